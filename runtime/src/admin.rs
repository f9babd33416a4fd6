//! The admin endpoint: metrics, health and readiness over HTTP/1.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::JoinSet,
    time::timeout,
};

use crate::{Backoff, DrainWatcher, Readiness};

/// Connections served at a time; more wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 32;
/// How long a request's head may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one connection may live, so that a peer that reads nothing cannot keep its place.
const MAX_LIFETIME: Duration = Duration::from_secs(60);
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// What the endpoint tells.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The process's metrics; registered without a prefix, each name begins with `weft_`.
    pub registry: Arc<Mutex<Registry>>,
    /// What the process waits for.
    pub readiness: Readiness,
}

/// Where the endpoint listens.
#[derive(Debug)]
pub enum Listener {
    /// An address.
    Tcp(TcpListener),
    /// A socket file.
    Unix(UnixListener),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

/// Serves `/metrics` (OpenMetrics), `/healthz` and `/readyz` until the drain is over; during it, `/readyz` says so.
///
/// # Errors
/// None today: failing accepts are logged and tried again after a wait.
pub async fn serve(listener: impl Into<Listener>, admin: Admin, drain: DrainWatcher) -> io::Result<()> {
    let listener = listener.into();
    let mut connections = JoinSet::new();
    let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
    let drained = drain.drained();
    tokio::pin!(drained);
    loop {
        let accepted = tokio::select! {
            () = &mut drained => return Ok(()),
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "an admin connection panicked; please report this");
                }
                continue;
            }
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => accepted,
        };
        match accepted {
            Ok(Accepted::Tcp(stream)) => {
                drop(connections.spawn(connection(stream, admin.clone(), drain.clone())));
            }
            Ok(Accepted::Unix(stream)) => {
                drop(connections.spawn(connection(stream, admin.clone(), drain.clone())));
            }
            Err(error) => {
                tracing::warn!(%error, "the admin endpoint cannot accept; it tries again");
                tokio::time::sleep(backoff.next()).await;
                continue;
            }
        }
        backoff.reset();
    }
}

impl Admin {
    /// Takes a filled registry.
    pub fn new(registry: Registry, readiness: Readiness) -> Self {
        Self { registry: Arc::new(Mutex::new(registry)), readiness }
    }

    fn answer(&self, method: &Method, path: &str, draining: bool) -> Response<Full<Bytes>> {
        let known = matches!(path, "/metrics" | "/healthz" | "/readyz");
        if known && !matches!(*method, Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            "/metrics" => self.metrics(),
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" if draining => text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            "/readyz" => match self.readiness.missing() {
                missing if missing.is_empty() => text(StatusCode::OK, "ready\n"),
                missing => text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("not ready, waiting for: {}\n", missing.join(", ")),
                ),
            },
            _ => text(StatusCode::NOT_FOUND, "unknown path; there are /metrics, /healthz and /readyz\n"),
        }
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        let mut body = String::new();
        let encoded = encode(&mut body, &self.registry.lock());
        match encoded {
            Ok(()) => response(StatusCode::OK, OPENMETRICS, body),
            Err(error) => {
                tracing::error!(%error, "the metrics cannot be encoded; please report this");
                text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be encoded; see the log\n")
            }
        }
    }
}

enum Accepted {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        Ok(match self {
            Self::Tcp(listener) => Accepted::Tcp(listener.accept().await?.0),
            Self::Unix(listener) => Accepted::Unix(listener.accept().await?.0),
        })
    }
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin + Send, admin: Admin, drain: DrainWatcher) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = admin.answer(request.method(), request.uri().path(), drain.is_draining());
        async { Ok::<_, Infallible>(response) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(MAX_LIFETIME, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "admin connection"),
        Err(_) => tracing::debug!("admin connection closed: it was open for {} s", MAX_LIFETIME.as_secs()),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    response(status, TEXT, body)
}

fn response(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests;
