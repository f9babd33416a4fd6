//! A message goes to its connection in pieces, each made when the one before is sent.
//!
//! tonic writes a message whole into a buffer that its stream keeps: with a state of 8 MB for each agent, a thousand
//! agents are 8 GB for as long as they are connected. The resources' JSON is shared by all streams; a piece copies a
//! little of it at a time.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{Stream, StreamExt, future::BoxFuture, stream};
use http_body_util::StreamBody;
use hyper::body::Frame;
use parking_lot::Mutex;
use prost::{Message, encoding::message};
use tonic::{
    Response, Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};
use weft_proto::control::{Resource, SubscribeResponse};

use super::turns::Outgoing;

/// About how long a piece is, in bytes.
const PIECE: usize = 32 << 10;
/// `SubscribeResponse.upserted`.
const UPSERTED: u32 = 3;

/// A message that is being sent: what stands before its resources, and those.
struct Sending {
    head: Option<Bytes>,
    resources: std::vec::IntoIter<Resource>,
}

impl Sending {
    /// The message with the five bytes before it (gRPC over HTTP/2, Length-Prefixed-Message).
    fn new(mut response: SubscribeResponse) -> Result<Self, Status> {
        let resources = std::mem::take(&mut response.upserted);
        let all = resources.iter().map(|r| message::encoded_len(UPSERTED, r)).sum::<usize>();
        let own = response.encode_to_vec();
        let length = u32::try_from(own.len() + all)
            .map_err(|_| Status::out_of_range("the state is larger than a message can be"))?;
        let mut head = BytesMut::with_capacity(5 + own.len());
        head.put_u8(0);
        head.put_u32(length);
        head.put_slice(&own);
        Ok(Self { head: Some(head.freeze()), resources: resources.into_iter() })
    }

    /// The next piece; `None` where all are out.
    fn next(&mut self) -> Option<Bytes> {
        if let Some(head) = self.head.take() {
            return Some(head);
        }
        let mut piece = BytesMut::new();
        while piece.len() < PIECE {
            let Some(resource) = self.resources.next() else { break };
            piece.reserve(message::encoded_len(UPSERTED, &resource));
            message::encode(UPSERTED, &resource, &mut piece);
        }
        (!piece.is_empty()).then(|| piece.freeze())
    }
}

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

/// The frames of a whole stream, its status at the end.
fn frames(
    messages: impl Stream<Item = Result<SubscribeResponse, Status>> + Send + Unpin + 'static,
) -> impl Stream<Item = Result<Frame<Bytes>, Status>> + Send + 'static {
    let state = (Some(messages), None::<Sending>);
    stream::unfold(state, async |(mut messages, mut sending)| {
        loop {
            if let Some(piece) = sending.as_mut().and_then(Sending::next) {
                return Some((Ok(Frame::data(piece)), (messages, sending)));
            }
            // Without messages the status was sent.
            let end = match messages.as_mut()?.next().await {
                Some(Ok(response)) => match Sending::new(response) {
                    Ok(next) => {
                        sending = Some(next);
                        continue;
                    }
                    Err(status) => status,
                },
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
    use weft_proto::control::Version;

    use super::*;

    fn response(resources: usize) -> SubscribeResponse {
        let json = |n: usize| Bytes::from(vec![b'a'; 100 + n * 37 % 9000]);
        SubscribeResponse {
            version: Some(Version { epoch: 7, sequence: 9 }),
            full: true,
            upserted: (0..resources).map(|n| Resource { json: json(n) }).collect(),
            removed: vec!["x".into(), "y".into()],
        }
    }

    #[tokio::test]
    async fn the_pieces_are_the_message() {
        for resources in [0, 1, 500] {
            let status = Status::unavailable("later");
            let messages = stream::iter([Ok(response(resources)), Ok(response(1)), Err(status)]);
            let frames: Vec<_> = frames(messages).map(Result::unwrap).collect().await;
            let (last, data) = frames.split_last().unwrap();
            let trailers = last.trailers_ref().unwrap();
            assert_eq!(trailers["grpc-status"], "14");
            assert_eq!(trailers["grpc-message"], "later");
            let pieces: Vec<&[u8]> = data.iter().map(|f| &f.data_ref().unwrap()[..]).collect();
            assert!(pieces.iter().all(|p| p.len() < PIECE + 10_000));
            let mut bytes = Bytes::from(pieces.concat());
            for expected in [response(resources), response(1)] {
                assert_eq!(bytes.split_to(1)[..], [0]);
                let length = u32::from_be_bytes(bytes.split_to(4)[..].try_into().unwrap());
                let message = bytes.split_to(usize::try_from(length).unwrap());
                assert_eq!(SubscribeResponse::decode(message).unwrap(), expected);
            }
            assert!(bytes.is_empty());
        }
    }
}
