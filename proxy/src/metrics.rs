//! What the proxy counts. Every series names source and destination by namespace, workload and identity; their
//! number is capped, and those of Pods that are gone go away.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use foldhash::{HashMap, HashSet};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tokio::sync::watch;
use weft_core::{
    MeshState, NamespacedName, SpiffeId, Workload,
    flow::{Reason, Verdict},
};

/// Bucket bounds of request durations, in seconds.
const BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Distinct (code, verdict), reasons or policies of one pair.
const DETAILS: usize = 64;

/// One side of a pair, as labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Side {
    namespace: Arc<str>,
    workload: Arc<str>,
    identity: Arc<str>,
}

impl Side {
    /// A Pod that the mesh knows.
    pub fn workload(workload: &Workload) -> Self {
        Self {
            namespace: workload.name.namespace.clone(),
            workload: workload.owner.name.clone(),
            identity: workload.identity.as_str().into(),
        }
    }

    /// A peer with an identity but no known Pod.
    pub fn identity(id: &SpiffeId) -> Self {
        let namespace = id.as_service_account().map_or("", |(namespace, _)| namespace);
        Self { namespace: namespace.into(), workload: "unknown".into(), identity: id.as_str().into() }
    }

    /// Somebody outside the mesh.
    pub fn outside() -> Self {
        Self { namespace: "".into(), workload: "outside".into(), identity: "".into() }
    }

