//! The loop that fetches, renews and takes back.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use rand::Rng;
use rustls_pki_types::CertificateDer;
use weft_core::SpiffeId;
use weft_runtime::{Backoff, DrainWatcher};

use super::Shared;
use crate::{BoxFuture, Credentials, IssueError, Issuer, Update};

/// The longest sleep, so that a jump of the system's clock is noticed.
const MAX_SLEEP: Duration = Duration::from_secs(30);
/// From when on a clock that goes back has been set, and not only corrected.
const SET_BACK: Duration = Duration::from_secs(5);
/// The shortest time between two renewals of one id, whatever lifetime the issuer gives.
const MIN_RENEWAL: Duration = Duration::from_secs(1);

pub(super) struct Run<'a> {
    shared: &'a Shared,
    issuer: &'a dyn Issuer,
    /// Whether what is held came from another issuer.
    anew: bool,
    slots: HashMap<SpiffeId, Slot>,
    fetches: FuturesUnordered<BoxFuture<'a, (SpiffeId, Result<Credentials, IssueError>)>>,
    /// What the issuer last said by itself, by trust domain.
    roots: HashMap<String, Vec<CertificateDer<'static>>>,
    /// An answer came with other roots than those.
    behind: bool,
    /// The time of day at the last turn.
    last: SystemTime,
}

/// One wanted id.
struct Slot {
    due: SystemTime,
    fetching: bool,
    /// A credential of it was published.
    held: bool,
    backoff: Backoff,
}

impl<'a> Run<'a> {
    /// Of one issuer; `anew` where another one served before.
    pub(super) fn new(shared: &'a Shared, issuer: &'a dyn Issuer, anew: bool) -> Self {
        Self {
            shared,
            issuer,
            anew,
            slots: HashMap::new(),
            fetches: FuturesUnordered::new(),
            roots: HashMap::new(),
            behind: false,
            last: shared.config.clock.now(),
        }
    }

    /// Until the drain is over.
    pub(super) async fn run(mut self, drain: DrainWatcher) {
        let mut drained = std::pin::pin!(drain.drained());
        let mut updates = self.shared.updates(self.issuer);
        loop {
            if std::mem::take(&mut self.behind) {
                // Either of the two may be the older one: asked again, the issuer says what holds now.
                updates = self.shared.updates(self.issuer);
            }
            let changed = self.shared.changed.notified();
            let mut dirty = self.follow_wanted();
            dirty |= self.expire();
            self.start();
            if dirty {
                self.persist();
            }
            let wake = self.next_wake();
            tokio::select! {
                () = &mut drained => return,
                () = changed => {}
                Some((id, result)) = self.fetches.next() => {
                    if self.fetched(&id, result) {
                        self.persist();
                    }
                }
                Some(update) = updates.next() => {
                    if self.updated(update) {
                        self.persist();
                    }
                }
                () = tokio::time::sleep(wake) => {}
            }
        }
    }

    /// Takes what the issuer said by itself; true when anything was published.
    fn updated(&mut self, update: Update) -> bool {
        match update {
            Update::Renewed { id, issued } => {
                let result = self.shared.validate(&id, issued);
                self.fetched(&id, result)
            }
            Update::Failed { id, error } => self.fetched(&id, Err(error)),
            Update::Roots { trust_domain, roots } => {
                let ids: Vec<SpiffeId> =
                    self.slots.keys().filter(|id| id.trust_domain() == trust_domain).cloned().collect();
                // All of them, not only until the first.
                let changed = ids.iter().filter(|id| self.trust(id, &roots)).count() > 0;
                self.roots.insert(trust_domain, roots);
                changed
            }
        }
    }

