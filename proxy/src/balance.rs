//! Least-request balancing by power of two choices, over the connections (or requests) active at each endpoint.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use foldhash::HashMap;
use parking_lot::Mutex;
use rand::Rng;

/// Counts what is active at each endpoint of a source Pod's view. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Balancer {
    active: Arc<Mutex<Active>>,
}

#[derive(Debug, Default)]
struct Active {
    counts: HashMap<SocketAddr, Weak<AtomicUsize>>,
    /// How many entries the next sweep waits for.
    sweep_at: usize,
}

/// Keeps one connection or request counted as active at its endpoint until dropped.
#[derive(Debug)]
pub struct Lease(Arc<AtomicUsize>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Entries with nothing active are swept once the map has at least this many.
const SWEEP_AT: usize = 1024;

impl Balancer {
    /// How much is active at an endpoint.
    pub fn active(&self, endpoint: SocketAddr) -> usize {
        let count = self.active.lock().counts.get(&endpoint).and_then(Weak::upgrade);
        count.map_or(0, |c| c.load(Ordering::Relaxed))
    }

    /// Counts one more at an endpoint.
    pub fn lease(&self, endpoint: SocketAddr) -> Lease {
        let mut active = self.active.lock();
        if active.counts.len() >= active.sweep_at.max(SWEEP_AT) {
            active.counts.retain(|_, c| c.strong_count() > 0);
            active.sweep_at = active.counts.len() * 2;
        }
        let count = active.counts.get(&endpoint).and_then(Weak::upgrade).unwrap_or_else(|| {
            let count = Arc::new(AtomicUsize::new(0));
            active.counts.insert(endpoint, Arc::downgrade(&count));
            count
        });
        count.fetch_add(1, Ordering::Relaxed);
        Lease(count)
    }

    /// Chooses the less busy of two random candidates, and another one to try when it fails.
    pub fn choose<'a, T>(
        &self,
        candidates: &'a [T],
        address: impl Fn(&T) -> SocketAddr,
    ) -> Option<(&'a T, Option<&'a T>)> {
        match candidates {
            [] => None,
            [only] => Some((only, None)),
            many => {
                let mut rng = rand::rng();
                let first = rng.random_range(0..many.len());
                let second = (first + rng.random_range(1..many.len())) % many.len();
                let (a, b) = (&many[first], &many[second]);
                if self.active(address(b)) < self.active(address(a)) {
                    Some((b, Some(a)))
                } else {
                    Some((a, Some(b)))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 80))
    }

    #[test]
    fn the_less_busy_of_two_is_chosen() {
        let balancer = Balancer::default();
        let _busy = balancer.lease(endpoint(1));
        for _ in 0..20 {
            let candidates = [endpoint(1), endpoint(2)];
            let chosen = balancer.choose(&candidates, |a| *a);
            assert_eq!(chosen, Some((&endpoint(2), Some(&endpoint(1)))));
        }
    }

    #[test]
    fn a_dropped_lease_counts_no_more() {
        let balancer = Balancer::default();
        let lease = balancer.lease(endpoint(1));
        let other = balancer.lease(endpoint(1));
        assert_eq!(balancer.active(endpoint(1)), 2);
        drop((lease, other));
        assert_eq!(balancer.active(endpoint(1)), 0);
    }

    #[test]
    fn leases_spread_evenly() {
        let balancer = Balancer::default();
        let candidates: Vec<_> = (1..=4).map(endpoint).collect();
        let mut leases = Vec::new();
        for _ in 0..400 {
            let (chosen, _) = balancer.choose(&candidates, |a| *a).expect("there are candidates");
            leases.push(balancer.lease(*chosen));
        }
        for candidate in candidates {
            let active = balancer.active(candidate);
            assert!((90..=110).contains(&active), "{candidate} has {active}");
        }
    }

    #[test]
    fn nothing_to_choose_from() {
        assert!(Balancer::default().choose::<SocketAddr>(&[], |a| *a).is_none());
    }
}
