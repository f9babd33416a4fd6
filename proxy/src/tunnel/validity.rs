//! Until when what handshakes proved holds, shared by all tunnels of the same two ends.
//!
//! A tunnel ends with the certificates it was made under, or a peer that lost its right to them would keep its
//! connections for ever. An application's connection may be meant to live for days though, a database's for
//! instance, and SVIDs live for an hour. TLS 1.3 has nothing to show a renewed certificate on a connection that
//! stands, so the proof comes from beside: a later handshake of the same two ends shows that each still holds a valid
//! SVID of the same identity, and what the older tunnels carry goes on until that one ends. Without such a handshake,
//! or where it shows another identity, they end as if there had been none.

use std::{
    hash::Hash,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use foldhash::HashMap;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::passed;

/// Pairs of ends that are remembered; with more of them, tunnels end with their own certificates.
const MAX_PAIRS: usize = 65_536;
/// Below this many entries nobody looks for those that are no longer used.
const SWEEP_FROM: usize = 64;

/// Until when the certificates shown by one end to another are valid. Clones share the time.
#[derive(Debug, Clone)]
pub struct Validity(Arc<State>);

#[derive(Debug)]
struct State {
    /// Milliseconds since 1970; only grows.
    until: AtomicU64,
    turn: Semaphore,
}

impl Validity {
    /// Ends at `until`, to the millisecond, unless it is extended.
    pub fn new(until: SystemTime) -> Self {
        Self(Arc::new(State { until: AtomicU64::new(millis(until)), turn: Semaphore::new(1) }))
    }

    /// When it ends, as far as is known now.
    pub fn until(&self) -> SystemTime {
        let since = Duration::from_millis(self.0.until.load(Ordering::Acquire));
        SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Whether it ended before or at `now`.
    pub fn ended(&self, now: SystemTime) -> bool {
        self.until() <= now
    }

    /// A certificate that ends at `until` was shown; one that ends earlier changes nothing.
    pub(super) fn extend(&self, until: SystemTime) {
        self.0.until.fetch_max(millis(until), Ordering::AcqRel);
    }

    /// Ends when it ended, extensions that come meanwhile included.
    pub(super) async fn passed(&self) {
        while !self.ended(SystemTime::now()) {
            passed(self.until()).await;
        }
    }

    /// The right to make the next handshake; `None` while somebody else has it.
    pub(super) fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.0.turn.try_acquire().ok()
    }
}

fn millis(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The validities of the tunnels that are open, by their two ends. It keeps none alive.
#[derive(Debug)]
pub struct Validities<K> {
    held: Mutex<Held<K>>,
    limit: usize,
}

#[derive(Debug)]
struct Held<K> {
    by_ends: HashMap<K, Weak<State>>,
    sweep_at: usize,
}

impl<K> Default for Validities<K> {
    fn default() -> Self {
        Self::limited(MAX_PAIRS)
    }
}

impl<K> Validities<K> {
    fn limited(limit: usize) -> Self {
        Self { held: Mutex::new(Held { by_ends: HashMap::default(), sweep_at: SWEEP_FROM }), limit }
    }
}

impl<K: Eq + Hash> Validities<K> {
    /// What the open tunnels of these ends share, not extended yet; with none open, a new one that ends at `until`.
    /// One that has ended already stays so: what rested on it is being cut.
    pub fn share(&self, ends: K, until: SystemTime) -> Validity {
        let mut held = self.held.lock();
        let shared = held.by_ends.get(&ends).and_then(Weak::upgrade).map(Validity);
        if let Some(shared) = shared.filter(|v| !v.ended(SystemTime::now())) {
            return shared;
        }
        if held.by_ends.len() >= held.sweep_at.min(self.limit) {
            held.by_ends.retain(|_, state| state.strong_count() > 0);
            held.sweep_at = (held.by_ends.len() * 2).max(SWEEP_FROM);
        }
        let new = Validity::new(until);
        if held.by_ends.len() < self.limit || held.by_ends.contains_key(&ends) {
            held.by_ends.insert(ends, Arc::downgrade(&new.0));
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_now(seconds: u64) -> SystemTime {
        SystemTime::now() + Duration::from_secs(seconds)
    }

    #[test]
    fn the_same_ends_share_and_only_the_later_end_counts() {
        let all = Validities::default();
        let first = all.share("a-b", from_now(60));
        let second = all.share("a-b", from_now(120));
        assert_eq!(first.until(), second.until());
        second.extend(from_now(120));
        second.extend(from_now(30));
        assert!(!first.ended(from_now(110)) && first.ended(from_now(130)));
        assert!(all.share("a-c", from_now(60)).ended(from_now(70)));
    }

    #[test]
    fn what_has_ended_is_not_revived() {
        let all = Validities::default();
        let ended = all.share("a-b", SystemTime::now());
        let new = all.share("a-b", from_now(60));
        new.extend(from_now(90));
        assert!(ended.ended(SystemTime::now()) && !new.ended(SystemTime::now()));
    }

    #[test]
    fn the_map_is_bounded_and_keeps_nothing_alive() {
        let all = Validities::limited(100);
        let kept: Vec<_> = (0..150).map(|n| all.share(n, from_now(60))).collect();
        assert_eq!(all.held.lock().by_ends.len(), 100);
        drop(kept);
        let last = all.share(1000, from_now(60));
        assert_eq!(all.held.lock().by_ends.len(), 1);
        assert_eq!(last.until(), all.share(1000, from_now(90)).until());
    }

    #[tokio::test]
    async fn waiting_goes_on_where_it_was_extended() {
        let validity = Validity::new(SystemTime::now() + Duration::from_millis(50));
        let end = SystemTime::now() + Duration::from_millis(400);
        let extend = async {
            tokio::task::yield_now().await;
            validity.extend(end);
        };
        tokio::join!(validity.passed(), extend);
        assert!(SystemTime::now() + Duration::from_millis(1) >= end);
    }
}
