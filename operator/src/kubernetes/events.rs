//! Events for what a user must know: `kubectl describe` shows them at the object.

use std::{collections::HashMap, time::Duration};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::time::timeout;

use super::{
    Cluster, MANAGER,
    status::{api, refusals},
};
use crate::{
    controller::Overview,
    index::Finding,
    objects::{Kind, ObjectKey},
    source::kubernetes::Observed,
};

/// Events in one round; the others follow in the next.
const MAX_EVENTS: usize = 16;
/// Longest text; the API server takes 1 KiB.
const MAX_NOTE: usize = 1000;
/// Longest wait for the API server.
const REQUEST: Duration = Duration::from_secs(5);

/// Tells of objects that are refused or partly ignored.
pub(super) struct Events {
    cluster: Cluster,
    recorder: Recorder,
    /// What was told of each object.
    told: HashMap<ObjectKey, String>,
}

impl Events {
    pub(super) fn new(cluster: &Cluster) -> Self {
        let reporter = Reporter { controller: MANAGER.into(), instance: Some(cluster.pod.clone()) };
        let recorder = Recorder::new(cluster.client.clone(), reporter);
        Self { cluster: cluster.clone(), recorder, told: HashMap::new() }
    }

    /// Tells what was not told yet.
    pub(super) async fn publish(&mut self, overview: &Overview, observed: &Observed, ca: Option<&Finding>) {
        let mut refusals = refusals(overview, observed);
        if let Some(bad) = ca.filter(|finding| !finding.ok)
            && let Some(mesh) = overview.objects.keys().find(|key| key.kind == Kind::MeshConfig)
        {
            refusals.entry(mesh).or_insert((bad.reason, bad.message.as_str()));
        }
        self.told.retain(|key, _| refusals.contains_key(key));
        let mut budget = MAX_EVENTS;
        for (key, (reason, message)) in refusals {
            if self.told.get(key).is_some_and(|told| told == message) {
                continue;
            }
            if budget == 0 {
                return;
            }
            budget -= 1;
            let event = Event {
                type_: EventType::Warning,
                reason: reason.into(),
                note: Some(cut(message)),
                action: "Accept".into(),
                secondary: None,
            };
            let told = async {
                let reference = self.reference(key, observed).await?;
                self.recorder.publish(&event, &reference).await.map_err(|e| e.to_string())
            };
            match timeout(REQUEST, told).await {
                Ok(Ok(())) => drop(self.told.insert(key.clone(), message.to_owned())),
                Ok(Err(error)) => {
                    tracing::warn!("cannot write an Event for {key}: {error}");
                    return;
                }
                Err(_) => return,
            }
        }
    }

    async fn reference(&self, key: &ObjectKey, observed: &Observed) -> Result<ObjectReference, String> {
        let uid = match observed.get(key) {
            Some(seen) => Some(seen.uid.clone()),
            None => {
                let api = api(&self.cluster, key).ok_or("it is of no kind of the API server")?;
                let found = api.get_metadata(&key.name).await.map_err(|e| e.to_string())?;
                found.metadata.uid
            }
        };
        Ok(ObjectReference {
            api_version: Some(key.kind.api_version().into()),
            kind: Some(key.kind.as_str().into()),
            name: Some(key.name.clone()),
            namespace: (!key.namespace.is_empty()).then(|| key.namespace.clone()),
            uid,
            ..ObjectReference::default()
        })
    }
}

/// At most [`MAX_NOTE`] bytes, whole characters.
fn cut(message: &str) -> String {
    let end = (0..=MAX_NOTE.min(message.len())).rev().find(|i| message.is_char_boundary(*i));
    message.get(..end.unwrap_or_default()).unwrap_or_default().to_owned()
}
