//! Objects from the Kubernetes API: one watch per kind, with bookmarks.
//!
//! Objects arrive untyped and are read one by one, so one that does not parse harms no other. What the index does not
//! need is taken off at once ([`trim`]), and an object that looks as before after that makes no change.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::BoxFuture};
use kube::{
    Api, Client,
    api::DynamicObject,
    core::{ApiResource, GroupVersionKind},
    runtime::watcher::{self, Event, watcher},
};
use tokio::{
    sync::mpsc,
    time::{sleep, sleep_until},
};
use weft_runtime::{Backoff, DrainWatcher};

use super::{Batch, Change, Source};
use crate::{
    last_good::Kept,
    objects::{Kind, ObjectKey},
};

pub mod observed;
mod read;
mod trim;

pub use observed::Observed;

/// How long changes are collected before they become one batch.
const DEBOUNCE: Duration = Duration::from_millis(4);
/// The longest that changes wait, however fast others follow.
const MAX_WAIT: Duration = Duration::from_millis(50);
/// How often a kind is looked for that the API server does not know.
const ABSENT_RETRY: Duration = Duration::from_secs(5);
/// How long one watch lasts, in seconds, before it is resumed where it was: a connection that the network lost without a
/// word is noticed by then.
const WATCH: u32 = 60;
/// News that wait to be merged, over all kinds.
const QUEUE: usize = 1024;
/// Changes in one batch after the first.
const MAX_BATCH: usize = 4096;

/// A kind and where the API server has it: versions in order of preference.
struct Watched {
    kind: Kind,
    group: &'static str,
    versions: &'static [&'static str],
    plural: &'static str,
}

const WATCHED: [Watched; 12] = [
    Watched { kind: Kind::Namespace, group: "", versions: &["v1"], plural: "namespaces" },
    Watched { kind: Kind::Node, group: "", versions: &["v1"], plural: "nodes" },
    Watched {
        kind: Kind::ServiceCidr,
        group: "networking.k8s.io",
        versions: &["v1", "v1beta1"],
        plural: "servicecidrs",
    },
    Watched { kind: Kind::Pod, group: "", versions: &["v1"], plural: "pods" },
    Watched { kind: Kind::Service, group: "", versions: &["v1"], plural: "services" },
    Watched {
        kind: Kind::EndpointSlice,
        group: "discovery.k8s.io",
        versions: &["v1"],
        plural: "endpointslices",
    },
    Watched {
        kind: Kind::NetworkPolicy,
        group: "networking.k8s.io",
        versions: &["v1"],
        plural: "networkpolicies",
    },
    Watched {
        kind: Kind::HttpRoute,
        group: "gateway.networking.k8s.io",
        versions: &["v1"],
        plural: "httproutes",
    },
    Watched {
        kind: Kind::ReferenceGrant,
        group: "gateway.networking.k8s.io",
        versions: &["v1", "v1beta1"],
        plural: "referencegrants",
    },
    Watched {
        kind: Kind::AuthorizationPolicy,
        group: "weft.mesh",
        versions: &["v1alpha1"],
        plural: "authorizationpolicies",
    },
    Watched {
        kind: Kind::TrafficPolicy,
        group: "weft.mesh",
        versions: &["v1alpha1"],
        plural: "trafficpolicies",
    },
    Watched { kind: Kind::MeshConfig, group: "weft.mesh", versions: &["v1alpha1"], plural: "meshconfigs" },
];

impl Watched {
    fn resource(&self, version: &str) -> ApiResource {
        ApiResource::from_gvk_with_plural(
            &GroupVersionKind::gvk(self.group, version, self.kind.as_str()),
            self.plural,
        )
    }

    /// What to do where the API server does not have the kind.
    fn remedy(&self) -> &'static str {
        match self.group {
            "weft.mesh" => "apply deploy/crds",
            "gateway.networking.k8s.io" => "routes work once the Gateway API's CRDs are applied",
            _ => "this version of Kubernetes does not have it; Weft goes on without",
        }
    }
}

