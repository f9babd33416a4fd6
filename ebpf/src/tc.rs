//! `tc` at the host side of a Pod's interface: forged sources, TCP beside the proxy, and everything that is not TCP.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::{bpf_sk_fullsock, bpf_skb_cgroup_id, bpf_skb_load_bytes},
    programs::TcContext,
};
use weft_ebpf_common::{
    Addr, AddrInfo, FragKey, Pod, Probe, Tuple, addr,
    codes::{FRAG_IDLE_NS, info, kind, pod, proto, reason, stat, verdict},
    judge::{Judgement, Query},
    packet::{ETH_IP4, ETH_IP6, ETH_LEN, Load, Packet, fragment, parse, parse_plain, plain_segment, tcp},
};

use crate::{
    events,
    maps::{FRAGS, KUBELETS, PROBES, VETHS},
    sock, tables,
};

mod flow;
mod report;

use flow::Flow;
use report::{Way, deny, drop_with, forwarded};

struct Skb<'a>(&'a TcContext);

impl Load for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // Not zeroed first: BPF would do that byte by byte.
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes at most N bytes, and checks the packet's bounds.
        let result =
            unsafe { bpf_skb_load_bytes(self.0.skb.skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) };
        // SAFETY: it succeeded: all N bytes are written.
        (result == 0).then(|| unsafe { bytes.assume_init() })
    }
}

/// A packet's memory, at offsets that are known when this is compiled; nothing where it is not all in one place.
struct InPlace<'a>(&'a TcContext);

impl Load for InPlace<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = self.0.data() + offset as usize;
        if start + N > self.0.data_end() {
            return None;
        }
        // SAFETY: the bounds were checked, as the verifier wants it; bytes have no alignment.
        Some(unsafe { (start as *const [u8; N]).read() })
    }
}

/// True for a segment that opens no connection and comes from where `from` allows: it is not judged.
#[inline(always)]
fn of_a_connection(ctx: &TcContext, ethertype: u16, from: impl FnOnce(&Addr) -> bool) -> bool {
    plain_segment(&InPlace(ctx), ethertype)
        .is_some_and(|(src, flags)| flags & (tcp::SYN | tcp::ACK) != tcp::SYN && from(&src))
}

/// The packet, read in place where that can be.
#[inline(always)]
fn read(ctx: &TcContext, ethertype: u16) -> Option<Packet> {
    parse_plain(&InPlace(ctx), ethertype).or_else(|| parse(&Skb(ctx), ETH_LEN, ethertype))
}

/// What leaves a Pod.
#[inline(always)]
pub(crate) fn from_pod(ctx: &TcContext) -> i32 {
    let Some(ethertype) = ip(ctx) else {
        return TC_ACT_UNSPEC;
    };
    let Some(own) = subject_to_judgement(ctx) else {
        return TC_ACT_UNSPEC;
    };
    if of_a_connection(ctx, ethertype, |src| has(own, src)) {
        return TC_ACT_UNSPEC;
    }
    let Some(packet) = read(ctx, ethertype) else {
        return drop_with(own, Way::Out, stat::EXT_HDR_DROPPED, reason::UNSUPPORTED);
    };
    if !own_source(own, &packet) {
        return deny(own, Way::Out, &packet, (0, 0), stat::SPOOFED, &refusal(reason::INVALID_SOURCE));
    }
    match judge_out(ctx, own, &packet) {
        TC_ACT_UNSPEC => first_fragment(&packet, Way::Out),
        refused => refused,
    }
}

/// What enters a Pod.
#[inline(always)]
pub(crate) fn to_pod(ctx: &TcContext) -> i32 {
    let Some(ethertype) = ip(ctx) else {
        return TC_ACT_UNSPEC;
    };
    // Whoever's interface this is.
    if of_a_connection(ctx, ethertype, |src| !addr::is_loopback(src)) {
        return TC_ACT_UNSPEC;
    }
    let Some(own) = subject_to_judgement(ctx) else {
        return TC_ACT_UNSPEC;
    };
    let Some(packet) = read(ctx, ethertype) else {
        return drop_with(own, Way::In, stat::EXT_HDR_DROPPED, reason::UNSUPPORTED);
    };
    if addr::is_loopback(&packet.src) {
        // sk_lookup passes what comes from loopback; only what never left the Pod may look like it.
        return deny(
            own,
            Way::In,
            &packet,
            (0, own.subject),
            stat::MARTIAN,
            &refusal(reason::INVALID_SOURCE),
        );
    }
    match judge_in(ctx, own, &packet) {
        TC_ACT_UNSPEC => first_fragment(&packet, Way::In),
        refused => refused,
    }
}

/// The packet's EtherType, where it is IP.
#[inline(always)]
fn ip(ctx: &TcContext) -> Option<u16> {
    // SAFETY: a plain field of the context.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    let ethertype = u16::from_be(protocol as u16);
    (ethertype == ETH_IP4 || ethertype == ETH_IP6).then_some(ethertype)
}

