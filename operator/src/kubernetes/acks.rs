//! What the other replica's agents enforce. Agents are spread over the replicas, but only the holder of the lease writes
//! statuses; so the others tell it, in a ConfigMap with one key for each Pod.
//!
//! Versions are each replica's own, so what a node holds is named by its inventory: a hash of all objects that carry a
//! status, with their generations. A replica that had the same inventory once knows at which of its versions that was.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use weft_core::Version;
use weft_runtime::DrainWatcher;

use super::{ACKS, Cluster, MANAGER, lease::Leadership};
use crate::{
    controller::Overview,
    distribution::{Distribution, nodes::NodeState},
    source::kubernetes::observed::carries_status,
};

/// How often is told and asked at most.
const TURN: Duration = Duration::from_secs(1);
/// How often is told without a change.
const REFRESH: u32 = 5;
/// How long what another replica said counts, without a word from it.
const STALE: Duration = Duration::from_secs(15);
/// Inventories that are remembered.
const HISTORY: usize = 256;
/// Nodes that are taken from one replica.
const MAX_NODES: usize = 20_000;
/// Longest wait for the API server.
const REQUEST: Duration = Duration::from_secs(3);

/// What a replica says of its agents.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Told {
    /// Grows, so that a replica that is there can be told from one that was.
    beat: u64,
    /// Connected nodes by what they enforce; under the empty inventory those that enforce nothing yet.
    nodes: BTreeMap<String, Vec<String>>,
    /// By node, what it could not apply: the resource's key as JSON, and why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    rejected: BTreeMap<String, Vec<(String, String)>>,
}

struct Heard {
    told: Told,
    since: Instant,
}

#[derive(Default)]
struct State {
    /// The version from which on an inventory held, newest last.
    history: VecDeque<(u64, String)>,
    heard: HashMap<String, Heard>,
}

/// The exchange between replicas.
pub struct Acks {
    api: Api<ConfigMap>,
    pod: String,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

impl Acks {
    /// In Weft's namespace.
    pub fn new(cluster: &Cluster) -> Self {
        Self {
            api: Api::namespaced(cluster.client.clone(), &cluster.namespace),
            pod: cluster.pod.clone(),
            state: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// Changes whenever another replica says something new.
    pub(super) fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Adds the nodes that are connected to other replicas.
    pub(super) fn add(&self, epoch: u64, states: &mut BTreeMap<String, NodeState>) {
        let state = self.state.lock();
        for heard in state.heard.values().filter(|h| h.since.elapsed() < STALE) {
            for (inventory, nodes) in &heard.told.nodes {
                let sequence = state.history.iter().rev().find(|(_, i)| i == inventory).map(|(s, _)| *s);
                for node in nodes.iter().take(MAX_NODES) {
                    let known = states.entry(node.clone()).or_default();
                    if known.streams == 0 {
                        *known = NodeState {
                            streams: 1,
                            acked: sequence.map(|sequence| Version { epoch, sequence }),
                            rejected: heard.told.rejected.get(node).cloned().unwrap_or_default(),
                            agent_version: String::new(),
                        };
                    }
                }
            }
        }
    }

    /// Tells and listens until the process drains.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut overview: watch::Receiver<Arc<Overview>>,
        distribution: Arc<Distribution>,
        leadership: Leadership,
        drain: DrainWatcher,
    ) {
        let mut ticks = interval(TURN);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Told::default();
        let mut quiet = 0;
        let mut failing = false;
        loop {
            let told = tokio::select! {
                () = drain.draining() => return,
                changed = overview.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Each one is remembered, so that none is missing when another replica names it.
                    let now = Arc::clone(&overview.borrow_and_update());
                    self.remember(&now);
                    continue;
                }
                _ = ticks.tick() => self.told(&distribution, last.beat),
            };
            let turn = async {
                if leadership.held() {
                    return self.listen().await;
                }
                quiet += 1;
                if quiet >= REFRESH || told.nodes != last.nodes || told.rejected != last.rejected {
                    self.tell(&told).await?;
                    last = told;
                    quiet = 0;
                }
                Ok(())
            };
            match timeout(REQUEST, turn).await {
                Ok(Ok(())) => failing = false,
                outcome => {
                    if !std::mem::replace(&mut failing, true) {
                        let error = match outcome {
                            Ok(Err(error)) => error.to_string(),
                            _ => format!("no answer in {REQUEST:?}"),
                        };
                        tracing::warn!(
                            "ConfigMap {ACKS} cannot be kept, so statuses may miss the other replica's nodes: {error}"
                        );
                    }
                }
            }
        }
    }

    fn remember(&self, overview: &Overview) {
        let inventory = inventory(overview);
        let mut state = self.state.lock();
        if state.history.back().is_none_or(|(_, last)| *last != inventory) {
            state.history.push_back((overview.version.sequence, inventory));
        }
        if state.history.len() > HISTORY {
            state.history.pop_front();
        }
    }

    fn told(&self, distribution: &Distribution, beat: u64) -> Told {
        let mut told = Told { beat: beat.wrapping_add(1), ..Told::default() };
        let state = self.state.lock();
        for (node, known) in distribution.nodes.states() {
            if known.streams == 0 {
                continue;
            }
            let acked = known.acked.map_or(0, |a| a.sequence);
            let inventory = state.history.iter().rev().find(|(since, _)| *since <= acked);
            let inventory = inventory.map(|(_, i)| i.clone()).unwrap_or_default();
            told.nodes.entry(inventory).or_default().push(node.clone());
            if !known.rejected.is_empty() {
                told.rejected.insert(node, known.rejected);
            }
        }
        told
    }

