//! One stream: judged, forwarded, answered.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{Reason as Code, RecvStream, SendStream, client::ResponseFuture, server::SendResponse};
use http::{Request, Response};
use weft_core::flow::Reason;

use super::{
    super::{
        Limits,
        h1::within,
        record::{Record, Tally},
        reply,
        service::{Changes, Decision, Service, revoked},
    },
    pool::Pool,
    pump::{PumpError, pump},
    request::{RequestHead, apply, strip_response},
};
use crate::l7::LocalReply;

pub(crate) const PROTOCOL: &str = "HTTP/2";

/// What the connection needs to know of a stream that ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Normal,
    ResetByCaller,
}

enum Ended {
    Done,
    Reply(LocalReply),
    /// The caller's stream is reset.
    Reset(Reason, Code),
    /// Policy no longer allows it; the caller's stream is reset.
    Revoked,
    ClientGone,
}

/// A stream that was judged and may go on.
struct Judged<S: Service> {
    pool: Arc<Pool<S>>,
    /// As it is forwarded; taken when it is.
    request: Option<Request<()>>,
    body: RecvStream,
    respond: SendResponse<Bytes>,
    decision: Decision,
    record: Record<S>,
    /// After which changes the head is judged again.
    changes: Option<(Changes, RequestHead)>,
    grpc: bool,
    head_only: bool,
}

/// Judges a stream and serves it to its end; `None` where it is answered already.
pub(crate) fn serve<S: Service>(
    service: &Arc<S>,
    pool: &Arc<Pool<S>>,
    limits: &Limits,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) -> Option<Pin<Box<impl Future<Output = Outcome>>>> {
    // What needs no waiting is done before: a future has room for all that ever was in it. Boxed where it is made, since it
    // would be moved again and again.
    judge(service, pool, request, respond).map(|judged| Box::pin(finish(judged, limits)))
}

