//! Flows that are not TCP: what was let pass is noted, so that its replies pass and only its first packet is told of.

use aya_ebpf::bindings::BPF_NOEXIST;
use weft_ebpf_common::{
    FlowSeen, Tuple,
    codes::{FLOW_IDLE_NS, stat},
    packet::Packet,
};

use crate::{events, maps::FLOW_PAIRS};

/// A packet's flow, looked up once for all that is asked of it.
pub(super) struct Flow {
    key: Tuple,
    /// The packet goes from the row's `dst` to its `src`.
    back: bool,
    /// The row, where there is one. A row that is deleted meanwhile may be another flow's when it is written: that flow's
    /// replies would pass a minute longer.
    seen: Option<*mut FlowSeen>,
    now: u64,
}

impl Flow {
    /// Looks the packet's flow up.
    #[inline(always)]
    pub(super) fn of(packet: &Packet) -> Self {
        let (key, back) = tuple(packet).ordered();
        let mut flow = Self { key, back, seen: None, now: events::coarse_now() };
        flow.seen = FLOW_PAIRS.get_ptr_mut(&flow.key);
        flow
    }

    /// True for the reply of a live flow, which lives on by it.
    #[inline(always)]
    pub(super) fn is_reply(&self) -> bool {
        let Some(seen) = self.seen else {
            return false;
        };
        let answered = direction(seen, !self.back);
        // SAFETY: one aligned word of a row.
        if !fresh(unsafe { answered.read() }, self.now) {
            return false;
        }
        // SAFETY: as above; writers on several CPUs write nearly the same time.
        unsafe { answered.write(self.now) };
        true
    }

    /// Notes the flow; true where it is new.
    #[inline(always)]
    pub(super) fn remember(&self) -> bool {
        let now = self.now;
        let seen = match self.seen {
            Some(seen) => seen,
            None => {
                let first = if self.back {
                    FlowSeen { forth: 0, back: now }
                } else {
                    FlowSeen { forth: now, back: 0 }
                };
                if FLOW_PAIRS.insert(&self.key, first, u64::from(BPF_NOEXIST)).is_ok() {
                    return true;
                }
                // The other direction's first packet may have come in between, on another CPU.
                let Some(seen) = FLOW_PAIRS.get_ptr_mut(&self.key) else {
                    events::count(stat::MAP_FULL);
                    return true;
                };
                seen
            }
        };
        let own = direction(seen, self.back);
        // SAFETY: one aligned word of a row.
        let before = unsafe { own.read() };
        // SAFETY: as above; writers on several CPUs write nearly the same time.
        unsafe { own.write(now) };
        !fresh(before, now)
    }
}

/// The time that is kept of one direction.
#[inline(always)]
fn direction(seen: *mut FlowSeen, back: bool) -> *mut u64 {
    // SAFETY: the row is there, as the verifier checks.
    unsafe { if back { &raw mut (*seen).back } else { &raw mut (*seen).forth } }
}

#[inline(always)]
fn fresh(seen: u64, now: u64) -> bool {
    seen != 0 && now.wrapping_sub(seen) < FLOW_IDLE_NS
}

/// A packet's ends and protocol.
#[inline(always)]
pub(super) fn tuple(packet: &Packet) -> Tuple {
    Tuple {
        netns: 0,
        src: packet.src,
        dst: packet.dst,
        sport: packet.sport,
        dport: packet.dport,
        proto: packet.proto.into(),
    }
}
