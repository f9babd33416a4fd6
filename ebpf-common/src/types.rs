//! Keys and values of the maps, and the record of the ring buffer.

use crate::{Addr, addr};

macro_rules! shared {
    ($($(#[$doc:meta])* $name:ident = $size:literal { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name { $($(#[$field_doc])* pub $field: $ty,)* }

        // The sum of the fields equals the size: no padding that the verifier or a hash key would trip over.
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$ty>())* == $size);

        // SAFETY: repr(C), integers only, no padding (asserted above): every bit pattern is a value.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    )*};
}

shared! {
    /// A Pod of this node. Value of `PODS`, `VETHS`, `POD_ADDRS`.
    Pod = 64 {
        /// Cookie of its network namespace.
        cookie: u64,
        /// Its IPv4 address; zero where it has none.
        ip4: Addr,
        /// Its IPv6 address; zero where it has none.
        ip6: Addr,
        /// Its number on this node, below 65,536; part of the addresses its connections are redirected to.
        slot: u32,
        /// Its policy subject.
        subject: u32,
        /// [`crate::codes::pod`].
        flags: u32,
        /// Index of the host-side interface in the agent's network namespace.
        ifindex: u32,
        /// The port of the proxy's IPv4 listener for outgoing connections.
        out_port: u16,
        /// The ports of the IPv6 listeners for outgoing connections.
        out_port6: [u16; 2],
        /// Zero.
        pad: [u8; 2],
    }

    /// What is known of an address or a range. Value of `ADDRS`, `CIDRS`.
    AddrInfo = 8 {
        /// The policy subject; of a Service the number of its rows, which is nobody's identity and never reported.
        subject: u32,
        /// [`crate::codes::info`].
        flags: u32,
    }

    /// A port that is a Service's, on an address that is not the Service's alone. Key of `FRONTS`.
    FrontKey = 20 {
        /// The address; unspecified (`::`) for the addresses of every node.
        addr: Addr,
        /// The port there.
        port: u16,
        /// IP protocol.
        proto: u8,
        /// Zero.
        pad: u8,
    }

    /// The Service behind it. Value of `FRONTS`.
    Front = 12 {
        /// As [`AddrInfo::subject`] of the Service's own address.
        subject: u32,
        /// As [`AddrInfo::flags`] of the Service's own address.
        flags: u32,
        /// The Service's own port.
        port: u16,
        /// Zero.
        pad: u16,
    }

    /// A SYN of the kubelet. Value of `PROBES`.
    Probe = 16 {
        /// When it entered the Pod's interface (ns, monotonic clock).
        seen: u64,
        /// The sender's cgroup2 id.
        cgroup: u64,
    }

    /// What is known of a socket. Value of `SK_META`.
    SkMeta = 40 {
        /// [`crate::codes::kind`].
        kind: u8,
        /// 4 or 6: the family of `addr` as the application would name it.
        family: u8,
        /// The port that goes with `addr`.
        port: u16,
        /// The subject of the Pod at the other end of the story: `APP` and `ACCEPTED_OUT` the client's,
        /// `PROXY` and `ACCEPTED_IN` the client's too; 0 where it is not known.
        subject: u32,
        /// What was dialled, or the client to show: see [`crate::codes::kind`].
        addr: Addr,
        /// The client's socket cookie; 0 where there is none.
        cookie: u64,
        /// Cookie of the network namespace the socket belongs to.
        netns: u64,
    }

    /// One direction of a connection. Key of `ORIG_DST`, `CLIENT_OF`, `PROBES`; of `FLOW_PAIRS` for both directions, as
    /// [`Tuple::ordered`] puts it.
    Tuple = 48 {
        /// Cookie of the network namespace; 0 in `FLOW_PAIRS`.
        netns: u64,
        /// Source address.
        src: Addr,
        /// Destination address.
        dst: Addr,
        /// Source port; for an ICMP echo request the identifier.
        sport: u16,
        /// Destination port; for an ICMP echo reply the identifier.
        dport: u16,
        /// IP protocol in `FLOW_PAIRS` and `PROBES`, else 0.
        proto: u32,
    }

    /// When a flow that is not TCP was last seen (ns, coarse monotonic clock), 0 for never. Value of `FLOW_PAIRS`.
    FlowSeen = 16 {
        /// From its `src` to its `dst`, let pass by its own right, or by a reply to that.
        forth: u64,
        /// From its `dst` to its `src`, likewise.
        back: u64,
    }

    /// What a redirected connection dialled, or who is behind a connection of the proxy. Value of `ORIG_DST`,
    /// `CLIENT_OF`.
    OrigDst = 32 {
        /// The address.
        addr: Addr,
        /// The client's socket cookie; 0 where there is none.
        cookie: u64,
        /// The client's subject.
        subject: u32,
        /// The port.
        port: u16,
        /// 4 or 6.
        family: u8,
        /// Zero.
        pad: u8,
    }

    /// Key of `LISTENERS`.
    ListenerKey = 8 {
        /// [`Pod::slot`].
        slot: u32,
        /// [`crate::codes::listener`].
        kind: u8,
        /// 0.
        shard: u8,
        /// The port for `OUT4` and `OUT6`, else 0.
        port: u16,
    }

    /// Key of `VIP_DENIED`.
    VipKey = 24 {
        /// The client's subject.
        subject: u32,
        /// The Service's port.
        port: u16,
        /// Zero.
        pad: u16,
        /// The Service's address.
        addr: Addr,
    }

    /// Key of `POLICY`.
    PolicyKey = 12 {
        /// The client's subject.
        src: u32,
        /// The server's subject.
        dst: u32,
        /// The port at the server; 0 for the ports no row names.
        port: u16,
        /// IP protocol; 0 (with port 0) for the protocols no row names.
        proto: u8,
        /// Zero.
        pad: u8,
    }

    /// Value of `POLICY`.
    PolicyVal = 8 {
        /// [`crate::codes::verdict`].
        verdict: u8,
        /// Zero.
        pad: [u8; 3],
        /// The policy that decided; 0 where none did.
        policy: u32,
    }

    /// Key of `FRAGS`.
    FragKey = 40 {
        /// Source address.
        src: Addr,
        /// Destination address.
        dst: Addr,
        /// Identification of the datagram.
        id: u32,
        /// IP protocol.
        proto: u8,
        /// 0 leaving a Pod, 1 entering one: each hook judges for itself.
        hook: u8,
        /// Zero.
        pad: [u8; 2],
    }

    /// Key of `COUNTS`.
    CountKey = 12 {
        /// The client's subject.
        src: u32,
        /// The server's subject.
        dst: u32,
        /// [`crate::codes::reason`].
        reason: u8,
        /// [`crate::codes::direction`].
        dir: u8,
        /// [`crate::codes::outcome`].
        verdict: u8,
        /// IP protocol.
        proto: u8,
    }

    /// Value of `CONFIG`.
    Config = 8 {
        /// [`crate::codes::config`].
        flags: u32,
        /// Counts up with every change.
        generation: u32,
    }

    /// A record of `EVENTS`.
    Event = 88 {
        /// When (ns, monotonic clock).
        ktime: u64,
        /// The socket's cookie (`SO_COOKIE`); 0 where there is none.
        cookie: u64,
        /// Cookie of the Pod's network namespace; 0 where it is not known.
        netns: u64,
        /// The caller's cgroup (`CONNECT`, `UNKNOWN_NETNS`), else 0.
        cgroup: u64,
        /// Source address.
        src: Addr,
        /// Destination address: what was dialled.
        dst: Addr,
        /// Source port; 0 where none is bound yet.
        sport: u16,
        /// Destination port.
        dport: u16,
        /// IP protocol.
        proto: u8,
        /// [`crate::codes::event`].
        kind: u8,
        /// [`crate::codes::outcome`].
        verdict: u8,
        /// [`crate::codes::reason`].
        reason: u8,
        /// The client's subject.
        src_subject: u32,
        /// The server's subject.
        dst_subject: u32,
        /// The policy that decided: [`PolicyVal::policy`].
        policy: u32,
        /// The caller's process (`CONNECT`, `UNKNOWN_NETNS`), else 0.
        pid: u32,
    }
}

impl Tuple {
    /// The same flow with its lower end first, and whether the ends were exchanged for that: both directions have one row.
    #[inline(always)]
    pub fn ordered(self) -> (Self, bool) {
        let [src, dst] = [&self.src, &self.dst].map(addr::halves);
        let exchanged = (src, self.sport) > (dst, self.dport);
        if exchanged {
            let Self { src, dst, sport, dport, .. } = self;
            (Self { src: dst, dst: src, sport: dport, dport: sport, ..self }, true)
        } else {
            (self, false)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn both_directions_of_a_flow_are_one_row(src: [u8; 16], dst: [u8; 16], sport: u16, dport: u16, proto: u32) {
            let forth = Tuple { netns: 0, src, dst, sport, dport, proto };
            let back = Tuple { src: dst, dst: src, sport: dport, dport: sport, ..forth };
            let ((one, exchanged), (other, back_exchanged)) = (forth.ordered(), back.ordered());
            prop_assert_eq!(one, other);
            prop_assert_eq!(exchanged != back_exchanged, forth != back);
            prop_assert_eq!(one, if exchanged { back } else { forth });
        }
    }
}
