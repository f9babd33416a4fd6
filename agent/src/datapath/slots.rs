//! Slots: the small numbers that name Pods in redirect addresses.

use std::collections::BTreeMap;

use super::error::DatapathError;

/// The greatest slot: two bytes of a loopback address carry it.
const LAST: u32 = 65_535;

/// Which slot belongs to which network namespace.
#[derive(Debug, Default)]
pub(super) struct Slots {
    by_slot: BTreeMap<u32, u64>,
    /// The one given out last; freed slots come round again late, after connections to them have ended.
    last: u32,
}

impl Slots {
    /// The slots that the entries of an earlier agent hold: (slot, cookie).
    pub(super) fn adopt(entries: impl IntoIterator<Item = (u32, u64)>) -> Self {
        let by_slot: BTreeMap<_, _> =
            entries.into_iter().filter(|(slot, _)| (1..=LAST).contains(slot)).collect();
        let last = by_slot.keys().next_back().copied().unwrap_or(0);
        Self { by_slot, last }
    }

    /// The slot of a namespace: the one it has, or a free one. 0 is never given out.
    pub(super) fn take(&mut self, cookie: u64) -> Result<u32, DatapathError> {
        if let Some((&slot, _)) = self.by_slot.iter().find(|(_, owner)| **owner == cookie) {
            return Ok(slot);
        }
        let free = (1..=LAST)
            .map(|step| (self.last + step - 1) % LAST + 1)
            .find(|slot| !self.by_slot.contains_key(slot))
            .ok_or(DatapathError::Slots)?;
        self.by_slot.insert(free, cookie);
        self.last = free;
        Ok(free)
    }

    /// Frees the slot of a namespace.
    pub(super) fn free(&mut self, cookie: u64) {
        self.by_slot.retain(|_, owner| *owner != cookie);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_keeps_its_slot() {
        let mut slots = Slots::adopt([(3, 30), (0, 9), (70_000, 8)]);
        assert_eq!(slots.take(30).expect("slot"), 3);
        assert_eq!(slots.take(40).expect("slot"), 4);
        assert_eq!(slots.take(40).expect("slot"), 4);
    }

    #[test]
    fn freed_slots_come_round_last_and_all_are_used() {
        let mut slots = Slots::default();
        assert_eq!(slots.take(1).expect("slot"), 1);
        slots.free(1);
        assert_eq!(slots.take(2).expect("slot"), 2);
        let mut slots = Slots::adopt([(LAST, 1)]);
        assert_eq!(slots.take(2).expect("slot"), 1);
        let mut full = Slots::adopt((1..=LAST).map(|slot| (slot, u64::from(slot))));
        assert!(matches!(full.take(0), Err(DatapathError::Slots)));
        full.free(77);
        assert_eq!(full.take(0).expect("the freed one"), 77);
    }
}
