//! Serving over in-memory streams: a scripted caller on one side, a scripted upstream on the other.

mod abuse;
mod hostile;
mod http1;
mod http2;
mod ours;
mod reuse;

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex},
    sync::{mpsc, watch},
};
use weft_core::{
    MeshConfig, MeshState, NamespacedName,
    flow::{Reason, Verdict},
    http::HttpRequest,
    route::HeaderChanges,
};
use weft_runtime::{
    Tasks,
    drain::{self, DrainTrigger},
};

use super::{Limits, serve_inbound, serve_outbound};
use crate::{
    l7::{ConnectError, InboundHandler, Io, LocalReply, OutboundHandler, Permit, RequestEnd, Routed, Target},
    socket::Cut,
};

/// Judges, routes and connects as a test says; everything under `/admin` is refused.
struct Handler {
    upstreams: mpsc::UnboundedSender<DuplexStream>,
    ended: mpsc::UnboundedSender<RequestEnd>,
    /// `method host path?query x-tenant` of what was judged.
    judged: Mutex<Vec<String>>,
    /// Value of `x-tenant` that is no longer allowed, and the news of it.
    revoked: Mutex<String>,
    changes: watch::Sender<Arc<MeshState>>,
    plan: Plan,
}

#[derive(Clone, Default)]
struct Plan {
    timeout: Option<Duration>,
    request_headers: HeaderChanges,
    response_headers: HeaderChanges,
    unreachable: bool,
}

impl Handler {
    fn judge(&self, request: &HttpRequest<'_>) -> Result<(), LocalReply> {
        let tenant = (request.header)("x-tenant").unwrap_or_default();
        self.judged
            .lock()
            .push(format!("{} {} {}?{} {tenant}", request.method, request.host, request.path, request.query));
        if !request.path.starts_with("/admin") {
            return Ok(());
        }
        Err(LocalReply {
            status: 403,
            reason: Reason::PolicyDenied,
            flow_id: "flow-7".into(),
            policy: Some(NamespacedName::new("shop", "web")),
            reveal_policy: false,
            headers: vec![("x-why".into(), "policy".into())],
            message: "weft denied this request".into(),
        })
    }

    fn revoke(&self, tenant: &str) {
        *self.revoked.lock() = tenant.to_owned();
        self.changes.send_replace(Arc::default());
    }

    fn open(&self) -> Result<DuplexStream, ConnectError> {
        if self.plan.unreachable {
            return Err(ConnectError::new(Reason::ConnectFailure, "connection refused"));
        }
        let (ours, theirs) = duplex(64 * 1024);
        self.upstreams.send(theirs).map_err(|_| ConnectError::new(Reason::NoEndpoint, "the test is over"))?;
        Ok(ours)
    }
}

impl OutboundHandler for Handler {
    type Upstream = DuplexStream;

    fn route(&self, request: &HttpRequest<'_>) -> Result<Routed, LocalReply> {
        self.judge(request)?;
        Ok(Routed {
            target: Target { address: SocketAddr::from(([10, 0, 0, 1], 80)), workload: None, service: None },
            alternate: None,
            request_headers: self.plan.request_headers.clone(),
            response_headers: self.plan.response_headers.clone(),
            timeout: self.plan.timeout,
            lease: None,
        })
    }

    fn flow_id(&self) -> String {
        "flow-9".into()
    }

    async fn connect(&self, _: &Target) -> Result<DuplexStream, ConnectError> {
        self.open()
    }

    fn settings(&self) -> Option<Arc<MeshConfig>> {
        None
    }

    fn finished(&self, end: RequestEnd) {
        // A test that has seen enough does not listen any more.
        let _ = self.ended.send(end);
    }
}

impl InboundHandler for Handler {
    type Upstream = DuplexStream;

    fn authorize(&self, request: &HttpRequest<'_>) -> Result<Permit, LocalReply> {
        self.judge(request).map(|()| Permit::default())
    }

    fn changes(&self) -> watch::Receiver<Arc<MeshState>> {
        self.changes.subscribe()
    }

    fn still_allows(&self, request: &HttpRequest<'_>) -> bool {
        (request.header)("x-tenant").as_ref() != Some(&*self.revoked.lock())
    }