/// The API resource of a kind, in the version that is preferred; for patches of its status.
pub fn resource(kind: Kind) -> Option<ApiResource> {
    let watched = WATCHED.iter().find(|w| w.kind == kind)?;
    Some(watched.resource(watched.versions.first()?))
}

/// The source over one cluster.
pub struct KubernetesSource {
    client: Client,
    observed: Arc<Observed>,
    kept: Vec<Kept>,
}

impl KubernetesSource {
    /// Over what the client reaches. `observed` learns the statuses that objects have; `kept` are last good forms of an
    /// earlier process.
    pub fn new(client: Client, observed: Arc<Observed>, kept: Vec<Kept>) -> Self {
        Self { client, observed, kept }
    }
}

impl Source for KubernetesSource {
    fn name(&self) -> String {
        "kubernetes".into()
    }

    fn run(
        self: Box<Self>,
        out: mpsc::Sender<Batch>,
        drain: DrainWatcher,
    ) -> BoxFuture<'static, Result<(), Box<dyn std::error::Error + Send + Sync>>> {
        Box::pin(async move {
            let (sender, news) = mpsc::channel(QUEUE);
            let watches = WATCHED.iter().map(|watched| {
                let follower = Follower {
                    watched,
                    client: self.client.clone(),
                    observed: Arc::clone(&self.observed),
                    out: sender.clone(),
                    known: HashMap::new(),
                };
                follower.run()
            });
            let watches = futures_util::future::join_all(watches);
            drop(sender);
            let merge = merge(news, out, self.kept);
            tokio::select! {
                () = drain.draining() => {}
                _ = watches => {}
                () = merge => {}
            }
            Ok(())
        })
    }
}

enum News {
    /// One object.
    Change(Instant, Change),
    /// All objects of the kind that there are were sent.
    Synced(Kind),
}

/// The watch of one kind.
struct Follower {
    watched: &'static Watched,
    client: Client,
    observed: Arc<Observed>,
    out: mpsc::Sender<News>,
    /// A hash of each object's trimmed form.
    known: HashMap<ObjectKey, u64>,
}

/// Nobody listens any more.
struct Gone;

impl Follower {
    async fn run(mut self) {
        let mut misses = 0_u32;
        loop {
            for version in self.watched.versions {
                match self.follow(self.watched.resource(version)).await {
                    Err(Gone) => return,
                    Ok(true) => misses = 0,
                    Ok(false) => {}
                }
            }
            misses += 1;
            // A single miss after the kind was there may be the API server's own restart.
            if self.known.is_empty() || misses > 1 {
                if misses <= 2 {
                    let kind = self.watched.kind.as_str();
                    tracing::info!("the API server does not have kind {kind}: {}", self.watched.remedy());
                }
                let gone: Vec<ObjectKey> = self.known.keys().cloned().collect();
                if self.remove(gone).await.is_err()
                    || self.out.send(News::Synced(self.watched.kind)).await.is_err()
                {
                    return;
                }
            }
            sleep(ABSENT_RETRY).await;
        }
    }

