//! What a peer may make us do for nothing: a budget for frames that carry no data, and one for streams that are begun
//! and taken back (CVE-2019-9512 to 9518, CVE-2023-44487, CVE-2024-27316, CVE-2025-8671).

use std::time::Instant;

/// A budget that refills with time.
#[derive(Debug)]
struct Budget {
    left: f64,
    most: f64,
    per_second: f64,
    at: Instant,
}

impl Budget {
    fn new(now: Instant, most: f64, per_second: f64) -> Self {
        Self { left: most, most, per_second, at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.left = (self.left + passed * self.per_second).min(self.most) - 1.0;
        self.left >= 0.0
    }
}

/// What one connection's peer has left.
#[derive(Debug)]
pub(super) struct Flood {
    control: Budget,
    resets: Budget,
    /// WINDOW_UPDATEs that the data we have sent does not explain.
    updates: Budget,
    /// DATA frames that we sent since the last of those was counted.
    sent: u64,
}

impl Flood {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            control: Budget::new(now, 1_000.0, 100.0),
            resets: Budget::new(now, 1_000.0, 200.0),
            updates: Budget::new(now, 4_000.0, 1_000.0),
            sent: 0,
        }
    }

    /// A PING, SETTINGS, PRIORITY, empty DATA or unknown frame; false where it is one too many.
    pub(super) fn control(&mut self, now: Instant) -> bool {
        self.control.take(now)
    }

    /// A stream that the peer took back before it was answered, or that it made us reset.
    pub(super) fn reset(&mut self, now: Instant) -> bool {
        self.resets.take(now)
    }

    /// We sent a DATA frame, for which the peer may give credit to its stream and to the connection.
    pub(super) fn sent(&mut self) {
        self.sent = (self.sent + 2).min(1_000_000);
    }

    /// A WINDOW_UPDATE.
    pub(super) fn update(&mut self, now: Instant) -> bool {
        if self.sent > 0 {
            self.sent -= 1;
            return true;
        }
        self.updates.take(now)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_passes_and_a_flood_does_not() {
        let now = Instant::now();
        let mut flood = Flood::new(now);
        assert!((0..1_000).all(|_| flood.control(now)));
        assert!(!flood.control(now));
        assert!(flood.control(now + Duration::from_secs(1)));
    }

    #[test]
    fn credit_for_what_was_sent_is_free() {
        let now = Instant::now();
        let mut flood = Flood::new(now);
        for _ in 0..100_000 {
            flood.sent();
            assert!(flood.update(now) && flood.update(now));
        }
    }
}
