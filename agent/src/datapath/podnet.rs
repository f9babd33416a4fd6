//! The proxy's sockets in a Pod's namespace.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Weak,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
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

use super::{Datapath, addr, maps::Maps, netns::NetNs};

/// Sockets made by the first entry into the namespace: entering costs more than many sockets.
const FIRST_BATCH: usize = 4;
/// Sockets made by one entry for a Pod that keeps on connecting.
const LAST_BATCH: usize = 64;
/// A batch that is used up sooner doubles the next one.
const QUICK: Duration = Duration::from_millis(500);
/// What is left of a batch after it is closed: a Pod that was busy once would hold its descriptors for ever.
const KEPT: Duration = Duration::from_secs(10);
/// `IP_BIND_ADDRESS_NO_PORT` (Linux, ip(7)).
const IP_BIND_ADDRESS_NO_PORT: i32 = 24;

/// One enrolled Pod's namespace, as the proxy uses it.
pub(super) struct PodNetwork {
    netns: Arc<NetNs>,
    maps: Arc<Maps>,
    addresses: Vec<IpAddr>,
    /// Of IPv4 and of IPv6.
    stock: [Mutex<Stock>; 2],
    next_source: AtomicU8,
}

/// Sockets that are ready to be used.
struct Stock {
    sockets: Vec<OwnedFd>,
    batch: usize,
    filled: Instant,
}

impl Stock {
    fn new() -> Self {
        Self { sockets: Vec::new(), batch: FIRST_BATCH, filled: Instant::now() }
    }

    /// How many the next batch has, by how long the last one lasted.
    fn next_batch(&mut self, now: Instant) -> usize {
        let quick = now.saturating_duration_since(self.filled) < QUICK;
        self.batch = if quick { (self.batch * 2).min(LAST_BATCH) } else { FIRST_BATCH };
        self.filled = now;
        self.batch
    }

    /// The sockets of a batch that has lasted for [`KEPT`].
    fn surplus(&mut self, now: Instant) -> Vec<OwnedFd> {
        if now.saturating_duration_since(self.filled) < KEPT {
            return Vec::new();
        }
        std::mem::take(&mut self.sockets)
    }
}

/// The namespaces that the proxy has.
#[derive(Debug, Default)]
pub(super) struct Nets(Mutex<Vec<Weak<PodNetwork>>>);

impl Nets {
    /// Shares one with the proxy.
    pub(super) fn share(&self, net: PodNetwork) -> Arc<PodNetwork> {
        let net = Arc::new(net);
        self.0.lock().push(Arc::downgrade(&net));
        net
    }
}

impl Datapath {
    /// Closes sockets that were made ahead for Pods which have become quiet. To be called every second or so.
    pub fn give_back(&self) {
        let now = Instant::now();
        self.inner.nets.0.lock().retain(|net| {
            let net = net.upgrade();
            net.iter().for_each(|net| net.give_back(now));
            net.is_some()
        });
    }
}

impl fmt::Debug for PodNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodNetwork").field("netns", &self.netns.path()).finish_non_exhaustive()
    }
}

impl PodNetwork {
    pub(super) fn new(netns: Arc<NetNs>, maps: Arc<Maps>) -> Self {
        Self {
            netns,
            maps,
            addresses: Vec::new(),
            stock: [(); 2].map(|()| Mutex::new(Stock::new())),
            next_source: AtomicU8::new(0),
        }
    }

    /// With what the Pod's own addresses are.
    pub(super) fn with_addresses(mut self, addresses: &[IpAddr]) -> Self {
        self.addresses = addresses.to_vec();
        self
    }

    /// An unconnected, non-blocking socket inside the namespace.
    fn fresh(&self, family: Family) -> io::Result<OwnedFd> {
        let (stock, domain) = match family {
            Family::V4 => (&self.stock[0], Domain::IPV4),
            Family::V6 => (&self.stock[1], Domain::IPV6),
        };
        let count = {
            let mut stock = stock.lock();
            if let Some(socket) = stock.sockets.pop() {
                return Ok(socket);
            }
            stock.next_batch(Instant::now())
        };
        let mut batch = self.netns.pass(|| {
            let one = || {
                let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
                Ok(OwnedFd::from(socket))
            };
            (0..count).map(|_| one()).collect::<io::Result<Vec<_>>>()
        })?;
        let socket = batch.pop().ok_or_else(|| io::Error::other("no socket was made"))?;
        // Another thread may have made a batch meanwhile; what is above one is closed again.
        let mut stock = stock.lock();
        let room = LAST_BATCH.saturating_sub(stock.sockets.len());
        stock.sockets.extend(batch.into_iter().take(room));
        Ok(socket)
    }

    /// Closes sockets that were made for a Pod which has become quiet.
    pub(super) fn give_back(&self, now: Instant) {
        for stock in &self.stock {
            let surplus = stock.lock().surplus(now);
            // Not under the lock.
            drop(surplus);
        }
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
            // The entry ends with its socket.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_pod_gets_larger_batches_and_a_quiet_one_small_ones() {
        let mut stock = Stock::new();
        let start = stock.filled;
        let sizes: Vec<usize> = (0..6).map(|_| stock.next_batch(start)).collect();
        assert_eq!(sizes, [8, 16, 32, 64, 64, 64]);
        assert_eq!(stock.next_batch(start + QUICK), FIRST_BATCH);
    }

    #[test]
    fn a_quiet_pod_keeps_no_sockets() {
        let mut stock = Stock::new();
        let socket = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap().into();
        stock.sockets = vec![socket(), socket()];
        let start = stock.filled;
        assert!(stock.surplus(start + KEPT / 2).is_empty());
        assert_eq!(stock.sockets.len(), 2, "a busy one keeps them");
        assert_eq!(stock.surplus(start + KEPT).len(), 2);
        assert!(stock.sockets.is_empty());
    }
}