    /// Follows until the API server says that it does not have the resource; true where it had it before.
    async fn follow(&mut self, resource: ApiResource) -> Result<bool, Gone> {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let config = watcher::Config::default().timeout(WATCH);
        let mut events = std::pin::pin!(watcher(api, config));
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut listed: Option<HashSet<ObjectKey>> = None;
        let mut found = false;
        let mut failing = false;
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    backoff.reset();
                    if std::mem::take(&mut failing) {
                        tracing::info!("the watch of {} works again", self.watched.kind.as_str());
                    }
                    found |= !matches!(event, Event::Init);
                    self.take(event, &mut listed).await?;
                }
                Err(error) if is_absent(&error) => return Ok(found),
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        let kind = self.watched.kind.as_str();
                        tracing::warn!(
                            "the watch of {kind} fails: {error}; what was read before goes on; if it is forbidden, \
                             apply the operator's RBAC again"
                        );
                    }
                    sleep(backoff.next()).await;
                }
            }
        }
        Ok(found)
    }

    async fn take(
        &mut self,
        event: Event<DynamicObject>,
        listed: &mut Option<HashSet<ObjectKey>>,
    ) -> Result<(), Gone> {
        match event {
            Event::Init => *listed = Some(HashSet::new()),
            Event::InitApply(object) => {
                if let Some(key) = self.apply(object).await?
                    && let Some(listed) = listed
                {
                    listed.insert(key);
                }
            }
            Event::InitDone => {
                let listed = listed.take().unwrap_or_default();
                let gone = self.known.keys().filter(|k| !listed.contains(*k)).cloned().collect();
                self.remove(gone).await?;
                self.out.send(News::Synced(self.watched.kind)).await.map_err(|_| Gone)?;
            }
            Event::Apply(object) => drop(self.apply(object).await?),
            Event::Delete(object) => {
                if let Some(key) = read::key(self.watched.kind, &object) {
                    self.remove(vec![key]).await?;
                }
            }
        }
        Ok(())
    }

    async fn apply(&mut self, object: DynamicObject) -> Result<Option<ObjectKey>, Gone> {
        let kind = self.watched.kind;
        let Some(key) = read::key(kind, &object) else { return Ok(None) };
        if observed::carries_status(kind) {
            self.observed.note(&key, &object);
        }
        let text = trim::trim(kind, object);
        let hash = read::hash(&text.json);
        if self.known.get(&key) != Some(&hash) {
            self.known.insert(key.clone(), hash);
            let change = read::change(key.clone(), &text);
            self.out.send(News::Change(Instant::now(), change)).await.map_err(|_| Gone)?;
        }
        Ok(Some(key))
    }

    async fn remove(&mut self, keys: Vec<ObjectKey>) -> Result<(), Gone> {
        for key in keys {
            self.known.remove(&key);
            self.observed.forget(&key);
            self.out.send(News::Change(Instant::now(), Change::Remove(key))).await.map_err(|_| Gone)?;
        }
        Ok(())
    }
}

fn is_absent(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(e) | WatchStartFailed(e) | WatchFailed(e) => {
            matches!(e, kube::Error::Api(status) if status.code == 404)
        }
        _ => false,
    }
}

/// News of all kinds into batches; the first one when every kind was read.
async fn merge(mut news: mpsc::Receiver<News>, out: mpsc::Sender<Batch>, kept: Vec<Kept>) {
    let origin: Arc<str> = "kubernetes".into();
    let mut kept: HashMap<ObjectKey, Kept> = kept.into_iter().map(|k| (k.document.key.clone(), k)).collect();
    let mut missing: HashSet<Kind> = WATCHED.iter().map(|w| w.kind).collect();
    let mut changes: Vec<(Arc<str>, Change)> = Vec::new();
    let mut noticed = Instant::now();
    // The first batch: nothing goes out before everything is in.
    while !missing.is_empty() {
        match news.recv().await {
            None => return,
            Some(News::Synced(kind)) => drop(missing.remove(&kind)),
            Some(News::Change(_, change)) => {
                // A form that was good in an earlier process goes on where the present one is not.
                if let Change::Bad { key, .. } = &change
                    && let Some(kept) = kept.remove(key)
                {
                    changes.push((kept.origin, Change::Apply(kept.document)));
                }
                changes.push((Arc::clone(&origin), change));
            }
        }
    }
    drop(kept);
    loop {
        let batch = Batch { noticed, changes: std::mem::take(&mut changes), unreadable: Default::default() };
        if out.send(batch).await.is_err() {
            return;
        }
        while changes.is_empty() {
            match news.recv().await {
                None => return,
                Some(News::Synced(_)) => {}
                Some(News::Change(at, change)) => {
                    noticed = at;
                    changes.push((Arc::clone(&origin), change));
                }
            }
        }
        let last = tokio::time::Instant::now() + MAX_WAIT;
        while changes.len() < MAX_BATCH {
            let rest = last.min(tokio::time::Instant::now() + DEBOUNCE);
            tokio::select! {
                () = sleep_until(rest) => break,
                item = news.recv() => match item {
                    None => return,
                    Some(News::Synced(_)) => {}
                    Some(News::Change(_, change)) => changes.push((Arc::clone(&origin), change)),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests;