/// The Pod behind this interface, where its packets are judged.
#[inline(always)]
fn subject_to_judgement(ctx: &TcContext) -> Option<&'static Pod> {
    // SAFETY: a plain field of the context.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: rows are replaced whole by the agent.
    let own = unsafe { VETHS.get(ifindex) }?;
    (own.flags & pod::PASS == 0).then_some(own)
}

#[inline(always)]
fn own_source(own: &Pod, packet: &Packet) -> bool {
    if addr::is_unspecified(&packet.src) {
        // Duplicate address detection and MLD before there is an address.
        return packet.control && !addr::is_v4(&packet.src);
    }
    has(own, &packet.src) || (addr::is_link_local6(&packet.src) && packet.control)
}

/// The unspecified address is nobody's: it stands for the one that a Pod does not have.
#[inline(always)]
fn has(own: &Pod, address: &Addr) -> bool {
    !addr::is_unspecified(address) && (addr::same(address, &own.ip4) || addr::same(address, &own.ip6))
}

#[inline(always)]
fn judge_out(ctx: &TcContext, own: &Pod, packet: &Packet) -> i32 {
    if packet.fragment == fragment::LATER {
        return later_fragment(own, packet, Way::Out);
    }
    if packet.control {
        return TC_ACT_UNSPEC;
    }
    if packet.proto == proto::TCP {
        return syn_out(ctx, own, packet);
    }
    let strict = |to: &AddrInfo| own.flags & pod::STRICT != 0 || to.flags & info::STRICT != 0;
    let dialled = tables::dialled(&packet.dst, packet.policy_port(), packet.proto);
    let Some((to, port)) = dialled.filter(|(to, _)| to_be_judged(to, strict(to))) else {
        // Not ours to judge; but its replies must come back in.
        Flow::of(packet).remember();
        return TC_ACT_UNSPEC;
    };
    let flow = Flow::of(packet);
    let query = Query {
        src: own.subject,
        dst: to.subject,
        port,
        proto: packet.proto,
        authenticated: true,
        dst_flags: to.flags,
    };
    let judged = if to.flags & info::ENROLLED != 0 && flow.is_reply() {
        return TC_ACT_UNSPEC;
    } else if own.flags & pod::HELD != 0 {
        refusal(reason::UNKNOWN_PEER)
    } else if to.flags & info::ENROLLED == 0 {
        tables::service_verdict(&query)
    } else {
        direct_verdict(&query, to.flags & info::LOCAL == 0 && strict(&to))
    };
    settle(own, packet, &flow, (own.subject, tables::reported(&to)), &judged, Way::Out)
}

/// An enrolled Pod; or a Service whose address becomes that of one on another node after the last hook that sees the
/// packet here.
#[inline(always)]
fn to_be_judged(to: &AddrInfo, strict: bool) -> bool {
    let guarded = info::SERVICE | info::POLICED;
    to.flags & info::ENROLLED != 0 || (strict && to.flags & guarded == guarded)
}

/// TCP that leaves: only the opening SYN is judged, and only whether it came through the proxy.
#[inline(always)]
fn syn_out(ctx: &TcContext, own: &Pod, packet: &Packet) -> i32 {
    if packet.tcp_flags & (tcp::SYN | tcp::ACK) != tcp::SYN {
        return TC_ACT_UNSPEC;
    }
    let Some(to) = tables::dialled_or_range(&packet.dst, packet.dport, proto::TCP) else {
        return TC_ACT_UNSPEC;
    };
    if !tables::is_mesh(to.flags) || through_the_mesh(ctx) {
        return TC_ACT_UNSPEC;
    }
    let subjects = (own.subject, tables::reported(&to));
    deny(own, Way::Out, packet, subjects, stat::BYPASS_SYN, &refusal(reason::PROXY_BYPASSED))
}

/// True where the packet's socket is the proxy's, or was judged at connect. No application can forge the mark.
#[inline(always)]
fn through_the_mesh(ctx: &TcContext) -> bool {
    // SAFETY: a plain field of the context; checked for null as the verifier wants it.
    unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return false;
        }
        let sk = bpf_sk_fullsock(sk);
        if sk.is_null() {
            return false;
        }
        let meta = sock::meta(sk);
        !meta.is_null() && ((*meta).kind == kind::PROXY || (*meta).kind == kind::DIRECT)
    }
}

