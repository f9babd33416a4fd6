//! The end of the h2 library, polled by hand over a pipe in memory.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client, server};
use http::{Method, Request, Response};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::wire::{End, Seen, Verdict, Wish, frames};
use crate::hbone::{Role, Settings, frame, hpack};

/// What lies in the pipe, in both directions.
#[derive(Default)]
struct Wire {
    there: VecDeque<u8>,
    back: Vec<u8>,
}

#[derive(Clone, Default)]
struct Pipe(Arc<Mutex<Wire>>);

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let there = &mut self.0.lock().there;
        if there.is_empty() {
            return Poll::Pending;
        }
        let n = there.len().min(buf.remaining());
        buf.put_slice(&there.drain(..n).collect::<Vec<_>>());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().back.extend_from_slice(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

enum Connection {
    Server(server::Connection<Pipe, Bytes>),
    Client(client::Connection<Pipe, Bytes>, client::SendRequest<Bytes>),
}

/// What the application has of a stream.
struct Use {
    response: Option<client::ResponseFuture>,
    body: Option<RecvStream>,
    send: SendStream<Bytes>,
    ended: bool,
    finish: bool,
    /// The end of our half is on the wire.
    finished: bool,
}

pub(super) struct Theirs {
    pipe: Pipe,
    connection: Connection,
    over: bool,
    keeps: bool,
    streams: BTreeMap<u32, Use>,
}

/// Polls what has all it needs.
fn now<T, E: std::fmt::Debug>(future: impl Future<Output = Result<T, E>>) -> T {
    let mut future = std::pin::pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..10 {
        if let Poll::Ready(done) = future.as_mut().poll(&mut cx) {
            return done.unwrap();
        }
    }
    panic!("it waits");
}

impl Theirs {
    /// An end with our limits that is greeted, with requests under way where it is a client.
    pub(super) fn new(role: Role, settings: Settings, keeps: bool, greeting: &[u8], requests: u32) -> Self {
        let pipe = Pipe::default();
        pipe.0.lock().there.extend(greeting);
        let connection = match role {
            Role::Server => {
                let mut builder = server::Builder::new();
                builder
                    .initial_window_size(settings.window)
                    .initial_connection_window_size(16 * 1024 * 1024)
                    .max_concurrent_streams(settings.streams)
                    .max_frame_size(settings.frame as u32)
                    .max_header_list_size(hpack::MAX_LIST as u32);
                Connection::Server(now(builder.handshake(pipe.clone())))
            }
            Role::Client => {
                let mut builder = client::Builder::new();
                builder
                    .initial_window_size(settings.window)
                    .initial_connection_window_size(16 * 1024 * 1024)
                    .max_frame_size(settings.frame as u32)
                    .max_header_list_size(hpack::MAX_LIST as u32)
                    .enable_push(false);
                let (send, connection) = now(builder.handshake(pipe.clone()));
                Connection::Client(connection, send)
            }
        };
        let mut theirs = Self { pipe, connection, over: false, keeps, streams: BTreeMap::new() };
        if role == Role::Client {
            theirs.pipe.0.lock().back.drain(..frame::PREFACE.len());
        }
        theirs.work(Verdict::default());
        for n in 0..requests {
            let Connection::Client(_, requests) = &mut theirs.connection else { break };
            let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
            let (response, send) = requests.send_request(request, false).unwrap();
            assert_eq!(response.stream_id().as_u32(), 1 + 2 * n);
            let used = Use {
                response: Some(response),
                body: None,
                send,
                ended: false,
                finish: false,
                finished: false,
            };
            theirs.streams.insert(1 + 2 * n, used);
            theirs.work(Verdict::default());
        }
        theirs
    }

    fn work(&mut self, mut verdict: Verdict) -> Verdict {
        let mut cx = Context::from_waker(Waker::noop());
        // Some of what it does takes effect only when the connection is polled again.
        let mut quiet = 0;
        while quiet < 3 {
            quiet += 1;
            self.poll(&mut verdict, &mut cx);
            if verdict.over.is_none() {
                self.streams.retain(|id, used| step(*id, used, self.keeps, &mut verdict, &mut cx));
            }
            let out = std::mem::take(&mut self.pipe.0.lock().back);
            for frame in frames(&out) {
                quiet = 0;
                let before = verdict.over;
                verdict.wrote(&frame);
                if before.is_some_and(|code| code != 0) {
                    verdict.over = before;
                }
                if verdict.finished.contains(&frame.stream)
                    && let Some(used) = self.streams.get_mut(&frame.stream)
                {
                    used.finished = true;
                }
            }
        }
        verdict
    }

    fn poll(&mut self, verdict: &mut Verdict, cx: &mut Context<'_>) {
        let mut ended = |error: Option<h2::Error>| {
            let code = error.and_then(|error| error.reason()).unwrap_or(Reason::NO_ERROR);
            verdict.over.get_or_insert(code.into());
        };
        if self.over {
            return ended(None);
        }
        match &mut self.connection {
            Connection::Server(connection) => loop {
                match connection.poll_accept(cx) {
                    Poll::Ready(Some(Ok((request, mut respond)))) => {
                        let id = respond.stream_id().as_u32();
                        let (request, body) = request.into_parts();
                        let headers = request.headers.iter();
                        let headers =
                            headers.map(|(n, v)| (n.as_str().to_owned(), v.as_bytes().to_vec())).collect();
                        let authority = request.uri.authority().map(ToString::to_string);
                        let seen = Seen { method: request.method.to_string(), authority, headers };
                        verdict.asked.insert(id, seen);
                        let send = respond.send_response(Response::new(()), false).unwrap();
                        let (ended, finish, finished) = (false, false, false);
                        let used = Use { response: None, body: Some(body), send, ended, finish, finished };
                        self.streams.insert(id, used);
                    }
                    Poll::Ready(done) => {
                        self.over = true;
                        return ended(done.and_then(Result::err));
                    }
                    Poll::Pending => return,
                }
            },
            Connection::Client(connection, _) => match Pin::new(connection).poll(cx) {
                Poll::Ready(done) => {
                    self.over = true;
                    ended(done.err());
                }
                Poll::Pending => {}
            },
        }
    }
}

/// Whether the stream goes on.
fn step(id: u32, used: &mut Use, keeps: bool, verdict: &mut Verdict, cx: &mut Context<'_>) -> bool {
    if let Some(response) = &mut used.response {
        match Pin::new(response).poll(cx) {
            Poll::Ready(Ok(response)) => {
                verdict.answers.insert(id, response.status().as_u16());
                used.response = None;
                used.body = Some(response.into_body());
            }
            Poll::Ready(Err(_)) => {
                verdict.lost.insert(id);
                return false;
            }
            Poll::Pending => {}
        }
    }
    while let Some(body) = used.body.as_mut().filter(|_| !used.ended) {
        match body.poll_data(cx) {
            Poll::Ready(Some(Ok(data))) => {
                body.flow_control().release_capacity(data.len()).unwrap();
                if !data.is_empty() {
                    verdict.data.entry(id).or_default().extend_from_slice(&data);
                }
            }
            Poll::Ready(Some(Err(_))) => {
                verdict.lost.insert(id);
                return false;
            }
            Poll::Ready(None) => {
                verdict.ended.insert(id);
                used.ended = true;
            }
            Poll::Pending => break,
        }
    }
    if let Poll::Ready(Ok(_) | Err(_)) = used.send.poll_reset(cx) {
        if !(used.ended && used.finished) {
            verdict.lost.insert(id);
        }
        return false;
    }
    if used.ended && !keeps && !used.finish {
        used.finish = true;
        used.send.send_data(Bytes::new(), true).unwrap();
    }
    !(used.ended && used.finished)
}

impl End for Theirs {
    fn take(&mut self, bytes: &[u8]) -> Verdict {
        self.pipe.0.lock().there.extend(bytes);
        self.work(Verdict::default())
    }

    fn wish(&mut self, wish: Wish) -> Verdict {
        let (Wish::Reset(id) | Wish::Send(id, _) | Wish::Finish(id)) = wish;
        if let Some(used) = self.streams.get_mut(&id) {
            match wish {
                Wish::Reset(_) => {
                    used.send.send_reset(Reason::CANCEL);
                    self.streams.remove(&id);
                }
                Wish::Send(_, bytes) if !used.finish => {
                    used.send.send_data(vec![7; bytes].into(), false).unwrap();
                }
                Wish::Finish(_) if !used.finish => {
                    used.finish = true;
                    used.send.send_data(Bytes::new(), true).unwrap();
                }
                Wish::Send(..) | Wish::Finish(_) => {}
            }
        }
        self.work(Verdict::default())
    }
}
