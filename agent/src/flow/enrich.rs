//! Joins what the kernel saw with what the proxy saw, by connection, and compares the identities of the two.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, Instant, SystemTime},
};

use foldhash::HashMap;
use parking_lot::Mutex;
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::{io::AsyncWrite, sync::watch};
use weft_core::{
    MeshState, NamespacedName, SpiffeId, SubjectId, Workload,
    flow::{FlowRecord, FlowSink, Peer, Reason, Reporter, Tls, Verdict},
};
use weft_proxy::connections::Connections;
use weft_runtime::{DrainWatcher, Tasks};

use super::{
    access::{AccessLog, Format},
    store::{FlowStore, StoredFlow},
};

/// Connections remembered for joining; the oldest make room.
const MAX_CONNECTIONS: usize = 16_384;
/// How long a redirected connection may wait for the proxy's record before it becomes a flow of its own.
pub const JOIN_WAIT: Duration = Duration::from_secs(3);

/// What the kernel did with a connection or packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KernelVerdict {
    /// Let it pass.
    Forwarded,
    /// Refused it.
    Denied,
    /// Handed it to the proxy.
    Redirected,
}

/// An event of the kernel's ring, in the mesh's own terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFlow {
    /// When.
    pub time: SystemTime,
    /// The client's socket cookie, 0 for packets.
    pub connection: u64,
    /// The cgroup of the caller, 0 where none is known.
    pub cgroup: u64,
    /// At the source's or at the destination's side.
    pub reporter: Reporter,
    /// What was done.
    pub verdict: KernelVerdict,
    /// Why.
    pub reason: Reason,
    /// The client.
    pub source: SocketAddr,
    /// What it spoke to, as dialled.
    pub destination: SocketAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// The client's subject, from its network namespace.
    pub source_subject: SubjectId,
    /// The server's subject.
    pub destination_subject: SubjectId,
    /// The policy that decided.
    pub policy: Option<NamespacedName>,
}

#[derive(Debug, Clone, Default)]
struct Counters {
    joined: Counter,
    mismatches: Counter,
    unjoined: Counter,
    unlogged: Counter,
}

#[derive(Debug, Default)]
struct Seen {
    /// The kernel's identity of the client and its cgroup.
    kernel: Option<(Option<SpiffeId>, u64)>,
    /// The proxy's identity of the client.
    proxy: Option<Option<SpiffeId>>,
}

#[derive(Debug, Default)]
struct Join {
    seen: HashMap<u64, Seen>,
    order: VecDeque<u64>,
    waiting: VecDeque<(Instant, KernelFlow)>,
}

/// Takes kernel events and proxy records, and puts joined flows into the store.
pub struct Enricher {
    store: FlowStore,
    state: watch::Receiver<Arc<MeshState>>,
    join: Mutex<Join>,
    counters: Counters,
    /// Where a connection is closed whose identities do not agree.
    live: OnceLock<Connections>,
    log: OnceLock<AccessLog>,
}

