//! Connections that the applications of a Pod open: what was dialled, where it goes, and on the way.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::future::Either;
use tokio::net::TcpStream;
use weft_core::{
    NamespacedName, SubjectId, Workload,
    flow::{Reason, Reporter},
};

use crate::{
    accept::{self, Room, Serving},
    balance::Lease,
    beside::beside,
    connections::{Entry, Registration},
    copy::{self, Traffic},
    early::Early,
    l7::{ConnectError, Io, Target},
    metrics::{Pair, Reported, Side},
    platform::OriginalDst,
    pod::Pod,
    proxy::Shared,
    record::{self, Session},
    socket::Socket,
    upstream::Upstream,
};

mod connect;
mod http;
mod resolve;

use connect::Dialler;
use resolve::{Resolved, Unresolved};

/// Serves one accepted outbound connection.
pub fn serve(
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    accepted: TcpStream,
    peer: SocketAddr,
    room: Room,
) -> impl Future<Output = ()> + Send {
    accept::connection(pod, room, move |pod| set_up(shared, pod, accepted, peer))
}

/// How a connection is served.
enum Served {
    /// Its bytes pass unseen.
    Opaque(Reached),
    /// Its requests are looked at.
    Http { service: NamespacedName, port: u16 },
}

/// Finds out what an application dialled, and reaches it where nothing more has to be known; what fails is recorded.
async fn set_up(
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    accepted: TcpStream,
    peer: SocketAddr,
) -> Option<Serving> {
    let original = match pod.net.original_dst(&accepted) {
        Ok(Some(original)) => original,
        Ok(None) => {
            shared.metrics.original_dst_missing.inc();
            let _reset = reset(accepted);
            return None;
        }
        Err(error) => {
            shared.metrics.original_dst_missing.inc();
            tracing::warn!(pod = %pod.uid, %error, "the kernel did not say what an application dialled");
            let _reset = reset(accepted);
            return None;
        }
    };
    let app = reset(accepted);
    let Some(source) = shared.wait(|state| state.workload(&pod.uid).cloned()).await else {
        tracing::warn!(pod = %pod.uid, "a connection was refused: nobody described its Pod");
        return None;
    };
    let outbound = Outbound {
        client: client_address(pod.net.addresses(), &source, original.address, peer),
        shared,
        pod,
        source,
        original,
    };
    Some(match outbound.resolve(&app).await? {
        Served::Opaque(reached) => {
            let Outbound { shared, pod, source, .. } = outbound;
            Box::pin(copy(shared.config.idle_timeout, pod, source, app, reached))
        }
        Served::Http { service, port } => Box::pin(async move { outbound.http(app, service, port).await }),
    })
}

/// The application's socket, to be reset unless its connection ends well.
fn reset(accepted: TcpStream) -> Socket {
    let app = Socket::new(accepted);
    app.cut().set(true);
    app
}

