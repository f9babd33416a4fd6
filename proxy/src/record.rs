//! Flow records of connections and requests.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use weft_core::{
    MeshConfig, SpiffeId, SubjectId, Workload,
    flow::{FlowRecord, FlowSink, HttpFlow, Peer, Reason, Reporter, Tls, Verdict},
};

use crate::{connections::TCP, copy::Traffic, l7::RequestEnd};

/// A side of a flow.
pub fn peer(address: SocketAddr, workload: Option<&Workload>, identity: Option<SpiffeId>) -> Peer {
    Peer {
        address,
        pod: workload.map(|w| w.name.clone()),
        owner: workload.map(|w| w.owner.clone()),
        identity,
        subject: workload.map_or(SubjectId::WORLD, |w| w.subject),
    }
}

/// The record of a connection that begins now, for the rest of it to be filled in.
pub fn begin(connection: u64, reporter: Reporter, source: Peer, destination: Peer) -> FlowRecord {
    FlowRecord {
        time: SystemTime::now(),
        connection,
        reporter,
        verdict: Verdict::Forwarded,
        reason: Reason::None,
        source,
        destination,
        protocol: TCP,
        service: None,
        policy: None,
        tls: Tls::None,
        http: None,
        sent: 0,
        received: 0,
        duration: std::time::Duration::ZERO,
        opening: false,
    }
}

/// The record of a request on a connection.
pub fn request(connection: FlowRecord, end: RequestEnd, settings: Option<&MeshConfig>) -> FlowRecord {
    let queries = settings.is_some_and(|s| s.telemetry.query_strings) && !end.query.is_empty();
    let query = if queries { ["?", &end.query] } else { [""; 2] };
    FlowRecord {
        time: end.started,
        verdict: end.verdict,
        reason: end.reason,
        policy: end.policy,
        http: Some(HttpFlow {
            method: end.method,
            url: ["http://", &end.host, &end.path, query[0], query[1]].concat(),
            protocol: end.protocol,
            status: end.status,
            headers: end.headers,
        }),
        sent: end.sent,
        received: end.received,
        duration: end.latency,
        opening: false,
        ..connection
    }
}

/// What a refusal or failure is, by its reason.
pub fn verdict(reason: Reason) -> Verdict {
    match reason {
        Reason::None => Verdict::Forwarded,
        Reason::PolicyDenied
        | Reason::PolicyDenyRule
        | Reason::PlaintextRefused
        | Reason::InvalidSource
        | Reason::ProxyBypassed
        | Reason::TunnelPortDialled
        | Reason::UnknownPeer
        | Reason::IdentityMismatch
        | Reason::Revoked => Verdict::Denied,
        _ => Verdict::Error,
    }
}

/// Records a connection: one record when it opened and one at its end, or one alone where it never opened.
pub struct Session {
    sink: Arc<dyn FlowSink>,
    /// What the records say; the end's verdict and reason too.
    pub record: FlowRecord,
    traffic: Arc<Traffic>,
    begun: Instant,
}

impl Session {
    /// Starts with what is known.
    pub fn new(sink: Arc<dyn FlowSink>, record: FlowRecord, traffic: Arc<Traffic>) -> Self {
        Self { sink, record, traffic, begun: Instant::now() }
    }

    /// Records the opening.
    pub fn opened(&self) {
        let duration = self.begun.elapsed();
        self.sink.record(FlowRecord { opening: true, duration, ..self.record.clone() });
    }

    /// Says why it ends; recorded when the session is dropped.
    pub fn fail(&mut self, reason: Reason) {
        self.record.reason = reason;
        self.record.verdict = verdict(reason);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Not a copy: the names in it are counted at places that all threads share.
        let record = std::mem::replace(&mut self.record, blank());
        self.sink.record(FlowRecord {
            opening: false,
            sent: self.traffic.sent(),
            received: self.traffic.received(),
            duration: self.begun.elapsed(),
            ..record
        });
    }
}

/// A record of nothing.
fn blank() -> FlowRecord {
    let nobody = || peer(SocketAddr::from(([0; 4], 0)), None, None);
    begin(0, Reporter::ProxySource, nobody(), nobody())
}