    async fn tell(&self, told: &Told) -> Result<(), kube::Error> {
        let data = BTreeMap::from([(&self.pod, json!(told).to_string())]);
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": ACKS, "labels": {"app.kubernetes.io/part-of": "weft"} },
            "data": data,
        });
        // Each replica owns its own key.
        let params = PatchParams::apply(&format!("{MANAGER}-{}", self.pod)).force();
        self.api.patch(ACKS, &params, &Patch::Apply(&object)).await.map(drop)
    }

    /// Takes what the others say, and clears away the words of those that are gone.
    async fn listen(&self) -> Result<(), kube::Error> {
        let Some(map) = self.api.get_opt(ACKS).await? else { return Ok(()) };
        let gone = self.hear(&map.data.unwrap_or_default());
        if !gone.is_empty() {
            let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
            self.api.patch(ACKS, &params, &Patch::Merge(json!({ "data": gone }))).await?;
        }
        Ok(())
    }

    /// Takes the words of all replicas; returns a merge patch that removes those of replicas that are gone.
    fn hear(&self, all: &BTreeMap<String, String>) -> serde_json::Map<String, Value> {
        let mut state = self.state.lock();
        let mut news = false;
        state.heard.retain(|pod, _| all.contains_key(pod));
        for (pod, text) in all.iter().filter(|(pod, _)| **pod != self.pod) {
            let Ok(told) = serde_json::from_str::<Told>(text) else { continue };
            let before = state.heard.get(pod);
            if before.is_none_or(|b| b.told != told) {
                news |= before.is_none_or(|b| b.told.nodes != told.nodes || b.told.rejected != told.rejected);
                state.heard.insert(pod.clone(), Heard { told, since: Instant::now() });
            }
        }
        let stale = state.heard.iter().filter(|(_, h)| h.since.elapsed() > STALE);
        let gone: serde_json::Map<_, _> = stale.map(|(pod, _)| (pod.clone(), Value::Null)).collect();
        if news || !gone.is_empty() {
            self.changed.send_modify(|n| *n = n.wrapping_add(1));
        }
        gone
    }
}

/// All objects that nodes enforce and that carry a status, in one hash.
fn inventory(overview: &Overview) -> String {
    let mut hasher = DefaultHasher::new();
    for (key, (report, _)) in &overview.objects {
        if carries_status(key.kind) {
            (key, report.generation).hash(&mut hasher);
        }
    }
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use kube::{Client, Config};

    use super::*;
    use crate::{
        distribution::nodes::Stream,
        index::{Finding, Report},
        objects::{Kind, ObjectKey},
    };

    fn acks(pod: &str) -> Acks {
        // Never connected.
        let client = Client::try_from(Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
        Acks::new(&Cluster { client, namespace: "weft-system".into(), pod: pod.into() })
    }

    fn overview(epoch: u64, sequence: u64, generation: i64) -> Overview {
        let key = ObjectKey { kind: Kind::MeshConfig, namespace: String::new(), name: "default".into() };
        let accepted = Finding { ok: true, reason: "Accepted", message: String::new() };
        let report = Report {
            origin: "x".into(),
            generation,
            accepted,
            resolved: None,
            programmable: Some(Ok(())),
            parents: BTreeMap::new(),
        };
        let version = Version { epoch, sequence };
        Overview {
            version,
            objects: [(Arc::new(key), (Arc::new(report), version))].into(),
            ..Overview::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_another_replica_says_counts_in_versions_of_ones_own() {
        let (one, two) = (acks("one"), acks("two"));
        for (sequence, generation) in [(3, 1), (7, 2)] {
            one.remember(&overview(1, sequence, generation));
        }
        for (sequence, generation) in [(20, 1), (31, 2)] {
            two.remember(&overview(2, sequence, generation));
        }
        let distribution = Arc::new(Distribution::new());
        let _streams: Vec<Stream> =
            ["a", "b"].iter().map(|n| Stream::open(&distribution, n, "v").unwrap()).collect();
        let version = |sequence| Version { epoch: distribution.epoch(), sequence };
        distribution.nodes.ack("a", version(33), vec![("k".into(), "bad".into())]);
        distribution.nodes.ack("b", version(25), vec![]);
        let told = json!(two.told(&distribution, 0)).to_string();

        assert!(one.hear(&[("two".into(), told.clone())].into()).is_empty());
        let mut states = BTreeMap::new();
        one.add(1, &mut states);
        assert_eq!(states["a"].acked, Some(Version { epoch: 1, sequence: 7 }));
        assert_eq!(states["a"].rejected, [("k".into(), "bad".into())]);
        assert_eq!(states["b"].acked, Some(Version { epoch: 1, sequence: 3 }));
        // Its own agents it knows better.
        let own = NodeState { streams: 1, ..NodeState::default() };
        let mut states = BTreeMap::from([("a".to_owned(), own.clone())]);
        one.add(1, &mut states);
        assert_eq!(states["a"], own);

        // Without a new word it counts no more, and is cleared away.
        tokio::time::advance(STALE + Duration::from_secs(1)).await;
        let gone = one.hear(&[("two".into(), told)].into());
        assert_eq!(gone.keys().collect::<Vec<_>>(), ["two"]);
        let mut states = BTreeMap::new();
        one.add(1, &mut states);
        assert!(states.is_empty());
    }
}
