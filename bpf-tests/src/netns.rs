//! Network namespaces without a name: a thread's own, gone with the last handle on it.

use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use socket2::{Domain, Socket, Type};

/// `SO_NETNS_COOKIE` (linux 5.14).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// A network namespace with loopback up.
#[derive(Debug)]
pub struct Netns {
    file: File,
    cookie: u64,
}

impl Netns {
    /// Makes one, whose loopback has these addresses as well.
    ///
    /// # Errors
    /// No right to make one (run as root), or `ip` is missing or fails.
    pub fn new(addresses: &[IpAddr]) -> Result<Self> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET)
                        .context("no new network namespace; these tests need root")?;
                    ip(&["link", "set", "lo", "up"])?;
                    for address in addresses {
                        let prefix = if address.is_ipv4() { 32 } else { 128 };
                        ip(&["addr", "add", &format!("{address}/{prefix}"), "dev", "lo"])?;
                    }
                    Ok(Self { file: File::open("/proc/thread-self/ns/net")?, cookie: cookie()? })
                })
                .join()
                .map_err(|_| anyhow!("the thread of a new namespace panicked"))?
        })
    }

    /// Joins it with another one by a veth pair, `pod0` here and `host0` there, with an address on each side of each
    /// pair of addresses and a route to the other.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn join(&self, host: &Self, pairs: &[(IpAddr, IpAddr)]) -> Result<()> {
        let other = format!("/proc/{}/fd/{}", std::process::id(), host.file.as_raw_fd());
        self.run(|| {
            ip(&["link", "add", "pod0", "type", "veth", "peer", "name", "host0"])?;
            ip(&["link", "set", "host0", "netns", &other])?;
            side("pod0", pairs.iter().copied())
        })?;
        host.run(|| side("host0", pairs.iter().map(|&(own, peer)| (peer, own))))
    }

    /// Its cookie: what the hooks know it by.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Runs something inside. A panic inside is a panic outside.
    ///
    /// # Errors
    /// What `inside` returns, or the namespace cannot be entered.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let result = thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.file, CloneFlags::CLONE_NEWNET).context("setns")?;
                    inside()
                })
                .join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Connects inside from an address of it, at any port; what connect says is the inner result.
    ///
    /// # Errors
    /// The address is not of this namespace.
    pub fn dial_from(&self, from: IpAddr, to: SocketAddr) -> Result<io::Result<Socket>> {
        self.run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.bind(&SocketAddr::new(from, 0).into())?;
            Ok(socket.connect_timeout(&to.into(), Duration::from_secs(5)).map(|()| socket))
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn side(device: &str, pairs: impl Iterator<Item = (IpAddr, IpAddr)>) -> Result<()> {
    ip(&["link", "set", device, "up"])?;
    for (own, peer) in pairs {
        if own.is_ipv4() {
            ip(&["addr", "add", &format!("{own}/32"), "dev", device])?;
        } else {
            ip(&["addr", "add", &format!("{own}/128"), "dev", device, "nodad"])?;
        }
        ip(&["route", "add", &peer.to_string(), "dev", device])?;
    }
    Ok(())
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("`ip` (iproute2) is needed")?;
    ensure!(output.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn cookie() -> Result<u64> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let mut value = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the value is as long as told.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    ensure!(result == 0, "SO_NETNS_COOKIE: {}", std::io::Error::last_os_error());
    Ok(value)
}