    fn overflow() -> Self {
        Self { namespace: "".into(), workload: "overflow".into(), identity: "".into() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PairLabels {
    reporter: &'static str,
    source_namespace: Arc<str>,
    source_workload: Arc<str>,
    source_identity: Arc<str>,
    destination_namespace: Arc<str>,
    destination_workload: Arc<str>,
    destination_identity: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    #[prometheus(flatten)]
    pair: PairLabels,
    response_code: Arc<str>,
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    #[prometheus(flatten)]
    pair: PairLabels,
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabels {
    #[prometheus(flatten)]
    pair: PairLabels,
    verdict: &'static str,
    policy_namespace: Arc<str>,
    policy: Arc<str>,
}

/// A decision, and the policy that made it.
type DecidedBy = (Verdict, Option<NamespacedName>);
type Durations = Family<PairLabels, Histogram, fn() -> Histogram>;

struct Families {
    requests: Family<RequestLabels, Counter>,
    durations: Durations,
    sent: Family<PairLabels, Counter>,
    received: Family<PairLabels, Counter>,
    opened: Family<PairLabels, Counter>,
    closed: Family<PairLabels, Counter>,
    failed: Family<FailureLabels, Counter>,
    policies: Family<PolicyLabels, Counter>,
}

/// Handles of one (reporter, source, destination); fetched once per connection.
pub struct Pair {
    labels: PairLabels,
    families: Arc<Families>,
    /// Bytes from client to server.
    pub sent: Counter,
    /// Bytes from server to client.
    pub received: Counter,
    /// Connections opened.
    pub opened: Counter,
    /// Connections closed.
    pub closed: Counter,
    duration: Histogram,
    requests: Mutex<HashMap<(u16, Verdict), (RequestLabels, Counter)>>,
    failures: Mutex<HashMap<Reason, (FailureLabels, Counter)>>,
    policies: Mutex<HashMap<DecidedBy, (PolicyLabels, Counter)>>,
}

/// Whether the proxy of the source's or of the destination's node counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reported {
    /// The source's.
    Source,
    /// The destination's.
    Destination,
}

impl Reported {
    fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl Pair {
    /// Counts a request; 0 stands for no answer. Codes beyond the cap are counted as 0.
    pub fn request(&self, code: u16, verdict: Verdict, duration: Duration) {
        let mut requests = self.requests.lock();
        let code = if requests.len() < DETAILS || requests.contains_key(&(code, verdict)) { code } else { 0 };
        let (_, counter) = requests.entry((code, verdict)).or_insert_with(|| {
            let labels = RequestLabels {
                pair: self.labels.clone(),
                response_code: code.to_string().into(),
                verdict: verdict_name(verdict),
            };
            let counter = self.families.requests.get_or_create_owned(&labels);
            (labels, counter)
        });
        counter.inc();
        self.duration.observe(duration.as_secs_f64());
    }

    /// Counts a connection that failed or was refused.
    pub fn failed(&self, reason: Reason) {
        let mut failures = self.failures.lock();
        let (_, counter) = failures.entry(reason).or_insert_with(|| {
            let labels = FailureLabels { pair: self.labels.clone(), reason: reason_name(reason) };
            let counter = self.families.failed.get_or_create_owned(&labels);
            (labels, counter)
        });
        counter.inc();
    }

    /// Counts a decision. Policies beyond the cap are counted without a name.
    pub fn decided(&self, verdict: Verdict, policy: Option<&NamespacedName>) {
        let mut policies = self.policies.lock();
        let mut key = (verdict, policy.cloned());
        if policies.len() >= DETAILS && !policies.contains_key(&key) {
            key.1 = None;
        }
        let (_, counter) = policies.entry(key.clone()).or_insert_with(|| {
            let labels = PolicyLabels {
                pair: self.labels.clone(),
                verdict: verdict_name(verdict),
                policy_namespace: key.1.as_ref().map_or_else(|| "".into(), |p| p.namespace.clone()),
                policy: key.1.as_ref().map_or_else(|| "".into(), |p| p.name.clone()),
            };
            let counter = self.families.policies.get_or_create_owned(&labels);
            (labels, counter)
        });
        counter.inc();
    }

    fn remove(&self) {
        let f = &self.families;
        f.durations.remove(&self.labels);
        for family in [&f.sent, &f.received, &f.opened, &f.closed] {
            family.remove(&self.labels);
        }
        self.requests.lock().values().for_each(|(labels, _)| _ = f.requests.remove(labels));
        self.failures.lock().values().for_each(|(labels, _)| _ = f.failed.remove(labels));
        self.policies.lock().values().for_each(|(labels, _)| _ = f.policies.remove(labels));
    }
}

type PairKey = (Reported, Side, Side);

/// All metrics of the proxy.
#[derive(Clone)]
pub struct Metrics {
    families: Arc<Families>,
    pairs: Arc<Mutex<HashMap<PairKey, Arc<Pair>>>>,
    cap: usize,
    /// Tunnel connections that this node opened and that are open.
    pub tunnels: Arc<AtomicUsize>,
    /// How often a pair was asked for beyond those that are told apart.
    pub overflowed: Counter,
    /// Connections that came without an original destination.
    pub original_dst_missing: Counter,
    /// Tunnels and CONNECTs refused because of the identity that the peer has proven.
    pub peer_mismatches: Counter,
    /// Outbound connections refused because of the identity that the kernel knows the client by.
    pub client_mismatches: Counter,
    /// Connections that the proxy would have made to itself.
    pub loops: Counter,
    /// Accepts that failed.
    pub accept_errors: Counter,
    /// Connections refused because a Pod has too many.
    pub limited: Counter,
    /// Handshakes of tunnels that failed.
    pub handshakes_failed: Counter,
    /// Malformed CONNECT requests.
    pub malformed: Counter,
    tunnels_gauge: Gauge<i64, AtomicI64>,
}

impl Metrics {
    /// Registers everything; `cap` is the number of pairs that are told apart.
    pub fn new(registry: &mut Registry, cap: usize) -> Self {
        let families = Arc::new(Families {
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            sent: Family::default(),
            received: Family::default(),
            opened: Family::default(),
            closed: Family::default(),
            failed: Family::default(),
            policies: Family::default(),
        });
        let f = &families;
        registry.register("weft_requests", "HTTP requests", f.requests.clone());
        registry.register(
            "weft_request_duration_seconds",
            "Time from a request's head to its response's head",
            f.durations.clone(),
        );
        registry.register("weft_bytes_sent", "Bytes from source to destination", f.sent.clone());
        registry.register("weft_bytes_received", "Bytes from destination to source", f.received.clone());
        registry.register("weft_connections_opened", "Connections opened", f.opened.clone());
        registry.register("weft_connections_closed", "Opened connections that ended", f.closed.clone());
        registry.register("weft_connections_failed", "Connections refused or failed", f.failed.clone());
        registry.register("weft_policy_verdicts", "Decisions of policy", f.policies.clone());
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let metrics = Self {
            overflowed: counter(
                "weft_metric_pairs_overflowed",
                "Connections and requests counted under workload=overflow because there are too many pairs",
            ),
            original_dst_missing: counter(
                "weft_original_dst_missing",
                "Outbound connections closed because the kernel did not steer them here",
            ),
            peer_mismatches: counter(
                "weft_peer_identity_mismatches",
                "Tunnels and CONNECTs refused because the peer has proven another identity than the Pod there has",
            ),
            client_mismatches: counter(
                "weft_client_identity_mismatches",
                "Outbound connections refused because the kernel knows the client by another identity than the proxy",
            ),
            loops: counter(
                "weft_proxy_loops",
                "Connections closed because they led from the proxy to itself",
            ),
            accept_errors: counter("weft_accept_errors", "Failed accepts"),
            limited: counter("weft_connections_limited", "Connections refused because a Pod has too many"),
            handshakes_failed: counter(
                "weft_tunnel_handshakes_failed",
                "Failed handshakes of accepted tunnels",
            ),
            malformed: counter("weft_tunnel_requests_malformed", "Malformed CONNECT requests"),
            families,
            pairs: Arc::default(),
            cap,
            tunnels: Arc::default(),
            tunnels_gauge: Gauge::default(),
        };
        registry.register(
            "weft_tunnels",
            "Open tunnel connections to other Pods",
            metrics.tunnels_gauge.clone(),
        );
        metrics
    }

    /// The handles of a pair.
    pub fn pair(&self, reported: Reported, source: Side, destination: Side) -> Arc<Pair> {
        let mut pairs = self.pairs.lock();
        let mut key = (reported, source, destination);
        if let Some(pair) = pairs.get(&key) {
            return pair.clone();
        }
        if pairs.len() >= self.cap {
            self.overflowed.inc();
            key = (reported, Side::overflow(), Side::overflow());
        }
        let made = || Arc::new(self.make(&key));
        pairs.entry(key.clone()).or_insert_with(made).clone()
    }

    /// Takes away the series of workloads that `state` no longer has, and brings the gauges up to date.
    pub fn sweep(&self, state: &MeshState) {
        let present: HashSet<(Arc<str>, Arc<str>)> =
            state.workloads().map(|w| (w.name.namespace.clone(), w.owner.name.clone())).collect();
        let there = |side: &Side| {
            side.identity.is_empty()
                || side.workload.as_ref() == "unknown"
                || present.contains(&(side.namespace.clone(), side.workload.clone()))
        };
        self.pairs.lock().retain(|(_, source, destination), pair| {
            let keep = Arc::strong_count(pair) > 1 || (there(source) && there(destination));
            if !keep {
                pair.remove();
            }
            keep
        });
        self.refresh();
    }

    /// Sweeps after changes of the state, at most once a second, and keeps the gauges up to date.
    pub async fn keep(&self, mut state: watch::Receiver<Arc<MeshState>>) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            match state.has_changed() {
                Ok(true) => {
                    let now = state.borrow_and_update().clone();
                    self.sweep(&now);
                }
                Ok(false) => self.refresh(),
                Err(_) => return,
            }
        }
    }

    /// Brings the gauges up to date.
    pub fn refresh(&self) {
        self.tunnels_gauge.set(i64::try_from(self.tunnels.load(Ordering::Relaxed)).unwrap_or(i64::MAX));
    }

    fn make(&self, (reported, source, destination): &PairKey) -> Pair {
        let labels = PairLabels {
            reporter: reported.name(),
            source_namespace: source.namespace.clone(),
            source_workload: source.workload.clone(),
            source_identity: source.identity.clone(),
            destination_namespace: destination.namespace.clone(),
            destination_workload: destination.workload.clone(),
            destination_identity: destination.identity.clone(),
        };
        let f = &self.families;
        Pair {
            families: f.clone(),
            sent: f.sent.get_or_create_owned(&labels),
            received: f.received.get_or_create_owned(&labels),
            opened: f.opened.get_or_create_owned(&labels),
            closed: f.closed.get_or_create_owned(&labels),
            duration: f.durations.get_or_create_owned(&labels),
            requests: Mutex::default(),
            failures: Mutex::default(),
            policies: Mutex::default(),
            labels,
        }
    }
}

/// A verdict as a label.
fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Forwarded => "forwarded",
        Verdict::Denied => "denied",
        Verdict::Error => "error",
        Verdict::Audited => "audited",
    }
}

/// A reason as a label: `PolicyDenied` is `policy_denied`.
fn reason_name(reason: Reason) -> String {
    let mut name = String::new();
    for c in format!("{reason:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_lowercase());
    }
    name
}
