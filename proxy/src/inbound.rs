//! Connections at their destination: who calls, may it, and on to the Pod's application. Tunnels, plain
//! connections and the same-node shortcut all meet in [`admit`].

use std::{net::SocketAddr, sync::Arc};

use weft_core::{
    SpiffeId, Workload,
    flow::{Reason, Reporter, Tls, Verdict},
    policy::eval::{self, Access, Decision, Outcome},
};

use crate::{
    connections::{Entry, Judged, Registration, Source, TCP},
    copy::Traffic,
    l7::ConnectError,
    metrics::{Pair, Reported, Side},
    platform::Family,
    pod::Pod,
    proxy::Shared,
    record::{self, Session},
    socket::{self, Cut, Socket},
    tunnel::validity::Validity,
    upstream::OpenConnection,
};

mod http;
pub mod plain;
pub mod tunnel;

pub use http::{AppConnection, HttpInbound};

/// A connection that arrived at its destination's node.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The id that joins its records.
    pub connection: u64,
    /// Who calls.
    pub source: Source,
    /// The Pod that calls, where it is known.
    pub workload: Option<Arc<Workload>>,
    /// The address that the application is shown.
    pub client: SocketAddr,
    /// The Pod's address and the port that is wanted.
    pub destination: SocketAddr,
    /// How it came.
    pub tls: Tls,
    /// Our own credentials that it came in under.
    pub credentials: Option<SpiffeId>,
    /// Until when the caller is proven.
    pub validity: Option<Validity>,
}

impl Arrival {
    fn identity(&self) -> Option<SpiffeId> {
        match &self.source {
            Source::Authenticated(id) => Some(id.clone()),
            Source::Unauthenticated(_) => None,
        }
    }

    fn side(&self) -> Side {
        match (&self.source, &self.workload) {
            (Source::Authenticated(_), Some(workload)) => Side::workload(workload),
            (Source::Authenticated(id), None) => Side::identity(id),
            (Source::Unauthenticated(_), _) => Side::outside(),
        }
    }
}

/// An admitted connection.
pub enum Admitted {
    /// Its bytes pass unseen; the application is connected.
    Opaque(Opened),
    /// Its requests are judged one by one.
    Http(Box<Http>),
}

/// A connection to the Pod's application, allowed as a whole.
pub struct Opened {
    /// The application's side.
    pub socket: Socket,
    /// Decides how the socket closes: reset until a clean end is seen.
    pub cut: Cut,
    /// Its bytes.
    pub traffic: Arc<Traffic>,
    /// What no byte needs.
    pub seldom: Box<Seldom>,
}

/// What of an [`Opened`] connection is needed at its ends. Away from what each byte needs, which lies close together so.
pub struct Seldom {
    /// Its place in the registry.
    pub registration: Registration,
    /// Its records.
    pub session: Session,
    _open: OpenConnection,
}

/// A connection whose requests are judged one by one.
pub struct Http {
    /// Judges, and connects to the application.
    pub handler: Arc<HttpInbound>,
    /// Its place in the registry.
    pub registration: Registration,
    /// Its records.
    pub session: Session,
    _open: OpenConnection,
}

