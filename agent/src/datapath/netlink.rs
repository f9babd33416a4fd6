//! Netlink as far as it is needed: dumps of links and addresses; TCP sockets in [`diag`], filters in [`tc`].

use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

mod diag;
pub(super) mod tc;

pub(super) use diag::{TcpSocket, destroy, tcp_sockets};

/// Longest answer that is read at once; the kernel's dumps stay below it.
const BUFFER: usize = 64 << 10;
/// Most messages one dump may hold: every socket of a large Pod.
const LIMIT: usize = 1 << 20;

/// `NETLINK_ROUTE` is the protocol 0.
const ROUTE: Option<rustix::net::Protocol> = None;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFLA_LINK: u16 = 5;

/// A netlink socket of the calling thread's network namespace.
struct Netlink(OwnedFd);

impl Netlink {
    fn open(protocol: Option<rustix::net::Protocol>) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        Ok(Self(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?))
    }

    fn send(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(16 + body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(body);
        rustix::net::send(self.0.as_fd(), &message, SendFlags::empty())?;
        Ok(())
    }

    /// Hands every message of the answer to `each`, until the dump is done or the request acknowledged.
    fn receive(&self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = vec![0_u8; BUFFER];
        for _ in 0..LIMIT {
            let (length, _) = rustix::net::recv(self.0.as_fd(), buffer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, body, tail)) = message(rest) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = body.first_chunk::<4>().map_or(0, |b| i32::from_ne_bytes(*b));
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    _ => each(body),
                }
                rest = tail;
            }
        }
        Err(io::Error::other("the netlink answer has no end"))
    }

    fn dump(&self, kind: u16, body: &[u8], each: impl FnMut(&[u8])) -> io::Result<()> {
        self.send(kind, NLM_F_DUMP, body)?;
        self.receive(each)
    }
}

/// Splits the first message off: kind, body, the rest.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(16..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attribute of a kind.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        if kind & 0x3fff == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(*bytes.first_chunk::<4>()?)),
        16 => Some(IpAddr::from(*bytes.first_chunk::<16>()?)),
        _ => None,
    }
}

/// Every address of the namespace with its interface's index.
pub(super) fn addresses() -> io::Result<Vec<(u32, IpAddr)>> {
    let mut found = Vec::new();
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    Netlink::open(ROUTE)?.dump(RTM_GETADDR, &[0; 8], |body| {
        let index = body.get(4..).and_then(|b| b.first_chunk()).map(|b| u32::from_ne_bytes(*b));
        let attributes = body.get(8..).unwrap_or_default();
        let value = attribute(attributes, IFA_LOCAL).or_else(|| attribute(attributes, IFA_ADDRESS));
        if let (Some(index), Some(address)) = (index, value.and_then(address)) {
            found.push((index, address));
        }
    })?;
    Ok(found)
}

/// The index of an interface's other end (`IFLA_LINK`); `None` where it has none or does not exist.
pub(super) fn peer_of(index: u32) -> io::Result<Option<u32>> {
    let socket = Netlink::open(ROUTE)?;
    // struct ifinfomsg: family, pad, type, index, flags, change.
    let mut body = [0_u8; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    socket.send(RTM_GETLINK, NLM_F_ACK, &body)?;
    let mut peer = None;
    let answer = socket.receive(|body| {
        let value = attribute(body.get(16..).unwrap_or_default(), IFLA_LINK);
        peer = value.and_then(|v| v.first_chunk()).map(|v| u32::from_ne_bytes(*v)).filter(|&i| i != 0);
    });
    match answer {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e),
        Ok(()) => Ok(peer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_bytes_are_no_message() {
        assert!(message(&[]).is_none());
        assert!(message(&[0; 16]).is_none());
        assert!(message(&[255; 16]).is_none());
        assert!(attribute(&[0; 4], 5).is_none());
        assert!(attribute(&[255; 8], 5).is_none());
    }

    #[test]
    fn the_loopback_is_seen() {
        assert!(addresses().expect("dump").iter().any(|(_, a)| a.is_loopback()));
        assert_eq!(peer_of(0x7fff_0000).expect("answer"), None);
    }
}
