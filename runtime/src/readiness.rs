//! Readiness as named guards, so that "not ready" says what is missing.

use std::{collections::BTreeMap, fmt, sync::Arc};

use tokio::sync::watch;

/// What the process still waits for. Ready when nothing is missing. Clones are handles to the same state.
#[derive(Clone)]
pub struct Readiness {
    /// Guards not yet ready, by name, with how many of that name.
    missing: Arc<watch::Sender<BTreeMap<&'static str, usize>>>,
}

/// One thing that must happen before the process is ready.
///
/// Dropped without [`ReadyGuard::ready`], for example by a panic or an early return, it leaves the process not
/// ready for good.
#[must_use = "dropping the guard leaves the process not ready"]
pub struct ReadyGuard {
    name: &'static str,
    readiness: Readiness,
}

impl Readiness {
    /// Nothing is missing yet: take all guards before serving.
    pub fn new() -> Self {
        Self { missing: Arc::new(watch::Sender::new(BTreeMap::new())) }
    }

    /// Adds a thing to wait for.
    pub fn guard(&self, name: &'static str) -> ReadyGuard {
        self.missing.send_modify(|missing| *missing.entry(name).or_default() += 1);
        ReadyGuard { name, readiness: self.clone() }
    }

    /// The names of what is missing, sorted; empty when ready.
    pub fn missing(&self) -> Vec<&'static str> {
        self.missing.borrow().keys().copied().collect()
    }

    /// Waits until nothing is missing.
    pub async fn wait(&self) {
        // The sender lives in `self`, so the channel cannot close meanwhile.
        let _ = self.missing.subscribe().wait_for(BTreeMap::is_empty).await;
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readiness").field("missing", &self.missing()).finish()
    }
}

impl ReadyGuard {
    /// It happened.
    pub fn ready(self) {
        self.readiness.missing.send_modify(|missing| {
            if let Some(count) = missing.get_mut(self.name) {
                *count -= 1;
                if *count == 0 {
                    missing.remove(self.name);
                }
            }
        });
        tracing::debug!(what = self.name, "ready");
    }
}

impl fmt::Debug for ReadyGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ReadyGuard").field(&self.name).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_when_every_guard_is() {
        let readiness = Readiness::new();
        let (state, datapath) = (readiness.guard("state"), readiness.guard("datapath"));
        assert_eq!(readiness.missing(), ["datapath", "state"]);
        let mut wait = std::pin::pin!(readiness.wait());
        state.ready();
        assert!(futures_util::poll!(wait.as_mut()).is_pending());
        datapath.ready();
        wait.await;
        assert!(readiness.missing().is_empty());
    }

    #[test]
    fn a_dropped_guard_is_never_ready() {
        let readiness = Readiness::new();
        drop(readiness.guard("state"));
        assert_eq!(readiness.missing(), ["state"]);
    }

    #[test]
    fn guards_of_one_name_are_counted() {
        let readiness = Readiness::new();
        let (one, two) = (readiness.guard("pod"), readiness.guard("pod"));
        one.ready();
        assert_eq!(readiness.missing(), ["pod"]);
        two.ready();
        assert!(readiness.missing().is_empty());
    }
}
