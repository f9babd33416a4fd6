//! A typed packet builder: one description, a frame in either family.

use std::net::IpAddr;

use weft_ebpf_common::codes::proto;

/// What the packet carries.
#[derive(Debug, Clone)]
pub enum Body {
    /// A TCP segment with these flags.
    Tcp(u16, u16, u8),
    /// A UDP datagram.
    Udp(u16, u16),
    /// An SCTP packet.
    Sctp(u16, u16),
    /// ICMP or ICMPv6 with this type and identifier: (IPv4 type, IPv6 type, identifier).
    Icmp(u8, u8, u16),
    /// Anything else: a protocol number and eight bytes.
    Other(u8),
}

/// A packet.
#[derive(Debug, Clone)]
pub struct Packet {
    src: IpAddr,
    dst: IpAddr,
    body: Body,
    fragment: Option<(u16, bool)>,
    extensions: usize,
    keep: Option<usize>,
}

impl Packet {
    /// A whole datagram.
    pub fn new(src: IpAddr, dst: IpAddr, body: Body) -> Self {
        Self { src, dst, body, fragment: None, extensions: 0, keep: None }
    }

    /// Makes it a fragment at this offset (bytes), with more to come or not.
    #[must_use]
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        self.fragment = Some((offset, more));
        self
    }

    /// Puts this many destination options headers before the body; IPv6 only.
    #[must_use]
    pub fn extensions(mut self, count: usize) -> Self {
        self.extensions = count;
        self
    }

    /// Cuts the frame off after this many bytes of its IP packet's payload.
    #[must_use]
    pub fn cut(mut self, payload: usize) -> Self {
        self.keep = Some(payload);
        self
    }

    fn body(&self) -> (u8, Vec<u8>) {
        let v4 = self.src.is_ipv4();
        match self.body {
            Body::Tcp(sport, dport, flags) => {
                let mut bytes = vec![0; 20];
                bytes[..2].copy_from_slice(&sport.to_be_bytes());
                bytes[2..4].copy_from_slice(&dport.to_be_bytes());
                bytes[12] = 0x50;
                bytes[13] = flags;
                (proto::TCP, bytes)
            }
            Body::Udp(sport, dport) | Body::Sctp(sport, dport) => {
                let mut bytes = vec![0; 16];
                bytes[..2].copy_from_slice(&sport.to_be_bytes());
                bytes[2..4].copy_from_slice(&dport.to_be_bytes());
                (if matches!(self.body, Body::Udp(..)) { proto::UDP } else { proto::SCTP }, bytes)
            }
            Body::Icmp(type4, type6, id) => {
                let mut bytes = vec![0; 16];
                bytes[0] = if v4 { type4 } else { type6 };
                bytes[4..6].copy_from_slice(&id.to_be_bytes());
                (if v4 { proto::ICMP } else { proto::ICMP6 }, bytes)
            }
            Body::Other(proto) => (proto, vec![0; 8]),
        }
    }

    /// The Ethernet frame.
    pub fn frame(&self) -> Vec<u8> {
        let (mut next, mut payload) = self.body();
        if let Some((offset, _)) = self.fragment
            && offset != 0
        {
            payload = vec![0x55; 16];
        }
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let bits =
                    self.fragment.map_or(0, |(offset, more)| (offset / 8) | if more { 0x2000 } else { 0 });
                let total = 20 + payload.len() as u16;
                frame.extend([8, 0, 0x45, 0]);
                frame.extend(total.to_be_bytes());
                frame.extend([0x12, 0x34]);
                frame.extend(bits.to_be_bytes());
                frame.extend([64, next, 0, 0]);
                frame.extend(src.octets());
                frame.extend(dst.octets());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                for _ in 0..self.extensions {
                    payload = [vec![next, 0, 1, 4, 0, 0, 0, 0], payload].concat();
                    next = 60;
                }
                if let Some((offset, more)) = self.fragment {
                    let bits = (offset | u16::from(more)).to_be_bytes();
                    payload = [vec![next, 0, bits[0], bits[1], 0, 0, 0x12, 0x34], payload].concat();
                    next = 44;
                }
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend((payload.len() as u16).to_be_bytes());
                frame.extend([next, 255]);
                frame.extend(src.octets());
                frame.extend(dst.octets());
            }
            mixed => panic!("addresses of two families in one packet: {mixed:?}"),
        }
        payload.truncate(self.keep.unwrap_or(usize::MAX));
        frame.extend(payload);
        frame
    }
}
