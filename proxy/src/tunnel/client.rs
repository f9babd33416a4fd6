//! The dialling end of tunnels: a pool of connections of one source Pod.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use http::{Method, Request, StatusCode, Uri};
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use tokio::{net::TcpStream, sync::Semaphore};
use tokio_rustls::{TlsConnector, client::TlsStream};
use weft_core::{SpiffeId, WorkloadUid, flow::Reason};
use weft_runtime::Tasks;

use super::{
    CONNECTION_WINDOW, ConnectRequest, MAX_FRAME, MAX_HEADERS, MAX_STREAMS, STREAM_WINDOW, Session, Stream,
    Times, keep_alive, negotiated,
};
use crate::{
    l7::ConnectError,
    platform::{Family, PodNet},
};

/// Connections of one key; with [`MAX_STREAMS`] each this allows more streams than a Pod has ports.
const MAX_CONNECTIONS: usize = 1024;
/// How often a CONNECT is tried again on another connection, after its connection went away before the answer.
const RETRIES: usize = 3;
/// How long an idle connection may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

/// What a tunnel connection may be shared by: nothing but the same source Pod and identity towards the same
/// address and expected identity, under the same credential.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The source Pod.
    pub source: WorkloadUid,
    /// Its identity.
    pub identity: SpiffeId,
    /// Where the destination's proxy listens.
    pub address: SocketAddr,
    /// Who must answer there.
    pub expected: SpiffeId,
    /// [`weft_identity::Credentials::generation`].
    pub generation: u64,
}

/// The tunnels of one source Pod. They live in its network namespace, so no two Pods share one.
pub struct Pool {
    net: Arc<dyn PodNet>,
    times: Times,
    tasks: Tasks,
    slots: Mutex<HashMap<Key, Arc<Slot>>>,
    open: Arc<AtomicUsize>,
}

struct Slot {
    connections: Mutex<Vec<Arc<Tunnel>>>,
    /// One dial at a time: those that wait find the new connection, or share the failure.
    dialling: Semaphore,
    failed: Mutex<Option<(Instant, ConnectError)>>,
}

struct Tunnel {
    send: SendRequest<Bytes>,
    session: Session,
    streams: AtomicUsize,
    closed: AtomicBool,
}

