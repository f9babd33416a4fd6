//! Fetches and renews the credentials of this node's workloads.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures_util::{
    StreamExt,
    stream::{self, BoxStream, FuturesUnordered},
};
use parking_lot::Mutex;
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use rand::Rng;
use rustls_pki_types::CertificateDer;
use tokio::{sync::Notify, time::timeout};
use weft_core::SpiffeId;
use weft_runtime::{Backoff, DrainWatcher};

use crate::{
    BoxFuture, CredentialReader, Credentials, IssueError, Issued, Issuer, Update, cache::Cache, store::Store,
};

/// The time of day, as far as expiry and renewal are concerned.
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> SystemTime;
}

/// How a [`CredentialManager`] works.
#[derive(Clone)]
pub struct ManagerConfig {
    /// A file on tmpfs to keep credentials in over a restart of this process.
    pub cache: Option<PathBuf>,
    /// How long one signature may take.
    pub timeout: Duration,
    /// Signatures asked for at a time.
    pub concurrency: usize,
    /// The first wait after a failure; it doubles with each.
    pub retry_initial: Duration,
    /// The longest wait after a failure.
    pub retry_max: Duration,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
}

/// Keeps a valid credential for each wanted id, and publishes it to the [`CredentialReader`]s.
///
/// Clones are handles; one of them runs.
#[derive(Clone)]
pub struct CredentialManager {
    shared: Arc<Shared>,
}

/// How it stands with one wanted id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SvidStatus {
    /// The id.
    pub id: SpiffeId,
    /// When its credential expires; `None` where it has none.
    pub not_after: Option<SystemTime>,
    /// Why the last try to get one failed; `None` after a success and before the first try.
    pub problem: Option<String>,
}

struct Shared {
    issuer: Arc<dyn Issuer>,
    config: ManagerConfig,
    cache: Option<Cache>,
    /// Read from the cache at start; published as far as wanted by the first `want`.
    cached: Mutex<Vec<Credentials>>,
    store: Arc<Store>,
    changed: Notify,
    problems: Mutex<HashMap<SpiffeId, String>>,
    running: AtomicBool,
    valid: Gauge,
    signed: Counter,
    failures: Counter,
    expired: Counter,
}

/// The longest sleep, so that a jump of the system's clock is noticed.
const MAX_SLEEP: Duration = Duration::from_secs(30);
/// The shortest time between two renewals of one id, whatever lifetime the issuer gives.
const MIN_RENEWAL: Duration = Duration::from_secs(1);

impl CredentialManager {
    /// With the usual configuration and the cache file `cache`, which must lie on tmpfs.
    pub fn new(issuer: Arc<dyn Issuer>, cache: Option<PathBuf>) -> (Self, CredentialReader) {
        Self::with_config(issuer, ManagerConfig { cache, ..ManagerConfig::default() })
    }

    /// A manager that wants nothing yet. A cache that cannot be used is logged and done without.
    pub fn with_config(issuer: Arc<dyn Issuer>, config: ManagerConfig) -> (Self, CredentialReader) {
        let cache = config.cache.clone().and_then(|path| {
            Cache::new(path).inspect_err(|error| tracing::warn!(%error, "credentials are not cached")).ok()
        });
        let cached = cache.as_ref().map_or_else(Vec::new, |cache| {
            cache.load(config.clock.now()).unwrap_or_else(|error| {
                tracing::warn!(%error, "cached credentials are not used");
                Vec::new()
            })
        });
        let store = Arc::new(Store::default());
        let reader = store.reader();
        let shared = Shared {
            issuer,
            config,
            cache,
            cached: Mutex::new(cached),
            store,
            changed: Notify::new(),
            problems: Mutex::default(),
            running: AtomicBool::new(false),
            valid: Gauge::default(),
            signed: Counter::default(),
            failures: Counter::default(),
            expired: Counter::default(),
        };
        (Self { shared: Arc::new(shared) }, reader)
    }

    /// Wants exactly these ids. Credentials of others are taken back before this returns; new ones are fetched at
    /// once by [`CredentialManager::run`].
    ///
    /// The first call decides which cached credentials live on: make it with all Pods of the node.
    pub fn want(&self, ids: BTreeSet<SpiffeId>) {
        let shared = &self.shared;
        let changed = shared.store.want(ids);
        let cached = std::mem::take(&mut *shared.cached.lock());
        let now = shared.config.clock.now();
        for credentials in cached {
            if credentials.not_after() > now {
                shared.store.publish(&Arc::new(credentials));
            }
        }
        if changed {
            shared.changed.notify_one();
        }
    }

    /// How it stands with each wanted id.
    pub fn status(&self) -> Vec<SvidStatus> {
        let problems = self.shared.problems.lock().clone();
        let status = |id: SpiffeId| SvidStatus {
            not_after: self.shared.store.get(&id).map(|credentials| credentials.not_after()),
            problem: problems.get(&id).cloned(),
            id,
        };
        self.shared.store.wanted().into_iter().map(status).collect()
    }

