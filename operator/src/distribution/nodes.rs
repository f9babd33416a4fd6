//! What the agents say: who is connected, and which version each enforces.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;
use weft_core::Version;

/// Streams that one node may hold: an agent and its successor, and one that the network lost.
const MAX_STREAMS: usize = 4;
/// Rejected resources that are kept per node.
const MAX_REJECTED: usize = 256;
/// Longest error text that is kept.
const MAX_ERROR: usize = 1024;

/// What is known of one node's agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeState {
    /// Its streams.
    pub streams: usize,
    /// What it enforces.
    pub acked: Option<Version>,
    /// What it could not apply: the key as JSON, and why.
    pub rejected: Vec<(String, String)>,
    /// The agent's version.
    pub agent_version: String,
}

/// All nodes that ever connected to this process. Nodes prove their names by tokens that an operator gave out, so
/// their number is bounded by those.
#[derive(Debug)]
pub struct Nodes {
    epoch: u64,
    states: Mutex<BTreeMap<String, NodeState>>,
    changed: watch::Sender<u64>,
}

/// A node holds too many streams.
#[derive(Debug, thiserror::Error)]
#[error("node {0} holds {MAX_STREAMS} streams already; end the agents that are too many")]
pub struct TooManyStreams(String);

/// One open stream; its end is noted when this is dropped.
#[derive(Debug)]
pub struct Stream {
    nodes: Arc<crate::Distribution>,
    node: String,
}

impl Nodes {
    pub(super) fn new(epoch: u64) -> Self {
        Self { epoch, states: Mutex::new(BTreeMap::new()), changed: watch::Sender::new(0) }
    }

    /// Changes whenever something of [`Self::states`] does.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A copy of what is known.
    pub fn states(&self) -> BTreeMap<String, NodeState> {
        self.states.lock().clone()
    }

    /// How many connected nodes have not acknowledged a version of this process, and how many are connected.
    pub fn behind(&self, sequence: u64) -> (usize, usize) {
        let states = self.states.lock();
        let connected = states.values().filter(|s| s.streams > 0);
        connected.fold((0, 0), |(behind, all), state| {
            let late = state.acked.is_none_or(|acked| acked.sequence < sequence);
            (behind + usize::from(late), all + 1)
        })
    }

    /// Notes an ack; false where it is of another epoch, or goes back.
    pub fn ack(&self, node: &str, version: Version, mut rejected: Vec<(String, String)>) -> bool {
        let mut states = self.states.lock();
        let Some(state) = states.get_mut(node) else { return false };
        let older = state.acked.is_some_and(|acked| acked.sequence > version.sequence);
        if version.epoch != self.epoch || older {
            return false;
        }
        rejected.truncate(MAX_REJECTED);
        for (key, error) in &mut rejected {
            for text in [key, error] {
                *text = text.chars().filter(|c| !c.is_control()).take(MAX_ERROR).collect();
            }
        }
        state.acked = Some(version);
        state.rejected = rejected;
        drop(states);
        self.notify();
        true
    }

    fn notify(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }
}

impl Stream {
    /// Notes a new stream of `node`, which holds `version`.
    ///
    /// # Errors
    /// When the node holds too many.
    pub fn open(
        distribution: &Arc<crate::Distribution>,
        node: &str,
        agent_version: &str,
    ) -> Result<Self, TooManyStreams> {
        let nodes = &distribution.nodes;
        let mut states = nodes.states.lock();
        let state = states.entry(node.to_owned()).or_default();
        if state.streams >= MAX_STREAMS {
            return Err(TooManyStreams(node.into()));
        }
        state.streams += 1;
        // An agent that comes back starts over; its predecessor's ack says nothing of it.
        if state.streams == 1 {
            state.acked = None;
            state.rejected.clear();
        }
        state.agent_version = agent_version.chars().filter(|c| !c.is_control()).take(64).collect();
        drop(states);
        nodes.notify();
        Ok(Self { nodes: Arc::clone(distribution), node: node.into() })
    }

    /// The node.
    pub fn node(&self) -> &str {
        &self.node
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let nodes = &self.nodes.nodes;
        if let Some(state) = nodes.states.lock().get_mut(&self.node) {
            state.streams = state.streams.saturating_sub(1);
        }
        nodes.notify();
    }
}
