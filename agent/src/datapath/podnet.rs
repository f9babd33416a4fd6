//! The proxy's sockets in a Pod's namespace.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};
use weft_core::SubjectId;
use weft_ebpf_common::{
    OrigDst, SkMeta, Tuple,
    addr::{DIAL_FIRST, DIAL_LAST},
    codes::kind,
};
use weft_proxy::platform::{Family, OriginalDst, PodNet};

use super::{addr, maps::Maps, netns::NetNs};

/// Sockets made per entry into the namespace: entering costs more than a socket.
const BATCH: usize = 4;
/// `IP_BIND_ADDRESS_NO_PORT` (Linux, ip(7)).
const IP_BIND_ADDRESS_NO_PORT: i32 = 24;

/// One enrolled Pod's namespace, as the proxy uses it.
pub(super) struct PodNetwork {
    netns: Arc<NetNs>,
    maps: Arc<Maps>,
    addresses: Vec<IpAddr>,
    pool: [Mutex<Vec<OwnedFd>>; 2],
    next_source: AtomicU8,
}

impl fmt::Debug for PodNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodNetwork").field("netns", &self.netns.path()).finish_non_exhaustive()
    }
}

impl PodNetwork {
    pub(super) fn new(netns: Arc<NetNs>, maps: Arc<Maps>) -> Self {
        Self { netns, maps, addresses: Vec::new(), pool: Default::default(), next_source: AtomicU8::new(0) }
    }

    /// With what the Pod's own addresses are.
    pub(super) fn with_addresses(mut self, addresses: &[IpAddr]) -> Self {
        self.addresses = addresses.to_vec();
        self
    }

    /// An unconnected, non-blocking socket inside the namespace.
    fn fresh(&self, family: Family) -> io::Result<OwnedFd> {
        let pool = match family {
            Family::V4 => &self.pool[0],
            Family::V6 => &self.pool[1],
        };
        if let Some(socket) = pool.lock().pop() {
            return Ok(socket);
        }
        let domain = match family {
            Family::V4 => Domain::IPV4,
            Family::V6 => Domain::IPV6,
        };
        let mut batch = self.netns.run(|| {
            let one = || {
                let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
                Ok(OwnedFd::from(socket))
            };
            (0..BATCH).map(|_| one()).collect::<io::Result<Vec<_>>>()
        })?;
        let socket = batch.pop().ok_or_else(|| io::Error::other("no socket was made"))?;
        // Another thread may have filled the pool meanwhile; what is above the batch is closed again.
        let mut pool = pool.lock();
        let room = BATCH.saturating_sub(pool.len());
        pool.extend(batch.into_iter().take(room));
        Ok(socket)
    }

    /// One of the loopback addresses that are reserved for dialling applications.
    fn source(&self, family: Family) -> IpAddr {
        let turn = self.next_source.fetch_add(1, Ordering::Relaxed);
        match family {
            Family::V4 => Ipv4Addr::new(127, 0, 0, DIAL_FIRST + turn % (DIAL_LAST - DIAL_FIRST + 1)).into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }
}

impl PodNet for PodNetwork {
    fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    fn socket(&self, family: Family, shown: Option<SocketAddr>) -> io::Result<TcpSocket> {
        let socket = self.fresh(family)?;
        let mut meta = SkMeta { kind: kind::PROXY, netns: self.netns.cookie(), ..SkMeta::default() };
        if let Some(shown) = shown {
            meta.family = if shown.ip().to_canonical().is_ipv4() { 4 } else { 6 };
            meta.addr = addr::encode(shown.ip());
            meta.port = shown.port();
        }
        // Before anything can be dialled with it: without the mark the hooks would redirect it to the proxy.
        self.maps.sk_meta.set(&socket.as_raw_fd(), &meta).map_err(io::Error::other)?;
        if shown.is_some() {
            bind_address_no_port(&socket)?;
            let source = SocketAddr::new(self.source(family), 0);
            socket2::SockRef::from(&socket).bind(&source.into())?;
        }
        Ok(TcpSocket::from_std_stream(std::net::TcpStream::from(socket)))
    }

    fn original_dst(&self, accepted: &TcpStream) -> io::Result<Option<OriginalDst>> {
        let fd = accepted.as_raw_fd();
        if let Some(meta) = self.maps.sk_meta.get(&fd).map_err(io::Error::other)? {
            if meta.kind != kind::ACCEPTED_OUT {
                return Ok(None);
            }
            self.maps.sk_meta.delete(&fd).map_err(io::Error::other)?;
            return Ok(Some(OriginalDst {
                address: addr::socket(meta.addr, meta.port),
                connection: meta.cookie,
                subject: SubjectId(meta.subject),
            }));
        }
        // The hook that moves the entry to the accepted socket runs in the agent's cgroup; an agent outside of the
        // cgroup root takes it by the connection's addresses.
        let (peer, local) = (accepted.peer_addr()?, accepted.local_addr()?);
        let tuple = Tuple {
            netns: self.netns.cookie(),
            src: addr::encode(peer.ip()),
            dst: addr::encode(local.ip()),
            sport: peer.port(),
            dport: local.port(),
            ..Tuple::default()
        };
        let Some(OrigDst { addr, cookie, subject, port, .. }) =
            self.maps.orig_dst.get(&tuple).map_err(io::Error::other)?
        else {
            return Ok(None);
        };
        let taken = self.maps.orig_dst.delete(&tuple).map_err(io::Error::other)?;
        let found = OriginalDst {
            address: addr::socket(addr, port),
            connection: cookie,
            subject: SubjectId(subject),
        };
        Ok(taken.then_some(found))
    }

    fn accepted(&self, accepted: &TcpStream) {
        let meta = SkMeta { kind: kind::PROXY, netns: self.netns.cookie(), ..SkMeta::default() };
        if let Err(error) = self.maps.sk_meta.set(&accepted.as_raw_fd(), &meta) {
            tracing::warn!(%error, "an accepted connection cannot be marked; it ends if its Pod's mode is tightened");
        }
    }
}

/// Leaves the choice of the port to connect(2), which may then use one port towards several peers.
fn bind_address_no_port(socket: &OwnedFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int; `on` lives across the call. It is of level IP for IPv6 sockets too.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            IP_BIND_ADDRESS_NO_PORT,
            std::ptr::from_ref(&on).cast(),
            libc::socklen_t::try_from(size_of_val(&on)).unwrap_or(4),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
