//! Proof of attachment: a connect below the cgroup root must meet the programs.

use std::{
    fs,
    io::{self, Write as _},
    net::IpAddr,
    os::fd::AsRawFd,
    path::Path,
};

use weft_ebpf_common::{AddrInfo, codes::info};

use super::{addr::encode, error::DatapathError, maps::Maps};

/// Addresses no Pod has: the IPv4 dummy address (RFC 7600) and one of the discard prefix (RFC 6666).
const DUMMY: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 0, 8)),
    IpAddr::V6(std::net::Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 8)),
];

/// Whether only a probe can have dialled this: its events are no traffic of anybody's.
pub(super) fn dialled(address: IpAddr) -> bool {
    DUMMY.contains(&address)
}

/// Dials an enrolled address from a network namespace that nobody knows, in a cgroup below `root`. The hooks refuse
/// that at once; without them the namespace has no route and the answer is another.
pub(super) fn probe(root: &Path, maps: &Maps) -> Result<(), DatapathError> {
    for address in DUMMY {
        maps.addrs.set(&encode(address), &AddrInfo { subject: 0, flags: info::ENROLLED })?;
    }
    let outcome = below(root, || DUMMY.into_iter().try_for_each(refused));
    for address in DUMMY {
        maps.addrs.delete(&encode(address))?;
    }
    outcome.map_err(|outcome| DatapathError::Probe { root: root.to_owned(), outcome: outcome.to_string() })
}

/// Runs `dial` in a child process that was moved below `root` and has a network namespace of its own.
fn below(root: &Path, dial: impl FnOnce() -> Result<(), i32>) -> io::Result<()> {
    let group = root.join(format!("weft-probe-{}", std::process::id()));
    match fs::create_dir(&group) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let outcome = child(&group, dial);
    // The kernel needs a moment to notice that a cgroup is empty; what is left is found again by the next probe.
    if let Err(error) = fs::remove_dir(&group) {
        tracing::debug!(%error, group = %group.display(), "the probe's cgroup is still there");
    }
    match outcome? {
        libc::ECONNREFUSED => Ok(()),
        0 => Err(io::Error::other("it connected")),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Forks, moves the child, lets it dial; the errno that it ends with.
fn child(group: &Path, dial: impl FnOnce() -> Result<(), i32>) -> io::Result<i32> {
    let (gate, mut opener) = io::pipe()?;
    // SAFETY: the child calls only async-signal-safe functions (read, unshare, socket, connect, close, _exit) and
    // allocates nothing, so locks that other threads held at the fork do not matter to it.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        let mut byte = 0_u8;
        // SAFETY: as above; `byte` outlives the read, and _exit does not return.
        unsafe {
            let opened = libc::read(gate.as_raw_fd(), std::ptr::from_mut(&mut byte).cast(), 1) == 1;
            let errno = if !opened || libc::unshare(libc::CLONE_NEWNET) != 0 {
                libc::EPERM
            } else {
                dial().err().unwrap_or(0)
            };
            libc::_exit(errno);
        }
    }
    let moved = fs::write(group.join("cgroup.procs"), pid.to_string());
    if moved.is_ok() {
        opener.write_all(&[1])?;
    }
    drop(opener);
    let mut status = 0;
    // SAFETY: `pid` is a child that only this function waits for; `status` outlives the call.
    while unsafe { libc::waitpid(pid, &mut status, 0) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    moved?;
    Ok(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { libc::EINTR })
}

/// Dials one address in the child; `Err(ECONNREFUSED)` is passed on only by the last one.
fn refused(address: IpAddr) -> Result<(), i32> {
    let errno = dial(address);
    let last = address == DUMMY[1];
    if errno == libc::ECONNREFUSED && !last { Ok(()) } else { Err(errno) }
}

/// connect(2) without allocation; its errno, 0 for success.
fn dial(address: IpAddr) -> i32 {
    // SAFETY: plain system calls on a descriptor and structs of this frame, with their sizes.
    unsafe {
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let fd = libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return *libc::__errno_location();
        }
        let result = match address {
            IpAddr::V4(a) => {
                let mut to: libc::sockaddr_in = std::mem::zeroed();
                to.sin_family = libc::AF_INET as libc::sa_family_t;
                to.sin_port = 9_u16.to_be();
                to.sin_addr.s_addr = u32::from_ne_bytes(a.octets());
                libc::connect(
                    fd,
                    std::ptr::from_ref(&to).cast(),
                    size_of::<libc::sockaddr_in>() as libc::socklen_t,
                )
            }
            IpAddr::V6(a) => {
                let mut to: libc::sockaddr_in6 = std::mem::zeroed();
                to.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                to.sin6_port = 9_u16.to_be();
                to.sin6_addr.s6_addr = a.octets();
                libc::connect(
                    fd,
                    std::ptr::from_ref(&to).cast(),
                    size_of::<libc::sockaddr_in6>() as libc::socklen_t,
                )
            }
        };
        let errno = if result == 0 { 0 } else { *libc::__errno_location() };
        libc::close(fd);
        errno
    }
}
