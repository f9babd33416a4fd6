//! Counters and records.

use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use weft_ebpf_common::{CountKey, Event, codes::stat};

use crate::maps::{COUNTS, EVENTS, STATS};

/// Counts one up.
#[inline(always)]
pub(crate) fn count(index: u32) {
    if let Some(value) = STATS.get_ptr_mut(index) {
        // SAFETY: the slot of this CPU; hooks that interrupt each other on one CPU are serialised by the kernel.
        unsafe { *value += 1 };
    }
}

/// Counts a decision, exactly: detail may be lost, this may not.
#[inline(always)]
pub(crate) fn decision(key: &CountKey) {
    if let Some(value) = COUNTS.get_ptr_mut(key) {
        // SAFETY: the slot of this CPU.
        unsafe { *value += 1 };
    } else if COUNTS.insert(key, 1, 0).is_err() {
        count(stat::COUNTS_FULL);
    }
}

/// Hands a record to the agent; a full ring is counted. The record is built in the ring, not copied into it.
#[inline(always)]
pub(crate) fn emit(event: impl FnOnce() -> Event) {
    if let Some(mut slot) = EVENTS.reserve(0) {
        slot.write(event());
        slot.submit(0);
    } else {
        count(stat::RING_LOST);
    }
}

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: takes nothing, gives a number.
    unsafe { bpf_ktime_get_ns() }
}

/// As [`now`], as of the last tick of the kernel's timer, for a tenth of the price (Linux 5.11).
#[inline(always)]
pub(crate) fn coarse_now() -> u64 {
    // SAFETY: takes nothing, gives a number.
    unsafe { bpf_ktime_get_coarse_ns() }
}
