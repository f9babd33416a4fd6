//! Plain connections from outside the mesh, and the same-node shortcut.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use socket2::SockRef;
use tokio::net::TcpStream;
use weft_core::flow::{Reason, Tls};

use super::{
    Admitted, Arrival, admit,
    tunnel::{opaque, serve_http},
};
use crate::{
    accept::{self, Serving},
    connections::Source,
    l7::ConnectError,
    metrics::Pair,
    pipe::pipe,
    pod::Pod,
    proxy::Shared,
    socket::Socket,
    upstream::{Upstream, Way},
};

/// Bytes buffered in memory in each direction towards a Pod of this node whose requests are judged.
const MEMORY: usize = 64 * 1024;

/// Serves one accepted plain connection, and holds `held` meanwhile.
pub fn serve(
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    accepted: TcpStream,
    client: SocketAddr,
    held: impl Send,
) -> impl Future<Output = ()> + Send {
    accept::connection(pod, held, move |pod| set_up(shared, pod, accepted, client))
}

/// Judges a connection, and connects it to the application.
async fn set_up(
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    accepted: TcpStream,
    client: SocketAddr,
) -> Option<Serving> {
    let connection = SockRef::from(&accepted).cookie().unwrap_or_default();
    let destination = accepted.local_addr().ok()?;
    let mut accepted = Socket::new(accepted);
    let cut = accepted.cut();
    cut.set(true);
    let port = destination.port();
    let own_port = port == shared.config.tunnel_port || pod.ports.contains(&port);
    if own_port || reserved(client.ip()) {
        shared.metrics.loops.inc();
        tracing::warn!(%client, %destination, "a connection from the proxy to itself was closed");
        return None;
    }
    let arrival = Arrival {
        connection,
        source: Source::Unauthenticated(client.ip().to_canonical()),
        workload: None,
        client,
        destination,
        tls: Tls::None,
        credentials: None,
        validity: None,
    };
    match admit(&shared, &pod, arrival).await {
        Ok(Admitted::Opaque(mut opened)) => {
            let idle = shared.config.idle_timeout;
            Some(Box::pin(async move {
                match opaque(idle, &pod, &mut accepted, &mut opened).await {
                    Reason::None => cut.set(false),
                    reason => opened.seldom.session.fail(reason),
                }
            }))
        }
        Ok(Admitted::Http(http)) => {
            cut.set(false);
            Some(Box::pin(async move { serve_http(&shared, &pod, *http, accepted).await }))
        }
        Err(error) => {
            tracing::debug!(%client, %destination, %error, "a plain connection was refused");
            None
        }
    }
}

/// Whether an address is one that only the proxy dials applications from: such a connection would come back to
/// the proxy again and again.
fn reserved(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => matches!(address.octets(), [127, 0, 0, 6..=13]),
        IpAddr::V6(address) => address.is_loopback(),
    }
}

/// Goes straight into a Pod of this node, judged like any other arrival; `pair` counts it at the source.
///
/// # Errors
/// As [`admit`].
pub async fn local(
    shared: &Arc<Shared>,
    pod: &Arc<Pod>,
    arrival: Arrival,
    pair: Arc<Pair>,
) -> Result<Upstream, ConnectError> {
    debug_assert!(
        matches!(arrival.source, Source::Authenticated(_)),
        "the kernel proves who calls on a node"
    );
    match admit(shared, pod, arrival).await? {
        Admitted::Opaque(opened) => Ok(Upstream::new(Way::Local(Box::new(opened)), Tls::Local, pair)),
        Admitted::Http(http) => {
            let (near, far) = pipe(MEMORY);
            let (shared, pod) = (shared.clone(), pod.clone());
            shared.tasks.clone().spawn("local-http", async move {
                serve_http(&shared, &pod, *http, far).await;
            });
            Ok(Upstream::new(Way::Judged(near), Tls::Local, pair))
        }
    }
}