fn judge<S: Service>(
    service: &Arc<S>,
    pool: &Arc<Pool<S>>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Option<Judged<S>> {
    let mut record = Record::new(service.clone(), PROTOCOL);
    let (parts, body) = request.into_parts();
    let head_only = parts.method == http::Method::HEAD;
    let head = match RequestHead::parse(parts) {
        Ok(head) => head,
        Err(problem) => {
            refuse(&mut respond, &mut record, reply::malformed(problem), false, head_only);
            return None;
        }
    };
    let grpc = head.grpc;
    // Before it is judged, so that no change is missed.
    let changes = service.changes();
    let decided = head.ask(|request| {
        record.request(request);
        service.decide(request)
    });
    let decision = match decided {
        Ok(decision) => decision,
        Err(reply) => {
            refuse(&mut respond, &mut record, reply, grpc, head_only);
            return None;
        }
    };
    record.decided(&decision);
    let changes = changes.map(|changes| (changes, head.clone()));
    let request = match head.into_request(&decision.request_headers) {
        Ok(request) => Some(request),
        Err(problem) => {
            refuse(&mut respond, &mut record, reply::malformed(problem), grpc, head_only);
            return None;
        }
    };
    let pool = pool.clone();
    Some(Judged { pool, request, body, respond, decision, record, changes, grpc, head_only })
}

#[allow(clippy::manual_async_fn, reason = "an async fn would hold its argument twice")]
fn finish<S: Service>(mut judged: Judged<S>, limits: &Limits) -> impl Future<Output = Outcome> {
    async move {
        let ended = attend(&mut judged, limits).await;
        let Judged { respond, record, grpc, head_only, .. } = &mut judged;
        match ended {
            Ended::Done => record.done(),
            Ended::Reply(reply) => refuse(respond, record, reply, *grpc, *head_only),
            Ended::Reset(reason, code) => {
                record.failed(reason);
                respond.send_reset(code);
            }
            Ended::Revoked => {
                record.revoked();
                respond.send_reset(Code::CANCEL);
            }
            Ended::ClientGone => {
                record.failed(Reason::PeerReset);
                return Outcome::ResetByCaller;
            }
        }
        Outcome::Normal
    }
}

/// Forwards a stream, as long as that may take and is allowed.
async fn attend<S: Service>(judged: &mut Judged<S>, limits: &Limits) -> Ended {
    let Judged { pool, request, body, respond, decision, record, changes, .. } = judged;
    let service = record.service.clone();
    let tally = record.tally.clone();
    let timeout = decision.timeout;
    let (changes, head) = changes.as_mut().map(|(changes, head)| (changes, &*head)).unzip();
    let still_allowed = || head.is_none_or(|head| head.ask(|request| service.still_allows(request)));
    // In their place, and not moved.
    let mut forward = pin!(forward(pool, request, body, decision, respond, record));
    let mut stalled = pin!(tally.stalled(limits));
    let mut late = pin!(within(timeout));
    let mut revoked = pin!(revoked(changes, still_allowed));
    tokio::select! {
        ended = &mut forward => ended,
        () = &mut stalled => timed_out(&tally),
        () = &mut late => timed_out(&tally),
        () = &mut revoked => Ended::Revoked,
    }
}

fn timed_out(tally: &Tally) -> Ended {
    if tally.is_answered() {
        Ended::Reset(Reason::Timeout, Code::CANCEL)
    } else {
        Ended::Reply(reply::timeout())
    }
}

fn refuse<S: Service>(
    respond: &mut SendResponse<Bytes>,
    record: &mut Record<S>,
    mut reply: LocalReply,
    grpc: bool,
    head_only: bool,
) {
    record.replied(&mut reply);
    let (response, body) = reply::build_h2(&reply, grpc);
    let status = response.status().as_u16();
    let end = head_only || body.is_empty();
    // A caller that is gone needs no answer; the record stands as it is.
    let Ok(mut stream) = respond.send_response(response, end) else { return };
    record.tally.answered(status, record.begun);
    if !end {
        let length = body.len();
        if stream.send_data(body, true).is_ok() {
            record.tally.add_received(length);
        }
    }
}

async fn forward<S: Service>(
    pool: &Pool<S>,
    request: &mut Option<Request<()>>,
    body: &mut RecvStream,
    decision: &Decision,
    respond: &mut SendResponse<Bytes>,
    record: &mut Record<S>,
) -> Ended {
    let mut connected = pool.sender(decision.target.as_ref()).await;
    if let (Err(error), Some(_)) = (&connected, &decision.alternate)
        && error.status != 403
        && let Ok(sender) = pool.sender(decision.alternate.as_ref()).await
    {
        record.target(decision.alternate.as_ref());
        connected = Ok(sender);
    }
    let mut sender = match connected {
        Ok(sender) => sender,
        Err(error) => return Ended::Reply(reply::connect(&error)),
    };
    let end = body.is_end_stream();
    let sent = request.take().map(|request| sender.send_request(request, end));
    let (response, mut upstream) = match sent {
        Some(Ok(sent)) => sent,
        Some(Err(_)) | None => {
            return Ended::Reply(reply::bad_upstream(Reason::PeerReset, "it closed before the request"));
        }
    };
    let tally = record.tally.clone();
    let record = &*record;
    let mut up = pin!(async {
        match end {
            true => Ok(()),
            false => pump(body, &mut upstream, |count| tally.add_sent(count)).await,
        }
    });
    let mut down = pin!(receive(response, decision, respond, record));
    let mut sent = false;
    let answered = loop {
        tokio::select! {
            ended = &mut down => break ended,
            result = &mut up, if !sent => match result {
                Err(PumpError::Source(_)) => return Ended::ClientGone,
                // An upstream that takes no more may have answered: its answer decides.
                Ok(()) | Err(PumpError::Sink) => sent = true,
            },
        }
    };
    // A full answer before the end of the request: the upstream says by a reset that it wants no more of it.
    if !sent && matches!(answered, Ended::Done) {
        let _ = up.await;
    }
    answered
}

enum Event {
    Interim(Response<()>),
    Response(Result<Response<RecvStream>, h2::Error>),
    ClientGone,
}

async fn receive<S: Service>(
    mut response: ResponseFuture,
    decision: &Decision,
    respond: &mut SendResponse<Bytes>,
    record: &Record<S>,
) -> Ended {
    let (mut body, mut stream) = loop {
        match poll_fn(|cx| next(&mut response, respond, cx)).await {
            Event::Interim(mut interim) => {
                strip_response(interim.headers_mut(), S::UPSTREAM_IS_APPLICATION);
                if respond.send_informational(interim).is_err() {
                    return Ended::ClientGone;
                }
            }
            Event::Response(received) => match answer(received, decision, respond, record) {
                Ok(bodies) => break bodies,
                Err(ended) => return ended,
            },
            Event::ClientGone => return Ended::ClientGone,
        }
    };
    body_down(&mut body, &mut stream, record).await
}

/// Passes an answer's head on; gives its body and where that goes, or how the stream ends without one.
fn answer<S: Service>(
    received: Result<Response<RecvStream>, h2::Error>,
    decision: &Decision,
    respond: &mut SendResponse<Bytes>,
    record: &Record<S>,
) -> Result<(RecvStream, SendStream<Bytes>), Ended> {
    let received = received.map_err(|error| {
        // Not processed (RFC 9113 section 8.7): the caller may try again, so it must hear just that.
        if error.reason() == Some(Code::REFUSED_STREAM) || unprocessed(&error) {
            return Ended::Reset(Reason::PeerReset, Code::REFUSED_STREAM);
        }
        let reason =
            if error.is_io() || error.is_remote() { Reason::PeerReset } else { Reason::ProtocolError };
        Ended::Reply(reply::bad_upstream(reason, "it broke off before its answer"))
    })?;
    let (mut parts, body) = received.into_parts();
    strip_response(&mut parts.headers, S::UPSTREAM_IS_APPLICATION);
    apply(&mut parts.headers, &decision.response_headers);
    parts.version = http::Version::HTTP_2;
    let status = parts.status.as_u16();
    let end = body.is_end_stream();
    let stream =
        respond.send_response(Response::from_parts(parts, ()), end).map_err(|_| Ended::ClientGone)?;
    record.tally.answered(status, record.begun);
    if end { Err(Ended::Done) } else { Ok((body, stream)) }
}

/// A GOAWAY says of the streams beyond its last one that nothing of them was done (RFC 9113 section 6.8); those
/// before it go on.
fn unprocessed(error: &h2::Error) -> bool {
    error.is_go_away() && error.is_remote() && error.reason() == Some(Code::NO_ERROR)
}

async fn body_down<S: Service>(
    body: &mut RecvStream,
    stream: &mut SendStream<Bytes>,
    record: &Record<S>,
) -> Ended {
    match pump(body, stream, |count| record.tally.add_received(count)).await {
        Ok(()) => Ended::Done,
        Err(PumpError::Sink) => Ended::ClientGone,
        Err(PumpError::Source(code)) => Ended::Reset(
            Reason::PeerReset,
            code.filter(|code| *code != Code::NO_ERROR).unwrap_or(Code::INTERNAL_ERROR),
        ),
    }
}

fn next(
    response: &mut ResponseFuture,
    respond: &mut SendResponse<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<Event> {
    if respond.poll_reset(cx).is_ready() {
        return Poll::Ready(Event::ClientGone);
    }
    if let Poll::Ready(Some(Ok(interim))) = response.poll_informational(cx) {
        return Poll::Ready(Event::Interim(interim));
    }
    Pin::new(response).poll(cx).map(Event::Response)
}
