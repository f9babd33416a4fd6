//! HTTP/2: every stream of a connection is judged and routed on its own.

mod gather;
mod pool;
pub(super) mod pump;
mod request;
mod stream;
mod watch;

use std::{
    collections::VecDeque,
    future::{Future as _, poll_fn},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use foldhash::HashSet;
use futures_util::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use tokio::time::Instant;
use weft_core::flow::Reason;
use weft_runtime::drain::DrainWatcher;

use self::{gather::Gather, pool::Pool, stream::Outcome, watch::Watch};
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
/// The most streams that are taken in one turn, before those that were reset meanwhile are counted.
const MAX_TURN: usize = 64;
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
    let io = Gather::new(io);
    let (watched, mut refused) = Watch::new(io.clone());
    let failed = |reason| Record::new(service.clone(), stream::PROTOCOL).failed(reason);
    let mut handshake = pin!(builder.handshake::<_, Bytes>(watched));
    let handshake = poll_fn(|cx| io.turn(cx, |cx| handshake.as_mut().poll(cx)));
    let mut conn = match tokio::time::timeout(limits.head_timeout, handshake).await {
        Ok(Ok(conn)) => conn,
        Ok(Err(_)) => return failed(Reason::ProtocolError),
        Err(_) => return failed(Reason::Timeout),
    };
    let (pool, mut opened) = Pool::new(service.clone());
    let pool = Arc::new(pool);
    let mut streams = FuturesUnordered::new();
    let mut drivers = FuturesUnordered::new();
    let mut resets = Resets { since: Instant::now(), count: 0 };
    let mut known = Known::default();
    let mut closing = false;
    let mut draining = pin!(drain.draining());
    let patience = |closing| if closing { limits.head_timeout } else { limits.idle_timeout };
    // Looked at while there is no stream.
    let mut quiet = pin!(tokio::time::sleep(limits.idle_timeout));
    'serving: loop {
        tokio::select! {
            // Many in a turn: what all of them have to say goes out in one write.
            mut accepted = poll_fn(|cx| io.turn(cx, |cx| conn.poll_accept(cx))) => for left in (0..MAX_TURN).rev() {
                match accepted {
                    Some(Ok((request, respond))) => {
                        let id = respond.stream_id().as_u32();
                        known.live.insert(id);
                        match stream::serve(service, &pool, limits, request, respond) {
                            Some(serve) => streams.push(serve.map(move |outcome| (id, outcome))),
                            None => {
                                known.ended(id);
                                quiet.as_mut().reset(Instant::now() + patience(closing));
                            }
                        }
                    }
                    // So broken that it is over. What was under way tells of its own end.
                    Some(Err(error)) => {
                        if let Some(reason) = fault(&error) {
                            failed(reason);
                        }
                        break 'serving;
                    }
                    None => break 'serving,
                }
                let next = poll_fn(|cx| io.turn(cx, |cx| conn.poll_accept(cx)));
                match (left > 0).then(|| next.now_or_never()).flatten() {
                    Some(next) => accepted = next,
                    None => break,
                }
            },
            Some((id, code)) = refused.recv() => if !known.contains(id) {
                failed(refusal(code));
                if resets.too_many(limits.max_resets) {
                    conn.abrupt_shutdown(::h2::Reason::ENHANCE_YOUR_CALM);
                }
            },
            Some(ended) = streams.next(), if !streams.is_empty() => {
                quiet.as_mut().reset(Instant::now() + patience(closing));
                let mut ended = Some(ended);
                while let Some((id, outcome)) = ended {
                    known.ended(id);
                    if matches!(outcome, Outcome::ResetByCaller) && resets.too_many(limits.max_resets) {
                        tracing::debug!(limit = limits.max_resets, "closing a HTTP/2 connection: too many resets");
                        conn.abrupt_shutdown(::h2::Reason::ENHANCE_YOUR_CALM);
                    }
                    ended = streams.next().now_or_never().flatten();
                }
            }
            Some(driver) = opened.recv() => drivers.push(driver),
            Some(()) = drivers.next(), if !drivers.is_empty() => {}
            () = &mut draining, if !closing => {
                closing = true;
                quiet.as_mut().reset(Instant::now() + patience(closing));
                conn.graceful_shutdown();
            }
            () = &mut quiet, if streams.is_empty() => {
                // A peer that was told to go and does not.
                if closing {
                    break;
                }
                closing = true;
                quiet.as_mut().reset(Instant::now() + patience(closing));
                conn.graceful_shutdown();
            }
        }
    }
    // With the connection gone every stream sees its end at once, and reports it.
    drop((conn, io));
    while let Ok((id, code)) = refused.try_recv() {
        if !known.contains(id) {
            failed(refusal(code));
        }
    }
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

/// Why a connection broke, where the caller or we found fault with it; `None` where it only went away.
fn fault(error: &::h2::Error) -> Option<Reason> {
    match error.reason() {
        None | Some(::h2::Reason::NO_ERROR) => None,
        Some(_) if error.is_remote() => Some(Reason::PeerReset),
        Some(code) => Some(refusal(code.into())),
    }
}

/// What the code of a refusal stands for (RFC 9113 section 7).
fn refusal(code: u32) -> Reason {
    match ::h2::Reason::from(code) {
        ::h2::Reason::REFUSED_STREAM | ::h2::Reason::ENHANCE_YOUR_CALM => Reason::LimitReached,
        _ => Reason::ProtocolError,
    }
}

/// The streams that were accepted here, and so have a record of their own: those under way and the last that ended.
#[derive(Default)]
struct Known {
    live: HashSet<u32>,
    ended: VecDeque<u32>,
}

impl Known {
    /// How many ended streams are remembered: their last frames may still wait to be written.
    const REMEMBERED: usize = 1024;

    fn contains(&self, id: u32) -> bool {
        self.live.contains(&id) || self.ended.contains(&id)
    }

    fn ended(&mut self, id: u32) {
        self.live.remove(&id);
        if self.ended.len() >= Self::REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back(id);
    }
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
