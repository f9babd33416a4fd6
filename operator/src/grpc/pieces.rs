//! A message goes to its connection in pieces, each made when the one before is sent.
//!
//! tonic writes a message whole into a buffer that its stream keeps: with a state of 8 MB for each agent, a thousand
//! agents are 8 GB for as long as they are connected. The pieces of [`Encoded`] are shared by all streams.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, future::BoxFuture, stream};
use http_body_util::StreamBody;
use hyper::body::Frame;
use parking_lot::Mutex;
use tonic::{
    Response, Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};
use weft_proto::control::SubscribeResponse;

use super::turns::Outgoing;
use crate::distribution::Encoded;

/// The stream on its way from the service's answer to [`InPieces`].
#[derive(Clone)]
struct Handed(Arc<Mutex<Option<Outgoing>>>);

/// What the generated code is given in place of the messages.
pub(super) type Nothing = stream::Pending<Result<SubscribeResponse, Status>>;

/// An answer of which [`InPieces`] sends the messages.
pub(super) fn answer(messages: Outgoing) -> Response<Nothing> {
    let mut response = Response::new(stream::pending());
    response.extensions_mut().insert(Handed(Arc::new(Mutex::new(Some(messages)))));
    response
}

/// Around the service: sends the messages of its streams.
#[derive(Debug, Clone)]
pub struct InPieces<S>(pub S);

impl<S, B> Service<http::Request<B>> for InPieces<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let answer = self.0.call(request);
        Box::pin(async move {
            let mut answer = answer.await?;
            let handed = answer.extensions_mut().remove::<Handed>();
            if let Some(messages) = handed.and_then(|handed| handed.0.lock().take()) {
                *answer.body_mut() = Body::new(StreamBody::new(frames(messages)));
            }
            Ok(answer)
        })
    }
}

impl<S: NamedService> NamedService for InPieces<S> {
    const NAME: &'static str = S::NAME;
}

/// A message of which so many pieces are sent.
type Sending = (Arc<Encoded>, usize);

/// The frames of a whole stream, its status at the end.
fn frames(
    messages: impl Stream<Item = Result<Arc<Encoded>, Status>> + Send + Unpin + 'static,
) -> impl Stream<Item = Result<Frame<Bytes>, Status>> + Send + 'static {
    let state = (Some(messages), None::<Sending>);
    stream::unfold(state, async |(mut messages, mut sending): (Option<_>, Option<Sending>)| {
        loop {
            // With its last piece the message is given up: the next one may be hours away.
            if let Some((message, sent)) = sending.take()
                && let Some(piece) = message.pieces().get(sent).cloned()
            {
                let rest = (message.pieces().len() > sent + 1).then(|| (message, sent + 1));
                return Some((Ok(Frame::data(piece)), (messages, rest)));
            }
            // Without messages the status was sent.
            let end = match messages.as_mut()?.next().await {
                Some(Ok(message)) => {
                    sending = Some((message, 0));
                    continue;
                }
                Some(Err(status)) => status,
                None => Status::ok(""),
            };
            let mut trailers = http::HeaderMap::new();
            return match end.add_header(&mut trailers) {
                Ok(()) => Some((Ok(Frame::trailers(trailers)), (None, None))),
                Err(status) => Some((Err(status), (None, None))),
            };
        }
    })
}

#[cfg(test)]
mod tests {
    use weft_proto::control::Resource;

    use super::*;

    #[tokio::test]
    async fn messages_are_sent_whole_and_given_up() {
        let upserted: Vec<_> = (0..500).map(|_| Resource { json: vec![b'a'; 1000].into() }).collect();
        let message = |n| Arc::new(Encoded::new(&SubscribeResponse::default(), &upserted[..n]).unwrap());
        let (long, short) = (message(500), message(0));
        assert!(long.pieces().len() > 10);
        let wanted = [long.pieces(), short.pieces()].concat();
        let messages = [Ok(Arc::clone(&long)), Ok(short), Err(Status::unavailable("later"))];
        let mut frames = Box::pin(frames(stream::iter(messages)));
        for (n, piece) in wanted.iter().enumerate() {
            let frame = frames.next().await.unwrap().unwrap();
            assert_eq!(frame.data_ref(), Some(piece));
            let held = Arc::strong_count(&long) > 1;
            assert_eq!(held, n + 1 < long.pieces().len(), "piece {n}");
        }
        let trailers = frames.next().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "14");
        assert_eq!(trailers["grpc-message"], "later");
        assert!(frames.next().await.is_none());
    }
}
