//! The tunnel between two node proxies: HBONE, an HTTP/2 CONNECT per connection over TLS 1.3.
//!
//! This is the boundary behind which the framing may change: the rest of the proxy sees byte streams, a
//! [`ConnectRequest`] with what the source says of itself, and typed refusals; no HTTP/2 type leaves this module.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use weft_core::flow::Tls;

pub mod client;
pub mod headers;
pub mod server;
mod stream;

pub use headers::{ConnectRequest, SourceInfo};
pub use stream::Stream;

/// Flow-control window of one stream, in bytes: what a stalled reader can make the peer's proxy hold.
pub const STREAM_WINDOW: u32 = 256 * 1024;
/// Streams of one connection; the next one goes to a further connection.
pub const MAX_STREAMS: u32 = 100;
/// Flow-control window of a connection. All stream windows fit into it, so however many streams stall, the others
/// still find credit.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS;
/// Largest frame payload. Larger frames cost fewer headers, but delay the frames of other streams.
const MAX_FRAME: u32 = 64 * 1024;
/// Largest decoded header list of a CONNECT (RFC 9113 section 6.5.2).
const MAX_HEADERS: u32 = 16 * 1024;

/// Times of a tunnel.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// For the TCP connection.
    pub connect: Duration,
    /// For the TLS and HTTP/2 handshakes together.
    pub handshake: Duration,
    /// For the answer to a CONNECT.
    pub answer: Duration,
    /// A connection without streams is closed after it.
    pub idle: Duration,
    /// Between two keepalive pings.
    pub ping_interval: Duration,
    /// For the answer to a ping; then the connection counts as dead.
    pub ping_timeout: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(5),
            answer: Duration::from_secs(10),
            idle: Duration::from_secs(60),
            ping_interval: Duration::from_secs(20),
            ping_timeout: Duration::from_secs(10),
        }
    }
}

/// What both ends of a finished handshake know of each other.
#[derive(Debug, Clone)]
pub struct Session {
    /// Our end.
    pub local: SocketAddr,
    /// Their end.
    pub peer: SocketAddr,
    /// The negotiated protection.
    pub tls: Tls,
}

/// What rustls negotiated.
fn negotiated(connection: &rustls::CommonState) -> Tls {
    let name = |text: Option<String>| -> Arc<str> { text.unwrap_or_default().into() };
    Tls::Mutual {
        key_exchange: name(connection.negotiated_key_exchange_group().map(|g| format!("{:?}", g.name()))),
        cipher: name(connection.negotiated_cipher_suite().map(|c| format!("{:?}", c.suite()))),
    }
}

/// Pings the peer; ends when it stopped to answer.
async fn keep_alive(mut pings: Option<h2::PingPong>, times: Times) {
    loop {
        tokio::time::sleep(times.ping_interval).await;
        let Some(pings) = &mut pings else { continue };
        match tokio::time::timeout(times.ping_timeout, pings.ping(h2::Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
