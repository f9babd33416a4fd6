//! What one stream may send us: its window, and how it grows while its reader keeps up.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Largest window of a stream.
const LARGEST: u32 = 4 * 1024 * 1024;
/// A window that is used up faster than this bounds the stream's rate.
const QUICK: Duration = Duration::from_millis(250);
/// What all streams of the process may have beyond their first windows.
const BUDGET: u64 = 32 * 1024 * 1024;

/// What they have.
static GRANTED: AtomicU64 = AtomicU64::new(0);

/// A stream's window as its receiver keeps it.
#[derive(Debug)]
pub(super) struct Window {
    size: u32,
    first: u32,
    /// What the peer may still send.
    left: u32,
    /// Delivered, and not credited yet.
    delivered: u32,
    at: Instant,
}

impl Window {
    pub(super) fn new(size: u32, now: Instant) -> Self {
        Self { size, first: size, left: size, delivered: 0, at: now }
    }

    /// The peer sent so much; false where it might not.
    pub(super) fn take(&mut self, bytes: u32) -> bool {
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }

    /// So much was delivered; gives the credit to send once it is worth a frame. A reader that has taken all that
    /// came (`drained`) and needed little time for half a window gets a larger one.
    pub(super) fn deliver(&mut self, bytes: u32, drained: bool, now: Instant) -> Option<u32> {
        self.delivered += bytes;
        if self.delivered < self.size / 2 {
            return None;
        }
        let mut increment = self.delivered;
        if drained
            && self.size < LARGEST
            && now.saturating_duration_since(self.at) < QUICK
            && grant(self.size)
        {
            increment += self.size;
            self.size *= 2;
        }
        self.delivered = 0;
        self.left += increment;
        self.at = now;
        Some(increment)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        GRANTED.fetch_sub(u64::from(self.size - self.first), Ordering::Relaxed);
    }
}

fn grant(bytes: u32) -> bool {
    let more = |granted: u64| Some(granted + u64::from(bytes)).filter(|all| *all <= BUDGET);
    GRANTED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_comes_back_in_halves_and_grows_for_a_quick_reader() {
        let now = Instant::now();
        let mut window = Window::new(100, now);
        assert!(window.take(100) && !window.take(1));
        assert_eq!(window.deliver(49, true, now), None);
        assert_eq!(window.deliver(1, false, now), Some(50));
        assert_eq!((window.size, window.left), (100, 50));
        assert_eq!(window.deliver(50, true, now), Some(150));
        assert_eq!((window.size, window.left), (200, 200));
        // Slowly: it stays as it is.
        assert_eq!(window.deliver(100, true, now + Duration::from_secs(1)), Some(100));
        assert_eq!(window.size, 200);
    }
}