    fn flow_id(&self) -> String {
        "flow-9".into()
    }

    async fn connect(&self) -> Result<DuplexStream, ConnectError> {
        self.open()
    }

    fn settings(&self) -> Option<Arc<MeshConfig>> {
        None
    }

    fn finished(&self, end: RequestEnd) {
        let _ = self.ended.send(end);
    }
}

/// What is dropped here is never a failure: the tests read what was written.
impl Io for DuplexStream {
    fn cut(&self) -> Cut {
        Cut::default()
    }
}

/// A stream whose writes are counted.
struct Counted {
    io: DuplexStream,
    writes: Arc<AtomicUsize>,
}

impl Io for Counted {
    fn cut(&self) -> Cut {
        self.io.cut()
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.io).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[derive(Clone, Copy)]
enum Side {
    Outbound,
    Inbound,
}

struct Rig {
    client: Peer,
    upstreams: mpsc::UnboundedReceiver<DuplexStream>,
    ended: mpsc::UnboundedReceiver<RequestEnd>,
    handler: Arc<Handler>,
    drain: DrainTrigger,
    task: tokio::task::AbortHandle,
    /// What was written to the client.
    writes: Arc<AtomicUsize>,
}

impl Rig {
    fn new(side: Side) -> Self {
        Self::with(side, Plan::default(), Limits::default())
    }

    fn with(side: Side, plan: Plan, limits: Limits) -> Self {
        let (ours, theirs) = duplex(64 * 1024);
        let writes = Arc::<AtomicUsize>::default();
        let theirs = Counted { io: theirs, writes: writes.clone() };
        let (upstreams_in, upstreams) = mpsc::unbounded_channel();
        let (ended_in, ended) = mpsc::unbounded_channel();
        let handler = Arc::new(Handler {
            upstreams: upstreams_in,
            ended: ended_in,
            judged: Mutex::default(),
            revoked: Mutex::default(),
            changes: watch::Sender::default(),
            plan,
        });
        let (drain, watcher) = drain::channel();
        let tasks = Tasks::new();
        let task = match side {
            Side::Outbound => tasks.spawn("http", serve_outbound(theirs, handler.clone(), limits, watcher)),
            Side::Inbound => tasks.spawn("http", serve_inbound(theirs, handler.clone(), limits, watcher)),
        };
        Self { client: Peer::new(ours), upstreams, ended, handler, drain, task, writes }
    }

    async fn upstream(&mut self) -> Peer {
        Peer::new(soon(self.upstreams.recv()).await.expect("an upstream connection"))
    }

    async fn end(&mut self) -> RequestEnd {
        soon(self.ended.recv()).await.expect("the end of a request")
    }
}

/// One end of a stream, speaking HTTP/1 by hand.
struct Peer {
    io: DuplexStream,
    buf: BytesMut,
}

impl Peer {
    fn new(io: DuplexStream) -> Self {
        Self { io, buf: BytesMut::new() }
    }

    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        soon(self.io.write_all(bytes.as_ref())).await.expect("a write");
    }

    async fn fill(&mut self) -> usize {
        soon(self.io.read_buf(&mut self.buf)).await.expect("a read")
    }

    /// Everything up to and including `until`.
    async fn read_until(&mut self, until: &str) -> String {
        loop {
            if let Some(at) = self.buf.windows(until.len()).position(|part| part == until.as_bytes()) {
                return String::from_utf8(self.buf.split_to(at + until.len()).to_vec()).expect("text");
            }
            assert!(self.fill().await > 0, "ended within: {:?}", self.buf);
        }
    }

    async fn head(&mut self) -> String {
        self.read_until("\r\n\r\n").await
    }

    async fn exactly(&mut self, count: usize) -> Vec<u8> {
        while self.buf.len() < count {
            assert!(self.fill().await > 0, "ended within: {:?}", self.buf);
        }
        self.buf.split_to(count).to_vec()
    }

    /// Everything to the end of the stream.
    async fn rest(&mut self) -> String {
        while self.fill().await > 0 {}
        String::from_utf8_lossy(&self.buf.split()).into_owned()
    }
}

/// Nothing in these tests takes long: a wait beyond this is a failure.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it hangs")
}
