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
    stream::{self, BoxStream},
};
use parking_lot::Mutex;
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};
use weft_core::SpiffeId;
use weft_runtime::{Backoff, DrainWatcher};

use self::run::Run;
use crate::{CredentialReader, Credentials, IssueError, Issued, Issuer, Update, cache::Cache, store::Store};

mod run;

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
    /// Who issued it: the name of the signing authority in its certificate.
    pub issued_by: Option<String>,
    /// Its serial number, in hexadecimal bytes joined by colons.
    pub serial: Option<String>,
    /// Why the last try to get one failed; `None` after a success and before the first try.
    pub problem: Option<String>,
}

struct Shared {
    /// A new one takes over at once.
    issuer: watch::Sender<Arc<dyn Issuer>>,
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
    /// 1 while the issuer's updates are followed.
    connected: Gauge,
}

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
            issuer: watch::Sender::new(issuer),
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
            connected: Gauge::default(),
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

    /// Lets another issuer take over: a credential of it is fetched for each id, and what is held serves until then.
    pub fn use_issuer(&self, issuer: Arc<dyn Issuer>) {
        self.shared.issuer.send_replace(issuer);
    }

    /// How it stands with each wanted id.
    pub fn status(&self) -> Vec<SvidStatus> {
        let problems = self.shared.problems.lock().clone();
        let status = |id: SpiffeId| {
            let held = self.shared.store.get(&id);
            SvidStatus {
                not_after: held.as_ref().map(|credentials| credentials.not_after()),
                issued_by: held.as_ref().map(|credentials| credentials.issued_by().to_owned()),
                serial: held.as_ref().map(|credentials| credentials.serial().to_owned()),
                problem: problems.get(&id).cloned(),
                id,
            }
        };
        self.shared.store.wanted().into_iter().map(status).collect()
    }

    /// Adds `weft_svids`, `weft_svid_signed_total`, `weft_svid_failures_total`, `weft_svid_expired_total` and
    /// `weft_issuer_connected`.
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
        registry.register(
            "weft_issuer_connected",
            "Whether the issuer tells this node of new roots and credentials",
            shared.connected.clone(),
        );
    }

    /// Fetches, renews at half life, and takes back what expires, until the drain is over.
    ///
    /// A second run of the same manager returns at once.
    pub async fn run(self, drain: DrainWatcher) {
        if self.shared.running.swap(true, Ordering::AcqRel) {
            tracing::error!("the credential manager runs already; please report this");
            return;
        }
        let mut issuers = self.shared.issuer.subscribe();
        let mut anew = false;
        loop {
            let issuer = Arc::clone(&issuers.borrow_and_update());
            let run = Run::new(&self.shared, &*issuer, anew);
            tokio::select! {
                () = run.run(drain.clone()) => break,
                // With the old one's requests: whatever they bring is not wanted any more.
                Ok(()) = issuers.changed() => {}
            }
            anew = true;
        }
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

impl Shared {
    /// The issuer's updates, begun again with growing pauses whenever they end.
    fn updates<'a>(&'a self, issuer: &'a dyn Issuer) -> BoxStream<'a, Update> {
        let backoff = Backoff::new(self.config.retry_initial, self.config.retry_max);
        let begin = (issuer.updates(), backoff);
        self.connected.set(0);
        stream::unfold(begin, async move |(mut updates, mut backoff)| {
            loop {
                match updates.next().await {
                    Some(Ok(update)) => {
                        backoff.reset();
                        if self.connected.set(1) == 0 && issuer.renews() {
                            tracing::info!("the issuer renews this node's credentials");
                        }
                        return Some((update, (updates, backoff)));
                    }
                    Some(Err(error)) => self.unfollowed(issuer, &error),
                    None => {}
                }
                tokio::time::sleep(backoff.next()).await;
                updates = issuer.updates();
            }
        })
        .boxed()
    }

    /// The issuer's changes are not heard of.
    fn unfollowed(&self, issuer: &dyn Issuer, error: &IssueError) {
        let before = self.connected.set(0);
        if !issuer.renews() {
            return tracing::debug!(%error, "the issuer's changes are not followed for now");
        }
        if before == 1 {
            tracing::warn!(%error, "what is held goes on until it expires; then connections are refused");
        }
        let mut problems = self.problems.lock();
        for id in self.store.wanted() {
            problems.entry(id).or_insert_with(|| error.to_string());
        }
    }

    async fn fetch(&self, issuer: &dyn Issuer, id: &SpiffeId) -> Result<Credentials, IssueError> {
        let issued = timeout(self.config.timeout, issuer.issue(id)).await.map_err(|_| {
            IssueError::Unavailable(format!("no answer within {} s", self.config.timeout.as_secs()))
        })??;
        self.validate(id, issued)
    }

    fn validate(&self, id: &SpiffeId, issued: Issued) -> Result<Credentials, IssueError> {
        Credentials::new(id, issued.key, issued.signed, self.config.clock.now())
            .map_err(|error| IssueError::Invalid(error.to_string()))
    }
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
