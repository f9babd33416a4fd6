//! Takes the source's batches, keeps the index, publishes what follows.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use weft_core::Version;
use weft_runtime::ReadyGuard;

use crate::{
    distribution::Distribution,
    index::{Index, Report},
    last_good::LastGood,
    metrics::{Metrics, ObjectLabels},
    objects::ObjectKey,
    source::{Batch, Change},
};

/// What is known of all objects after a batch; the status writer's input.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overview {
    /// The version that was published.
    pub(crate) version: Version,
    /// Each object's report, and the version from which on it is enforced.
    pub(crate) objects: BTreeMap<Arc<ObjectKey>, (Arc<Report>, Version)>,
    /// Nodes that there are by their objects.
    pub(crate) nodes: Arc<BTreeSet<String>>,
    /// Places that name no object.
    pub(crate) unreadable: BTreeMap<Arc<str>, String>,
}

/// Each agent is sent each version. What comes in a row is sent together, at intervals of this much for each agent, and
/// the first of a row at once.
const PACE: Duration = Duration::from_micros(100);
/// The longest of these intervals.
const MAX_PACE: Duration = Duration::from_millis(200);
/// How many of these intervals the next of a row waits at most where agents have not taken the last one yet: while they
/// do not keep up, what lies in between would only be more work for them.
const BACKLOG: u32 = 10;

pub(crate) struct Controller {
    pub(crate) index: Index,
    /// Where the source keeps nothing by itself.
    pub(crate) last_good: Option<LastGood>,
    pub(crate) distribution: Arc<Distribution>,
    pub(crate) metrics: Metrics,
    pub(crate) overview: watch::Sender<Arc<Overview>>,
}

impl Controller {
    /// Runs until the source ends.
    pub(crate) async fn run(mut self, mut batches: mpsc::Receiver<Batch>, ready: ReadyGuard) {
        let mut ready = Some(ready);
        while let Some(mut batch) = batches.recv().await {
            // What waits already is built once.
            let mut rest = Vec::new();
            while let Ok(next) = batches.try_recv() {
                rest.push(next);
            }
            for next in rest {
                batch.changes.extend(next.changes);
                batch.unreadable = next.unreadable;
            }
            self.take(batch);
            if let Some(ready) = ready.take() {
                ready.ready();
            }
            let agents = u32::try_from(self.metrics.streams.get()).unwrap_or_default();
            let pace = PACE.saturating_mul(agents).min(MAX_PACE);
            sleep(pace).await;
            for _ in 1..BACKLOG {
                if !self.distribution.backlog() {
                    break;
                }
                sleep(pace).await;
            }
        }
    }

    pub(crate) fn take(&mut self, batch: Batch) {
        let before = Arc::clone(&self.overview.borrow());
        for (place, message) in &batch.unreadable {
            if before.unreadable.get(place) != Some(message) {
                tracing::error!("{place}: {message}; what it held before goes on");
            }
        }
        let mut changed = BTreeSet::new();
        let mut forms = BTreeMap::new();
        for (origin, change) in batch.changes {
            let key = change.key().clone();
            changed.insert(key.clone());
            let form = match &change {
                Change::Apply(document) => Some(Some((document.generation, Arc::clone(&document.text)))),
                Change::Remove(_) => Some(None),
                Change::Bad { .. } => None,
            };
            if let Some(problem) = self.index.apply(&origin, change) {
                tracing::error!("{origin}: {problem}");
            } else if let Some(form) = form {
                forms.insert(key, (origin, form));
            }
        }
        let changes = self.index.update();
        let version = self.distribution.update(changes.resources, batch.noticed);
        self.metrics.published.observe(batch.noticed.elapsed().as_secs_f64());
        // After the push, which must not wait for the disk: what is lost by a crash in between is read again.
        if let Some(last_good) = &mut self.last_good {
            for (key, (origin, form)) in forms {
                match form {
                    Some((generation, text)) => last_good.keep(&origin, &key, generation, &text),
                    None => last_good.forget(&key),
                }
            }
        }
        let mut objects = before.objects.clone();
        for (key, report) in changes.reports {
            let Some(report) = report else {
                objects.remove(&key);
                continue;
            };
            let old = objects.get_mut(&key);
            if !report.accepted.ok && report.accepted.reason != "Invalid" {
                let said = old.as_ref().is_some_and(|(r, _)| r.accepted == report.accepted);
                if !said {
                    tracing::warn!("{}: {}", report.origin, report.accepted.message);
                }
            }
            match old {
                Some((old, since)) => {
                    // What stays the same stays the same allocation.
                    if **old != report {
                        *old = Arc::new(report);
                    }
                    if changed.contains(&key) {
                        *since = version;
                    }
                }
                None => drop(objects.insert(Arc::new(key), (Arc::new(report), version))),
            }
        }
        let nodes = changes.nodes.map_or_else(|| Arc::clone(&before.nodes), Arc::new);
        let overview = Overview { version, objects, nodes, unreadable: batch.unreadable };
        self.count(&overview);
        self.overview.send_replace(Arc::new(overview));
    }

    fn count(&self, overview: &Overview) {
        let mut counts: BTreeMap<(&'static str, &'static str), i64> = BTreeMap::new();
        for (key, (report, _)) in &overview.objects {
            let accepted = if report.accepted.ok { "true" } else { "false" };
            *counts.entry((key.kind.as_str(), accepted)).or_default() += 1;
        }
        self.metrics.objects.clear();
        for ((kind, accepted), count) in counts {
            self.metrics.objects.get_or_create(&ObjectLabels { kind, accepted }).set(count);
        }
        self.metrics.sequence.set(i64::try_from(overview.version.sequence).unwrap_or(i64::MAX));
        self.metrics.unreadable.set(i64::try_from(overview.unreadable.len()).unwrap_or(i64::MAX));
    }
}
