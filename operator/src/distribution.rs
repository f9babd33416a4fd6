//! Versions, and what each node is sent: versioned deltas with acks and resume.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use parking_lot::Mutex;
use tokio::sync::watch;
use weft_core::{Delta, Resource, ResourceKey, Version, Workload};

pub mod nodes;

pub use nodes::Nodes;

/// States that are kept, so that an agent that was away for a short time gets the difference only.
const HISTORY: usize = 64;

/// Everything at one version.
#[derive(Debug)]
pub struct Snapshot {
    /// The version.
    pub version: Version,
    /// When the change that led to it was noticed.
    pub noticed: Instant,
    /// All resources, before they are cut to a node's share.
    pub resources: BTreeMap<ResourceKey, Resource>,
}

/// The states of this process, newest last.
#[derive(Debug)]
pub struct Distribution {
    epoch: u64,
    history: Mutex<VecDeque<Arc<Snapshot>>>,
    current: watch::Sender<Option<Arc<Snapshot>>>,
    /// What the agents say.
    pub nodes: Nodes,
}

impl Default for Distribution {
    fn default() -> Self {
        Self::new()
    }
}

impl Distribution {
    /// A new one, with an epoch of its own. Nothing is sent before the first [`Self::publish`].
    pub fn new() -> Self {
        // 53 bits: exact in JSON readers that know only floating point. Zero means "nothing" on the wire.
        let epoch = (rand::random::<u64>() >> 11).max(1);
        Self {
            epoch,
            history: Mutex::new(VecDeque::new()),
            current: watch::Sender::new(None),
            nodes: Nodes::new(epoch),
        }
    }

    /// The epoch of this process.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Takes a new state. Where nothing differs from the last one, its version stays.
    pub fn publish(&self, mut resources: BTreeMap<ResourceKey, Resource>, noticed: Instant) -> Version {
        let mut history = self.history.lock();
        let last = history.back();
        if let Some(last) = last {
            let mut same = last.resources.len() == resources.len();
            for (key, resource) in &mut resources {
                match last.resources.get(key) {
                    // The old allocation is kept, so that later comparisons end at the pointer.
                    Some(old) if old == resource => *resource = old.clone(),
                    _ => same = false,
                }
            }
            if same {
                return last.version;
            }
        }
        let sequence = last.map_or(0, |l| l.version.sequence) + 1;
        let version = Version { epoch: self.epoch, sequence };
        let snapshot = Arc::new(Snapshot { version, noticed, resources });
        history.push_back(Arc::clone(&snapshot));
        if history.len() > HISTORY {
            history.pop_front();
        }
        // Under the lock, so that two publishers cannot swap their order.
        self.current.send_replace(Some(snapshot));
        version
    }

    /// Follows the newest state.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Snapshot>>> {
        self.current.subscribe()
    }

    /// The newest state, once there is one.
    pub fn current(&self) -> Option<Arc<Snapshot>> {
        self.current.borrow().clone()
    }

    /// A state that is still kept; `None` for another epoch or one that is too old.
    pub fn at(&self, version: Version) -> Option<Arc<Snapshot>> {
        self.history.lock().iter().rev().find(|s| s.version == version).cloned()
    }

    /// When a kept state's change was noticed.
    pub fn noticed(&self, version: Version) -> Option<Instant> {
        self.at(version).map(|s| s.noticed)
    }
}

/// What `node` must be told to get from `from` to `to`; a full state where `from` is not known.
pub fn delta(from: Option<&Snapshot>, to: &Snapshot, node: &str) -> Delta {
    let Some(from) = from else {
        let upserted = to.resources.values().map(|r| share(r, node)).collect();
        return Delta { version: to.version, full: true, upserted, removed: Vec::new() };
    };
    let upserted = (to.resources.iter())
        .filter(|(key, resource)| from.resources.get(key) != Some(resource))
        .map(|(_, resource)| share(resource, node))
        .collect();
    let removed = from.resources.keys().filter(|key| !to.resources.contains_key(key)).cloned().collect();
    Delta { version: to.version, full: false, upserted, removed }
}

/// A resource as a node gets it: only a Pod's own node learns where its namespace is.
fn share(resource: &Resource, node: &str) -> Resource {
    match resource {
        Resource::Workload(w) if w.netns.is_some() && *w.node != *node => {
            Resource::Workload(Arc::new(Workload { netns: None, ..Workload::clone(w) }))
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests;
