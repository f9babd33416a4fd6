//! Conditions into the status of the objects, by the replica that holds the lease, and only where they differ from what
//! the API server has.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, future::BoxFuture};
use k8s_openapi::jiff::Timestamp;
use kube::{
    Api,
    api::{DynamicObject, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use weft_core::Version;
use weft_runtime::DrainWatcher;

use super::{Cluster, MANAGER, acks::Acks, ca::CaWatch, events::Events, lease::Leadership};
use crate::{
    controller::Overview,
    distribution::Distribution,
    index::{Finding, Report},
    objects::{Kind, ObjectKey},
    source::kubernetes::{
        Observed,
        observed::{Seen, carries_status},
        resource,
    },
    status::{Progress, WriteStatus},
};

/// Who writes an entry of a route's `status.parents`.
pub const CONTROLLER: &str = "weft.mesh/operator";
/// The shortest time between two rounds; what changes in between is written once.
const ROUND: Duration = Duration::from_millis(200);
/// How often an object is compared again without a change: what a write did not reach.
const AGAIN: Duration = Duration::from_secs(10);
/// Writes in one round.
const MAX_WRITES: usize = 64;
/// Of them, those that only count nodes anew: one agent of a thousand that starts again changes every policy's status,
/// twice.
const MAX_PROGRESS: usize = 24;
/// Writes at one time.
const PARALLEL: usize = 8;
/// Longest wait for the API server.
const REQUEST: Duration = Duration::from_secs(5);
/// How long an object rests after a write that failed.
const REST: Duration = Duration::from_secs(5);
/// Longest message; the API server takes 32 KiB.
const MAX_MESSAGE: usize = 4096;

/// The writer.
pub struct KubernetesStatus {
    cluster: Cluster,
    observed: Arc<Observed>,
    leadership: Leadership,
    acks: Arc<Acks>,
    events: Events,
    resting: HashMap<Arc<ObjectKey>, Instant>,
    /// Where the last round's counting of nodes stopped.
    reached: Option<Arc<ObjectKey>>,
    ca: Option<CaWatch>,
}

impl KubernetesStatus {
    /// Over the objects that the source has seen.
    pub fn new(cluster: Cluster, observed: Arc<Observed>, leadership: Leadership) -> Self {
        let events = Events::new(&cluster);
        let acks = Arc::new(Acks::new(&cluster));
        Self { cluster, observed, leadership, acks, events, resting: HashMap::new(), reached: None, ca: None }
    }

    /// Tells of the CA too, at the MeshConfig.
    #[must_use]
    pub fn with_ca(self, ca: CaWatch) -> Self {
        Self { ca: Some(ca), ..self }
    }

    async fn follow(
        mut self,
        mut overview: watch::Receiver<Arc<Overview>>,
        distribution: Arc<Distribution>,
        drain: DrainWatcher,
    ) {
        let mut nodes = distribution.nodes.changed();
        let mut observed = self.observed.changed();
        let mut others = self.acks.changed();
        loop {
            tokio::select! {
                () = drain.draining() => return,
                () = self.leadership.acquired() => {}
            }
            // Marked as seen before they are read: what changes in between is written in the next round.
            let now = Arc::clone(&overview.borrow_and_update());
            nodes.borrow_and_update();
            observed.borrow_and_update();
            others.borrow_and_update();
            let mut more = false;
            if now.version.sequence > 0 {
                more = tokio::select! {
                    () = drain.draining() => return,
                    more = self.round(&now, &distribution) => more,
                };
            }
            sleep(ROUND).await;
            if more {
                continue;
            }
            tokio::select! {
                () = drain.draining() => return,
                changed = overview.changed() => if changed.is_err() { return },
                changed = nodes.changed() => if changed.is_err() { return },
                _ = observed.changed() => {}
                _ = others.changed() => {}
                () = CaWatch::changed(self.ca.as_mut()) => {}
                () = sleep(AGAIN) => {}
            }
        }
    }

    /// True where more is to be written than one round may.
    async fn round(&mut self, overview: &Overview, distribution: &Distribution) -> bool {
        let mut states = distribution.nodes.states();
        self.acks.add(distribution.epoch(), &mut states);
        let time = format!("{:.0}", Timestamp::now());
        let now = Instant::now();
        self.resting.retain(|_, until| *until > now);
        let mut progress = Progress::new(overview, &states);
        let ca = self.ca.as_ref().map(CaWatch::finding);
        let (mut patches, mut counts) = (Vec::new(), Vec::new());
        let mut more = false;
        let start = self.reached.take();
        for (key, (report, since)) in in_turn(overview, start.as_deref()) {
            if !carries_status(key.kind) || self.resting.contains_key(key) {
                continue;
            }
            let Some(seen) = self.observed.get(key) else { continue };
            let wanted = Wanted {
                findings: with_ca(key, ca.as_ref(), progress.findings(key, report, since.sequence)),
                parents: &report.parents,
                generation: report.generation,
                time: &time,
            };
            // What is new about the object itself goes before what is new about nodes.
            if let Some(status) = wanted.status(key, &seen) {
                let (list, room) = if seen.speaks_of(report.generation) {
                    (&mut counts, MAX_PROGRESS)
                } else {
                    (&mut patches, MAX_WRITES)
                };
                if list.len() < room {
                    list.push((Arc::clone(key), patch(key, &seen, &status)));
                } else {
                    more = true;
                }
            }
        }
        let room = MAX_WRITES.saturating_sub(patches.len());
        more |= counts.len() > room;
        counts.truncate(room);
        self.reached = counts.last().map(|(key, _)| Arc::clone(key));
        patches.extend(counts);
        drop(progress);
        let writes = patches.into_iter().map(|(key, patch)| {
            let (cluster, leadership) = (self.cluster.clone(), self.leadership.clone());
            async move {
                // The lease may have gone since the round began.
                let outcome =
                    if leadership.held() { Some(write(&cluster, &key, &patch).await) } else { None };
                (key, outcome)
            }
        });
        let outcomes: Vec<_> = futures_util::stream::iter(writes).buffer_unordered(PARALLEL).collect().await;
        for (key, outcome) in outcomes {
            match outcome {
                None => more = true,
                Some(Ok(object)) => self.observed.note(&key, &object),
                Some(Err(error)) => {
                    // A conflict is an object that changed; the watch brings its new form.
                    if !error.starts_with("changed") {
                        tracing::warn!("cannot write the status of {key}: {error}");
                    }
                    self.resting.insert(key, now + REST);
                }
            }
        }
        if self.leadership.held() {
            self.events.publish(overview, &self.observed, ca.as_ref()).await;
        }
        more
    }
}

/// The objects in their order, beginning behind one of them.
fn in_turn<'o>(
    overview: &'o Overview,
    behind: Option<&ObjectKey>,
) -> impl Iterator<Item = (&'o Arc<ObjectKey>, &'o (Arc<Report>, Version))> {
    let all = &overview.objects;
    let rest = behind.map(|key| all.range::<ObjectKey, _>((Bound::Excluded(key), Bound::Unbounded)));
    let end = behind.map_or(Bound::Unbounded, Bound::Included);
    rest.into_iter().flatten().chain(all.range::<ObjectKey, _>((Bound::Unbounded, end)))
}

impl WriteStatus for KubernetesStatus {
    fn run(
        self: Box<Self>,
        overview: watch::Receiver<Arc<Overview>>,
        distribution: Arc<Distribution>,
        drain: DrainWatcher,
    ) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let (acks, leadership) = (Arc::clone(&self.acks), self.leadership.clone());
            let exchange = acks.run(overview.clone(), Arc::clone(&distribution), leadership, drain.clone());
            futures_util::join!(self.follow(overview, distribution, drain), exchange);
        })
    }
}

