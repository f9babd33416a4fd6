//! The seam between HTTP serving ([`crate::http`]) and the rest of the proxy: HTTP knows messages, this side knows
//! who talks to whom, where a request goes and whether it may.

use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
};
use weft_core::{
    MeshConfig, MeshState, NamespacedName, Workload,
    flow::{Reason, Verdict},
    http::HttpRequest,
    route::HeaderChanges,
};

use crate::{balance::Lease, socket::Cut};

/// A connection that HTTP is spoken on.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Decides whether its drop is a failure for the other side, or an end.
    fn cut(&self) -> Cut;

    /// From when on it takes no further requests, because it will soon be cut.
    fn retires(&self) -> Option<Instant> {
        None
    }
}

/// What HTTP serving asks of the outbound side; one handler per connection of an application.
pub trait OutboundHandler: Send + Sync + 'static {
    /// A connection towards an endpoint.
    type Upstream: Io;

    /// Chooses route, backend and endpoint of one request.
    ///
    /// # Errors
    /// With the answer to give the application locally.
    fn route(&self, request: &HttpRequest<'_>) -> Result<Routed, LocalReply>;

    /// Opens a connection to the chosen endpoint: a tunnel stream, or straight into a Pod of this node. It has its
    /// own timeout. The connection may be reused for later requests to an equal [`Target`].
    fn connect(&self, target: &Target) -> impl Future<Output = Result<Self::Upstream, ConnectError>> + Send;

    /// The id of the connection's flow records, for answers that HTTP serving gives itself.
    fn flow_id(&self) -> String;

    /// The mesh's settings (what to record), `None` before the first snapshot.
    fn settings(&self) -> Option<Arc<MeshConfig>>;

    /// Called exactly once per request when it ended, however it ended.
    fn finished(&self, end: RequestEnd);
}

/// What HTTP serving asks of the inbound side; one handler per connection towards the Pod.
pub trait InboundHandler: Send + Sync + 'static {
    /// A connection to the Pod's own application.
    type Upstream: Io;

    /// Judges one request, before a byte of it goes to the application.
    ///
    /// # Errors
    /// With the answer (403, carrying the flow's id) to give the caller.
    fn authorize(&self, request: &HttpRequest<'_>) -> Result<Permit, LocalReply>;

    /// Tells of changes from now on after which a request under way is to be judged again with
    /// [`InboundHandler::still_allows`]. Taken before [`InboundHandler::authorize`] is asked, so that no change is
    /// missed in between.
    fn changes(&self) -> watch::Receiver<Arc<MeshState>>;

    /// Whether a request that was authorized still may go on. Nothing is counted.
    fn still_allows(&self, request: &HttpRequest<'_>) -> bool;

    /// The id of the connection's flow records, for answers that HTTP serving gives itself.
    fn flow_id(&self) -> String;

    /// Opens a connection to the Pod's application. It has its own timeout. All of them serve this one caller, so
    /// a connection may be reused for later requests of the same handler.
    fn connect(&self) -> impl Future<Output = Result<Self::Upstream, ConnectError>> + Send;

    /// The mesh's settings (what to record), `None` before the first snapshot.
    fn settings(&self) -> Option<Arc<MeshConfig>>;

    /// Called exactly once per request when it ended, however it ended.
    fn finished(&self, end: RequestEnd);
}

/// Where a request goes.
#[derive(Debug)]
pub struct Routed {
    /// The chosen endpoint.
    pub target: Target,
    /// One more endpoint, to try when the first cannot be connected to.
    pub alternate: Option<Target>,
    /// Changes to the request's headers.
    pub request_headers: HeaderChanges,
    /// Changes to the response's headers.
    pub response_headers: HeaderChanges,
    /// The time the whole request may take.
    pub timeout: Option<Duration>,
    /// Counts this request as active at its endpoint; to be kept until the request ended.
    pub lease: Option<Lease>,
}

/// An endpoint. Equal targets may share connections.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its address and port.
    pub address: SocketAddr,
    /// The Pod there, where the mesh knows one.
    pub workload: Option<Arc<Workload>>,
    /// The backend Service and its port, where the request went through one.
    pub service: Option<(NamespacedName, u16)>,
}

impl PartialEq for Target {
    fn eq(&self, other: &Self) -> bool {
        let uids = [self, other].map(|target| target.workload.as_ref().map(|workload| &workload.uid));
        self.address == other.address && uids[0] == uids[1]
    }
}

impl Eq for Target {}

/// An answer that the proxy gives in the place of an upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalReply {
    /// The status code.
    pub status: u16,
    /// Why; goes into the flow.
    pub reason: Reason,
    /// The id of the flow record, for the `weft-flow-id` header and the body.
    pub flow_id: String,
    /// The policy that decided, for the flow record.
    pub policy: Option<NamespacedName>,
    /// Whether the answer may name [`LocalReply::policy`].
    pub reveal_policy: bool,
    /// Further response headers.
    pub headers: Vec<(String, String)>,
    /// A sentence for the body, without secrets.
    pub message: String,
}

/// A request that may pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Permit {
    /// The policy that allowed it, or an AUDIT policy that matched.
    pub policy: Option<NamespacedName>,
    /// Whether an AUDIT policy matched.
    pub audited: bool,
}

/// What is known of a request when it ended.
#[derive(Debug, Clone)]
pub struct RequestEnd {
    /// When its head was read.
    pub started: SystemTime,
    /// The method.
    pub method: String,
    /// The host, lower case, without port.
    pub host: String,
    /// The normalised path.
    pub path: String,
    /// The query without `?`.
    pub query: String,
    /// `HTTP/1.1` or `HTTP/2`, as the caller spoke.
    pub protocol: &'static str,
    /// The status that the caller got, 0 where it got none.
    pub status: u16,
    /// Request headers that [`weft_core::config::Telemetry::headers`] asks for.
    pub headers: Vec<(String, String)>,
    /// Body bytes from the caller.
    pub sent: u64,
    /// Body bytes to the caller.
    pub received: u64,
    /// From the request's head to the response's head; to the end where there was no response.
    pub latency: Duration,
    /// The endpoint that got it (outbound only).
    pub target: Option<Target>,
    /// What became of it: `Denied` for a policy's refusal, `Error` for a failure, `Audited` as [`Permit`] says.
    pub verdict: Verdict,
    /// Why it was refused or failed.
    pub reason: Reason,
    /// The policy of the [`LocalReply`] or [`Permit`].
    pub policy: Option<NamespacedName>,
}

/// An upstream that could not be connected to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ConnectError {
    /// What to record.
    pub reason: Reason,
    /// The status to answer an HTTP request with (503; 403 where the peer refused the caller; 504 for a timeout).
    pub status: u16,
    /// What happened, with the next step where there is one.
    pub message: String,
    /// No other endpoint may be tried: this one may have heard the application's first bytes, or the application is gone.
    pub settled: bool,
}

impl ConnectError {
    /// With the status that fits the reason.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        let status = match reason {
            Reason::PolicyDenied | Reason::PolicyDenyRule | Reason::PlaintextRefused => 403,
            Reason::Timeout => 504,
            _ => 503,
        };
        Self { reason, status, message: message.into(), settled: false }
    }

    /// The same, with [`ConnectError::settled`].
    #[must_use]
    pub fn settled(self, settled: bool) -> Self {
        Self { settled, ..self }
    }
}
