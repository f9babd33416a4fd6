//! Requests that an application sends to a Service's HTTP port: route, backend, endpoint.

use std::{net::SocketAddr, sync::Arc};

use foldhash::HashMap;
use parking_lot::Mutex;
use rand::Rng;
use weft_core::{
    MeshConfig, MeshState, NamespacedName,
    flow::{FlowRecord, Reason, Tls},
    http::HttpRequest,
    route::{self, HeaderChanges, RouteAnswer},
};

use super::{connect::Dialler, resolve};
use crate::{
    early::Early,
    l7::{ConnectError, Io, LocalReply, OutboundHandler, RequestEnd, Routed, Target},
    metrics::{Pair, Reported, Side},
    record,
    upstream::Upstream,
};

/// Endpoints that one connection remembers for its records.
const REMEMBERED: usize = 256;

/// Routes the requests of one connection of an application.
pub(super) struct HttpOutbound {
    dialler: Dialler,
    service: NamespacedName,
    port: u16,
    record: FlowRecord,
    known: Mutex<HashMap<SocketAddr, Known>>,
}

/// What every request to an endpoint is told with, from the last connection to it.
#[derive(Clone)]
struct Known {
    target: Target,
    tls: Tls,
    pair: Arc<Pair>,
}

impl HttpOutbound {
    pub(super) fn new(dialler: Dialler, service: NamespacedName, port: u16, record: FlowRecord) -> Self {
        Self { dialler, service, port, record, known: Mutex::default() }
    }

    fn reply(&self, status: u16, reason: Reason, message: &str) -> LocalReply {
        LocalReply {
            status,
            reason,
            flow_id: self.flow_id(),
            policy: None,
            reveal_policy: false,
            headers: Vec::new(),
            message: message.to_owned(),
        }
    }

    fn endpoint(
        &self,
        state: &MeshState,
        service: &NamespacedName,
        port: u16,
    ) -> Result<(Target, Option<Target>), LocalReply> {
        let like = self.record.source.address.ip();
        let service = state.service(service);
        let source = &self.dialler.source;
        let targets = service.map(|s| resolve::ready(state, source, s, port, like)).unwrap_or_default();
        let chosen = self.dialler.pod.balancer.choose(&targets, |t| t.address);
        let why = match service {
            Some(service) if service.node_local => {
                "no endpoint on this node is ready, and internalTrafficPolicy is Local"
            }
            _ => "no endpoint is ready",
        };
        let (target, alternate) = chosen.ok_or_else(|| self.reply(503, Reason::NoEndpoint, why))?;
        Ok((target.clone(), alternate.cloned()))
    }
}

impl OutboundHandler for HttpOutbound {
    type Upstream = Upstream;

    fn route(&self, request: &HttpRequest<'_>) -> Result<Routed, LocalReply> {
        let state = self.dialler.shared.state();
        let namespace = &self.dialler.source.name.namespace;
        let (mut request_headers, mut response_headers) =
            (HeaderChanges::default(), HeaderChanges::default());
        let mut timeout = None;
        let (service, port) = match route::select(&state, &self.service, self.port, namespace, request) {
            RouteAnswer::Unrouted => (&self.service, self.port),
            RouteAnswer::NotFound => {
                return Err(self.reply(404, Reason::NoEndpoint, "no rule of the Service's routes matches"));
            }
            RouteAnswer::Rule { rule, .. } => {
                request_headers.clone_from(&rule.request_headers);
                response_headers.clone_from(&rule.response_headers);
                timeout = rule.timeout;
                let backend = rule.backend(rand::rng().random()).filter(|b| b.valid);
                let backend = backend.ok_or_else(|| {
                    self.reply(500, Reason::NoEndpoint, "the route's rule has no valid backend")
                })?;
                (&backend.service, backend.port)
            }
        };
        let (target, alternate) = self.endpoint(&state, service, port)?;
        let lease = Some(self.dialler.pod.balancer.lease(target.address));
        Ok(Routed { target, alternate, request_headers, response_headers, timeout, lease })
    }

    async fn connect(&self, target: &Target) -> Result<Upstream, ConnectError> {
        let pair = self.dialler.pair(target);
        let connected = self.dialler.connect(target, pair.clone(), &mut Early::default()).await;
        let upstream = connected.inspect_err(|error| {
            pair.failed(error.reason);
        })?;
        let found =
            Known { target: target.clone(), tls: upstream.tls.clone(), pair: upstream.pair().clone() };
        let mut known = self.known.lock();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(target.address, found);
        drop(known);
        upstream.cut().set(false);
        Ok(upstream)
    }

    fn flow_id(&self) -> String {
        format!("{:016x}", self.record.connection)
    }

    fn settings(&self) -> Option<Arc<MeshConfig>> {
        self.dialler.shared.state().config().cloned()
    }

    fn finished(&self, end: RequestEnd) {
        let mut connection = self.record.clone();
        let pair = match &end.target {
            Some(target) => {
                let known = self.known.lock().get(&target.address).cloned();
                let tls = known.as_ref().map_or(Tls::None, |known| known.tls.clone());
                let proven =
                    target.workload.as_ref().filter(|_| tls != Tls::None).map(|w| w.identity.clone());
                connection.tls = tls;
                connection.destination = record::peer(target.address, target.workload.as_deref(), proven);
                let same = known.filter(|known| known.target == *target);
                same.map_or_else(|| self.dialler.pair(target), |known| known.pair)
            }
            None => self.dialler.shared.metrics.pair(
                Reported::Source,
                Side::workload(&self.dialler.source),
                Side::outside(),
            ),
        };
        pair.request(end.status, end.verdict, end.latency);
        pair.sent.inc_by(end.sent);
        pair.received.inc_by(end.received);
        self.dialler.shared.flows.record(record::request(connection, end, self.settings().as_deref()));
    }
}