#[inline(always)]
fn judge_in(ctx: &TcContext, own: &Pod, packet: &Packet) -> i32 {
    if packet.proto == proto::TCP {
        // sk_lookup judges connections, whole datagrams or not.
        note_probe(ctx, own, packet);
        return TC_ACT_UNSPEC;
    }
    if packet.fragment == fragment::LATER {
        return later_fragment(own, packet, Way::In);
    }
    if packet.control {
        return TC_ACT_UNSPEC;
    }
    let flow = Flow::of(packet);
    if flow.is_reply() {
        return TC_ACT_UNSPEC;
    }
    if own.flags & pod::HELD != 0 {
        return settle(own, packet, &flow, (0, own.subject), &refusal(reason::UNKNOWN_PEER), Way::In);
    }
    let dst = if addr::is_multicast(&packet.dst) {
        if addr::is_v4(&packet.dst) { &own.ip4 } else { &own.ip6 }
    } else {
        &packet.dst
    };
    let mut dst_flags = tables::destination(dst, own.flags);
    let strict = own.flags & pod::STRICT != 0;
    if strict {
        dst_flags |= info::STRICT;
    }
    let (src, authenticated, crosses) = match tables::address(&packet.src) {
        Some(AddrInfo { subject, flags }) if flags & info::ENROLLED != 0 => {
            (subject, true, flags & info::LOCAL == 0 && (strict || flags & info::STRICT != 0))
        }
        _ => (tables::outside(&packet.src), false, false),
    };
    let query = Query {
        src,
        dst: own.subject,
        port: packet.policy_port(),
        proto: packet.proto,
        authenticated,
        dst_flags,
    };
    settle(own, packet, &flow, (query.src, query.dst), &direct_verdict(&query, crosses), Way::In)
}

/// Tells `sk_lookup` of the kubelet's SYN, known by the cgroup of its socket: what is forwarded or masqueraded has
/// none. Anybody else's SYN takes back what was told of the same four-tuple, so that nobody inherits the kubelet's port.
#[inline(always)]
fn note_probe(ctx: &TcContext, own: &Pod, packet: &Packet) {
    if packet.tcp_flags & (tcp::SYN | tcp::ACK) != tcp::SYN {
        return;
    }
    let key = Tuple { netns: own.cookie, ..flow::tuple(packet) };
    // SAFETY: the context's own packet.
    let cgroup = unsafe { bpf_skb_cgroup_id(ctx.skb.skb) };
    // SAFETY: only whether there is a row.
    if unsafe { KUBELETS.get(cgroup) }.is_some() {
        if PROBES.insert(key, Probe { seen: events::now(), cgroup }, 0).is_err() {
            events::count(stat::MAP_FULL);
        }
    } else if PROBES.get_ptr(&key).is_some() {
        let _ = PROBES.remove(&key);
    }
}

/// The verdict on a packet from Pod to Pod that is not TCP. `crosses`: it goes between nodes, and one side is strict.
#[inline(always)]
fn direct_verdict(query: &Query, crosses: bool) -> Judgement {
    let judged = tables::verdict(query);
    let reason = match judged.verdict {
        // The proxy carries TCP only.
        verdict::PROXY => reason::POLICY_DENIED,
        verdict::ALLOW if crosses => reason::PLAINTEXT_REFUSED,
        _ => return judged,
    };
    Judgement { verdict: verdict::DENY, reason, policy: judged.policy }
}

/// Carries out the verdict on a packet that is not TCP.
#[inline(always)]
fn settle(
    own: &Pod,
    packet: &Packet,
    flow: &Flow,
    subjects: (u32, u32),
    judged: &Judgement,
    way: Way,
) -> i32 {
    if judged.denied() {
        return deny(own, way, packet, subjects, stat::NON_TCP_DENIED, judged);
    }
    if flow.remember() {
        forwarded(own, way, packet, subjects, judged);
    }
    TC_ACT_UNSPEC
}

#[inline(always)]
fn refusal(reason: u8) -> Judgement {
    Judgement { verdict: verdict::DENY, reason, policy: 0 }
}

#[inline(always)]
fn fragment_key(packet: &Packet, way: Way) -> FragKey {
    FragKey {
        src: packet.src,
        dst: packet.dst,
        id: packet.fragment_id,
        proto: packet.fragment_proto,
        hook: way as u8,
        pad: [0; 2],
    }
}

/// Notes a first fragment that passed.
#[inline(always)]
fn first_fragment(packet: &Packet, way: Way) -> i32 {
    if packet.fragment == fragment::FIRST
        && FRAGS.insert(fragment_key(packet, way), events::now(), 0).is_err()
    {
        events::count(stat::MAP_FULL);
    }
    TC_ACT_UNSPEC
}

/// Later fragments pass where the first one did.
#[inline(always)]
fn later_fragment(own: &Pod, packet: &Packet, way: Way) -> i32 {
    // SAFETY: one aligned word, copied at once.
    let passed = unsafe { FRAGS.get(fragment_key(packet, way)) }.copied();
    if passed.is_some_and(|then| events::now().wrapping_sub(then) < FRAG_IDLE_NS) {
        return TC_ACT_UNSPEC;
    }
    deny(own, way, packet, (0, 0), stat::FRAG_DROPPED, &refusal(reason::UNSUPPORTED))
}

// A packet that may pass goes on to the programs behind ours, such as a CNI's; -1 is also `TCX_NEXT`.
const _: () = assert!(TC_ACT_SHOT == 2 && TC_ACT_UNSPEC == -1);
