//! What the operator counts.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

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
            "apply_to_enforced",
            "Time from noticing a change to a node's ack that it enforces it",
            Unit::Seconds,
            m.enforced,
        );
        metrics
    }
}
