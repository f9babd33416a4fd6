//! `sk_lookup`, one link per Pod namespace: which listener takes a connection, and whether any does.

use aya_ebpf::{bindings::bpf_sk_lookup, programs::SkLookupContext};
use weft_ebpf_common::{
    Addr, CountKey, Event, ListenerKey, Pod, Probe, Tuple, addr,
    codes::{
        PROBE_FRESH_NS, TUNNEL_PORT, direction, event, info, listener, outcome, pod, proto, reason, stat,
        subject, verdict,
    },
    judge::{Judgement, Query},
};

use crate::{
    events,
    log::trace_line,
    maps::{LISTENERS, POD_ADDRS, PROBES},
    tables,
};

const AF_INET: u32 = 2;
/// Else the kernel would spread connections over both processes of a hand-over.
const BPF_SK_LOOKUP_F_NO_REUSEPORT: u64 = 2;
const DROP: u32 = 0;
const PASS: u32 = 1;

/// Both ends as the Pod sees them.
struct Ends {
    local: Addr,
    remote: Addr,
    local_port: u16,
    remote_port: u16,
    v4: bool,
}

/// The hook.
#[inline(always)]
pub(crate) fn sk_lookup(ctx: &SkLookupContext) -> u32 {
    let raw = ctx.lookup;
    // SAFETY: a plain field of the context.
    if unsafe { (*raw).protocol } != u32::from(proto::TCP) {
        return PASS;
    }
    let ends = ends(raw);
    if addr::is_redirect_range(&ends.local) {
        // The slot is in the address: outgoing connections of this Pod. Nothing else may live here.
        let slot = addr::redirect_slot(&ends.local);
        return steer(ctx, slot, listener::OUT4, ends.local_port, false);
    }
    if addr::is_loopback(&ends.local) || addr::is_loopback(&ends.remote) {
        return PASS;
    }
    // SAFETY: rows are replaced whole by the agent.
    let Some(own) = (unsafe { POD_ADDRS.get(ends.local) }) else {
        // An enrolled namespace answers on the addresses of its Pod and on no other.
        return DROP;
    };
    if own.flags & pod::PASS != 0 {
        return PASS;
    }
    if addr::same(&ends.local, &ends.remote) {
        let port = ends.local_port;
        if !ends.v4 && port != 0 && (port == own.out_port6[0] || port == own.out_port6[1]) {
            return steer(ctx, own.slot, listener::OUT6, port, false);
        }
        return PASS;
    }
    if ends.local_port == TUNNEL_PORT {
        let kind = if ends.v4 { listener::TUN4 } else { listener::TUN6 };
        return steer(ctx, own.slot, kind, 0, false);
    }
    inbound(ctx, &ends, own)
}

#[inline(always)]
fn ends(raw: *mut bpf_sk_lookup) -> Ends {
    // SAFETY: plain fields of the context, read word by word as the verifier wants it.
    unsafe {
        let v4 = (*raw).family == AF_INET;
        let read = |field: *const u32| {
            addr::from_words([
                field.read_volatile(),
                field.add(1).read_volatile(),
                field.add(2).read_volatile(),
                field.add(3).read_volatile(),
            ])
        };
        let (local, remote) = if v4 {
            (addr::v4((*raw).local_ip4.to_ne_bytes()), addr::v4((*raw).remote_ip4.to_ne_bytes()))
        } else {
            (read((&raw const (*raw).local_ip6).cast()), read((&raw const (*raw).remote_ip6).cast()))
        };
        Ends {
            local,
            remote,
            local_port: (*raw).local_port as u16,
            remote_port: u16::from_be((*raw).remote_port),
            v4,
        }
    }
}

