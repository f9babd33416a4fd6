//! What the packet hooks read of a packet: addresses, ports, and whether it carries anything that must be judged.
//!
//! Lengths in the packet are never trusted: every read goes through [`Load`], which checks bounds.

use crate::{
    Addr, addr,
    codes::proto::{ICMP, ICMP6, TCP, UDP},
};

/// Bounds-checked reads of a packet.
pub trait Load {
    /// `N` bytes at `offset`, or nothing where the packet is shorter.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Load for &[u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.get(offset as usize..)?.first_chunk().copied()
    }
}

/// EtherType of IPv4, host order.
pub const ETH_IP4: u16 = 0x0800;
/// EtherType of IPv6, host order.
pub const ETH_IP6: u16 = 0x86dd;
/// Length of an Ethernet header, bytes.
pub const ETH_LEN: u32 = 14;
/// More IPv6 extension headers than this are not followed.
pub const MAX_EXTENSIONS: u32 = 8;

/// Bits of [`Packet::tcp_flags`] (RFC 9293).
pub mod tcp {
    /// Synchronise: opens a connection where ACK is not set.
    pub const SYN: u8 = 2;
    /// Acknowledge.
    pub const ACK: u8 = 16;
}

/// [`Packet::fragment`].
pub mod fragment {
    /// The whole datagram.
    pub const NONE: u8 = 0;
    /// The first fragment: carries the ports.
    pub const FIRST: u8 = 1;
    /// A later fragment: ports are not known.
    pub const LATER: u8 = 2;
}

/// A packet, as far as it is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Fragment identification; 0 where it is no fragment.
    pub fragment_id: u32,
    /// Source port; of an ICMP echo request the identifier.
    pub sport: u16,
    /// Destination port; of an ICMP echo reply the identifier.
    pub dport: u16,
    /// IP protocol; of a later fragment what the fragment header names.
    pub proto: u8,
    /// What a fragment is filed under: the protocol the IPv4 or fragment header names.
    pub fragment_proto: u8,
    /// [`fragment`].
    pub fragment: u8,
    /// Flags of a TCP segment, else 0.
    pub tcp_flags: u8,
    /// True for what keeps IP itself working and always passes: neighbour and router discovery, multicast
    /// listener discovery, ICMP errors (path MTU).
    pub control: bool,
}

impl Packet {
    /// The port the policy knows: 0 for protocols without ports.
    #[inline(always)]
    pub fn policy_port(&self) -> u16 {
        if self.proto == ICMP || self.proto == ICMP6 { 0 } else { self.dport }
    }
}

/// Reads an IP packet that begins at `offset`; nothing where it is cut short, malformed, or carries headers that
/// would hide what must be judged.
#[inline(always)]
pub fn parse(packet: &impl Load, offset: u32, ethertype: u16) -> Option<Packet> {
    if ethertype == ETH_IP4 { parse4(packet, offset) } else { parse6(packet, offset) }
}

#[inline(always)]
fn parse4(packet: &impl Load, offset: u32) -> Option<Packet> {
    let header: [u8; 20] = packet.load(offset)?;
    let length = u32::from(header[0] & 15) * 4;
    let proto = header[9];
    // IGMP carries the router alert option (RFC 3376); with any other protocol options are of no honest use, and
    // source routing would change the destination after the verdict.
    if header[0] >> 4 != 4 || length < 20 || (length > 20 && proto != 2) {
        return None;
    }
    let bits = u16::from_be_bytes([header[6], header[7]]);
    let fragment = match (bits & 0x1fff, bits & 0x2000) {
        (0, 0) => fragment::NONE,
        (0, _) => fragment::FIRST,
        _ => fragment::LATER,
    };
    // A second fragment at offset 8 could rewrite the flags of a judged first one (RFC 3128).
    if proto == TCP && bits & 0x1fff == 1 {
        return None;
    }
    let mut parsed = Packet {
        src: addr::v4([header[12], header[13], header[14], header[15]]),
        dst: addr::v4([header[16], header[17], header[18], header[19]]),
        fragment_id: u32::from(u16::from_be_bytes([header[4], header[5]])),
        sport: 0,
        dport: 0,
        proto,
        fragment_proto: proto,
        fragment,
        tcp_flags: 0,
        control: false,
    };
    // Only IGMP, which has nothing that would be read there, begins further behind.
    transport(packet, offset + 20, &mut parsed).then_some(parsed)
}

/// The fixed header of IPv6: `proto` is what follows it.
#[inline(always)]
fn header6(packet: &impl Load, offset: u32) -> Option<Packet> {
    let header: [u8; 8] = packet.load(offset)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    Some(Packet {
        src: packet.load(offset + 8)?,
        dst: packet.load(offset + 24)?,
        fragment_id: 0,
        sport: 0,
        dport: 0,
        proto: header[6],
        fragment_proto: 0,
        fragment: fragment::NONE,
        tcp_flags: 0,
        control: false,
    })
}

