//! Metrics that are read when they are asked for: the kernel's own counters, map fill, expiry.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use tokio::sync::watch;
use weft_core::{MeshState, SubjectId};
use weft_identity::CredentialManager;

use crate::{
    control::Link,
    datapath::{Datapath, KernelVerdict, MapFill},
    flow::{FlowStore, convert::reason_name},
    node::NodeStatus,
};

/// Pairs told apart in the kernel's counters; the rest is one series.
const MAX_SERIES: usize = 4096;
/// How long the fill of the maps is good for: counting walks every entry.
const FILL_AGE: Duration = Duration::from_secs(5);

/// Collects them.
#[derive(Debug)]
pub struct NodeCollector {
    datapath: Datapath,
    state: watch::Receiver<Arc<MeshState>>,
    status: watch::Receiver<Arc<NodeStatus>>,
    credentials: Credentials,
    link: Link,
    flows: FlowStore,
    fill: Mutex<Option<(Instant, Vec<MapFill>)>>,
}

struct Credentials(CredentialManager);

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials")
    }
}

type Labels<const N: usize> = [(&'static str, String); N];

impl NodeCollector {
    /// A collector over the parts of an agent.
    pub fn new(
        datapath: Datapath,
        state: watch::Receiver<Arc<MeshState>>,
        status: watch::Receiver<Arc<NodeStatus>>,
        credentials: CredentialManager,
        link: Link,
        flows: FlowStore,
    ) -> Self {
        Self {
            datapath,
            state,
            status,
            credentials: Credentials(credentials),
            link,
            flows,
            fill: Mutex::default(),
        }
    }

    fn verdicts(&self) -> BTreeMap<Labels<9>, u64> {
        let state = self.state.borrow().clone();
        let mut sums: BTreeMap<Labels<9>, u64> = BTreeMap::new();
        for (key, count) in self.datapath.counters().unwrap_or_default() {
            let verdict = match key.verdict {
                KernelVerdict::Forwarded => "forwarded",
                KernelVerdict::Denied => "denied",
                KernelVerdict::Redirected => "redirected",
            };
            let labels = |source: [String; 3], destination: [String; 3]| {
                let [sn, sw, si] = source;
                let [dn, dw, di] = destination;
                [
                    ("source_namespace", sn),
                    ("source_workload", sw),
                    ("source_identity", si),
                    ("destination_namespace", dn),
                    ("destination_workload", dw),
                    ("destination_identity", di),
                    ("direction", if key.inbound { "inbound" } else { "outbound" }.to_owned()),
                    ("verdict", verdict.to_owned()),
                    ("reason", reason_name(key.reason).to_owned()),
                ]
            };
            let own = labels(named(&state, key.source), named(&state, key.destination));
            let other = || std::array::from_fn(|_| "other".to_owned());
            let labels = if sums.len() < MAX_SERIES || sums.contains_key(&own) {
                own
            } else {
                labels(other(), other())
            };
            *sums.entry(labels).or_default() += count;
        }
        sums
    }

    fn fill(&self) -> Vec<MapFill> {
        let mut fill = self.fill.lock();
        if let Some((at, maps)) = &*fill
            && at.elapsed() < FILL_AGE
        {
            return maps.clone();
        }
        let maps = self.datapath.maps().unwrap_or_default();
        *fill = Some((Instant::now(), maps.clone()));
        maps
    }
}

/// Namespace, workload and identity of a subject.
fn named(state: &MeshState, subject: SubjectId) -> [String; 3] {
    match state.workload_of(subject) {
        Some(w) => [w.name.namespace.to_string(), w.owner.name.to_string(), w.identity.to_string()],
        None => {
            let class = match subject {
                SubjectId::HOST => "host",
                SubjectId::UNKNOWN => "unknown",
                _ => "world",
            };
            [String::new(), class.into(), String::new()]
        }
    }
}

impl Collector for NodeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut verdicts = encoder.encode_descriptor(
            "weft_kernel_verdicts",
            "What the kernel decided, counted exactly",
            None,
            MetricType::Counter,
        )?;
        for (labels, count) in self.verdicts() {
            ConstCounter::new(count).encode(verdicts.encode_family(&labels)?)?;
        }
        for (name, count) in self.datapath.stats().unwrap_or_default() {
            // Its own metric, see `node`.
            if name != "ring_lost" {
                let name = format!("weft_kernel_{name}");
                let metric = encoder.encode_descriptor(
                    &name,
                    "A total of the BPF programs",
                    None,
                    MetricType::Counter,
                )?;
                ConstCounter::new(count).encode(metric)?;
            }
        }
        let maps = self.fill();
        for (name, help, value) in [
            ("weft_map_entries", "Entries in a BPF map", (|m| m.entries as u64) as fn(&MapFill) -> u64),
            ("weft_map_capacity", "Entries that a BPF map can hold", |m| m.capacity.into()),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for map in &maps {
                gauge(value(map)).encode(metric.encode_family(&[("map", map.name)])?)?;
            }
        }
        let mut expiry = encoder.encode_descriptor(
            "weft_svid_expiry_timestamp_seconds",
            "When a credential expires",
            None,
            MetricType::Gauge,
        )?;
        for svid in self.credentials.0.status() {
            if let Some(at) = svid.not_after {
                let labels = [("identity", svid.id.to_string())];
                ConstGauge::new(seconds(at)).encode(expiry.encode_family(&labels)?)?;
            }
        }
        let node = self.status.borrow().clone();
        let totals = self.flows.totals();
        let gauges = [
            ("weft_config_version", "Sequence of the enforced configuration", node.version.sequence),
            (
                "weft_operator_connected",
                "Whether the link to the operator stands",
                u64::from(self.link.connected()),
            ),
            (
                "weft_config_rejected_resources",
                "Resources that could not be applied",
                self.link.rejected().len() as u64,
            ),
            ("weft_flow_ring_entries", "Flows held", totals.held),
            ("weft_flow_ring_capacity", "Flows that can be held", totals.capacity),
        ];
        for (name, help, value) in gauges {
            gauge(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        for (name, help, value) in [
            ("weft_flows", "Flows recorded", totals.seen),
            ("weft_flow_ring_lost", "Flows that a reader was too slow to see", totals.lost_readers),
        ] {
            ConstCounter::new(value).encode(encoder.encode_descriptor(
                name,
                help,
                None,
                MetricType::Counter,
            )?)?;
        }
        Ok(())
    }
}

fn gauge(value: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

fn seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
