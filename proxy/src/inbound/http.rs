//! Judging the requests of one connection at its destination.

use std::{net::SocketAddr, sync::Arc};

use weft_core::{
    MeshConfig,
    flow::{FlowRecord, Reason, Verdict},
    http::HttpRequest,
    policy::eval::{self, Access, Outcome},
};

use super::{Arrival, count, dial, policy_of};
use crate::{
    connections::TCP,
    l7::{ConnectError, InboundHandler, LocalReply, Permit, RequestEnd},
    metrics::Pair,
    pod::Pod,
    proxy::Shared,
    record,
    socket::Socket,
};

/// A connection to the Pod's application.
pub type AppConnection = Socket;

/// Judges the requests of one connection and connects them to the Pod's application.
pub struct HttpInbound {
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    arrival: Arrival,
    record: FlowRecord,
    pair: Arc<Pair>,
}

impl HttpInbound {
    pub(super) fn new(
        shared: Arc<Shared>,
        pod: Arc<Pod>,
        arrival: Arrival,
        record: FlowRecord,
        pair: Arc<Pair>,
    ) -> Self {
        Self { shared, pod, arrival, record, pair }
    }

    fn denied(&self, reason: Reason, policy: Option<weft_core::NamespacedName>) -> LocalReply {
        LocalReply {
            status: 403,
            reason,
            flow_id: format!("{:016x}", self.arrival.connection),
            policy,
            reveal_policy: self.settings().is_some_and(|s| s.reveal_policy),
            headers: Vec::new(),
            message: "denied by policy".to_owned(),
        }
    }

    fn destination(&self) -> SocketAddr {
        self.arrival.destination
    }
}

impl InboundHandler for HttpInbound {
    type Upstream = AppConnection;

    fn authorize(&self, request: &HttpRequest<'_>) -> Result<Permit, LocalReply> {
        let state = self.shared.state();
        let Some(destination) = state.workload(&self.pod.uid) else {
            return Err(self.denied(Reason::UnknownPeer, None));
        };
        let caller = self.arrival.source.caller();
        let access = Access { caller, destination, port: self.destination().port(), protocol: TCP };
        let decision = eval::judge_http(&state, &access, request);
        count(&self.pair, &decision);
        match decision.outcome {
            Outcome::Allow => {
                Ok(Permit { policy: policy_of(&decision), audited: !decision.audited.is_empty() })
            }
            Outcome::Deny | Outcome::JudgeHttp => Err(self.denied(decision.reason, decision.policy)),
        }
    }

    async fn connect(&self) -> Result<AppConnection, ConnectError> {
        dial(&self.shared, &self.pod, self.arrival.client, self.destination())
            .await
            .inspect_err(|error| self.pair.failed(error.reason))
    }

    fn settings(&self) -> Option<Arc<MeshConfig>> {
        self.shared.state().config().cloned()
    }

    fn finished(&self, end: RequestEnd) {
        self.pair.request(end.status, end.verdict, end.latency);
        self.pair.sent.inc_by(end.sent);
        self.pair.received.inc_by(end.received);
        if end.verdict == Verdict::Denied {
            self.pair.failed(end.reason);
        }
        self.shared.flows.record(record::request(&self.record, &end, self.settings().as_deref()));
    }
}
