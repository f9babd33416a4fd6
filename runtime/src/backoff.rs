//! Exponential backoff with jitter.

use std::time::Duration;

use rand::Rng;

/// Waits that double from `initial` up to `max`, each shortened at random by up to a half, so that many clients do
/// not come back in step.
#[derive(Debug, Clone)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    current: Duration,
}

impl Backoff {
    /// Begins at `initial`; no wait is longer than `max`.
    pub fn new(initial: Duration, max: Duration) -> Self {
        let initial = initial.min(max);
        Self { initial, max, current: initial }
    }

    /// How long to wait before the next try.
    #[expect(clippy::should_implement_trait, reason = "it never ends, and nobody iterates over waits")]
    pub fn next(&mut self) -> Duration {
        let wait = self.current.mul_f64(rand::rng().random_range(0.5..=1.0));
        self.current = self.current.saturating_mul(2).min(self.max);
        wait
    }

    /// It worked: begin again at `initial`.
    pub fn reset(&mut self) {
        self.current = self.initial;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_maximum_within_the_jitter() {
        let (initial, max) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut backoff = Backoff::new(initial, max);
        for full in [100, 200, 400, 800, 1000, 1000, 1000].map(Duration::from_millis) {
            let wait = backoff.next();
            assert!(wait <= full && wait >= full / 2, "{wait:?} is not within half and whole of {full:?}");
        }
        backoff.reset();
        assert!(backoff.next() <= initial);
    }

    #[test]
    fn an_initial_above_the_maximum_is_cut() {
        assert!(
            Backoff::new(Duration::from_secs(9), Duration::from_secs(1)).next() <= Duration::from_secs(1)
        );
    }
}
