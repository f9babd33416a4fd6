//! What the operator counts.

use std::sync::Arc;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use crate::distribution::Distribution;

/// A refusal's reason; a fixed set.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    /// The reason.
    pub reason: &'static str,
}

/// A kind of object and how it fares.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ObjectLabels {
    /// The kind.
    pub kind: &'static str,
    /// `true` or `false`.
    pub accepted: &'static str,
}

/// Handles to all metrics; cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Calls without a valid token.
    pub unauthenticated: Family<Reason, Counter>,
    /// Certificates signed.
    pub signed: Counter,
    /// Certificates refused.
    pub sign_refused: Family<Reason, Counter>,
    /// Open streams of agents.
    pub streams: Gauge,
    /// Messages sent to agents.
    pub deltas: Counter,
    /// Resources that agents rejected.
    pub rejected: Counter,
    /// The newest version's sequence.
    pub sequence: Gauge,
    /// Objects by kind.
    pub objects: Family<ObjectLabels, Gauge>,
    /// Places of the source that name no object.
    pub unreadable: Gauge,
    /// From a change being noticed to its version being published.
    pub published: Histogram,
    /// From a change being noticed to one node's ack.
    pub enforced: Histogram,
}

impl Metrics {
    /// Registers them all.
    pub fn new(registry: &mut Registry) -> Self {
        let buckets = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 30.0];
        let metrics = Self {
            unauthenticated: Family::default(),
            signed: Counter::default(),
            sign_refused: Family::default(),
            streams: Gauge::default(),
            deltas: Counter::default(),
            rejected: Counter::default(),
            sequence: Gauge::default(),
            objects: Family::default(),
            unreadable: Gauge::default(),
            published: Histogram::new(buckets),
            enforced: Histogram::new(buckets),
        };
        let m = metrics.clone();
        let r = registry.sub_registry_with_prefix("weft_operator");
        r.register("unauthenticated_calls", "Calls without a valid token, by reason", m.unauthenticated);
        r.register("svids_signed", "Certificates signed", m.signed);
        r.register("svids_refused", "Certificate requests refused, by reason", m.sign_refused);
        r.register("agent_streams", "Open streams of agents", m.streams);
        r.register("deltas_sent", "Messages sent to agents", m.deltas);
        r.register("resources_rejected", "Resources that agents could not apply", m.rejected);
        r.register("config_sequence", "Sequence of the newest version", m.sequence);
        r.register("objects", "Objects of the source, by kind and whether they are accepted", m.objects);
        r.register("unreadable_files", "Places of the source whose text names no object", m.unreadable);
        r.register_with_unit(
            "apply_to_published",
            "Time from noticing a change to sending it; what grows here waits in the operator",
            Unit::Seconds,
            m.published,
        );
        r.register_with_unit(
            "apply_to_enforced",
            "Time from noticing a change to a node's ack that it enforces it",
            Unit::Seconds,
            m.enforced,
        );
        metrics
    }
}

/// How many connected agents do not have the newest version yet; counted when somebody asks.
#[derive(Debug)]
pub(crate) struct Behind(pub(crate) Arc<Distribution>);

impl Collector for Behind {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let newest = self.0.current().map_or(0, |c| c.version.sequence);
        let (behind, _) = self.0.nodes.behind(newest);
        let gauge = ConstGauge::new(i64::try_from(behind).unwrap_or(i64::MAX));
        let help = "Connected agents that do not enforce the newest version yet";
        gauge.encode(encoder.encode_descriptor(
            "weft_operator_agents_behind",
            help,
            None,
            MetricType::Gauge,
        )?)
    }
}
