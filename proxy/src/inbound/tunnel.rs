//! Tunnels that other proxies open to a Pod of this node.

use std::{
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::FutureExt as _;
use futures_util::future::Either;
use http::StatusCode;
use tokio::net::TcpStream;
use weft_core::{SpiffeId, Workload, flow::Reason};
use weft_runtime::DrainHold;

use super::{Admitted, Arrival, Http, Opened, admit};
use crate::{
    accept::{self, Room, Serving},
    beside::beside,
    connections::Source,
    copy::{self, Copied},
    l7::ConnectError,
    metrics::{Reported, Side},
    pod::Pod,
    proxy::Shared,
    tunnel::{
        Session, Stream,
        server::{Incoming, Server},
    },
};

/// Serves one accepted connection at the tunnel port until it ends or its Pod is closed.
pub async fn serve(shared: Arc<Shared>, pod: Arc<Pod>, socket: TcpStream, _room: Room) {
    let closing = pod.clone();
    let _ended = beside(pin!(tunnel(shared, pod, socket)), Box::pin(closing.closed())).await;
}

async fn tunnel(shared: Arc<Shared>, pod: Arc<Pod>, socket: TcpStream) {
    let Some(own) = shared.state().workload(&pod.uid).map(|w| w.identity.clone()) else {
        tracing::warn!(pod = %pod.uid, "a tunnel was refused: nobody described the Pod");
        return;
    };
    // Before the first credentials and after their expiry there is no handshake.
    let Some(credentials) = shared.credentials.current(&own) else {
        shared.metrics.handshakes_failed.inc();
        tracing::warn!(identity = %own, "a tunnel was refused: no credentials; is the operator reachable?");
        return;
    };
    let accepted = Server::accept(socket, &credentials, shared.config.tunnel).await;
    let mut server = match accepted {
        Ok(server) => server,
        Err(error) => {
            shared.metrics.handshakes_failed.inc();
            tracing::info!(pod = %pod.uid, %error, "a tunnel was refused");
            return;
        }
    };
    let peer = server.peer().clone();
    let ends = (pod.uid.clone(), peer.clone(), server.session().peer.ip().to_canonical());
    server.share(&shared.proven, ends);
    let caller = Caller { session: server.session().clone(), peer, own };
    let serve = |incoming: Incoming| {
        let stream = stream(shared.clone(), pod.clone(), caller.clone(), incoming, shared.drain.hold());
        shared.tasks.spawn("tunnel-stream", stream);
    };
    let malformed = |problem: &'static str| {
        shared.metrics.malformed.inc();
        tracing::info!(peer = %caller.peer, problem, "a malformed CONNECT was refused");
    };
    let ended = server.run(shared.drain.clone(), serve, malformed).await;
    if let Err(error) = ended {
        tracing::debug!(peer = %caller.peer, %error, "a tunnel ended");
    }
}

#[derive(Clone)]
struct Caller {
    session: Session,
    peer: SpiffeId,
    own: SpiffeId,
}

/// One stream of a tunnel, until it ends or its Pod is closed.
fn stream(
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    caller: Caller,
    incoming: Incoming,
    hold: DrainHold,
) -> impl Future<Output = ()> + Send {
    accept::connection(pod, hold, move |pod| set_up(shared, pod, caller, incoming))
}

/// Judges a CONNECT, connects to the application, and answers.
async fn set_up(shared: Arc<Shared>, pod: Arc<Pod>, caller: Caller, incoming: Incoming) -> Option<Serving> {
    if caller.session.validity.ended(SystemTime::now()) {
        // Nothing of it was done: the peer may ask again, under a new certificate.
        incoming.postpone();
        return None;
    }
    let problem = check(&shared, &pod, &caller, &incoming);
    if let Some(problem) = problem {
        shared.metrics.malformed.inc();
        tracing::info!(peer = %caller.peer, authority = %incoming.request().authority, problem, "a CONNECT was refused");
        incoming.refuse(StatusCode::BAD_REQUEST);
        return None;
    }
    let workload = match source(&shared, &caller).await {
        Ok(workload) => workload,
        Err(claimed) => {
            shared.metrics.peer_mismatches.inc();
            mismatch(&shared, &pod, &claimed);
            tracing::warn!(
                peer = %caller.peer, expected = %claimed.identity, address = %caller.session.peer,
                "a CONNECT was refused: the peer's identity is not that of the Pod with its address"
            );
            incoming.refuse(StatusCode::UNAUTHORIZED);
            return None;
        }
    };
    let info = &incoming.request().source;
    let port = if info.port == 0 { caller.session.peer.port() } else { info.port };
    let arrival = Arrival {
        connection: info.connection,
        source: Source::Authenticated(caller.peer.clone()),
        workload,
        client: SocketAddr::new(caller.session.peer.ip().to_canonical(), port),
        destination: canonical(incoming.request().authority),
        tls: caller.session.tls.clone(),
        credentials: Some(caller.own.clone()),
        validity: Some(caller.session.validity.clone()),
    };
    match admit(&shared, &pod, arrival).await {
        Ok(admitted) => match incoming.accept() {
            Ok(stream) => Some(match admitted {
                Admitted::Opaque(opened) => {
                    Box::pin(forward(shared.config.idle_timeout, pod, opened, stream))
                }
                Admitted::Http(http) => {
                    Box::pin(async move { serve_http(&shared, &pod, *http, stream).await })
                }
            }),
            Err(error) => {
                tracing::debug!(%error, "the peer went away before the answer");
                None
            }
        },
        Err(error) => {
            incoming.refuse(status(&error));
            None
        }
    }
}