impl std::fmt::Debug for Enricher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enricher").field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl Enricher {
    /// An enricher in front of `store`.
    pub fn new(store: FlowStore, state: watch::Receiver<Arc<MeshState>>, registry: &mut Registry) -> Self {
        let counters = Counters::default();
        registry.register(
            "weft_flow_joins",
            "Connections whose kernel event and proxy record were joined",
            counters.joined.clone(),
        );
        registry.register(
            "weft_flow_unjoined",
            "Redirected connections of which the proxy recorded nothing in time",
            counters.unjoined.clone(),
        );
        registry.register(
            "weft_access_log_dropped",
            "Flows that were not written to the access log because standard output was too slow",
            counters.unlogged.clone(),
        );
        registry.register(
            "weft_flow_identity_conflicts",
            "Connections closed because the kernel's event and the proxy's record named different clients",
            counters.mismatches.clone(),
        );
        Self { store, state, join: Mutex::default(), counters, live: OnceLock::new(), log: OnceLock::new() }
    }

    /// Names the proxy's connections, among which those are closed whose identities do not agree. The proxy is made
    /// after its flow sink, so this comes later; a second call changes nothing.
    pub fn close_in(&self, live: Connections) {
        self.live.get_or_init(|| live);
    }

    /// Writes the flows that the configuration asks for ([`weft_core::config::AccessLog`]) as lines to standard output,
    /// until `drain` is complete; as JSON objects with `json`. A second call changes nothing.
    pub fn log_to_stdout(&self, node: &str, json: bool, tasks: &Tasks, drain: DrainWatcher) {
        let format = if json { Format::Json { node: node.into() } } else { Format::Text };
        self.log(format, tokio::io::stdout(), tasks, drain);
    }

    fn log<W>(&self, format: Format, to: W, tasks: &Tasks, drain: DrainWatcher)
    where
        W: AsyncWrite + Send + Unpin + 'static,
    {
        self.log.get_or_init(|| AccessLog::start(format, to, self.counters.unlogged.clone(), tasks, drain));
    }

    /// The store behind it.
    pub fn store(&self) -> &FlowStore {
        &self.store
    }

    /// How often kernel and proxy disagreed about a client's identity.
    pub fn mismatches(&self) -> u64 {
        self.counters.mismatches.get()
    }

    /// Takes events of the kernel. A redirected connection waits for the proxy's record; the rest is a flow.
    pub fn kernel(&self, flows: impl IntoIterator<Item = KernelFlow>) {
        let state = self.state.borrow().clone();
        flows.into_iter().for_each(|flow| self.one(flow, &state));
    }

    fn one(&self, flow: KernelFlow, state: &MeshState) {
        if flow.verdict != KernelVerdict::Redirected || flow.connection == 0 {
            self.keep(stored(&flow, state), state);
            return;
        }
        let identity = state.workload_of(flow.source_subject).map(|w| w.identity.clone());
        let mut late = None;
        {
            let mut join = self.join.lock();
            let seen = join.entry(flow.connection);
            seen.kernel = Some((identity.clone(), flow.cgroup));
            if let Some(proxy) = seen.proxy.clone() {
                self.compare(flow.connection, identity.as_ref(), proxy.as_ref());
            } else {
                join.waiting.push_back((Instant::now() + JOIN_WAIT, flow));
                if join.waiting.len() > MAX_CONNECTIONS {
                    late = join.waiting.pop_front();
                }
            }
        }
        if let Some((_, flow)) = late {
            self.unjoined(&flow, state);
        }
    }

    /// Turns the redirected connections that the proxy never spoke of into flows. Called every second.
    pub fn expire(&self, now: Instant) {
        let mut late = Vec::new();
        {
            let mut join = self.join.lock();
            while join.waiting.front().is_some_and(|(at, _)| *at <= now) {
                let Some((_, flow)) = join.waiting.pop_front() else { break };
                if join.seen.get(&flow.connection).is_none_or(|s| s.proxy.is_none()) {
                    late.push(flow);
                }
            }
        }
        let state = self.state.borrow().clone();
        for flow in &late {
            self.unjoined(flow, &state);
        }
    }

    fn keep(&self, flow: StoredFlow, state: &MeshState) {
        let flow = Arc::new(flow);
        if let (Some(log), Some(config)) = (self.log.get(), state.config()) {
            log.offer(&flow, config.telemetry.access_log);
        }
        self.store.push(flow);
    }

    fn unjoined(&self, flow: &KernelFlow, state: &MeshState) {
        self.counters.unjoined.inc();
        self.keep(stored(flow, state), state);
    }

    /// Both sides are known: counts, and where they differ says so aloud and closes the connection.
    fn compare(&self, connection: u64, kernel: Option<&SpiffeId>, proxy: Option<&SpiffeId>) {
        self.counters.joined.inc();
        if let (Some(kernel), Some(proxy)) = (kernel, proxy)
            && kernel != proxy
        {
            self.counters.mismatches.inc();
            let closed =
                self.live.get().map_or(0, |l| l.cut_connection(connection, Reason::IdentityMismatch));
            tracing::error!(
                connection, %kernel, %proxy, closed,
                "the kernel and the proxy name different clients: the connection is closed"
            );
        }
    }
}

impl FlowSink for Enricher {
    fn record(&self, mut record: FlowRecord) {
        let state = self.state.borrow().clone();
        let mut cgroup = 0;
        if record.reporter == Reporter::ProxySource && record.connection != 0 {
            let mut join = self.join.lock();
            let seen = join.entry(record.connection);
            let first = seen.proxy.replace(record.source.identity.clone()).is_none();
            if let Some((kernel, from)) = seen.kernel.clone() {
                cgroup = from;
                if first {
                    self.compare(record.connection, kernel.as_ref(), record.source.identity.as_ref());
                }
            }
        }
        let source = named(&record.source, &state);
        let destination = named(&record.destination, &state);
        complete(&mut record.source, source.as_deref());
        complete(&mut record.destination, destination.as_deref());
        self.keep(StoredFlow { record, source, destination, redirected: false, cgroup }, &state);
    }
}

