//! Judging the requests of one connection at its destination.

use std::{net::SocketAddr, sync::Arc};

use tokio::sync::watch;
use weft_core::{
    MeshConfig, MeshState,
    flow::{FlowRecord, Reason, Verdict},
    http::HttpRequest,
    policy::eval::{self, Access, Decision, Outcome},
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
            flow_id: self.flow_id(),
            policy,
            reveal_policy: self.settings().is_some_and(|s| s.reveal_policy),
            headers: Vec::new(),
            message: "denied by policy".to_owned(),
        }
    }

    fn destination(&self) -> SocketAddr {
        self.arrival.destination
    }

    /// What policy says now; `None` where nobody describes the Pod.
    fn judge(&self, request: &HttpRequest<'_>) -> Option<Decision> {
        let state = self.shared.state();
        let destination = state.workload(&self.pod.uid)?;
        let caller = self.arrival.source.caller();
        let access = Access { caller, destination, port: self.destination().port(), protocol: TCP };
        Some(eval::judge_http(&state, &access, request))
    }
}

impl InboundHandler for HttpInbound {
    type Upstream = AppConnection;

    fn authorize(&self, request: &HttpRequest<'_>) -> Result<Permit, LocalReply> {
        let Some(decision) = self.judge(request) else {
            return Err(self.denied(Reason::UnknownPeer, None));
        };
        count(&self.pair, &decision);
        match decision.outcome {
            Outcome::Allow => {
                Ok(Permit { policy: policy_of(&decision), audited: !decision.audited.is_empty() })
            }
            Outcome::Deny | Outcome::JudgeHttp => Err(self.denied(decision.reason, decision.policy)),
        }
    }

    fn changes(&self) -> watch::Receiver<Arc<MeshState>> {
        self.shared.changes()
    }

    fn still_allows(&self, request: &HttpRequest<'_>) -> bool {
        self.judge(request).is_some_and(|decision| decision.outcome == Outcome::Allow)
    }

    fn flow_id(&self) -> String {
        format!("{:016x}", self.arrival.connection)
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
        self.shared.flows.record(record::request(self.record.clone(), end, self.settings().as_deref()));
    }
}
