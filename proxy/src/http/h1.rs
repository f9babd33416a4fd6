//! HTTP/1.1 and HTTP/1.0: requests of a connection in order, each judged on its own.

pub(crate) mod body;
mod conn;
mod exchange;
pub(crate) mod fields;
mod pool;
pub(crate) mod request;
pub(crate) mod response;
pub(crate) mod scan;

use std::{sync::Arc, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use weft_core::flow::Reason;
use weft_runtime::drain::DrainWatcher;

use self::{
    conn::{Conn, HeadError},
    exchange::{Context, Ended, exchange},
    pool::Pool,
    request::RequestHead,
};
use super::{
    Limits,
    message::Malformed,
    record::Record,
    reply,
    service::{Service, revoked},
};
use crate::l7::{Io, LocalReply};

const PROTOCOL: &str = "HTTP/1.1";

/// Serves a connection until it ends; `buf` holds what was read of it already.
pub(crate) async fn serve<S: Service, I: Io>(
    io: I,
    buf: BytesMut,
    service: &Arc<S>,
    limits: &Limits,
    drain: &DrainWatcher,
) {
    let mut client = Conn::new(io, buf);
    let mut pool = Pool::new();
    let mut first = true;
    let draining = || drain.is_draining();
    let context = Context { service: &**service, limits, draining: &draining };
    loop {
        let raw = match next_head(&mut client, limits, drain, first).await {
            Next::Head(raw) => raw,
            Next::End => break,
            Next::Refused(reply) => {
                let mut record = Record::new(service.clone(), PROTOCOL);
                refuse(&mut client, &mut record, reply, false, false).await;
                break;
            }
        };
        first = false;
        // Whoever drops this connection from here on leaves an answer without its end.
        client.cut.set(true);
        let mut record = Record::new(service.clone(), PROTOCOL);
        let keep = match RequestHead::parse(&raw) {
            Ok(head) => request(&context, &mut client, &mut pool, &head, &mut record).await,
            Err(problem) => {
                refuse(&mut client, &mut record, reply::malformed(problem), false, false).await;
                false
            }
        };
        client.cut.set(client.writer.torn);
        if !keep {
            break;
        }
    }
    if !client.writer.torn {
        client.writer.shutdown().await;
        linger(&mut client).await;
    }
}

enum Next {
    Head(Bytes),
    End,
    Refused(LocalReply),
}

async fn next_head<I: Io>(client: &mut Conn<I>, limits: &Limits, drain: &DrainWatcher, first: bool) -> Next {
    // One empty line before a request is forgiven (RFC 9112 section 2.2).
    let mut forgiven = false;
    let patience = if first { limits.head_timeout } else { limits.idle_timeout };
    let idle = tokio::time::sleep(patience);
    tokio::pin!(idle);
    loop {
        if !forgiven && client.reader.buf.starts_with(b"\r\n") {
            client.reader.buf.advance(2);
            forgiven = true;
        }
        if !client.reader.buf.is_empty() && (forgiven || client.reader.buf[..] != b"\r"[..]) {
            break;
        }
        tokio::select! {
            read = client.reader.fill() => match read {
                Ok(count) if count > 0 => {}
                _ => return Next::End,
            },
            () = drain.draining(), if !first => return Next::End,
            () = &mut idle => return match first {
                true => Next::Refused(reply::plain(408, Reason::Timeout, "no request came in time")),
                false => Next::End,
            },
        }
    }
    match tokio::time::timeout(limits.head_timeout, client.reader.head()).await {
        Ok(Ok(raw)) => Next::Head(raw),
        Ok(Err(HeadError::Malformed(problem))) => Next::Refused(reply::malformed(problem)),
        Ok(Err(HeadError::Ended(_))) => Next::Refused(reply::malformed(Malformed("the head is incomplete"))),
        Err(_) => {
            Next::Refused(reply::plain(408, Reason::Timeout, "the request's head did not come in time"))
        }
    }
}

/// Judges and serves one request; says whether the connection may go on.
async fn request<S: Service, I: Io>(
    context: &Context<'_, S>,
    client: &mut Conn<I>,
    pool: &mut Pool<S::Upstream>,
    head: &RequestHead,
    record: &mut Record<S>,
) -> bool {
    // Before it is judged, so that no change is missed.
    let mut changes = context.service.changes();
    let decided = head.ask(|request| {
        record.request(request);
        context.service.decide(request)
    });
    let head_only = head.method == "HEAD";
    let decision = match decided {
        Ok(decision) => decision,
        Err(reply) => {
            let keep = head.keep_alive && !head.body.is_some() && !(context.draining)();
            return refuse(client, record, reply, keep, head_only).await;
        }
    };
    record.decided(&decision);
    let tally = record.tally.clone();
    let ended = tokio::select! {
        ended = exchange(context, client, pool, head, &decision, record) => ended,
        () = tally.stalled(context.limits) => timed_out(&tally),
        // What an upgrade leads to is no longer a request with an answer.
        () = within(decision.timeout), if head.upgrade.is_none() => timed_out(&tally),
        () = revoked(changes.as_mut(), || head.ask(|request| context.service.still_allows(request))) => Ended::Revoked,
    };
    match ended {
        Ended::Next => true,
        Ended::Close => false,
        Ended::Reply { reply, keep } => {
            let keep = keep && head.keep_alive && !(context.draining)();
            refuse(client, record, reply, keep, head_only).await
        }
        // Without an end of the body: the caller must see that it is not whole.
        Ended::Abort(reason) => {
            record.failed(reason);
            client.writer.torn = true;
            false
        }
        Ended::Revoked => {
            record.revoked();
            client.writer.torn = true;
            false
        }
    }
}

fn timed_out(tally: &super::record::Tally) -> Ended {
    if tally.is_answered() {
        Ended::Abort(Reason::Timeout)
    } else {
        Ended::Reply { reply: reply::timeout(), keep: false }
    }
}

/// The time that a route allows; for ever where it does not say.
pub(crate) async fn within(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

async fn refuse<S: Service, I: Io>(
    client: &mut Conn<I>,
    record: &mut Record<S>,
    mut reply: LocalReply,
    keep: bool,
    head_only: bool,
) -> bool {
    record.replied(&mut reply);
    if client.writer.torn {
        return false;
    }
    let connection: &[u8] = if keep { b"" } else { b"close" };
    let (status, length) = reply::encode_h1(&reply, head_only, connection, &mut client.writer.out);
    record.tally.answered(status, record.begun);
    record.tally.add_received(length);
    client.writer.flush().await.is_ok() && keep
}

/// Takes what the caller still sends for a moment: closing with unread bytes would reset the connection, and the
/// caller might lose the answer.
async fn linger<I: Io>(client: &mut Conn<I>) {
    const LONGEST: Duration = Duration::from_secs(1);
    const MOST: usize = 256 * 1024;
    let discard = async {
        let mut taken = 0;
        while taken < MOST {
            client.reader.buf.clear();
            match client.reader.fill().await {
                Ok(count) if count > 0 => taken += count,
                _ => break,
            }
        }
    };
    // However it ends, the connection is dropped next.
    let _ = tokio::time::timeout(LONGEST, discard).await;
}