/// The Pod's address, of the family that was dialled, with the application's port: the socket itself shows a
/// loopback address, as it was steered there.
fn client_address(
    network: &[IpAddr],
    source: &Workload,
    dialled: SocketAddr,
    peer: SocketAddr,
) -> SocketAddr {
    let v4 = dialled.ip().to_canonical().is_ipv4();
    let own = network.iter().chain(&source.addresses).chain(&source.host_addresses).map(IpAddr::to_canonical);
    // Applications trust loopback: an address that is not known must not look like it.
    let nobody = || match peer.ip().to_canonical() {
        ip if !ip.is_loopback() => ip,
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(own.into_iter().find(|a| a.is_ipv4() == v4).unwrap_or_else(nobody), peer.port())
}

/// One connection of an application.
struct Outbound {
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    source: Arc<Workload>,
    original: OriginalDst,
    client: SocketAddr,
}

impl Outbound {
    async fn resolve(&self, app: &Socket) -> Option<Served> {
        if let Some(reason) = self.forbidden() {
            self.refuse(reason);
            return None;
        }
        let address = self.address();
        // An address of the mesh that nobody described yet is held: the Pod may just be starting.
        let held = self
            .shared
            .wait(|state| match resolve::resolve(state, &self.source, address) {
                Err(Unresolved::Unknown) => None,
                answer => Some(answer),
            })
            .await;
        match held.unwrap_or(Err(Unresolved::Unknown)) {
            Ok(Resolved::Http { service, port }) => Some(Served::Http { service, port }),
            Ok(Resolved::Opaque(targets)) => self.reach_one(app, &targets).await.map(Served::Opaque),
            Err(Unresolved::Unknown) => {
                self.refuse(Reason::UnknownPeer);
                None
            }
            Err(Unresolved::Refused(reason)) => {
                self.refuse(reason);
                None
            }
        }
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::new(self.original.address.ip().to_canonical(), self.original.address.port())
    }

    /// Connections that must not be made, whatever the address is.
    fn forbidden(&self) -> Option<Reason> {
        let state = self.shared.state();
        let address = self.address();
        let ip = address.ip();
        let mesh = state.workload_at(ip).is_some_and(|w| w.mode.enrolled())
            || state.service_at(ip).is_some()
            || state.in_ranges(ip);
        if address.port() == self.shared.config.tunnel_port && mesh {
            return Some(Reason::TunnelPortDialled);
        }
        let own = self.source.addresses.iter().any(|a| a.to_canonical() == ip);
        if ip.is_unspecified() || ((own || ip.is_loopback()) && self.pod.ports.contains(&address.port())) {
            self.shared.metrics.loops.inc();
            return Some(Reason::ProtocolError);
        }
        let kernel = state.workload_of(self.original.subject);
        if kernel.is_some_and(|w| w.identity != self.source.identity) {
            self.shared.metrics.client_mismatches.inc();
            return Some(Reason::IdentityMismatch);
        }
        None
    }

    /// Records a refusal; the application sees a reset.
    fn refuse(&self, reason: Reason) {
        let (_, pair, mut session) = self.session(None);
        pair.failed(reason);
        session.fail(reason);
        tracing::debug!(pod = %self.source.name, address = %self.original.address, ?reason, "a connection was refused");
    }

    fn session(&self, target: Option<&Target>) -> (Arc<Traffic>, Arc<Pair>, Session) {
        let state = self.shared.state();
        let dialled = self.address();
        let workload = match target {
            Some(target) => target.workload.clone(),
            None => state.workload_at(dialled.ip()).cloned(),
        };
        let side = workload.as_deref().map_or_else(Side::outside, Side::workload);
        let pair = self.shared.metrics.pair(Reported::Source, Side::workload(&self.source), side);
        let traffic = Arc::new(Traffic::new(pair.sent.clone(), pair.received.clone()));
        let source = record::peer(self.client, Some(&self.source), Some(self.source.identity.clone()));
        let to = record::peer(target.map_or(dialled, |t| t.address), workload.as_deref(), None);
        let mut base = record::begin(self.original.connection, Reporter::ProxySource, source, to);
        base.service = match target {
            Some(target) => target.service.clone(),
            None => state.frontend(dialled).map(|(service, port)| (service.name.clone(), port.port)),
        };
        if target.is_none() && base.service.is_some() {
            // It is no Pod's, and not the world's either.
            base.destination.subject = SubjectId::UNKNOWN;
        }
        (traffic.clone(), pair, Session::new(self.shared.flows.clone(), base, traffic))
    }

    fn register(&self, destination: Option<&Workload>) -> Registration {
        let tunnelled = destination.is_some_and(|w| w.mode.enrolled());
        self.shared.connections.register(Entry {
            connection: Some(self.original.connection),
            source: Some((self.source.uid.clone(), self.source.identity.clone())),
            destination: destination.map(|w| w.uid.clone()),
            credentials: tunnelled.then(|| self.source.identity.clone()),
            validity: None,
            judged: None,
        })
    }

    fn dialler(&self) -> Dialler {
        Dialler {
            shared: self.shared.clone(),
            pod: self.pod.clone(),
            source: self.source.clone(),
            connection: self.original.connection,
            client: self.client,
        }
    }

    async fn http(&self, app: Socket, service: NamespacedName, port: u16) {
        // HTTP ends with its last message, and is answered where it fails.
        app.cut().set(false);
        let cut = app.cut();
        let (_, _, mut session) = self.session(None);
        // Before anybody hears of the connection: what they hear may make them cut it.
        let mut registration = self.register(None);
        session.opened();
        let handler =
            Arc::new(http::HttpOutbound::new(self.dialler(), service, port, session.record.clone()));
        let (limits, drain) = (self.shared.http_limits(), self.shared.drain.clone());
        let reason = {
            let serving = crate::http::serve_outbound(app, handler, limits, drain);
            let mut serving = std::pin::pin!(serving);
            match beside(&mut serving, Box::pin(registration.ended(&self.pod))).await {
                Either::Left(()) => Reason::None,
                Either::Right(reason) => {
                    // Before what serves is dropped.
                    cut.set(true);
                    reason
                }
            }
        };
        if reason != Reason::None {
            session.fail(reason);
        }
    }

    /// Connects to one of the endpoints, to another where the first cannot be had.
    async fn reach_one(&self, app: &Socket, targets: &[Target]) -> Option<Reached> {
        let Some((target, alternate)) = self.pod.balancer.choose(targets, |t| t.address) else {
            self.refuse(Reason::NoEndpoint);
            return None;
        };
        let mut early = Early::of(app);
        for target in std::iter::once(target).chain(alternate) {
            match self.reach(target, &mut early).await {
                Ok(mut reached) => {
                    let (sent, rest) = early.into_parts();
                    reached.traffic.add_sent(sent as u64);
                    reached.early = rest;
                    return Some(reached);
                }
                Err(error) if connect::worth_another(&error) => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// Connects to one endpoint; a failure is recorded.
    async fn reach(&self, target: &Target, early: &mut Early<'_>) -> Result<Reached, ConnectError> {
        let (traffic, pair, mut session) = self.session(Some(target));
        let mut registration = self.register(target.workload.as_deref());
        let lease = self.pod.balancer.lease(target.address);
        let dialler = self.dialler();
        let connected = tokio::select! {
            connected = dialler.connect(target, pair.clone(), early) => connected,
            reason = registration.cut() => Err(ConnectError::new(reason, "cut while connecting")),
        };
        match connected {
            Ok(upstream) => {
                registration.set_validity(upstream.validity());
                session.record.tls = upstream.tls.clone();
                // Whoever answered a tunnel, or was reached on this node, has proven its identity.
                if upstream.tls != weft_core::flow::Tls::None {
                    let identity = target.workload.as_ref().map(|w| w.identity.clone());
                    session.record.destination.identity = identity;
                }
                let seldom = Box::new(Seldom { _lease: lease, registration, session });
                Ok(Reached { early: Vec::new(), traffic, upstream, seldom })
            }
            Err(error) => {
                pair.failed(error.reason);
                session.fail(error.reason);
                tracing::debug!(pod = %self.source.name, target = %target.address, %error, "an endpoint was not reached");
                Err(error)
            }
        }
    }
}

/// Copies between an application and the endpoint that was reached for it, until the end.
fn copy(
    idle: Duration,
    pod: Arc<Pod>,
    source: Arc<Workload>,
    mut app: Socket,
    reached: Reached,
) -> impl Future<Output = ()> + Send {
    // Here and not in the block, where what is given and what it becomes would both have room.
    let Reached { early, traffic, mut upstream, mut seldom } = reached;
    let upstream_cut = upstream.cut();
    upstream_cut.set(true);
    seldom.session.opened();
    async move {
        let end = seldom.registration.ended(&pod);
        match copy::both(&mut app, &mut upstream, early, &traffic, idle, end).await {
            Ok(()) => {
                app.cut().set(false);
                upstream_cut.set(false);
            }
            Err(error) => {
                seldom.session.fail(error.reason());
                tracing::debug!(pod = %source.name, %error, "a connection failed");
            }
        }
        // The connection ends last, when everybody has been told.
        drop(seldom);
        drop(upstream);
    }
}

/// An endpoint that was connected to.
struct Reached {
    /// Read from the application, and not sent yet.
    early: Vec<u8>,
    traffic: Arc<Traffic>,
    upstream: Upstream,
    seldom: Box<Seldom>,
}

/// What of it no byte needs.
struct Seldom {
    _lease: Lease,
    registration: Registration,
    session: Session,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size of what a function's future holds.
    fn state<A, B, C, D, E, F>(_: impl Fn(A, B, C, D, E) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_connection_that_rests_holds_little() {
        let (task, copied, seldom) = (state(serve), state(copy), size_of::<Seldom>());
        assert!(task <= 96, "{task} bytes for each connection");
        assert!(copied <= 448, "{copied} bytes where its bytes pass unseen");
        assert!(seldom <= 640, "{seldom} bytes that are seldom needed");
    }
}