impl Join {
    fn entry(&mut self, connection: u64) -> &mut Seen {
        if !self.seen.contains_key(&connection) {
            if self.order.len() >= MAX_CONNECTIONS
                && let Some(oldest) = self.order.pop_front()
            {
                self.seen.remove(&oldest);
            }
            self.order.push_back(connection);
        }
        self.seen.entry(connection).or_default()
    }
}

/// The Pod that a record speaks of: by its name where the record has one, else by address; never one whose identity
/// is another than the record's.
fn named(peer: &Peer, state: &MeshState) -> Option<Arc<Workload>> {
    let workload = state.workload_at(peer.address.ip());
    let fits = |w: &&Arc<Workload>| {
        peer.pod.as_ref().is_none_or(|p| *p == w.name)
            && peer.identity.as_ref().is_none_or(|i| *i == w.identity)
    };
    workload.filter(fits).cloned().or_else(|| {
        let pod = peer.pod.as_ref()?;
        let of_subject = state.workload_of(peer.subject).filter(|w| w.name == *pod)?;
        Some(of_subject.clone())
    })
}

/// Fills names that the reporter left out. An identity is never filled in: it is there only where proven.
fn complete(peer: &mut Peer, workload: Option<&Workload>) {
    let Some(workload) = workload else { return };
    peer.pod.get_or_insert_with(|| workload.name.clone());
    peer.owner.get_or_insert_with(|| workload.owner.clone());
    if peer.subject == SubjectId::UNKNOWN {
        peer.subject = workload.subject;
    }
}

/// A kernel event as a flow.
fn stored(flow: &KernelFlow, state: &MeshState) -> StoredFlow {
    let (source_peer, source) = kernel_peer(flow.source, flow.source_subject, state);
    let (destination_peer, destination) = kernel_peer(flow.destination, flow.destination_subject, state);
    let dialled = state.dialled(flow.destination, flow.protocol);
    let service = dialled.map(|(service, port)| (service.name.clone(), port));
    StoredFlow {
        record: FlowRecord {
            time: flow.time,
            connection: flow.connection,
            reporter: flow.reporter,
            verdict: if flow.verdict == KernelVerdict::Denied { Verdict::Denied } else { Verdict::Forwarded },
            reason: flow.reason,
            source: source_peer,
            destination: destination_peer,
            protocol: flow.protocol,
            service,
            policy: flow.policy.clone(),
            tls: Tls::None,
            http: None,
            sent: 0,
            received: 0,
            duration: Duration::ZERO,
            opening: true,
        },
        source,
        destination,
        redirected: flow.verdict == KernelVerdict::Redirected,
        cgroup: flow.cgroup,
    }
}

/// A side of a kernel event. The subject is what the kernel judged; the address only helps to find the Pod's name.
fn kernel_peer(address: SocketAddr, subject: SubjectId, state: &MeshState) -> (Peer, Option<Arc<Workload>>) {
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    let mut peer = Peer { address, pod: None, owner: None, identity: None, subject };
    let at = state.workload_at(address.ip());
    if let Some(workload) = at.filter(|w| w.subject == subject || subject == SubjectId::UNKNOWN) {
        peer.pod = Some(workload.name.clone());
        peer.owner = Some(workload.owner.clone());
        if subject == workload.subject {
            peer.identity = Some(workload.identity.clone());
        }
        return (peer, Some(workload.clone()));
    }
    let mut of_subject = state.workloads().filter(|w| w.subject == subject);
    let Some(some) = of_subject.next() else { return (peer, None) };
    // The address is not one of the subject's (a forged source, a Pod that is gone): what all its Pods share is
    // true, and where there is only one it is that one.
    peer.identity = Some(some.identity.clone());
    peer.owner = Some(some.owner.clone());
    let only = of_subject.next().is_none().then(|| some.clone());
    peer.pod = only.as_ref().map(|w| w.name.clone());
    (peer, only)
}

#[cfg(test)]
mod tests;
