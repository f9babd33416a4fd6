//! One request and its response: both bodies move at the same time.

use std::{
    future::pending,
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
};

use tokio::io::{AsyncRead, ReadHalf, WriteHalf};
use weft_core::flow::Reason;

use super::{
    super::{Limits, message::Known, record::Record, reply, service::Decision, service::Service},
    body::{Decoder, Length},
    conn::{Conn, HeadError, PumpError, Reader, Writer, opaque, pump},
    pool::Pool,
    request::RequestHead,
    response::ResponseHead,
};
use crate::l7::{Io, LocalReply, Target};

/// How an exchange ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The caller has its answer and may ask again.
    Next,
    /// The caller has its answer; the connection ends.
    Close,
    /// The caller gets this answer, and the connection ends unless `keep`.
    Reply { reply: LocalReply, keep: bool },
    /// No answer can be given any more; the connection ends at once.
    Abort(Reason),
    /// Policy no longer allows it; the connection ends at once.
    Revoked,
}

/// The most interim responses before the final one.
const MAX_INTERIM: usize = 16;
/// What a pipelining caller may send ahead while it waits.
const MAX_AHEAD: usize = 64 * 1024;

/// What stays the same over the exchanges of a connection.
pub(crate) struct Context<'a, S: Service> {
    pub(crate) service: &'a S,
    pub(crate) limits: &'a Limits,
    /// Whether the proxy stops: asked when the response's head is written.
    pub(crate) draining: &'a (dyn Fn() -> bool + Sync),
}

/// Sends a decided request and its answer.
pub(crate) async fn exchange<S: Service, I: Io>(
    context: &Context<'_, S>,
    client: &mut Conn<I>,
    pool: &mut Pool<S::Upstream>,
    head: &RequestHead,
    decision: &Decision,
    record: &mut Record<S>,
) -> Ended {
    let target = decision.target.as_ref();
    if let Some(upstream) = pool.take(target) {
        match attempt(context, client, pool, head, decision, record, (target, upstream)).await {
            Attempt::Stale if head.may_retry() => {}
            Attempt::Stale => {
                return Ended::Reply {
                    reply: reply::bad_upstream(Reason::PeerReset, "it closed a kept connection"),
                    keep: !head.body.is_some(),
                };
            }
            Attempt::Ended(ended) => return ended,
        }
    }
    let (target, upstream) = match connect(context.service, decision).await {
        Ok(connected) => connected,
        Err(reply) => return Ended::Reply { reply, keep: !head.body.is_some() },
    };
    record.target(target);
    let upstream = Conn::new(upstream, bytes::BytesMut::new());
    match attempt(context, client, pool, head, decision, record, (target, upstream)).await {
        Attempt::Ended(ended) => ended,
        Attempt::Stale => Ended::Reply {
            reply: reply::bad_upstream(Reason::PeerReset, "it closed without an answer"),
            keep: !head.body.is_some(),
        },
    }
}

async fn connect<'d, S: Service>(
    service: &S,
    decision: &'d Decision,
) -> Result<(Option<&'d Target>, S::Upstream), LocalReply> {
    let first = decision.target.as_ref();
    let error = match service.connect(first).await {
        Ok(upstream) => return Ok((first, upstream)),
        Err(error) => error,
    };
    // Another endpoint of the same kind would refuse this caller as well.
    if let (Some(_), true) = (&decision.alternate, error.status != 403) {
        let second = decision.alternate.as_ref();
        if let Ok(upstream) = service.connect(second).await {
            return Ok((second, upstream));
        }
    }
    Err(reply::connect(&error))
}

enum Attempt {
    /// The upstream closed before a byte of an answer.
    Stale,
    Ended(Ended),
}

enum Up {
    /// The request is through, and the response had ended before.
    Finished,
    ClientGone,
    Malformed(super::super::message::Malformed),
}

