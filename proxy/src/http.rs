//! HTTP serving: HTTP/1.0, HTTP/1.1 and HTTP/2 on one port, told apart by the first bytes.
//!
//! One rule holds everywhere: a request is judged on exactly what is forwarded. What two parsers could read in two
//! ways is refused, the path is normalised once, and headers that end at a hop are taken away before judging.

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod h1;
mod h2;
mod message;
mod record;
mod reply;
mod rewind;
mod service;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use weft_core::flow::Reason;
use weft_runtime::drain::DrainWatcher;

use self::{
    record::Record,
    rewind::Rewind,
    service::{Inbound, Outbound, Service},
};
use crate::l7::{InboundHandler, Io, OutboundHandler};

/// Limits on what a caller can hold open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// From the connection's first byte (or its opening) to the end of a request's head.
    pub head_timeout: Duration,
    /// Between two requests of a connection.
    pub idle_timeout: Duration,
    /// How long a request may go without a byte of its body and without an answer.
    pub stall_timeout: Duration,
    /// How long an answer that began (event stream, WebSocket) may go without a byte in either direction.
    pub stream_idle: Duration,
    /// Streams of one HTTP/2 connection at a time.
    pub max_streams: u32,
    /// Streams that a caller may reset in ten seconds before its connection is closed (CVE-2023-44487).
    pub max_resets: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(300),
            stall_timeout: Duration::from_secs(300),
            stream_idle: Duration::from_secs(3600),
            max_streams: 256,
            max_resets: 500,
        }
    }
}

/// Serves a connection that an application opened: every request is routed on its own. Ends when the connection
/// does; dropping the future cuts it.
pub async fn serve_outbound<H: OutboundHandler, I: Io>(
    io: I,
    handler: Arc<H>,
    limits: Limits,
    drain: DrainWatcher,
) {
    serve(io, Arc::new(Outbound(handler)), &limits, &drain).await;
}

/// Serves a connection towards the Pod's application: every request is judged on its own. Ends when the connection
/// does; dropping the future cuts it.
pub async fn serve_inbound<H: InboundHandler, I: Io>(
    io: I,
    handler: Arc<H>,
    limits: Limits,
    drain: DrainWatcher,
) {
    serve(io, Arc::new(Inbound(handler)), &limits, &drain).await;
}

/// What a HTTP/2 client with prior knowledge sends first (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

async fn serve<S: Service, I: Io>(mut io: I, service: Arc<S>, limits: &Limits, drain: &DrainWatcher) {
    let mut buf = BytesMut::new();
    let detect = async {
        loop {
            let common = buf.len().min(PREFACE.len());
            if common > 0 && buf.get(..common) != PREFACE.get(..common) {
                return Some(false);
            }
            if common == PREFACE.len() {
                return Some(true);
            }
            buf.reserve(4096);
            match io.read_buf(&mut buf).await {
                Ok(count) if count > 0 => {}
                _ => return None,
            }
        }
    };
    match tokio::time::timeout(limits.head_timeout, detect).await {
        Ok(Some(true)) => h2::serve(Rewind::new(buf, io), &service, limits, drain).await,
        Ok(Some(false)) => h1::serve(io, buf, &service, limits, drain).await,
        // Opened and closed without a byte, as health checks do: nothing was asked.
        Ok(None) if buf.is_empty() => {}
        Ok(None) => Record::new(service, "HTTP/2").failed(Reason::ProtocolError),
        // A protocol where the server speaks first stays silent here: that must not pass unseen.
        Err(_) => Record::new(service, "HTTP/1.1").failed(Reason::Timeout),
    }
}