/// A connection that comes neither through a tunnel nor from this Pod itself.
#[inline(always)]
fn inbound(ctx: &SkLookupContext, ends: &Ends, own: &Pod) -> u32 {
    if let Some(probe) = probe(ends, own) {
        events::count(stat::PROBE_PASSED);
        let passed = Judgement { verdict: verdict::ALLOW, reason: reason::NONE, policy: 0 };
        report(ends, own, (subject::HOST, probe.cgroup), outcome::FORWARDED, &passed);
        return PASS;
    }
    if own.flags & pod::HELD != 0 {
        let refused = Judgement { verdict: verdict::DENY, reason: reason::UNKNOWN_PEER, policy: 0 };
        return deny(ctx, ends, own, subject::UNKNOWN, &refused);
    }
    let dst_flags = tables::destination(&ends.local, own.flags);
    let strict = own.flags & pod::STRICT != 0 || dst_flags & info::STRICT != 0;
    let dst_flags = if strict { dst_flags | info::STRICT } else { dst_flags };
    // A local Pod's source address is proven by the packet hook at its interface; any other address proves nothing.
    let known = info::ENROLLED | info::LOCAL;
    let (src, authenticated) = match tables::address(&ends.remote) {
        Some(found) if found.flags & known == known => (found.subject, true),
        _ => (tables::outside(&ends.remote), false),
    };
    let query =
        Query { src, dst: own.subject, port: ends.local_port, proto: proto::TCP, authenticated, dst_flags };
    let judged = tables::verdict(&query);
    if judged.denied() {
        return deny(ctx, ends, own, src, &judged);
    }
    if authenticated && judged.verdict != verdict::PROXY {
        if dst_flags & info::SHORTCUT_OK != 0 {
            events::count(stat::PASSED_KERNEL);
            report(ends, own, (src, 0), outcome::FORWARDED, &judged);
            return PASS;
        }
        if strict {
            let refused = Judgement { verdict: verdict::DENY, reason: reason::PLAINTEXT_REFUSED, policy: 0 };
            return deny(ctx, ends, own, src, &refused);
        }
    }
    let kind = if ends.v4 { listener::IN4 } else { listener::IN6 };
    steer(ctx, own.slot, kind, 0, own.flags & pod::FAIL_OPEN != 0)
}

/// The kubelet's own connection, as the packet hook at the interface told.
///
/// It stays told after this: the ACK of a SYN cookie is looked up once more.
#[inline(always)]
fn probe(ends: &Ends, own: &Pod) -> Option<Probe> {
    let key = Tuple {
        netns: own.cookie,
        src: ends.remote,
        dst: ends.local,
        sport: ends.remote_port,
        dport: ends.local_port,
        proto: proto::TCP.into(),
    };
    let told = PROBES.get_ptr(&key)?;
    // SAFETY: two aligned words; rows are replaced whole, and either one was true.
    let told = unsafe { told.read() };
    (events::now().wrapping_sub(told.seen) < PROBE_FRESH_NS).then_some(told)
}

#[inline(always)]
fn deny(ctx: &SkLookupContext, ends: &Ends, own: &Pod, src: u32, judged: &Judgement) -> u32 {
    let which = if judged.reason == reason::PLAINTEXT_REFUSED {
        stat::PLAINTEXT_REFUSED
    } else {
        stat::DENIED_INBOUND
    };
    events::count(which);
    report(ends, own, (src, 0), outcome::DENIED, judged);
    trace_line!(ctx, "sk_lookup: subject {} to port {} refused", src, ends.local_port);
    DROP
}

/// Gives the connection to the proxy's listener; without one it is dropped, or passes where the Pod fails open.
#[inline(always)]
fn steer(ctx: &SkLookupContext, slot: u32, kind: u8, port: u16, fail_open: bool) -> u32 {
    let key = ListenerKey { slot, kind, shard: 0, port };
    if LISTENERS.redirect_sk_lookup(ctx, key, BPF_SK_LOOKUP_F_NO_REUSEPORT).is_ok() {
        if kind == listener::IN4 || kind == listener::IN6 {
            events::count(stat::STEERED);
        }
        return PASS;
    }
    if fail_open {
        events::count(stat::FAILED_OPEN);
        return PASS;
    }
    events::count(stat::NO_LISTENER);
    DROP
}

#[inline(always)]
fn report(ends: &Ends, own: &Pod, (src, cgroup): (u32, u64), outcome: u8, judged: &Judgement) {
    events::decision(&CountKey {
        src,
        dst: own.subject,
        reason: judged.reason,
        dir: direction::IN,
        verdict: outcome,
        proto: proto::TCP,
    });
    events::emit(|| Event {
        ktime: events::now(),
        cookie: 0,
        netns: own.cookie,
        cgroup,
        src: ends.remote,
        dst: ends.local,
        sport: ends.remote_port,
        dport: ends.local_port,
        proto: proto::TCP,
        kind: event::SK_LOOKUP,
        verdict: outcome,
        reason: judged.reason,
        src_subject: src,
        dst_subject: own.subject,
        policy: judged.policy,
        pid: 0,
    });
}