enum Down {
    /// The answer is through.
    Finished {
        keep_upstream: bool,
        close: bool,
    },
    Upgraded,
    Stale,
    Bad(Reason, &'static str),
    /// It broke off after its head.
    Cut(Reason),
    ClientGone,
}

async fn attempt<S: Service, I: Io>(
    context: &Context<'_, S>,
    client: &mut Conn<I>,
    pool: &mut Pool<S::Upstream>,
    head: &RequestHead,
    decision: &Decision,
    record: &mut Record<S>,
    (target, mut upstream): (Option<&Target>, Conn<S::Upstream>),
) -> Attempt {
    // Until it is known to have ended well.
    upstream.cut.set(true);
    head.encode(&decision.request_headers, &mut upstream.writer.out);
    let tally = record.tally.clone();
    // The request is through: set by the upward half, read by the downward one, and the other way round.
    let (sent, answered, unread) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    let (up_end, down_end) = {
        let mut up = pin!(send(
            head,
            &mut client.reader,
            &mut upstream.writer,
            |count| tally.add_sent(count),
            Flags { sent: &sent, answered: &answered, unread: &unread }
        ));
        let mut down =
            pin!(receive(context, head, decision, record, &mut upstream.reader, &mut client.writer, &unread));
        let mut down_end = None;
        let up_end = loop {
            tokio::select! {
                biased;
                end = &mut down, if down_end.is_none() => {
                    answered.store(true, Ordering::Relaxed);
                    let finished = matches!(end, Down::Finished { .. });
                    down_end = Some(end);
                    if !finished || sent.load(Ordering::Relaxed) || unread.load(Ordering::Relaxed) {
                        break None;
                    }
                }
                end = &mut up => break Some(end),
            }
        };
        (up_end, down_end)
    };
    let complete = sent.load(Ordering::Relaxed);
    Attempt::Ended(match (down_end, up_end) {
        (Some(Down::Finished { keep_upstream, close }), None | Some(Up::Finished)) => {
            upstream.cut.set(false);
            if keep_upstream && complete && upstream.reader.buf.is_empty() {
                pool.put(target.cloned(), upstream);
            }
            record.done();
            if close || !complete { Ended::Close } else { Ended::Next }
        }
        (Some(Down::Upgraded), _) => {
            if opaque(client, &mut upstream, &tally).await {
                upstream.cut.set(false);
                record.done();
                Ended::Close
            } else {
                Ended::Abort(Reason::PeerReset)
            }
        }
        (Some(Down::Stale), _) if !tally.is_answered() => return Attempt::Stale,
        (Some(Down::Bad(reason, problem)), _) => {
            Ended::Reply { reply: reply::bad_upstream(reason, problem), keep: complete }
        }
        (Some(Down::Cut(reason)), _) => Ended::Abort(reason),
        (_, Some(Up::Malformed(problem))) if !tally.is_answered() => {
            Ended::Reply { reply: reply::malformed(problem), keep: false }
        }
        (_, Some(Up::Malformed(_))) => Ended::Abort(Reason::ProtocolError),
        _ => Ended::Abort(Reason::PeerReset),
    })
}

#[derive(Clone, Copy)]
struct Flags<'a> {
    sent: &'a AtomicBool,
    answered: &'a AtomicBool,
    /// The upstream does not take the rest of the request.
    unread: &'a AtomicBool,
}

/// Sends head and body, then watches the caller: when it goes, so does the request.
async fn send<R, I: Io>(
    head: &RequestHead,
    client: &mut Reader<R>,
    upstream: &mut Writer<WriteHalf<I>>,
    count: impl Fn(usize),
    flags: Flags<'_>,
) -> Up
where
    R: AsyncRead + Unpin,
{
    let mut decoder = Decoder::new(head.body);
    match pump(client, &mut decoder, upstream, head.body, count).await {
        Ok(()) => {}
        Err(PumpError::Source) => return Up::ClientGone,
        Err(PumpError::Malformed(problem)) => return Up::Malformed(problem),
        Err(PumpError::Sink) => {
            // It may have answered early and closed: the answer counts, and decides.
            flags.unread.store(true, Ordering::Relaxed);
            if flags.answered.load(Ordering::Relaxed) {
                return Up::Finished;
            }
            return pending().await;
        }
    }
    flags.sent.store(true, Ordering::Relaxed);
    if flags.answered.load(Ordering::Relaxed) {
        return Up::Finished;
    }
    while client.buf.len() < MAX_AHEAD {
        if !matches!(client.fill().await, Ok(count) if count > 0) {
            return Up::ClientGone;
        }
    }
    pending().await
}

