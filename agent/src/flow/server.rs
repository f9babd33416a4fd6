//! `observer.Observer` over the store, as Hubble's clients expect it, and the standard health service.

use std::{
    collections::{BTreeSet, VecDeque},
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{Stream, stream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use weft_core::MeshState;
use weft_proto::{
    health::{self, health_check_response::ServingStatus, health_server},
    observer::{self, observer_server},
    relay::NodeState,
};
use weft_runtime::DrainWatcher;

use super::{
    convert::{self, Context},
    filter::Filters,
    store::{Entry, FlowStore},
};

/// Entries read from the store at once.
const BATCH: usize = 64;
/// What the rate of flows is taken over.
const RATE_WINDOW: Duration = Duration::from_secs(60);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The observer of one node.
#[derive(Debug, Clone)]
pub struct Observer {
    node: Arc<str>,
    store: FlowStore,
    state: watch::Receiver<Arc<MeshState>>,
    drain: DrainWatcher,
}

impl Observer {
    /// An observer over `store`; its streams end when `drain` begins.
    pub fn new(
        node: &str,
        store: FlowStore,
        state: watch::Receiver<Arc<MeshState>>,
        drain: DrainWatcher,
    ) -> Self {
        Self { node: node.into(), store, state, drain }
    }

    /// Flows of the last minute, per second.
    fn rate(&self) -> f64 {
        let Some(since) = SystemTime::now().checked_sub(RATE_WINDOW) else { return 0.0 };
        let (oldest, mut end) = self.store.bounds();
        let mut count = 0_u32;
        while end > oldest {
            let entries = self.store.read_back(end, BATCH);
            let recent = |e: &Entry| matches!(e, Entry::Flow(f) if f.record.time >= since);
            let found = entries.iter().filter(|(_, e)| recent(e)).count();
            count += u32::try_from(found).unwrap_or_default();
            match entries.last() {
                Some((at, _)) if found > 0 => end = *at,
                _ => break,
            }
        }
        let window = self.store.started().elapsed().min(RATE_WINDOW).as_secs_f64().max(1.0);
        f64::from(count) / window
    }

    fn uptime(&self) -> u64 {
        u64::try_from(self.store.started().elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[tonic::async_trait]
impl observer_server::Observer for Observer {
    type GetFlowsStream = Answers<observer::GetFlowsResponse>;
    type GetAgentEventsStream = Answers<observer::GetAgentEventsResponse>;
    type GetDebugEventsStream = Answers<observer::GetDebugEventsResponse>;

    async fn get_flows(
        &self,
        request: Request<observer::GetFlowsRequest>,
    ) -> Result<Response<Self::GetFlowsStream>, Status> {
        let cursor = Cursor::new(self, request.get_ref())?;
        let answers = stream::unfold(cursor, |mut cursor| async {
            let answer = cursor.next().await?;
            Some((Ok(answer), cursor))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn get_agent_events(
        &self,
        _: Request<observer::GetAgentEventsRequest>,
    ) -> Result<Response<Self::GetAgentEventsStream>, Status> {
        Err(Status::unimplemented("weft-agent has no agent events; see its log and /metrics"))
    }

    async fn get_debug_events(
        &self,
        _: Request<observer::GetDebugEventsRequest>,
    ) -> Result<Response<Self::GetDebugEventsStream>, Status> {
        Err(Status::unimplemented(
            "weft-agent has no debug events; start it with --bpf-log for the datapath's own log",
        ))
    }

    async fn get_nodes(
        &self,
        _: Request<observer::GetNodesRequest>,
    ) -> Result<Response<observer::GetNodesResponse>, Status> {
        let totals = self.store.totals();
        let node = observer::Node {
            name: self.node.to_string(),
            version: version(),
            state: NodeState::NodeConnected.into(),
            tls: Some(observer::Tls::default()),
            uptime_ns: self.uptime(),
            num_flows: totals.held,
            max_flows: totals.capacity,
            seen_flows: totals.seen,
            ..Default::default()
        };
        Ok(Response::new(observer::GetNodesResponse { nodes: vec![node] }))
    }

    async fn get_namespaces(
        &self,
        _: Request<observer::GetNamespacesRequest>,
    ) -> Result<Response<observer::GetNamespacesResponse>, Status> {
        let state = self.state.borrow().clone();
        let names: BTreeSet<&str> = state.workloads().map(|w| w.name.namespace.as_ref()).collect();
        let namespaces = names
            .into_iter()
            .map(|n| observer::Namespace { cluster: String::new(), namespace: n.into() })
            .collect();
        Ok(Response::new(observer::GetNamespacesResponse { namespaces }))
    }

    async fn server_status(
        &self,
        _: Request<observer::ServerStatusRequest>,
    ) -> Result<Response<observer::ServerStatusResponse>, Status> {
        let totals = self.store.totals();
        Ok(Response::new(observer::ServerStatusResponse {
            num_flows: totals.held,
            max_flows: totals.capacity,
            seen_flows: totals.seen,
            uptime_ns: self.uptime(),
            num_connected_nodes: Some(1),
            num_unavailable_nodes: Some(0),
            unavailable_nodes: Vec::new(),
            version: version(),
            flows_rate: self.rate(),
        }))
    }
}

fn version() -> String {
    format!("weft-agent v{}", env!("CARGO_PKG_VERSION"))
}

/// Where one GetFlows call stands.
struct Cursor {
    node: Arc<str>,
    store: FlowStore,
    filters: Filters,
    since: Option<SystemTime>,
    until: Option<SystemTime>,
    position: u64,
    /// Where a call that does not follow ends.
    end: Option<u64>,
    remaining: Option<u64>,
    ready: VecDeque<observer::GetFlowsResponse>,
    written: watch::Receiver<u64>,
    drain: DrainWatcher,
}

impl Cursor {
    fn new(observer: &Observer, request: &observer::GetFlowsRequest) -> Result<Self, Status> {
        if request.first && request.follow {
            return Err(Status::invalid_argument("first cannot be used with follow"));
        }
        let filters = Filters::new(&request.whitelist, &request.blacklist)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        let mut written = observer.store.watch();
        written.mark_unchanged();
        let (oldest, end) = observer.store.bounds();
        let mut cursor = Self {
            node: observer.node.clone(),
            store: observer.store.clone(),
            filters,
            since: time(request.since.as_ref())?,
            until: time(request.until.as_ref())?,
            position: oldest,
            end: (!request.follow).then_some(end),
            remaining: (request.first && request.number > 0).then_some(request.number),
            ready: VecDeque::new(),
            written,
            drain: observer.drain.clone(),
        };
        if !request.first {
            cursor.position = match (request.number, request.follow, cursor.since) {
                (0, true, None) => end,
                (0, _, _) => oldest,
                (number, _, _) => cursor.rewind(oldest, end, number),
            };
        }
        Ok(cursor)
    }

    /// The position of the `number`th matching flow before `end`, or the oldest.
    fn rewind(&self, oldest: u64, end: u64, number: u64) -> u64 {
        let (mut at, mut found, mut first) = (end, 0, end);
        while at > oldest {
            let entries = self.store.read_back(at, BATCH);
            for (position, entry) in &entries {
                if let Entry::Flow(_) = entry
                    && self.answer(*position, entry).is_some()
                {
                    found += 1;
                    first = *position;
                    if found == number {
                        return first;
                    }
                }
            }
            // An empty answer: the ring came round meanwhile, or was never that full.
            at = entries.last().map_or(oldest, |(position, _)| *position);
        }
        if found == 0 { end } else { first }
    }

    fn answer(&self, position: u64, entry: &Entry) -> Option<observer::GetFlowsResponse> {
        let in_time = |t: SystemTime| self.since.is_none_or(|s| t >= s) && self.until.is_none_or(|u| t <= u);
        match entry {
            Entry::Flow(stored) if in_time(stored.record.time) => {
                let context = Context { node: &self.node, store: self.store.id() };
                let message = convert::flow(stored, position, &context);
                self.filters.matches(&message).then(|| convert::response(message))
            }
            Entry::Lost { source, count, time } if in_time(*time) => {
                Some(convert::lost(*source, *count, *time, &self.node))
            }
            _ => None,
        }
    }

    async fn next(&mut self) -> Option<observer::GetFlowsResponse> {
        loop {
            if let Some(answer) = self.ready.pop_front() {
                return Some(answer);
            }
            if self.remaining == Some(0) {
                return None;
            }
            if self.end.is_some_and(|end| self.position >= end) {
                return None;
            }
            if !self.fill() && !self.wait().await {
                return None;
            }
        }
    }

    /// Reads a batch; false where there is nothing new.
    fn fill(&mut self) -> bool {
        self.written.mark_unchanged();
        let batch = self.store.read(self.position, BATCH);
        if batch.lost > 0 {
            let lost = convert::lost(super::LossSource::Ring, batch.lost, SystemTime::now(), &self.node);
            self.ready.push_back(lost);
        }
        for (position, entry) in &batch.entries {
            if self.remaining == Some(0) || self.end.is_some_and(|end| *position >= end) {
                break;
            }
            if let Some(answer) = self.answer(*position, entry) {
                if let (Some(left), Entry::Flow(_)) = (&mut self.remaining, entry) {
                    *left -= 1;
                }
                self.ready.push_back(answer);
            }
        }
        let progress = batch.next > self.position;
        self.position = batch.next;
        progress
    }

    /// Waits for a new entry; false when the call is over.
    async fn wait(&mut self) -> bool {
        if self.end.is_some() {
            return false;
        }
        let left = match self.until {
            None => Duration::from_secs(3600),
            Some(until) => match until.duration_since(SystemTime::now()) {
                Ok(left) => left,
                Err(_) => return false,
            },
        };
        tokio::select! {
            () = self.drain.draining() => false,
            changed = self.written.changed() => changed.is_ok(),
            () = tokio::time::sleep(left) => true,
        }
    }
}

fn time(stamp: Option<&prost_types::Timestamp>) -> Result<Option<SystemTime>, Status> {
    stamp
        .map(|t| SystemTime::try_from(*t).map_err(|_| Status::invalid_argument("a time is out of range")))
        .transpose()
}

/// The standard health service: everything that answers is serving.
#[derive(Debug, Clone, Copy)]
pub struct Health;

/// Services whose health may be asked for; the empty name is the server itself.
const SERVICES: [&str; 4] = ["", "hubble.server.Observer", "observer.Observer", "weft.agent.v1.Agent"];

fn health_of(service: &str) -> Option<health::HealthCheckResponse> {
    SERVICES.contains(&service).then(|| health::HealthCheckResponse { status: ServingStatus::Serving.into() })
}

#[tonic::async_trait]
impl health_server::Health for Health {
    type WatchStream = Answers<health::HealthCheckResponse>;

    async fn check(
        &self,
        request: Request<health::HealthCheckRequest>,
    ) -> Result<Response<health::HealthCheckResponse>, Status> {
        health_of(&request.get_ref().service)
            .map(Response::new)
            .ok_or_else(|| Status::not_found("no such service"))
    }

    async fn watch(
        &self,
        request: Request<health::HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let answer = health_of(&request.get_ref().service)
            .unwrap_or(health::HealthCheckResponse { status: ServingStatus::ServiceUnknown.into() });
        // It never changes while the process lives: one answer, then silence until the client leaves.
        let answers = stream::unfold(Some(answer), |next| async move {
            match next {
                Some(answer) => Some((Ok(answer), None)),
                None => std::future::pending().await,
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

#[cfg(test)]
mod tests;