#[inline(always)]
fn parse6(packet: &impl Load, offset: u32) -> Option<Packet> {
    let mut parsed = header6(packet, offset)?;
    let mut at = offset + 40;
    for _ in 0..=MAX_EXTENSIONS {
        match parsed.proto {
            // Hop-by-hop, routing, destination options (RFC 8200).
            0 | 43 | 60 => {
                let extension: [u8; 4] = packet.load(at)?;
                // Segments left: the destination changes on the way.
                if parsed.proto == 43 && extension[3] != 0 {
                    return None;
                }
                parsed.proto = extension[0];
                at += (u32::from(extension[1]) + 1) * 8;
            }
            44 => {
                let extension: [u8; 8] = packet.load(at)?;
                let bits = u16::from_be_bytes([extension[2], extension[3]]);
                parsed.proto = extension[0];
                // With neither offset nor "more" it is the whole datagram (RFC 6946).
                if bits & 0xfff9 != 0 {
                    parsed.fragment = if bits & 0xfff8 == 0 { fragment::FIRST } else { fragment::LATER };
                    parsed.fragment_proto = parsed.proto;
                    parsed.fragment_id =
                        u32::from_be_bytes([extension[4], extension[5], extension[6], extension[7]]);
                    if parsed.fragment == fragment::LATER {
                        return Some(parsed);
                    }
                }
                at += 8;
            }
            // ESP, AH, no next header, mobility, HIP, shim6, experiments: nothing to judge by.
            50 | 51 | 59 | 135 | 139 | 140 | 253 | 254 => return None,
            _ => return transport(packet, at, &mut parsed).then_some(parsed),
        }
    }
    None
}

/// As [`parse`], of a packet behind an Ethernet header whose transport header follows IP's own, as nearly all do; nothing
/// of any other. The offsets are constants, so that a packet's memory can be read in place.
#[inline(always)]
pub fn parse_plain(packet: &impl Load, ethertype: u16) -> Option<Packet> {
    if ethertype == ETH_IP4 {
        return parse4(packet, ETH_LEN);
    }
    let mut parsed = header6(packet, ETH_LEN)?;
    let plain = matches!(parsed.proto, TCP | UDP | ICMP6);
    (plain && transport(packet, ETH_LEN + 40, &mut parsed)).then_some(parsed)
}

/// Source and flags of a whole TCP segment behind an Ethernet header, where its headers have no options between them:
/// as [`parse`] reads them, and nearly all packets are such. The offsets are constants, so that a packet's memory can be
/// read in place.
#[inline(always)]
pub fn plain_segment(packet: &impl Load, ethertype: u16) -> Option<(Addr, u8)> {
    if ethertype == ETH_IP4 {
        let header: [u8; 34] = packet.load(ETH_LEN)?;
        // "Don't fragment" is no fragment.
        let whole = header[6] & 0x3f == 0 && header[7] == 0;
        (header[0] == 0x45 && whole && header[9] == TCP)
            .then(|| (addr::v4([header[12], header[13], header[14], header[15]]), header[33]))
    } else {
        let header: [u8; 54] = packet.load(ETH_LEN)?;
        let mut src = [0; 16];
        src.copy_from_slice(&header[8..24]);
        (header[0] >> 4 == 6 && header[6] == TCP).then_some((src, header[53]))
    }
}

/// Reads ports and flags; false where the packet is too short for them.
#[inline(always)]
fn transport(packet: &impl Load, at: u32, parsed: &mut Packet) -> bool {
    if parsed.fragment == fragment::LATER {
        return true;
    }
    match parsed.proto {
        TCP => match packet.load::<14>(at) {
            Some(header) => {
                parsed.sport = u16::from_be_bytes([header[0], header[1]]);
                parsed.dport = u16::from_be_bytes([header[2], header[3]]);
                parsed.tcp_flags = header[13];
                true
            }
            None => false,
        },
        UDP | 136 | 132 | 33 => match packet.load::<4>(at) {
            Some(header) => {
                // Ports of UDP, UDP-Lite, SCTP and DCCP are at the same place; only UDP's are part of a policy.
                parsed.sport = u16::from_be_bytes([header[0], header[1]]);
                parsed.dport = u16::from_be_bytes([header[2], header[3]]);
                true
            }
            None => false,
        },
        ICMP | ICMP6 => match packet.load::<8>(at) {
            Some(header) => {
                let id = u16::from_be_bytes([header[4], header[5]]);
                match (parsed.proto, header[0]) {
                    (ICMP, 8) | (ICMP6, 128) => parsed.sport = id,
                    (ICMP, 0) | (ICMP6, 129) => parsed.dport = id,
                    // Unreachable, source quench, time exceeded, parameter problem (RFC 792).
                    (ICMP, 3 | 4 | 11 | 12) => parsed.control = true,
                    // Errors (RFC 4443), MLD (RFC 2710, RFC 3810), router and neighbour discovery but for redirects
                    // (RFC 4861).
                    (ICMP6, 1..=4 | 130..=136 | 143) => parsed.control = true,
                    _ => {}
                }
                true
            }
            None => false,
        },
        _ => true,
    }
}

#[cfg(test)]
mod tests;