/// What is wrong with a CONNECT, if anything.
fn check(shared: &Shared, pod: &Pod, caller: &Caller, incoming: &Incoming) -> Option<&'static str> {
    if incoming.forwarded() != caller.session.peer.ip().to_canonical() {
        return Some("the forwarded header is not the tunnel's source");
    }
    let authority = incoming.request().authority;
    let ip = authority.ip().to_canonical();
    let state = shared.state();
    let known = state.workload(&pod.uid).is_some_and(|w| w.addresses.iter().any(|a| a.to_canonical() == ip));
    if !known && ip != caller.session.local.ip().to_canonical() {
        return Some("the authority is not an address of this Pod");
    }
    if authority.port() == 0
        || authority.port() == shared.config.tunnel_port
        || pod.ports.contains(&authority.port())
    {
        return Some("the authority's port is the proxy's own");
    }
    None
}

/// The Pod that calls, or the node for those of its network, which have no address of their own. Where the state knows
/// another identity for its address, the state may be late: it gets a moment to agree.
async fn source(shared: &Shared, caller: &Caller) -> Result<Option<Arc<Workload>>, Arc<Workload>> {
    let address = caller.session.peer.ip();
    let agrees = |workload: Option<&Arc<Workload>>| match workload {
        Some(workload) => (workload.identity == caller.peer).then(|| Some(workload.clone())),
        None => Some(None),
    };
    match shared.wait(|state| agrees(state.workload_at(address))).await {
        Some(workload) => Ok(workload.or_else(|| {
            let state = shared.state();
            state.node(caller.peer.as_node()?).filter(|node| node.identity == caller.peer).cloned()
        })),
        None => match shared.state().workload_at(address) {
            Some(workload) if workload.identity != caller.peer => Err(workload.clone()),
            other => Ok(other.cloned()),
        },
    }
}

fn mismatch(shared: &Shared, pod: &Pod, claimed: &Workload) {
    if let Some(destination) = shared.state().workload(&pod.uid) {
        let pair =
            shared.metrics.pair(Reported::Destination, Side::workload(claimed), Side::workload(destination));
        pair.failed(Reason::IdentityMismatch);
    }
}

fn status(error: &ConnectError) -> StatusCode {
    match error.status {
        403 => StatusCode::UNAUTHORIZED,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

#[expect(clippy::manual_async_fn, reason = "that would have room for what it is given twice")]
fn forward(
    idle: Duration,
    pod: Arc<Pod>,
    mut opened: Opened,
    mut stream: Stream,
) -> impl Future<Output = ()> + Send {
    async move {
        let reason = opaque(idle, &pod, &mut stream, &mut opened).await;
        if reason != Reason::None {
            opened.seldom.session.fail(reason);
            stream.abort();
        }
        drop(opened);
    }
}

/// Copies until the end; [`Reason::None`] for a clean one, after which the application's socket closes cleanly.
pub(super) fn opaque<'a, C>(
    idle: Duration,
    pod: &'a Pod,
    client: &'a mut C,
    opened: &'a mut Opened,
) -> impl Future<Output = Reason> + 'a
where
    C: Copied,
{
    let Opened { socket, traffic, seldom, cut } = opened;
    let copied = copy::both(client, socket, Vec::new(), traffic, idle, seldom.registration.ended(pod));
    copied.map(|copied| match copied {
        Ok(()) => {
            cut.set(false);
            Reason::None
        }
        Err(error) => error.reason(),
    })
}

/// Serves HTTP until the connection ends or is cut.
pub(super) async fn serve_http<C: crate::l7::Io>(shared: &Arc<Shared>, pod: &Pod, mut http: Http, stream: C) {
    let (limits, cut) = (shared.http_limits(), stream.cut());
    let reason = {
        let serving = crate::http::serve_inbound(stream, http.handler.clone(), limits, shared.drain.clone());
        let mut serving = std::pin::pin!(serving);
        match beside(&mut serving, Box::pin(http.registration.ended(pod))).await {
            Either::Left(()) => Reason::None,
            Either::Right(reason) => {
                // Before what serves is dropped.
                cut.set(true);
                reason
            }
        }
    };
    if reason != Reason::None {
        http.session.fail(reason);
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::{super::Seldom, *};

    /// The size of what a function's future holds.
    fn state<A, B, C, D, E, F>(_: impl Fn(A, B, C, D, E) -> F) -> usize {
        size_of::<F>()
    }

    fn copied<A, B, C, D, F>(_: impl Fn(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_stream_that_rests_holds_little() {
        let (task, copied, seldom) = (state(stream), copied(forward), size_of::<Seldom>());
        assert!(task <= 64, "{task} bytes for each stream");
        assert!(copied <= 384, "{copied} bytes where its bytes pass unseen");
        assert!(seldom <= 640, "{seldom} bytes that are seldom needed");
    }
}