    /// Publishes the credential of `id` again, under these roots.
    fn trust(&mut self, id: &SpiffeId, roots: &[CertificateDer<'static>]) -> bool {
        let shared = self.shared;
        let (Some(held), Some(slot)) = (shared.store.get(id), self.slots.get_mut(id)) else { return false };
        if held.signed().roots == roots {
            return false;
        }
        match held.with_roots(roots.to_vec(), shared.config.clock.now()) {
            Ok(credentials) => {
                tracing::info!(%id, roots = roots.len(), "the trusted roots changed");
                shared.store.publish(&Arc::new(credentials))
            }
            Err(error) => {
                // Its root went before it did: peers refuse it already, so it is renewed at once.
                tracing::warn!(%id, %error, "the credential does not lead to the new roots; another is fetched");
                slot.due = shared.config.clock.now();
                false
            }
        }
    }

    /// Makes the slots those of the wanted ids; true when any came or went.
    fn follow_wanted(&mut self) -> bool {
        let wanted = self.shared.store.wanted();
        let before = self.slots.len();
        self.slots.retain(|id, _| {
            let stays = wanted.contains(id);
            if !stays {
                self.issuer.forget(id);
            }
            stays
        });
        let mut dirty = self.slots.len() != before;
        self.shared.problems.lock().retain(|id, _| wanted.contains(id));
        let config = &self.shared.config;
        for id in wanted {
            let held = self.shared.store.get(&id);
            if let Some(slot) = self.slots.get_mut(&id) {
                // Unwanted and wanted again between two turns, it lost its credential.
                if std::mem::replace(&mut slot.held, held.is_some()) && held.is_none() {
                    slot.due = config.clock.now();
                    dirty = true;
                }
                continue;
            }
            let has = held.is_some();
            let due = match held {
                // An issuer that renews by itself begins to when it is asked.
                Some(held) if !self.anew && !self.issuer.renews() => renewal(&held),
                _ => config.clock.now(),
            };
            let backoff = Backoff::new(config.retry_initial, config.retry_max);
            self.slots.insert(id, Slot { due, fetching: false, held: has, backoff });
            dirty = true;
        }
        dirty
    }

    /// Takes back what has expired; true when there was any.
    fn expire(&mut self) -> bool {
        let shared = self.shared;
        let now = shared.config.clock.now();
        let mut any = false;
        for id in self.slots.keys() {
            if shared.store.expire(id, now) {
                tracing::error!(%id, "the credential expired before it could be renewed: connections are refused");
                shared.expired.inc();
                any = true;
            }
        }
        any
    }

    /// Starts what is due, first for those who have nothing.
    fn start(&mut self) {
        let (shared, issuer) = (self.shared, self.issuer);
        let now = shared.config.clock.now();
        if self.last.duration_since(now).is_ok_and(|back| back >= SET_BACK) {
            // What was planned by the clock as it was would wait for as long as that was ahead.
            tracing::warn!("the clock was set back: every credential is fetched anew");
            self.slots.values_mut().for_each(|slot| slot.due = slot.due.min(now));
        }
        self.last = now;
        let free = shared.config.concurrency.max(1).saturating_sub(self.fetches.len());
        let mut due: Vec<_> = self
            .slots
            .iter_mut()
            .filter(|(_, slot)| !slot.fetching && slot.due <= now)
            .map(|(id, slot)| ((shared.store.get(id).is_some(), slot.due), id, slot))
            .collect();
        due.sort_by_key(|(order, ..)| *order);
        for (_, id, slot) in due.into_iter().take(free) {
            slot.fetching = true;
            let id = id.clone();
            self.fetches.push(Box::pin(async move {
                let result = shared.fetch(issuer, &id).await;
                (id, result)
            }));
        }
    }

    fn fetched(&mut self, id: &SpiffeId, result: Result<Credentials, IssueError>) -> bool {
        let shared = self.shared;
        // No slot, or one made anew meanwhile: then the id went while the issuer worked.
        let Some(slot) = self.slots.get_mut(id) else {
            self.issuer.forget(id);
            return false;
        };
        slot.fetching = false;
        match result {
            Ok(credentials) => {
                shared.signed.inc();
                slot.backoff.reset();
                slot.due = if self.issuer.renews() { overdue(&credentials) } else { renewal(&credentials) };
                shared.problems.lock().remove(id);
                tracing::debug!(%id, serial = credentials.serial(), "credential obtained");
                let said = self.roots.get(id.trust_domain());
                self.behind |= said.is_some_and(|roots| *roots != credentials.signed().roots);
                shared.store.publish(&Arc::new(credentials))
            }
            Err(error) => {
                shared.failures.inc();
                slot.due = shared.config.clock.now() + slot.backoff.next();
                let problem = error.to_string();
                let last = shared.problems.lock().insert(id.clone(), problem);
                if last.is_none_or(|last| last != error.to_string()) {
                    tracing::warn!(%id, %error, "no new credential; it is tried again");
                }
                false
            }
        }
    }

    fn persist(&self) {
        let held = self.shared.store.all();
        self.shared.valid.set(i64::try_from(held.len()).unwrap_or(i64::MAX));
        let Some(cache) = &self.shared.cache else { return };
        if let Err(error) = cache.store(&held) {
            tracing::warn!(%error, "credentials could not be cached: a restart needs the operator");
        }
    }

    /// Until the next renewal or expiry. What is due already waits for a free place, not for the time.
    fn next_wake(&self) -> Duration {
        let now = self.shared.config.clock.now();
        let dues = self.slots.values().filter(|slot| !slot.fetching).map(|slot| slot.due);
        let expiries = self.shared.store.all().into_iter().map(|credentials| credentials.not_after());
        let waits =
            dues.chain(expiries).filter_map(|at| at.duration_since(now).ok()).filter(|wait| !wait.is_zero());
        // Timers are exact to the millisecond only: a little later is better than a turn for nothing.
        waits.min().map_or(MAX_SLEEP, |wait| (wait + Duration::from_millis(1)).min(MAX_SLEEP))
    }
}

/// Half of the life from when it was obtained, a tenth of that earlier or later, so that nodes do not come in step.
fn renewal(credentials: &Credentials) -> SystemTime {
    let life = credentials.not_after().duration_since(credentials.obtained()).unwrap_or_default();
    credentials.obtained() + (life / 2).mul_f64(rand::rng().random_range(0.9..=1.1)).max(MIN_RENEWAL)
}

/// Three quarters of the life: an issuer that renews by itself has done so before.
fn overdue(credentials: &Credentials) -> SystemTime {
    let life = credentials.not_after().duration_since(credentials.obtained()).unwrap_or_default();
    credentials.obtained() + (life / 4 * 3).max(MIN_RENEWAL)
}
