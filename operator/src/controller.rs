//! Takes the source's batches, keeps the index, publishes what follows.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use tokio::sync::{mpsc, watch};
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
    pub(crate) objects: BTreeMap<ObjectKey, (Report, Version)>,
    /// Nodes that there are by their objects.
    pub(crate) nodes: BTreeSet<String>,
    /// Places that name no object.
    pub(crate) unreadable: BTreeMap<Arc<str>, String>,
}

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
        let output = self.index.build();
        let version = self.distribution.publish(output.resources, batch.noticed);
        // After the push, which must not wait for the disk: what is lost by a crash in between is read again.
        if let Some(last_good) = &mut self.last_good {
            for (key, (origin, form)) in forms {
                match form {
                    Some((generation, text)) => last_good.keep(&origin, &key, generation, &text),
                    None => last_good.forget(&key),
                }
            }
        }
        let objects = output
            .reports
            .into_iter()
            .map(|(key, report)| {
                let old = before.objects.get(&key);
                if !report.accepted.ok && report.accepted.reason != "Invalid" {
                    let said = old.is_some_and(|(r, _)| r.accepted == report.accepted);
                    if !said {
                        tracing::warn!("{}: {}", report.origin, report.accepted.message);
                    }
                }
                let since = match old {
                    Some((_, since)) if !changed.contains(&key) => *since,
                    _ => version,
                };
                (key, (report, since))
            })
            .collect();
        let overview = Overview { version, objects, nodes: output.nodes, unreadable: batch.unreadable };
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