/// The MeshConfig's findings, and how the CA is doing.
fn with_ca(
    key: &ObjectKey,
    ca: Option<&Finding>,
    mut findings: Vec<(&'static str, Finding)>,
) -> Vec<(&'static str, Finding)> {
    if key.kind == Kind::MeshConfig {
        findings.extend(ca.map(|finding| ("CertificateAuthority", finding.clone())));
    }
    findings
}

async fn write(cluster: &Cluster, key: &ObjectKey, patch: &Value) -> Result<DynamicObject, String> {
    let Some(api) = api(cluster, key) else { return Err("it is of no kind of the API server".into()) };
    let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
    match timeout(REQUEST, api.patch_status(&key.name, &params, &Patch::Merge(patch))).await {
        Ok(Ok(object)) => Ok(object),
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Err("changed".into()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer in {REQUEST:?}")),
    }
}

/// The API of an object's kind and namespace.
pub(super) fn api(cluster: &Cluster, key: &ObjectKey) -> Option<Api<DynamicObject>> {
    let resource = resource(key.kind)?;
    let client = cluster.client.clone();
    Some(if key.namespace.is_empty() {
        Api::all_with(client, &resource)
    } else {
        Api::namespaced_with(client, &key.namespace, &resource)
    })
}

/// The identity (and, where others write too, the version) travels with the patch, so that it never lands on an object
/// that only has the same name.
fn patch(key: &ObjectKey, seen: &Seen, status: &Value) -> Value {
    let mut metadata = json!({ "uid": seen.uid });
    if key.kind == Kind::HttpRoute {
        metadata["resourceVersion"] = seen.resource_version.as_str().into();
    }
    json!({ "metadata": metadata, "status": status })
}

struct Wanted<'a> {
    findings: Vec<(&'static str, Finding)>,
    parents: &'a BTreeMap<usize, Finding>,
    generation: i64,
    time: &'a str,
}

impl Wanted<'_> {
    /// The status as it should be; `None` where it is so already.
    fn status(&self, key: &ObjectKey, seen: &Seen) -> Option<Value> {
        if key.kind == Kind::HttpRoute {
            return self.parents(seen);
        }
        let old = seen.status.get("conditions").unwrap_or(&Value::Null);
        let conditions = self.conditions(self.findings.iter().map(|(k, f)| (*k, f)), old)?;
        Some(json!({ "conditions": conditions }))
    }

    /// A route's: one entry for each parent that is a Service; entries of other controllers stay.
    fn parents(&self, seen: &Seen) -> Option<Value> {
        let empty = Vec::new();
        let old = seen.status.get("parents").and_then(Value::as_array).unwrap_or(&empty);
        let ours = |entry: &&Value| entry.get("controllerName").and_then(Value::as_str) == Some(CONTROLLER);
        let mut parents: Vec<Value> = old.iter().filter(|e| !ours(e)).cloned().collect();
        let mut changed = false;
        let refs = seen.parent_refs.as_array().unwrap_or(&empty);
        let mut kept = 0;
        for (i, parent) in refs.iter().enumerate().filter(|(_, p)| is_service(p)) {
            let before = old.iter().filter(ours).find(|e| e.get("parentRef") == Some(parent));
            let null = Value::Null;
            let before = before.and_then(|e| e.get("conditions")).unwrap_or(&null);
            // A parent that is not there is this entry's problem alone; where others are, they accept the route.
            let findings = self.findings.iter().map(|(kind, finding)| match self.parents.get(&i) {
                Some(missing) if *kind == "Accepted" => (*kind, missing),
                _ => (*kind, finding),
            });
            let conditions = match self.conditions(findings, before) {
                None => before.clone(),
                Some(new) => {
                    changed = true;
                    new
                }
            };
            kept += 1;
            parents
                .push(json!({ "parentRef": parent, "controllerName": CONTROLLER, "conditions": conditions }));
        }
        changed |= kept != old.iter().filter(ours).count();
        changed.then(|| json!({ "parents": parents }))
    }

    fn conditions<'f>(
        &self,
        findings: impl Iterator<Item = (&'static str, &'f Finding)>,
        old: &Value,
    ) -> Option<Value> {
        let empty = Vec::new();
        let old = old.as_array().unwrap_or(&empty);
        let mut new = Vec::new();
        for (kind, finding) in findings {
            let status = if finding.ok { "True" } else { "False" };
            let before = old.iter().find(|c| c.get("type").and_then(Value::as_str) == Some(kind));
            let since = before
                .filter(|c| c.get("status").and_then(Value::as_str) == Some(status))
                .and_then(|c| c.get("lastTransitionTime")?.as_str())
                .unwrap_or(self.time);
            let message: String = finding.message.chars().take(MAX_MESSAGE).collect();
            new.push(json!({
                "type": kind,
                "status": status,
                "reason": finding.reason,
                "message": message,
                "observedGeneration": self.generation,
                "lastTransitionTime": since,
            }));
        }
        (new != *old).then_some(Value::Array(new))
    }
}

fn is_service(parent: &Value) -> bool {
    let text = |field| parent.get(field).and_then(Value::as_str);
    text("kind") == Some("Service") && matches!(text("group"), Some("" | "core"))
}

/// The messages of what is not well, by object; what [`Events`] tells of.
pub(super) fn refusals<'o>(
    overview: &'o Overview,
    observed: &Observed,
) -> BTreeMap<&'o ObjectKey, (&'static str, &'o str)> {
    let mut refusals = BTreeMap::new();
    for (key, (report, _)) in overview.objects.iter().map(|(key, known)| (&**key, known)) {
        // A route of somebody else's Gateway is not ours to speak of.
        let foreign = key.kind == Kind::HttpRoute
            && observed
                .get(key)
                .is_none_or(|s| !s.parent_refs.as_array().into_iter().flatten().any(is_service));
        if foreign {
            continue;
        }
        let resolved = report.resolved.as_ref().filter(|r| !r.ok);
        if let Some(bad) = (!report.accepted.ok).then_some(&report.accepted).or(resolved) {
            refusals.insert(key, (bad.reason, bad.message.as_str()));
        }
    }
    refusals
}

#[cfg(test)]
mod tests;
