//! What the packet hooks tell: counters and records.

use aya_ebpf::bindings::TC_ACT_SHOT;
use weft_ebpf_common::{
    CountKey, Event, Pod, addr,
    codes::{direction, event, outcome},
    judge::Judgement,
    packet::Packet,
};

use crate::events;

/// Which way a packet goes at the Pod's interface.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// It leaves the Pod.
    Out = 0,
    /// It enters the Pod.
    In = 1,
}

impl Way {
    #[inline(always)]
    fn direction(self) -> u8 {
        if self == Self::Out { direction::OUT } else { direction::IN }
    }

    #[inline(always)]
    fn event(self) -> u8 {
        if self == Self::Out { event::TC_FROM } else { event::TC_TO }
    }

    /// Subjects where one side is not known: the Pod is on its side.
    #[inline(always)]
    fn subjects(self, own: &Pod, subjects: (u32, u32)) -> (u32, u32) {
        match self {
            Self::Out => (own.subject, subjects.1),
            Self::In => (subjects.0, own.subject),
        }
    }
}

/// Drops a packet that could not even be read.
#[inline(always)]
pub(crate) fn drop_with(own: &Pod, way: Way, stat: u32, reason: u8) -> i32 {
    events::count(stat);
    let (src, dst) = way.subjects(own, (0, 0));
    events::decision(&CountKey {
        src,
        dst,
        reason,
        dir: way.direction(),
        verdict: outcome::DENIED,
        proto: 0,
    });
    let (src_addr, dst_addr) = if way == Way::Out { (own.ip4, addr::NONE) } else { (addr::NONE, own.ip4) };
    events::emit(|| Event {
        ktime: events::now(),
        cookie: 0,
        netns: own.cookie,
        cgroup: 0,
        src: src_addr,
        dst: dst_addr,
        sport: 0,
        dport: 0,
        proto: 0,
        kind: way.event(),
        verdict: outcome::DENIED,
        reason,
        src_subject: src,
        dst_subject: dst,
        policy: 0,
        pid: 0,
    });
    TC_ACT_SHOT
}

/// Drops a packet, counts it and says why.
#[inline(always)]
pub(crate) fn deny(
    own: &Pod,
    way: Way,
    packet: &Packet,
    subjects: (u32, u32),
    stat: u32,
    judged: &Judgement,
) -> i32 {
    events::count(stat);
    report(own, way, packet, subjects, outcome::DENIED, judged);
    TC_ACT_SHOT
}

/// Counts and tells of the first packet of a flow that passes.
#[inline(always)]
pub(crate) fn forwarded(own: &Pod, way: Way, packet: &Packet, subjects: (u32, u32), judged: &Judgement) {
    report(own, way, packet, subjects, outcome::FORWARDED, judged);
}

#[inline(always)]
fn report(own: &Pod, way: Way, packet: &Packet, subjects: (u32, u32), outcome: u8, judged: &Judgement) {
    let (src, dst) = way.subjects(own, subjects);
    events::decision(&CountKey {
        src,
        dst,
        reason: judged.reason,
        dir: way.direction(),
        verdict: outcome,
        proto: packet.proto,
    });
    events::emit(|| Event {
        ktime: events::now(),
        cookie: 0,
        netns: own.cookie,
        cgroup: 0,
        src: packet.src,
        dst: packet.dst,
        sport: packet.sport,
        dport: packet.dport,
        proto: packet.proto,
        kind: way.event(),
        verdict: outcome,
        reason: judged.reason,
        src_subject: src,
        dst_subject: dst,
        policy: judged.policy,
        pid: 0,
    });
}
