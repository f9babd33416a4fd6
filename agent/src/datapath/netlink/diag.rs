//! TCP sockets by `inet_diag` (include/uapi/linux/inet_diag.h, sock_diag.h): who they are, whose, and their end.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::net::netlink;

use super::{NLM_F_ACK, Netlink, address, attribute};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const TCP_ESTABLISHED: u32 = 1;
const TCP_LISTEN: u32 = 10;
/// `INET_DIAG_REQ_SK_BPF_STORAGES`, and in it `SK_DIAG_BPF_STORAGE_REQ_MAP_FD`.
const REQ_STORAGES: u16 = 2;
const REQ_MAP: u16 = 1;
/// `INET_DIAG_SK_BPF_STORAGES`, in it `SK_DIAG_BPF_STORAGE`, in that `SK_DIAG_BPF_STORAGE_MAP_VALUE`.
const STORAGES: u16 = 20;
const STORAGE: u16 = 1;
const VALUE: u16 = 3;
/// `INET_DIAG_CGROUP_ID` (Linux 5.8).
const CGROUP: u16 = 21;
/// struct inet_diag_msg.
const MESSAGE: usize = 72;

/// A TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct TcpSocket {
    family: u8,
    id: [u8; 48],
    /// Its own address.
    pub(in super::super) local: SocketAddr,
    /// Its peer.
    pub(in super::super) remote: SocketAddr,
    /// True where it only listens.
    pub(in super::super) listening: bool,
    /// The kind of its mark ([`weft_ebpf_common::SkMeta::kind`]); 0 where it has none, or was not asked for.
    pub(in super::super) kind: u8,
    /// The cgroup2 it was made in; 0 where the kernel does not tell.
    pub(in super::super) cgroup: u64,
}

/// struct inet_diag_req_v2.
fn request(family: u8, states: u32, id: &[u8; 48]) -> Vec<u8> {
    let mut request = vec![family, 6, 0, 0];
    request.extend_from_slice(&states.to_ne_bytes());
    request.extend_from_slice(id);
    request
}

/// Asks for the entry of each socket in a socket storage.
fn with_storage(request: &mut Vec<u8>, map: BorrowedFd<'_>) {
    for (length, kind) in [(12_u16, REQ_STORAGES), (8, REQ_MAP)] {
        request.extend_from_slice(&length.to_ne_bytes());
        request.extend_from_slice(&kind.to_ne_bytes());
    }
    request.extend_from_slice(&map.as_raw_fd().to_ne_bytes());
}

/// Reads struct inet_diag_msg: family, state, timer, retransmits, then the socket's id.
fn read(body: &[u8]) -> Option<TcpSocket> {
    let (family, state) = (*body.first()?, *body.get(1)?);
    let id: [u8; 48] = *body.get(4..)?.first_chunk()?;
    let port = |at: usize| Some(u16::from_be_bytes(*id.get(at..)?.first_chunk()?));
    let ip = |at: usize| address(id.get(at..at + if i32::from(family) == libc::AF_INET { 4 } else { 16 })?);
    let local = SocketAddr::new(ip(4)?.to_canonical(), port(0)?);
    let remote = SocketAddr::new(ip(20)?.to_canonical(), port(2)?);
    let attributes = body.get(MESSAGE..).unwrap_or_default();
    let mark = attribute(attributes, STORAGES).and_then(|s| attribute(attribute(s, STORAGE)?, VALUE));
    let cgroup = attribute(attributes, CGROUP).and_then(|c| c.first_chunk());
    Some(TcpSocket {
        family,
        id,
        local,
        remote,
        listening: u32::from(state) == TCP_LISTEN,
        kind: mark.and_then(|m| m.first().copied()).unwrap_or_default(),
        cgroup: cgroup.map_or(0, |c| u64::from_ne_bytes(*c)),
    })
}

/// Every listening and connected TCP socket of the namespace, with its mark in the socket storage `marks`.
pub(in super::super) fn tcp_sockets(marks: Option<BorrowedFd<'_>>) -> io::Result<Vec<TcpSocket>> {
    let socket = Netlink::open(Some(netlink::SOCK_DIAG))?;
    // Half-open and closing states too: everything that can still carry bytes.
    let states = (0x7ff & !(1 << 6) & !(1 << 7)) | (1 << TCP_LISTEN) | (1 << TCP_ESTABLISHED);
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut request = request(u8::try_from(family).unwrap_or_default(), states, &[0; 48]);
        if let Some(marks) = marks {
            with_storage(&mut request, marks);
        }
        socket.dump(SOCK_DIAG_BY_FAMILY, &request, |body| found.extend(read(body)))?;
    }
    Ok(found)
}

/// Ends a connection of the namespace with a reset; false where it is gone already.
pub(in super::super) fn destroy(tcp: &TcpSocket) -> io::Result<bool> {
    let socket = Netlink::open(Some(netlink::SOCK_DIAG))?;
    socket.send(SOCK_DESTROY, NLM_F_ACK, &request(tcp.family, u32::MAX, &tcp.id))?;
    match socket.receive(|_| ()) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_bytes_are_no_socket() {
        assert!(read(&[2; 20]).is_none());
        let mut cut = vec![2; MESSAGE];
        cut.extend([255; 8]);
        assert!(read(&cut).is_some_and(|socket| socket.kind == 0 && socket.cgroup == 0));
    }

    #[test]
    fn listeners_are_seen_with_their_cgroup() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let sockets = tcp_sockets(None).expect("dump");
        let socket = sockets.iter().find(|s| s.listening && s.local == address).expect("listed");
        assert!(socket.cgroup != 0 && socket.kind == 0);
    }

    #[test]
    fn a_destroyed_connection_is_reset() {
        use std::io::Read as _;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let mut client =
            std::net::TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (server, _) = listener.accept().expect("accept");
        let local = server.local_addr().expect("address");
        let remote = server.peer_addr().expect("peer");
        let sockets = tcp_sockets(None).expect("dump");
        let socket = sockets.iter().find(|s| s.local == local && s.remote == remote).expect("listed");
        assert!(destroy(socket).expect("destroyed; run as root"));
        assert!(client.read(&mut [0; 1]).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset));
    }
}
