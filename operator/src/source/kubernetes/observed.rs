//! The statuses that the API server holds, so that only differences are written.

use std::{collections::HashMap, sync::Arc};

use kube::api::DynamicObject;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::watch;

use crate::objects::{Kind, ObjectKey};

/// What is known of an object that carries a status.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Its `metadata.uid`.
    pub uid: String,
    /// Its `metadata.resourceVersion`, for writes that must not overwrite another's.
    pub resource_version: String,
    /// Its `metadata.generation`.
    pub generation: i64,
    /// Its `status`.
    pub status: Value,
    /// `spec.parentRefs` of a route; null otherwise.
    pub parent_refs: Value,
}

impl Seen {
    /// Whether its conditions were written for that generation.
    pub fn speaks_of(&self, generation: i64) -> bool {
        let conditions =
            self.status.pointer("/conditions").or_else(|| self.status.pointer("/parents/0/conditions"));
        let first = conditions.and_then(|c| c.get(0)?.get("observedGeneration")?.as_i64());
        first == Some(generation)
    }
}

/// The objects that carry a status.
#[derive(Debug, Default)]
pub struct Observed {
    seen: Mutex<HashMap<ObjectKey, Arc<Seen>>>,
    changed: watch::Sender<u64>,
}

/// Whether Weft writes a status to objects of the kind.
pub fn carries_status(kind: Kind) -> bool {
    matches!(kind, Kind::AuthorizationPolicy | Kind::TrafficPolicy | Kind::MeshConfig | Kind::HttpRoute)
}

impl Observed {
    /// What is known of one.
    pub fn get(&self, key: &ObjectKey) -> Option<Arc<Seen>> {
        self.seen.lock().get(key).cloned()
    }

    /// Changes whenever something of it does.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Takes an object as the API server sent it.
    pub fn note(&self, key: &ObjectKey, object: &DynamicObject) {
        let parent_refs = (key.kind == Kind::HttpRoute)
            .then(|| object.data.pointer("/spec/parentRefs").cloned())
            .flatten()
            .unwrap_or_default();
        let seen = Seen {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            resource_version: object.metadata.resource_version.clone().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            status: object.data.get("status").cloned().unwrap_or_default(),
            parent_refs,
        };
        self.seen.lock().insert(key.clone(), Arc::new(seen));
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Takes the removal of an object.
    pub fn forget(&self, key: &ObjectKey) {
        self.seen.lock().remove(key);
    }
}
