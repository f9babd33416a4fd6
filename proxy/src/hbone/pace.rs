//! How much a stream moves, and from when on that is bulk.

/// What a stream of bulk moves within [`PERIOD`], bytes: more than 32 Mbit/s.
const BULK: u32 = 4 * 1024 * 1024;
/// Milliseconds.
const PERIOD: u32 = 1_000;
/// How long a connection counts as one with bulk after it was last seen, milliseconds: until the next period says so.
const HOLD: u32 = 2 * PERIOD;

/// One stream's bytes of either direction. Times are milliseconds of one clock, which may wrap.
#[derive(Debug, Default)]
pub(super) struct Pace {
    since: u32,
    moved: u32,
}

impl Pace {
    /// So much was moved; whether the stream carries bulk.
    pub(super) fn add(&mut self, bytes: usize, now: u32) -> bool {
        if now.wrapping_sub(self.since) >= PERIOD {
            *self = Self { since: now, moved: 0 };
        }
        self.moved = self.moved.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.moved >= BULK
    }
}

/// Whether bulk that was seen `at` still goes on.
pub(super) fn lasts(at: u32, now: u32) -> bool {
    now.wrapping_sub(at) < HOLD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_is_much_in_little_time() {
        let mut pace = Pace::default();
        assert!(!pace.add(BULK as usize - 1, 5));
        assert!(pace.add(1, PERIOD - 1));
        assert!(!pace.add(1, PERIOD), "the next period begins with nothing");
        assert!(pace.add(usize::MAX, PERIOD));
        // Across the clock's end.
        let mut pace = Pace { since: u32::MAX - 10, moved: BULK - 1 };
        assert!(pace.add(1, 10));
        assert!(lasts(u32::MAX - 10, 10) && !lasts(0, HOLD));
    }
}
