//! Versions, and what each node is sent: versioned deltas with acks and resume.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, OnceLock},
    time::Instant,
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use weft_core::{Resource, ResourceKey, Version, Workload};

mod messages;
pub mod nodes;

pub use messages::{Encoded, MessageError};
pub use nodes::Nodes;

/// Changes that are kept, so that an agent that was away for a short time gets the difference only.
const HISTORY: usize = 256;
/// Most keys that the kept changes name together; what goes beyond makes the oldest forgotten.
const HISTORY_KEYS: usize = 200_000;

/// Everything at one version.
#[derive(Debug)]
pub struct Snapshot {
    /// The version.
    pub version: Version,
    /// All resources, before they are cut to a node's share.
    pub resources: BTreeMap<ResourceKey, Published>,
    /// What led here, newest last.
    changes: VecDeque<Arc<Change>>,
    messages: messages::Messages,
}

/// A resource, and its text as nodes get it: written once, sent to each.
#[derive(Debug, Clone)]
pub struct Published {
    /// The resource.
    pub resource: Resource,
    json: Arc<[OnceLock<Bytes>; 2]>,
}

/// What one version changed.
#[derive(Debug)]
struct Change {
    sequence: u64,
    /// When it was noticed.
    noticed: Instant,
    keys: Vec<ResourceKey>,
}

/// The state of this process.
#[derive(Debug)]
pub struct Distribution {
    epoch: u64,
    /// Held while a version is made, so that two publishers cannot swap their order.
    publishing: Mutex<()>,
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
            publishing: Mutex::new(()),
            current: watch::Sender::new(None),
            nodes: Nodes::new(epoch),
        }
    }

    /// The epoch of this process.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Takes a new state. Where nothing differs from the last one, its version stays.
    pub fn publish(&self, resources: BTreeMap<ResourceKey, Resource>, noticed: Instant) -> Version {
        let publishing = self.publishing.lock();
        let last = self.current();
        let gone = last.iter().flat_map(|l| l.resources.keys()).filter(|key| !resources.contains_key(*key));
        let mut changes: Vec<_> = gone.map(|key| (key.clone(), None)).collect();
        changes.extend(resources.into_iter().map(|(key, resource)| (key, Some(resource))));
        self.commit(&publishing, changes, noticed)
    }

    /// Takes what may differ from the last state; `None` where a resource is no more. Where nothing does, its version
    /// stays.
    pub fn update(
        &self,
        changes: impl IntoIterator<Item = (ResourceKey, Option<Resource>)>,
        noticed: Instant,
    ) -> Version {
        self.commit(&self.publishing.lock(), changes, noticed)
    }

    fn commit(
        &self,
        _publishing: &MutexGuard<'_, ()>,
        changes: impl IntoIterator<Item = (ResourceKey, Option<Resource>)>,
        noticed: Instant,
    ) -> Version {
        let last = self.current();
        let known = |key: &ResourceKey| last.as_ref().and_then(|l| l.resources.get(key));
        let changes: Vec<_> = (changes.into_iter())
            .filter(|(key, new)| known(key).map(|old| &old.resource) != new.as_ref())
            .collect();
        if let Some(last) = last.as_ref().filter(|_| changes.is_empty()) {
            return last.version;
        }
        let mut resources = last.as_ref().map_or_else(BTreeMap::new, |l| l.resources.clone());
        let mut keys = Vec::with_capacity(changes.len());
        for (key, new) in changes {
            keys.push(key.clone());
            match new {
                Some(resource) => drop(resources.insert(key, Published { resource, json: Arc::default() })),
                None => drop(resources.remove(&key)),
            }
        }
        let sequence = last.as_ref().map_or(0, |l| l.version.sequence) + 1;
        let version = Version { epoch: self.epoch, sequence };
        let mut changes = last.as_ref().map_or_else(VecDeque::new, |l| l.changes.clone());
        changes.push_back(Arc::new(Change { sequence, noticed, keys }));
        while changes.len() > HISTORY
            || (changes.len() > 1 && changes.iter().map(|c| c.keys.len()).sum::<usize>() > HISTORY_KEYS)
        {
            changes.pop_front();
        }
        self.current.send_replace(Some(Arc::new(Snapshot {
            version,
            resources,
            changes,
            messages: messages::Messages::default(),
        })));
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

    /// Whether more than a tenth of the agents have not taken the newest version yet.
    pub fn backlog(&self) -> bool {
        let newest = self.current().map_or(0, |current| current.version.sequence);
        let (behind, all) = self.nodes.behind(newest);
        behind * 10 > all
    }

    /// When a kept version's change was noticed.
    pub fn noticed(&self, version: Version) -> Option<Instant> {
        let current = self.current()?;
        let change = current.changes.iter().rev().find(|c| c.sequence == version.sequence)?;
        (version.epoch == self.epoch).then_some(change.noticed)
    }
}