/// Registers a connection, then judges it, then connects to the application.
///
/// # Errors
/// When policy refuses it (status 403) or the application cannot be reached (503, 504). It is recorded then.
pub async fn admit(shared: &Arc<Shared>, pod: &Arc<Pod>, arrival: Arrival) -> Result<Admitted, ConnectError> {
    let state = shared.state();
    let Some(destination) = state.workload(&pod.uid).cloned() else {
        return Err(ConnectError::new(Reason::UnknownPeer, format!("nobody described the Pod {}", pod.uid)));
    };
    let pair = shared.metrics.pair(Reported::Destination, arrival.side(), Side::workload(&destination));
    let traffic = Arc::new(Traffic::new(pair.sent.clone(), pair.received.clone()));
    let mut session = new_session(shared, &arrival, &destination, traffic.clone());
    let registration = shared.connections.register(Entry {
        // A cookie of another node's socket means nothing here, and on this node the source has registered it.
        connection: None,
        source: arrival.workload.as_ref().map(|w| (w.uid.clone(), w.identity.clone())),
        destination: Some(pod.uid.clone()),
        credentials: arrival.credentials.clone(),
        validity: arrival.validity.clone(),
        judged: Some(Judged { source: arrival.source.clone(), port: arrival.destination.port() }),
    });
    let decision = judge(shared, pod, &arrival, &registration);
    session.record.policy = policy_of(&decision);
    count(&pair, &decision);
    match decision.outcome {
        Outcome::Deny => {
            session.fail(decision.reason);
            session.record.verdict = Verdict::Denied;
            pair.failed(decision.reason);
            let mut refusal = ConnectError::new(decision.reason, "policy refuses this caller");
            refusal.status = 403;
            Err(refusal)
        }
        Outcome::Allow => {
            let connected = dial(shared, pod, arrival.client, arrival.destination).await;
            let socket = connected.inspect_err(|error| {
                session.fail(error.reason);
                pair.failed(error.reason);
            })?;
            if !decision.audited.is_empty() {
                session.record.verdict = Verdict::Audited;
            }
            session.opened();
            let cut = socket.cut();
            cut.set(true);
            let _open = OpenConnection::new(pair);
            let seldom = Box::new(Seldom { registration, session, _open });
            Ok(Admitted::Opaque(Opened { socket, cut, traffic, seldom }))
        }
        Outcome::JudgeHttp => {
            session.opened();
            let handler =
                HttpInbound::new(shared.clone(), pod.clone(), arrival, session.record.clone(), pair.clone());
            let _open = OpenConnection::new(pair);
            Ok(Admitted::Http(Box::new(Http { handler: Arc::new(handler), registration, session, _open })))
        }
    }
}

/// Judges with a state that is still the current one once the registry knows the outcome: a change in between is
/// seen either here or by the registry.
fn judge(shared: &Shared, pod: &Pod, arrival: &Arrival, registration: &Registration) -> Decision {
    loop {
        let state = shared.state();
        let decision = match state.workload(&pod.uid) {
            Some(destination) => eval::judge(
                &state,
                &Access {
                    caller: arrival.source.caller(),
                    destination,
                    port: arrival.destination.port(),
                    protocol: TCP,
                },
            ),
            None => Decision {
                outcome: Outcome::Deny,
                reason: Reason::UnknownPeer,
                policy: None,
                audited: Vec::new(),
                plaintext: false,
            },
        };
        registration.set_opaque(decision.outcome == Outcome::Allow);
        if Arc::ptr_eq(&state, &shared.state()) {
            return decision;
        }
    }
}

fn new_session(shared: &Shared, arrival: &Arrival, destination: &Workload, traffic: Arc<Traffic>) -> Session {
    let source = record::peer(arrival.client, arrival.workload.as_deref(), arrival.identity());
    let to = record::peer(arrival.destination, Some(destination), Some(destination.identity.clone()));
    let mut base = record::begin(arrival.connection, Reporter::ProxyDestination, source, to);
    base.tls = arrival.tls.clone();
    Session::new(shared.flows.clone(), base, traffic)
}

fn policy_of(decision: &Decision) -> Option<weft_core::NamespacedName> {
    decision.policy.clone().or_else(|| decision.audited.first().cloned())
}

fn count(pair: &Pair, decision: &Decision) {
    for policy in &decision.audited {
        pair.decided(Verdict::Audited, Some(policy));
    }
    match decision.outcome {
        Outcome::Allow => pair.decided(Verdict::Forwarded, decision.policy.as_ref()),
        Outcome::Deny => pair.decided(Verdict::Denied, decision.policy.as_ref()),
        // Each request is counted when it is judged.
        Outcome::JudgeHttp => {}
    }
}

/// Connects to the Pod's own application, which sees `client` as its peer.
async fn dial(
    shared: &Shared,
    pod: &Pod,
    client: SocketAddr,
    destination: SocketAddr,
) -> Result<Socket, ConnectError> {
    let failed = |error: std::io::Error| {
        let text = format!(
            "the application at {destination} cannot be connected to: {error}; does it listen there?"
        );
        ConnectError::new(Reason::ConnectFailure, text)
    };
    let socket = pod.net.socket(Family::of(destination), Some(client)).map_err(failed)?;
    let connected = tokio::time::timeout(shared.config.connect_timeout, socket.connect(destination)).await;
    let stream = connected
        .map_err(|_| {
            ConnectError::new(Reason::Timeout, format!("the application at {destination} did not answer"))
        })?
        .map_err(failed)?;
    socket::tune_noticed(&stream);
    Ok(Socket::new(stream))
}
