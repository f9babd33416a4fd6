//! HTTP/2: every stream of a connection is judged and routed on its own.

mod pool;
pub(super) mod pump;
mod request;
mod stream;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::Instant;
use weft_core::flow::Reason;
use weft_runtime::drain::DrainWatcher;

use self::{pool::Pool, stream::Outcome};
use super::{Limits, record::Record, service::Service};
use crate::l7::Io;

/// What a peer may send ahead on one stream.
const STREAM_WINDOW: u32 = 256 * 1024;
/// What a peer may send ahead on all streams of a connection.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// What is held per stream before it is on the wire.
const SEND_BUFFER: usize = 64 * 1024;
/// The most bytes of a header list, as RFC 9113 section 6.5.2 counts them.
const HEADER_LIST: u32 = 64 * 1024;
/// The span over which resets are counted.
const RESET_SPAN: Duration = Duration::from_secs(10);

/// Serves a connection whose preface is next to be read.
pub(crate) async fn serve<S: Service, I: Io>(io: I, service: &Arc<S>, limits: &Limits, drain: &DrainWatcher) {
    let mut builder = ::h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_concurrent_streams(limits.max_streams);
    let handshake = builder.handshake::<I, Bytes>(io);
    let Ok(Ok(mut conn)) = tokio::time::timeout(limits.head_timeout, handshake).await else {
        Record::new(service.clone(), stream::PROTOCOL).failed(Reason::ProtocolError);
        return;
    };
    let (pool, mut opened) = Pool::new(service.clone());
    let pool = Arc::new(pool);
    let mut streams = FuturesUnordered::new();
    let mut drivers = FuturesUnordered::new();
    let mut resets = Resets { since: Instant::now(), count: 0 };
    let mut closing = false;
    let mut quiet_since = Instant::now();
    loop {
        let idle_end = quiet_since + limits.idle_timeout;
        tokio::select! {
            accepted = conn.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    streams.push(stream::serve(service.clone(), pool.clone(), limits, request, respond));
                }
                // The connection is over, or so broken that it is.
                Some(Err(_)) | None => break,
            },
            Some(outcome) = streams.next(), if !streams.is_empty() => {
                quiet_since = Instant::now();
                if matches!(outcome, Outcome::ResetByCaller) && resets.too_many(limits.max_resets) {
                    tracing::debug!(limit = limits.max_resets, "closing a HTTP/2 connection: too many resets");
                    conn.abrupt_shutdown(::h2::Reason::ENHANCE_YOUR_CALM);
                }
            }
            Some(driver) = opened.recv() => drivers.push(driver),
            Some(()) = drivers.next(), if !drivers.is_empty() => {}
            () = drain.draining(), if !closing => {
                closing = true;
                conn.graceful_shutdown();
            }
            () = tokio::time::sleep_until(idle_end), if streams.is_empty() && !closing => {
                closing = true;
                conn.graceful_shutdown();
            }
            // A peer that was told to go and does not.
            () = tokio::time::sleep(limits.head_timeout), if streams.is_empty() && closing => break,
        }
    }
    // With the connection gone every stream sees its end at once, and reports it.
    drop(conn);
    let rest = async {
        while !streams.is_empty() {
            tokio::select! {
                _ = streams.next() => {}
                Some(driver) = opened.recv() => drivers.push(driver),
                Some(()) = drivers.next(), if !drivers.is_empty() => {}
            }
        }
    };
    // What does not end in time is dropped, and reported as cut.
    let _ = tokio::time::timeout(Duration::from_secs(1), rest).await;
}

struct Resets {
    since: Instant,
    count: u32,
}

impl Resets {
    fn too_many(&mut self, limit: u32) -> bool {
        if self.since.elapsed() > RESET_SPAN {
            *self = Self { since: Instant::now(), count: 0 };
        }
        self.count += 1;
        self.count > limit
    }
}
