//! The tunnel between two node proxies: HBONE, an HTTP/2 CONNECT per connection over TLS 1.3.
//!
//! This is the boundary behind which the framing may change: the rest of the proxy sees byte streams, a
//! [`ConnectRequest`] with what the source says of itself, and typed refusals; no HTTP/2 type leaves this module.

use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use rand::Rng;
use weft_core::flow::Tls;

use crate::hbone;

pub mod client;
pub mod headers;
pub mod server;
mod stream;
pub mod validity;

pub use headers::{ConnectRequest, SourceInfo};
pub use stream::Stream;

/// First flow-control window of one stream, in bytes: what a reader that stops makes us hold. It grows for one that
/// keeps up; see [`hbone`].
pub const STREAM_WINDOW: u32 = 64 * 1024;
/// Streams of one connection; the next one goes to a further connection.
pub const MAX_STREAMS: u32 = 100;
/// Largest frame payload. Larger frames cost fewer headers, but delay the frames of other streams.
const MAX_FRAME: usize = 64 * 1024;

/// What both ends grant.
const SETTINGS: hbone::Settings =
    hbone::Settings { window: STREAM_WINDOW, streams: MAX_STREAMS, frame: MAX_FRAME };

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
    /// Between two keepalive pings, a quarter more or less.
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

impl Times {
    /// About [`Self::ping_interval`]: many tunnels are made at once, such as when an agent starts, and their pings shall not
    /// come at once for ever.
    fn until_next_ping(&self) -> Duration {
        self.ping_interval.mul_f64(rand::rng().random_range(0.75..1.25))
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
    /// When the first of the certificates ends that the peer showed.
    pub expires: SystemTime,
    /// Until when the peer is proven, later handshakes of the same ends included. The connection ends with it.
    pub validity: validity::Validity,
}

impl Session {
    /// When the connection takes no more streams, seen from its handshake at `now`: early enough that what begins
    /// on it ends by itself, as a rule, before the certificate does.
    fn retires(&self, now: SystemTime) -> Instant {
        let left = self.expires.duration_since(now).unwrap_or_default();
        Instant::now() + left * 3 / 4
    }
}

/// How long the streams of a connection whose peer's certificate ended may take to be cut with that reason, before
/// the connection ends under them.
const PARTING: Duration = Duration::from_secs(1);
/// How often the clock on the wall is looked at: it may be set, and it goes on while the machine sleeps.
const CLOCK: Duration = Duration::from_secs(10);

/// Ends when `at` has passed.
async fn passed(at: SystemTime) {
    while let Ok(left) = at.duration_since(SystemTime::now())
        && !left.is_zero()
    {
        tokio::time::sleep(left.min(CLOCK)).await;
    }
}

/// Pings the peer; tells of its first answer, and ends when it stopped to answer.
async fn keep_alive(control: hbone::Control, times: Times, answered: impl FnOnce()) {
    let mut answered = Some(answered);
    loop {
        match tokio::time::timeout(times.ping_timeout, control.ping()).await {
            Ok(Ok(())) => {
                if let Some(tell) = answered.take() {
                    tell();
                }
            }
            Ok(Err(_)) | Err(_) => return,
        }
        tokio::time::sleep(times.until_next_ping()).await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn pings_of_tunnels_made_together_are_spread_over_half_an_interval() {
        let times = Times::default();
        let pauses: BTreeSet<Duration> = (0..1_000).map(|_| times.until_next_ping()).collect();
        let (first, last) = (pauses.first().expect("pauses"), pauses.last().expect("pauses"));
        assert!(*first >= times.ping_interval.mul_f64(0.75) && *last <= times.ping_interval.mul_f64(1.25));
        assert!(*last - *first > times.ping_interval.mul_f64(0.4), "all within {first:?} to {last:?}");
    }
}