/// What a node must be told to get to a snapshot.
#[derive(Debug)]
pub struct Difference<'a> {
    /// What is not listed is gone.
    pub full: bool,
    /// New and changed resources.
    pub upserted: Vec<&'a Published>,
    /// Resources that are no more.
    pub removed: Vec<&'a ResourceKey>,
}

impl Snapshot {
    /// What leads from `held` here; everything where that version is of another epoch or forgotten.
    pub fn since(&self, held: Version) -> Difference<'_> {
        if !self.knows(held) {
            return Difference {
                full: true,
                upserted: self.resources.values().collect(),
                removed: Vec::new(),
            };
        }
        let newer = self.changes.iter().rev().take_while(|c| c.sequence > held.sequence);
        let keys: BTreeSet<&ResourceKey> = newer.flat_map(|c| &c.keys).collect();
        let (mut upserted, mut removed) = (Vec::new(), Vec::new());
        for key in keys {
            match self.resources.get(key) {
                Some(resource) => upserted.push(resource),
                None => removed.push(key),
            }
        }
        Difference { full: false, upserted, removed }
    }

    /// Whether the way from `held` is known.
    fn knows(&self, held: Version) -> bool {
        let oldest = self.changes.front().map_or(u64::MAX, |c| c.sequence);
        held.epoch == self.version.epoch
            && held.sequence > 0
            && held.sequence <= self.version.sequence
            && held.sequence.saturating_add(1) >= oldest
    }
}

impl Published {
    /// The node that is told more of it than the others.
    fn tells_more(&self) -> Option<&Arc<str>> {
        match &self.resource {
            Resource::Workload(w) if w.netns.is_some() => Some(&w.node),
            _ => None,
        }
    }

    /// The resource as `node` gets it, as JSON: only a Pod's own node learns where its namespace is.
    ///
    /// # Errors
    /// When it does not serialise.
    pub fn json(&self, node: &str) -> Result<Bytes, serde_json::Error> {
        if self.tells_more().is_none_or(|own| **own != *node) {
            return self.foreign();
        }
        let [own, _] = &*self.json;
        written(own, || serde_json::to_vec(&self.resource))
    }

    /// As all other nodes get it.
    fn foreign(&self) -> Result<Bytes, serde_json::Error> {
        let [_, foreign] = &*self.json;
        written(foreign, || match &self.resource {
            Resource::Workload(w) if w.netns.is_some() => {
                let stripped = Workload { netns: None, ..Workload::clone(w) };
                serde_json::to_vec(&Resource::Workload(Arc::new(stripped)))
            }
            resource => serde_json::to_vec(resource),
        })
    }
}

/// What is there, or what is to be there.
fn written(
    place: &OnceLock<Bytes>,
    write: impl FnOnce() -> Result<Vec<u8>, serde_json::Error>,
) -> Result<Bytes, serde_json::Error> {
    if let Some(json) = place.get() {
        return Ok(json.clone());
    }
    let json = write()?;
    Ok(place.get_or_init(|| json.into()).clone())
}

#[cfg(test)]
mod tests;
