//! The proxy's listening sockets inside a Pod's namespace.
//!
//! Every one of them is reached only through `sk_lookup`, whatever it is bound to. So they are bound to addresses
//! that no packet carries, at ports above the ephemeral range: an application finds every port free, and no
//! application can dial a listener by its own address.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

use socket2::{Domain, Protocol, Socket, Type};
use weft_ebpf_common::addr::{HOST_SPREAD, redirect4};

/// Backlog of each listener.
const BACKLOG: i32 = 4096;
/// First port that is tried: above the default ephemeral range (Linux, `ip_local_port_range`).
const FIRST_PORT: u16 = 61_000;
/// How many ports are tried before giving up.
const ATTEMPTS: usize = 64;

/// The ports that the outgoing listeners have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Ports {
    /// IPv4; 0 for "any".
    pub(super) out4: u16,
    /// IPv6; 0 for "any", and where the Pod has no IPv6 address.
    pub(super) out6: [u16; 2],
}

/// The sockets of one Pod.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) out4: TcpListener,
    pub(super) in4: TcpListener,
    pub(super) tunnel4: TcpListener,
    /// Those of IPv6, where the Pod has such an address.
    pub(super) v6: Option<Sockets6>,
    pub(super) ports: Ports,
}

/// The IPv6 sockets of one Pod.
#[derive(Debug)]
pub(super) struct Sockets6 {
    pub(super) out: TcpListener,
    pub(super) inbound: TcpListener,
    pub(super) tunnel: TcpListener,
    /// Bound to the second outgoing port, so that no application takes it.
    pub(super) reserved: Option<Socket>,
}

/// Opens them in the calling thread's namespace, at `wanted` ports where those are given and free.
pub(super) fn open(slot: u32, ip6: Option<Ipv6Addr>, wanted: Ports) -> io::Result<Sockets> {
    let (out4, in4, tunnel4, port4) = at_free_port(wanted.out4, |port| {
        let address = |spread| SocketAddr::from((Ipv4Addr::from(redirect4(slot, spread)), port));
        Ok((listen(address(0))?, listen(address(1))?, listen(address(2))?, port))
    })?;
    let mut ports = Ports { out4: port4, out6: [0; 2] };
    let v6 = match ip6 {
        None => None,
        Some(ip6) => {
            let discard = |last| IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, last));
            let (out, inbound, tunnel, first) = at_free_port(wanted.out6[0], |port| {
                let at = |ip| listen(SocketAddr::new(ip, port));
                Ok((at(ip6.into())?, at(discard(1))?, at(discard(2))?, port))
            })?;
            let (reserved, second) = at_free_port(wanted.out6[1], |port| {
                // Two sockets of one user may share a port here: the first one's is not the second's.
                if port == first {
                    return Err(io::ErrorKind::AddrInUse.into());
                }
                Ok((bound(SocketAddr::new(ip6.into(), port))?, port))
            })?;
            ports.out6 = [first, second];
            Some(Sockets6 { out, inbound, tunnel, reserved: Some(reserved) })
        }
    };
    Ok(Sockets { out4, in4, tunnel4, v6, ports })
}

/// The sockets of the node's own network.
#[derive(Debug)]
pub(super) struct HostSockets {
    /// All for outgoing connections.
    pub(super) outbound: Vec<TcpListener>,
    pub(super) ports: Ports,
}

/// Opens listeners in the calling thread's namespace that are reached by their own addresses: no program chooses among
/// the sockets of the node. A port of an earlier agent is never taken over; that agent serves it to its end.
pub(super) fn open_host(slot: u32) -> io::Result<HostSockets> {
    let (mut outbound, out4) = at_free_port(0, |port| {
        let one = |spread| alone(SocketAddr::from((Ipv4Addr::from(redirect4(slot, spread)), port)));
        Ok(((0..HOST_SPREAD).map(one).collect::<io::Result<Vec<_>>>()?, port))
    })?;
    let mut out6 = [0; 2];
    for place in &mut out6 {
        match at_free_port(0, |port| Ok((alone(SocketAddr::from((Ipv6Addr::LOCALHOST, port)))?, port))) {
            Ok((listener, port)) => {
                outbound.push(listener);
                *place = port;
            }
            // A node without IPv6.
            Err(e) if matches!(e.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported) => {}
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(HostSockets { outbound, ports: Ports { out4, out6 } })
}

/// A listener that shares its port with nobody.
fn alone(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Calls `open` with the wanted port, then with random ones, until one is free.
fn at_free_port<T>(wanted: u16, mut open: impl FnMut(u16) -> io::Result<T>) -> io::Result<T> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for attempt in 0..ATTEMPTS {
        let port =
            if attempt == 0 && wanted != 0 { wanted } else { rand::random_range(FIRST_PORT..=u16::MAX) };
        match open(port) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => last = e,
            done => return done,
        }
    }
    Err(last)
}

/// A bound socket. `SO_REUSEPORT`: the next agent binds the same port while this one still listens; which of the two
/// gets a connection is decided by `LISTENERS` alone.
fn bound(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = bound(address)?;
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_agent_gets_the_same_ports() {
        let first = open(7, None, Ports::default()).expect("listeners");
        assert!(first.ports.out4 >= FIRST_PORT);
        let second = open(7, None, first.ports).expect("the same again");
        assert_eq!(first.ports, second.ports);
    }

    #[test]
    fn the_nodes_listeners_are_at_ports_of_their_own() {
        let first = open_host(6).expect("listeners");
        let second = open_host(6).expect("those of the next agent");
        assert_eq!(first.outbound.len(), HOST_SPREAD as usize + 2);
        assert_ne!(first.ports.out4, second.ports.out4);
        for (spread, listener) in first.outbound.iter().take(HOST_SPREAD as usize).enumerate() {
            let ip = Ipv4Addr::from(redirect4(6, u32::try_from(spread).expect("small")));
            assert_eq!(listener.local_addr().expect("address"), SocketAddr::from((ip, first.ports.out4)));
        }
        assert!(first.ports.out6[0] != first.ports.out6[1]);
    }

    #[test]
    fn a_taken_port_is_left_alone() {
        let taken = TcpListener::bind("0.0.0.0:0").expect("bind");
        let port = taken.local_addr().expect("address").port();
        let sockets = open(8, None, Ports { out4: port, out6: [0; 2] }).expect("listeners");
        assert_ne!(sockets.ports.out4, port);
    }

    #[test]
    fn two_ports_are_reserved_for_ipv6() {
        let sockets = open(9, Some(Ipv6Addr::LOCALHOST), Ports::default()).expect("listeners");
        let [first, second] = sockets.ports.out6;
        assert!(first != second && first >= FIRST_PORT && second >= FIRST_PORT);
        let address = sockets.v6.expect("v6").out.local_addr().expect("address");
        assert_eq!(address.port(), first);
    }
}
