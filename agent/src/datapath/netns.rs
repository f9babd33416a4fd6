//! Network namespaces: opened once, and entered on threads that end afterwards, or for a moment.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::error::DatapathError;

/// `SO_NETNS_COOKIE` (include/uapi/asm-generic/socket.h), Linux 5.14.
const SO_NETNS_COOKIE: i32 = 71;

/// An open network namespace.
#[derive(Debug)]
pub(super) struct NetNs {
    path: PathBuf,
    file: File,
    cookie: u64,
    inode: u64,
}

impl NetNs {
    /// Opens the namespace at `path` (a bind mount or `/proc/<pid>/ns/net`).
    pub(super) fn open(path: &Path) -> Result<Self, DatapathError> {
        Ok(Self::visit(path, |_| ())?.0)
    }

    /// Opens the namespace at `path` and runs `f` inside, with its cookie, at one go: on a busy node a second thread
    /// costs milliseconds.
    pub(super) fn visit<T: Send>(
        path: &Path,
        f: impl FnOnce(u64) -> T + Send,
    ) -> Result<(Self, T), DatapathError> {
        let failed = |source| DatapathError::Netns { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let inode = rustix::fs::fstat(&file).map_err(|e| failed(e.into()))?.st_ino;
        let visited = enter(file.as_fd(), || {
            let cookie = cookie()?;
            Ok((cookie, f(cookie)))
        });
        let (cookie, found) = visited.map_err(failed)?;
        Ok((Self { path: path.to_owned(), file, cookie, inode }, found))
    }

    /// The namespace's cookie: unique for as long as the kernel runs.
    pub(super) fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The namespace's inode, by which links name their target.
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// Where it was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `f` inside.
    pub(super) fn run<T: Send>(&self, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        enter(self.file.as_fd(), f)
    }

    /// As [`Self::run`], on the calling thread and without the price of another one, for work that neither waits nor
    /// starts threads. The process ends where the thread cannot go back: it would serve others inside of a Pod.
    pub(super) fn pass<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _home = Home(home()?);
        move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?;
        f()
    }
}

/// The namespace of the agent's threads, opened by the first one that needs it: all of them are in it.
fn home() -> io::Result<&'static File> {
    static HOME: OnceLock<File> = OnceLock::new();
    if let Some(home) = HOME.get() {
        return Ok(home);
    }
    let home = File::open("/proc/thread-self/ns/net")?;
    Ok(HOME.get_or_init(|| home))
}

/// Where the calling thread returns to when this is dropped, also by a panic.
struct Home(&'static File);

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)) {
            tracing::error!(%error, "a thread cannot leave a Pod's network namespace; the agent ends, to be started anew");
            std::process::abort();
        }
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Runs `f` inside a namespace, on a thread of its own that ends with it: it may wait there, and what goes wrong leaves
/// no thread behind in a Pod.
fn enter<T: Send>(namespace: BorrowedFd<'_>, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    alone(|| {
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
        f()
    })
}

/// Runs `f` on a thread of its own.
fn alone<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("weft-netns".into())
            .stack_size(256 << 10)
            .spawn_scoped(scope, f)?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread inside the network namespace panicked")))
    })
}

/// The cookie of the calling thread's network namespace.
pub(super) fn cookie() -> io::Result<u64> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(8);
    // SAFETY: the kernel writes at most `length` bytes, the size of `cookie`, to a live u64.
    let result = unsafe {
        let out = std::ptr::from_mut(&mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, out, &mut length)
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_known_by_its_cookie() {
        let here = NetNs::open(Path::new("/proc/thread-self/ns/net")).expect("own namespace");
        assert_eq!(here.cookie(), cookie().expect("cookie"));
        let other = alone(|| {
            // SAFETY: only this thread, which ends here, changes its network namespace.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
            cookie()
        });
        assert_ne!(other.expect("a namespace of its own; run as root"), here.cookie());
        assert_eq!(here.run(cookie).expect("cookie"), here.cookie());
    }

    #[test]
    fn a_thread_that_passes_through_a_namespace_finds_back() {
        let home = cookie().expect("cookie");
        let (there, expected) = alone(|| {
            // SAFETY: only this thread, which ends here, changes its network namespace.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
            let there = NetNs::open(Path::new("/proc/thread-self/ns/net")).map_err(io::Error::other)?;
            Ok((there, cookie()?))
        })
        .expect("a namespace of its own; run as root");
        assert_eq!(there.pass(cookie).expect("cookie"), expected);
        assert_eq!(cookie().expect("cookie"), home);
        assert!(there.pass(|| Err::<(), _>(io::ErrorKind::Other.into())).is_err());
        assert_eq!(cookie().expect("cookie"), home, "after a failure");
        let panicked = std::panic::catch_unwind(|| there.pass(|| -> io::Result<()> { panic!("inside") }));
        assert!(panicked.is_err());
        assert_eq!(cookie().expect("cookie"), home, "after a panic");
    }

    #[test]
    fn a_missing_namespace_names_its_path() {
        let error = NetNs::open(Path::new("/nonexistent/netns")).expect_err("not there");
        assert!(error.to_string().contains("/nonexistent/netns"));
    }
}
