//! Network namespaces as far as discovery needs them: where one is to be found, and which addresses it holds.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::{self, File},
    io,
    net::IpAddr,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Component, Path, PathBuf},
};

use nix::ifaddrs::getifaddrs;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Most symbolic links on the way to a file, as the kernel's own limit.
const LINKS: usize = 40;
/// `EINVAL`: what readlink(2) says of a file that is no link.
const NO_LINK: i32 = libc::EINVAL;

/// Where the namespace that the runtime names is for us: its path below `root`, the runtime's own root folder, else
/// the one of the process. `None` where neither exists.
pub(super) fn locate(root: &Path, named: Option<&str>, pid: Option<u32>) -> Option<PathBuf> {
    let named = named.filter(|n| n.starts_with('/')).and_then(|named| {
        // Process ids are the same for us; the links below /proc lead nowhere by their text.
        if named.starts_with("/proc/") {
            Some(PathBuf::from(named))
        } else {
            in_root(root, Path::new(named)).ok()
        }
    });
    let own = pid.filter(|p| *p != 0).map(|pid| PathBuf::from(format!("/proc/{pid}/ns/net")));
    named.into_iter().chain(own).find(|path| path.exists())
}

/// The path of `path` as a process whose root folder is `root` understands it: absolute links begin at `root`.
fn in_root(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let mut rest = parts(path);
    let mut inside = PathBuf::new();
    let mut links = 0;
    while let Some(part) = rest.pop_front() {
        if part == ".." {
            inside.pop();
            continue;
        }
        match fs::read_link(root.join(&inside).join(&part)) {
            Ok(target) => {
                links += 1;
                if links > LINKS {
                    return Err(io::Error::other("too many symbolic links"));
                }
                if target.is_absolute() {
                    inside = PathBuf::new();
                }
                let mut ahead = parts(&target);
                ahead.append(&mut rest);
                rest = ahead;
            }
            Err(e) if e.raw_os_error() == Some(NO_LINK) => inside.push(part),
            Err(e) => return Err(e),
        }
    }
    Ok(root.join(inside))
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let part = |c: Component<'_>| match c {
        Component::Normal(part) => Some(part.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(part).collect()
}

/// The inode by which a namespace is known.
pub(super) fn inode(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.ino())
}

/// Whether it is the namespace that the agent runs in, the host's.
pub(super) fn is_host(path: &Path) -> bool {
    let host = inode(Path::new("/proc/self/ns/net"));
    matches!((inode(path), host), (Ok(a), Ok(b)) if a == b)
}

/// The addresses that a namespace holds, without loopback and link-local ones; IPv4 first.
pub(super) fn addresses(path: &Path) -> io::Result<Vec<IpAddr>> {
    let namespace = File::open(path)?;
    // A thread of its own, which ends inside: no thread ever has to find back.
    std::thread::scope(|scope| {
        let inside = || -> io::Result<Vec<IpAddr>> {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            let mut found: Vec<IpAddr> = getifaddrs()?
                .filter_map(|interface| {
                    let address = interface.address?;
                    let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
                    v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
                })
                .filter(usable)
                .collect();
            found.sort();
            found.dedup();
            Ok(found)
        };
        let thread = std::thread::Builder::new().name("weft-netns".into()).spawn_scoped(scope, inside)?;
        let panicked = || io::Error::other("the thread inside the network namespace panicked");
        thread.join().unwrap_or_else(|_| Err(panicked()))
    })
}

/// Whether a Pod may have this address.
pub(super) fn usable(address: &IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    !address.is_loopback() && !address.is_unspecified() && !address.is_multicast() && !link_local
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_followed_inside_the_other_root() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path();
        fs::create_dir_all(dir.join("run/netns")).unwrap();
        fs::create_dir_all(dir.join("var")).unwrap();
        fs::write(dir.join("run/netns/cni-1"), "").unwrap();
        symlink("/run", dir.join("var/run")).unwrap();
        symlink("../run/netns/cni-1", dir.join("var/one")).unwrap();
        symlink("/loop", dir.join("loop")).unwrap();
        let found = |path: &str| in_root(dir, Path::new(path));
        assert_eq!(found("/var/run/netns/cni-1").unwrap(), dir.join("run/netns/cni-1"));
        assert_eq!(found("/var/one").unwrap(), dir.join("run/netns/cni-1"));
        // Nothing leads out of the root.
        assert_eq!(found("/../../run/netns").unwrap(), dir.join("run/netns"));
        assert!(found("/run/netns/cni-2").is_err());
        assert!(found("/loop").is_err());
    }

    #[test]
    fn the_process_is_the_second_choice() {
        let root = tempfile::tempdir().unwrap();
        let own = std::process::id();
        let path = locate(root.path(), Some("/run/netns/gone"), Some(own)).unwrap();
        assert_eq!(path, PathBuf::from(format!("/proc/{own}/ns/net")));
        assert!(is_host(&path));
        assert_eq!(locate(root.path(), Some("relative"), None), None);
        assert_eq!(locate(root.path(), None, Some(0)), None);
    }

    #[test]
    fn loopback_and_link_local_are_no_pods() {
        for no in ["127.0.0.1", "169.254.1.1", "fe80::1", "::1", "0.0.0.0", "224.0.0.1"] {
            assert!(!usable(&no.parse().unwrap()), "{no}");
        }
        assert!(usable(&"10.1.1.1".parse().unwrap()) && usable(&"fd00::1".parse().unwrap()));
        let own = addresses(Path::new("/proc/self/ns/net")).unwrap();
        assert!(own.iter().all(usable));
    }
}