async fn receive<S: Service, R: Io, W: Io>(
    context: &Context<'_, S>,
    head: &RequestHead,
    decision: &Decision,
    record: &Record<S>,
    upstream: &mut Reader<ReadHalf<R>>,
    client: &mut Writer<WriteHalf<W>>,
    unread: &AtomicBool,
) -> Down {
    let changes = &decision.response_headers;
    let mut interim = 0;
    let mut response = loop {
        let raw = match upstream.head().await {
            Ok(raw) => raw,
            Err(HeadError::Ended(0)) if interim == 0 => return Down::Stale,
            Err(HeadError::Ended(_)) => return Down::Bad(Reason::PeerReset, "it closed within its answer"),
            Err(HeadError::Malformed(problem)) => return Down::Bad(Reason::ProtocolError, problem.0),
        };
        let mut response = match ResponseHead::parse(&raw, &head.method) {
            Ok(response) => response,
            Err(problem) => return Down::Bad(Reason::ProtocolError, problem.0),
        };
        if S::UPSTREAM_IS_APPLICATION {
            response.fields.drop_known(Known::Ours);
        }
        match response.status {
            101 if response.upgrades_to(head.upgrade.as_ref()) => {
                record.tally.answered(101, record.begun);
                response.encode(changes, Length::None, b"", &mut client.out);
                return match client.flush().await {
                    Ok(()) => Down::Upgraded,
                    Err(_) => Down::ClientGone,
                };
            }
            101 => return Down::Bad(Reason::ProtocolError, "it changed to a protocol that nobody asked for"),
            100..=199 => {
                interim += 1;
                if interim > MAX_INTERIM {
                    return Down::Bad(Reason::ProtocolError, "too many interim responses");
                }
                if head.http11 {
                    response.encode(&Default::default(), Length::None, b"", &mut client.out);
                    if client.flush().await.is_err() {
                        return Down::ClientGone;
                    }
                }
            }
            _ => break response,
        }
    };
    // A caller of HTTP/1.0 knows no chunks: for it the body ends with the connection.
    let framing = match response.body {
        Length::Chunked | Length::UntilClose if head.http11 => Length::Chunked,
        Length::Chunked | Length::UntilClose => Length::UntilClose,
        other => other,
    };
    let close = !head.keep_alive
        || framing == Length::UntilClose
        || unread.load(Ordering::Relaxed)
        || (context.draining)();
    let connection: &[u8] = match (close, head.http11) {
        (true, _) => b"close",
        (false, true) => b"",
        (false, false) => b"keep-alive",
    };
    // Without chunks there is nothing that a trailer announcement could announce.
    if framing != Length::Chunked {
        response.fields.drop_known(Known::Trailer);
    }
    record.tally.answered(response.status, record.begun);
    response.encode(changes, framing, connection, &mut client.out);
    let mut decoder = Decoder::new(response.body);
    match pump(upstream, &mut decoder, client, framing, |count| record.tally.add_received(count)).await {
        Ok(()) => Down::Finished { keep_upstream: response.keep_alive, close },
        Err(PumpError::Source) => Down::Cut(Reason::PeerReset),
        Err(PumpError::Malformed(_)) => Down::Cut(Reason::ProtocolError),
        Err(PumpError::Sink) => Down::ClientGone,
    }
}