    /// Adds `weft_svids`, `weft_svid_signed_total`, `weft_svid_failures_total` and `weft_svid_expired_total`.
    pub fn register(&self, registry: &mut Registry) {
        let shared = &self.shared;
        registry.register("weft_svids", "Credentials held and valid", shared.valid.clone());
        registry.register("weft_svid_signed", "Credentials obtained from the issuer", shared.signed.clone());
        registry.register(
            "weft_svid_failures",
            "Failed tries to obtain a credential",
            shared.failures.clone(),
        );
        registry.register("weft_svid_expired", "Credentials that expired unrenewed", shared.expired.clone());
    }

    /// Fetches, renews at half life, and takes back what expires, until the drain is over.
    ///
    /// A second run of the same manager returns at once.
    pub async fn run(self, drain: DrainWatcher) {
        if self.shared.running.swap(true, Ordering::AcqRel) {
            tracing::error!("the credential manager runs already; please report this");
            return;
        }
        let run = Run {
            shared: &self.shared,
            slots: HashMap::new(),
            fetches: FuturesUnordered::new(),
            roots: HashMap::new(),
            behind: false,
        };
        run.run(drain).await;
        self.shared.running.store(false, Ordering::Release);
    }
}

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            cache: None,
            timeout: Duration::from_secs(15),
            concurrency: 8,
            retry_initial: Duration::from_millis(250),
            retry_max: Duration::from_secs(30),
            clock: Arc::new(SystemClock),
        }
    }
}

struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

struct Run<'a> {
    shared: &'a Shared,
    slots: HashMap<SpiffeId, Slot>,
    fetches: FuturesUnordered<BoxFuture<'a, (SpiffeId, Result<Credentials, IssueError>)>>,
    /// What the issuer last said by itself, by trust domain.
    roots: HashMap<String, Vec<CertificateDer<'static>>>,
    /// An answer came with other roots than those.
    behind: bool,
}

/// One wanted id.
struct Slot {
    due: SystemTime,
    fetching: bool,
    /// A credential of it was published.
    held: bool,
    backoff: Backoff,
}

impl Run<'_> {
    async fn run(mut self, drain: DrainWatcher) {
        let mut drained = std::pin::pin!(drain.drained());
        let mut updates = self.shared.updates();
        loop {
            if std::mem::take(&mut self.behind) {
                // Either of the two may be the older one: asked again, the issuer says what holds now.
                updates = self.shared.updates();
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
                self.shared.issuer.forget(id);
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
            let due = held.map_or_else(|| config.clock.now(), |credentials| renewal(&credentials));
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
        let shared = self.shared;
        let now = shared.config.clock.now();
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
                let result = shared.fetch(&id).await;
                (id, result)
            }));
        }
    }

    fn fetched(&mut self, id: &SpiffeId, result: Result<Credentials, IssueError>) -> bool {
        let shared = self.shared;
        // No slot, or one made anew meanwhile: then the id went while the issuer worked.
        let Some(slot) = self.slots.get_mut(id) else { return false };
        slot.fetching = false;
        match result {
            Ok(credentials) => {
                shared.signed.inc();
                slot.backoff.reset();
                slot.due = renewal(&credentials);
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

impl Shared {
    /// The issuer's updates, begun again with growing pauses whenever they end.
    fn updates(&self) -> BoxStream<'_, Update> {
        let backoff = Backoff::new(self.config.retry_initial, self.config.retry_max);
        let begin = (self.issuer.updates(), backoff);
        stream::unfold(begin, async move |(mut updates, mut backoff)| {
            loop {
                match updates.next().await {
                    Some(Ok(update)) => {
                        backoff.reset();
                        return Some((update, (updates, backoff)));
                    }
                    Some(Err(error)) => tracing::debug!(%error, "changes of roots are not followed for now"),
                    None => {}
                }
                tokio::time::sleep(backoff.next()).await;
                updates = self.issuer.updates();
            }
        })
        .boxed()
    }

    async fn fetch(&self, id: &SpiffeId) -> Result<Credentials, IssueError> {
        let issued = timeout(self.config.timeout, self.issuer.issue(id)).await.map_err(|_| {
            IssueError::Unavailable(format!("no answer within {} s", self.config.timeout.as_secs()))
        })??;
        self.validate(id, issued)
    }

    fn validate(&self, id: &SpiffeId, issued: Issued) -> Result<Credentials, IssueError> {
        Credentials::new(id, issued.key, issued.signed, self.config.clock.now())
            .map_err(|error| IssueError::Invalid(error.to_string()))
    }
}

/// Half of the life from when it was obtained, a tenth of that earlier or later, so that nodes do not come in step.
fn renewal(credentials: &Credentials) -> SystemTime {
    let life = credentials.not_after().duration_since(credentials.obtained()).unwrap_or_default();
    credentials.obtained() + (life / 2).mul_f64(rand::rng().random_range(0.9..=1.1)).max(MIN_RENEWAL)
}

impl fmt::Debug for CredentialManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialManager").field("store", &self.shared.store).finish_non_exhaustive()
    }
}

impl fmt::Debug for ManagerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagerConfig")
            .field("cache", &self.cache)
            .field("timeout", &self.timeout)
            .field("concurrency", &self.concurrency)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
