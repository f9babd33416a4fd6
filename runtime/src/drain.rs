//! Drain: one trigger, many watchers, and holders that keep the process alive until their work is done.

use std::{fmt, future::pending, sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};

/// A trigger and a watcher that belong together.
pub fn channel() -> (DrainTrigger, DrainWatcher) {
    let (draining, watcher) = watch::channel(false);
    let holders = Arc::new(watch::Sender::new(0));
    (DrainTrigger { draining, holders: Arc::clone(&holders) }, DrainWatcher { draining: watcher, holders })
}

/// Starts the drain. Dropped unused, it never starts one.
#[derive(Debug)]
pub struct DrainTrigger {
    draining: watch::Sender<bool>,
    holders: Arc<watch::Sender<usize>>,
}

/// Learns of the drain, and hands out holds. Watching alone holds nothing up.
#[derive(Clone)]
pub struct DrainWatcher {
    draining: watch::Receiver<bool>,
    holders: Arc<watch::Sender<usize>>,
}

/// Keeps the drain waiting as long as it lives, e.g. for one connection.
pub struct DrainHold {
    holders: Arc<watch::Sender<usize>>,
}

impl DrainTrigger {
    /// Tells every watcher, then waits until all holds are gone, at most for `deadline`.
    ///
    /// True when they went in time; false when the deadline cut the wait short.
    pub async fn drain(self, deadline: Duration) -> bool {
        self.draining.send_replace(true);
        let mut holders = self.holders.subscribe();
        // The sender lives in `self`, so the wait ends by the count or by the deadline only.
        timeout(deadline, holders.wait_for(|count| *count == 0)).await.is_ok()
    }

    /// Holds alive.
    pub fn holders(&self) -> usize {
        *self.holders.borrow()
    }
}

impl DrainWatcher {
    /// Waits for the drain to start. Cancel safe.
    pub async fn draining(&self) {
        if self.draining.clone().wait_for(|draining| *draining).await.is_err() {
            // The trigger went without ever draining: nobody can start one any more.
            pending::<()>().await;
        }
    }

    /// Waits for the drain to be over: all holds gone, or its deadline passed. What shall serve during the drain,
    /// such as metrics, stops here.
    pub async fn drained(&self) {
        self.draining().await;
        let mut draining = self.draining.clone();
        while draining.changed().await.is_ok() {}
    }

    /// Whether the drain has started.
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Makes the drain wait until the hold is dropped.
    pub fn hold(&self) -> DrainHold {
        self.holders.send_modify(|count| *count += 1);
        DrainHold { holders: Arc::clone(&self.holders) }
    }
}

impl fmt::Debug for DrainWatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainWatcher").field("draining", &self.is_draining()).finish()
    }
}

impl fmt::Debug for DrainHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DrainHold")
    }
}

impl Drop for DrainHold {
    fn drop(&mut self) {
        self.holders.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_for_the_last_hold() {
        let (trigger, watcher) = channel();
        let (first, second) = (watcher.hold(), watcher.hold());
        assert!(!watcher.is_draining());
        let mut drain = std::pin::pin!(trigger.drain(Duration::from_secs(60)));
        assert!(futures_util::poll!(drain.as_mut()).is_pending());
        assert!(watcher.is_draining());
        watcher.draining().await;
        drop(first);
        assert!(futures_util::poll!(drain.as_mut()).is_pending());
        drop(second);
        assert!(drain.await);
        watcher.drained().await;
    }

    #[tokio::test(start_paused = true)]
    async fn says_when_the_deadline_cut_it_short() {
        let (trigger, watcher) = channel();
        let _hold = watcher.hold();
        assert!(!trigger.drain(Duration::from_secs(5)).await);
        watcher.drained().await;
    }

    #[tokio::test]
    async fn without_holds_it_is_immediate() {
        let (trigger, _watcher) = channel();
        assert!(trigger.drain(Duration::ZERO).await);
    }

    #[tokio::test]
    async fn a_dropped_trigger_never_drains() {
        let (trigger, watcher) = channel();
        drop(trigger);
        assert!(!watcher.is_draining());
        let mut draining = std::pin::pin!(watcher.draining());
        assert!(futures_util::poll!(draining.as_mut()).is_pending());
    }

    #[tokio::test]
    async fn drained_comes_after_draining() {
        let (trigger, watcher) = channel();
        let hold = watcher.hold();
        let mut drained = std::pin::pin!(watcher.drained());
        let mut drain = Box::pin(trigger.drain(Duration::from_secs(60)));
        assert!(futures_util::poll!(drain.as_mut()).is_pending());
        assert!(futures_util::poll!(drained.as_mut()).is_pending());
        drop(hold);
        assert!(drain.await);
        drained.await;
    }
}