/// One stream's place on a connection.
struct Place(Arc<Tunnel>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

enum OpenError {
    /// Another connection may do.
    Connection(String),
    Refused(ConnectError),
}

impl Pool {
    /// An empty pool; `open` counts the connections of all pools.
    pub fn new(net: Arc<dyn PodNet>, times: Times, tasks: Tasks, open: Arc<AtomicUsize>) -> Self {
        Self { net, times, tasks, slots: Mutex::new(HashMap::new()), open }
    }

    /// Opens a stream, over an open connection of this key or a new one.
    ///
    /// # Errors
    /// When the destination cannot be reached, is not who it should be, or refuses.
    pub async fn connect(
        &self,
        key: &Key,
        config: &Arc<rustls::ClientConfig>,
        request: &ConnectRequest,
    ) -> Result<(Stream, Session), ConnectError> {
        let slot = self.slot(key);
        let mut problem = String::new();
        for _ in 0..RETRIES {
            let place = match slot.reserve() {
                Some(place) => place,
                None => self.dial(key, &slot, config).await?,
            };
            let session = place.0.session.clone();
            match tokio::time::timeout(self.times.answer, open(place, request)).await {
                Ok(Ok(stream)) => return Ok((stream, session)),
                Ok(Err(OpenError::Refused(error))) => return Err(error),
                Ok(Err(OpenError::Connection(text))) => problem = text,
                Err(_) => {
                    let text = format!("the proxy at {} did not answer the CONNECT in time", key.address);
                    return Err(ConnectError::new(Reason::Timeout, text));
                }
            }
        }
        let text = format!("the tunnel to {} broke before an answer: {problem}", key.address);
        Err(ConnectError::new(Reason::ConnectFailure, text))
    }

    /// Connections that are open towards all destinations.
    pub fn connections(&self) -> usize {
        self.slots.lock().values().map(|s| s.connections.lock().len()).sum()
    }

    fn slot(&self, key: &Key) -> Arc<Slot> {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.get(key) {
            return slot.clone();
        }
        // A renewed credential makes new keys; the slots that nobody uses any more go here.
        slots.retain(|_, s| Arc::strong_count(s) > 1 || !s.connections.lock().is_empty());
        let slot = Arc::new(Slot {
            connections: Mutex::new(Vec::new()),
            dialling: Semaphore::new(1),
            failed: Mutex::new(None),
        });
        slots.insert(key.clone(), slot.clone());
        slot
    }

    async fn dial(
        &self,
        key: &Key,
        slot: &Arc<Slot>,
        config: &Arc<rustls::ClientConfig>,
    ) -> Result<Place, ConnectError> {
        let since = Instant::now();
        let Ok(_permit) = slot.dialling.acquire().await else {
            return Err(ConnectError::new(Reason::Draining, "the pool is closed"));
        };
        if let Some(place) = slot.reserve() {
            return Ok(place);
        }
        if let Some((_, error)) = slot.failed.lock().as_ref().filter(|(at, _)| *at >= since) {
            return Err(error.clone());
        }
        if slot.connections.lock().len() >= MAX_CONNECTIONS {
            let text = format!("{MAX_CONNECTIONS} tunnels to {} are full", key.address);
            return Err(ConnectError::new(Reason::LimitReached, text));
        }
        match handshake(&*self.net, key, config, self.times).await {
            Ok((send, connection, session)) => {
                let tunnel = Arc::new(Tunnel {
                    send,
                    session,
                    streams: AtomicUsize::new(1),
                    closed: AtomicBool::new(false),
                });
                slot.connections.lock().push(tunnel.clone());
                let drive = drive(connection, Arc::downgrade(&tunnel), Arc::downgrade(slot), self.times);
                let count = Count::new(&self.open);
                self.tasks.spawn("tunnel", async move {
                    drive.await;
                    drop(count);
                });
                Ok(Place(tunnel))
            }
            Err(error) => {
                *slot.failed.lock() = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }
}

impl Slot {
    /// A place on an open connection, the fullest first, so that spare ones become idle.
    fn reserve(&self) -> Option<Place> {
        let connections = self.connections.lock();
        connections.iter().find_map(|tunnel| {
            let limit = tunnel.send.current_max_send_streams().min(MAX_STREAMS as usize);
            let free =
                !tunnel.closed.load(Ordering::Acquire) && tunnel.streams.load(Ordering::Acquire) < limit;
            free.then(|| {
                tunnel.streams.fetch_add(1, Ordering::AcqRel);
                Place(tunnel.clone())
            })
        })
    }

    fn forget(&self, tunnel: &Weak<Tunnel>) {
        self.connections.lock().retain(|t| !Weak::ptr_eq(&Arc::downgrade(t), tunnel));
    }

    /// Closes a connection to new streams if it has none.
    fn close_if_unused(&self, tunnel: &Arc<Tunnel>) -> bool {
        let _no_reserve = self.connections.lock();
        let unused = tunnel.streams.load(Ordering::Acquire) == 0;
        if unused {
            tunnel.closed.store(true, Ordering::Release);
        }
        unused
    }
}

struct Count(Arc<AtomicUsize>);

impl Count {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(open.clone())
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

type Established = (SendRequest<Bytes>, Connection<TlsStream<TcpStream>, Bytes>, Session);

async fn handshake(
    net: &dyn PodNet,
    key: &Key,
    config: &Arc<rustls::ClientConfig>,
    times: Times,
) -> Result<Established, ConnectError> {
    let address = key.address;
    let unreachable = |error: std::io::Error| {
        ConnectError::new(
            Reason::ConnectFailure,
            format!(
                "no TCP connection to the proxy of {address}: {error}; is the agent running on that node, and does a \
                 NetworkPolicy block its port {}?",
                address.port()
            ),
        )
    };
    let socket = net.socket(Family::of(address), None).map_err(unreachable)?;
    let tcp = tokio::time::timeout(times.connect, socket.connect(address))
        .await
        .map_err(|_| {
            ConnectError::new(Reason::Timeout, format!("the proxy of {address} did not answer in time"))
        })?
        .map_err(unreachable)?;
    crate::socket::tune(&tcp);
    let (local, peer) = (tcp.local_addr().map_err(unreachable)?, tcp.peer_addr().map_err(unreachable)?);
    let establish = async {
        let name = ServerName::IpAddress(address.ip().into());
        let tls = TlsConnector::from(config.clone()).connect(name, tcp).await.map_err(|error| {
            let text =
                format!("TLS with the proxy of {address}, expected to be {}, failed: {error}", key.expected);
            ConnectError::new(tls_reason(&error), text)
        })?;
        let session = Session { local, peer, tls: negotiated(tls.get_ref().1) };
        let (send, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(0)
            .max_frame_size(MAX_FRAME)
            .max_header_list_size(MAX_HEADERS)
            .max_send_buffer_size(STREAM_WINDOW as usize)
            .enable_push(false)
            .handshake(tls)
            .await
            .map_err(|error| {
                let text = format!("HTTP/2 with the proxy of {address} failed: {error}");
                ConnectError::new(Reason::ProtocolError, text)
            })?;
        Ok((send, connection, session))
    };
    tokio::time::timeout(times.handshake, establish).await.unwrap_or_else(|_| {
        let text = format!("the handshake with the proxy of {address} took too long");
        Err(ConnectError::new(Reason::Timeout, text))
    })
}

/// A certificate of the wrong peer is told apart from other failures.
fn tls_reason(error: &std::io::Error) -> Reason {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(
            rustls::CertificateError::ApplicationVerificationFailure
            | rustls::CertificateError::NotValidForName
            | rustls::CertificateError::NotValidForNameContext { .. }
            | rustls::CertificateError::Other(_),
        )) => Reason::IdentityMismatch,
        _ => Reason::TlsFailure,
    }
}

/// Runs a connection until it fails, the peer stops to answer pings, or it was idle for long enough.
async fn drive(
    mut connection: Connection<TlsStream<TcpStream>, Bytes>,
    tunnel: Weak<Tunnel>,
    slot: Weak<Slot>,
    times: Times,
) {
    let mut alive = std::pin::pin!(keep_alive(connection.ping_pong(), times));
    let mut idle = std::pin::pin!(idle(tunnel.clone(), slot.clone(), times.idle));
    tokio::select! {
        ended = &mut connection => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a tunnel ended");
            }
        }
        () = &mut alive => tracing::debug!("a tunnel's peer stopped to answer pings"),
        () = &mut idle => {
            if let Some(slot) = slot.upgrade() {
                slot.forget(&tunnel);
            }
            // With its last handle gone the connection says goodbye and ends by itself.
            let _ = tokio::time::timeout(GOODBYE, &mut connection).await;
            return;
        }
    }
    if let Some(tunnel) = tunnel.upgrade() {
        tunnel.closed.store(true, Ordering::Release);
    }
    if let Some(slot) = slot.upgrade() {
        slot.forget(&tunnel);
    }
}

/// Ends when the connection had no stream at two ticks of the idle time in a row, or its pool is gone.
async fn idle(tunnel: Weak<Tunnel>, slot: Weak<Slot>, limit: Duration) {
    let mut was_unused = false;
    loop {
        tokio::time::sleep(limit / 2).await;
        let (Some(tunnel), Some(slot)) = (tunnel.upgrade(), slot.upgrade()) else { return };
        let unused = tunnel.streams.load(Ordering::Acquire) == 0;
        if unused && was_unused && slot.close_if_unused(&tunnel) {
            return;
        }
        was_unused = unused;
    }
}

async fn open(place: Place, request: &ConnectRequest) -> Result<Stream, OpenError> {
    let tunnel = place.0.clone();
    let lost = |error: h2::Error| {
        // A connection that no longer takes streams is left to end with those it has.
        tunnel.closed.store(true, Ordering::Release);
        OpenError::Connection(error.to_string())
    };
    let refused = |reason, text: String| Err(OpenError::Refused(ConnectError::new(reason, text)));
    let mut connect = Request::new(());
    *connect.method_mut() = Method::CONNECT;
    let Ok(uri) = Uri::builder().authority(request.authority.to_string()).build() else {
        return refused(Reason::ProtocolError, format!("{} is no authority", request.authority));
    };
    *connect.uri_mut() = uri;
    request.source.write(tunnel.session.local.ip(), connect.headers_mut());
    let mut send = tunnel.send.clone().ready().await.map_err(lost)?;
    let (response, body) = send.send_request(connect, false).map_err(lost)?;
    drop(send);
    let response = match response.await {
        Ok(response) => response,
        Err(error) if error.is_reset() && error.reason() != Some(h2::Reason::REFUSED_STREAM) => {
            return refused(
                Reason::PeerReset,
                format!("the proxy of {} reset the CONNECT", request.authority),
            );
        }
        Err(error) => return Err(lost(error)),
    };
    let authority = request.authority;
    match response.status() {
        StatusCode::OK => Ok(Stream::new(body, response.into_body(), Some(Box::new(place)))),
        StatusCode::UNAUTHORIZED => {
            refused(Reason::PolicyDenied, format!("the proxy of {authority} refuses this identity by policy"))
        }
        StatusCode::SERVICE_UNAVAILABLE => {
            refused(Reason::ConnectFailure, format!("the application at {authority} cannot be connected to"))
        }
        status => refused(Reason::ProtocolError, format!("the proxy of {authority} answered {status}")),
    }
}
