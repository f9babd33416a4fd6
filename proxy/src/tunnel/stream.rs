//! One CONNECT as a byte stream.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::validity::Validity;
use crate::{l7::Io, socket::Cut};

/// The bytes of one CONNECT. END_STREAM and half-close are the same thing in both directions; a reset of the stream
/// or the loss of its connection is an error, never an end. Dropped before both directions ended, it resets.
pub struct Stream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// Received, not yet delivered.
    chunk: Bytes,
    read_closed: bool,
    write_closed: bool,
    pooled: Option<Pooled>,
}

/// What a stream has of the connection that it was opened on.
struct Pooled {
    /// Keeps the stream counted in its pool.
    _lease: Box<dyn Send + Sync>,
    validity: Validity,
    retires: Instant,
}

/// Most bytes taken by one write: a stream that finds a large window still lets others in between.
const MAX_WRITE: usize = 64 * 1024;

impl Stream {
    pub(super) fn new(send: SendStream<Bytes>, recv: RecvStream) -> Self {
        Self { send, recv, chunk: Bytes::new(), read_closed: false, write_closed: false, pooled: None }
    }

    /// A stream of a pooled connection, which ends with `validity` and takes no more streams from `retires` on.
    pub(super) fn of(self, lease: Box<dyn Send + Sync>, validity: Validity, retires: Instant) -> Self {
        Self { pooled: Some(Pooled { _lease: lease, validity, retires }), ..self }
    }

    /// Until when the peer that was dialled is proven.
    pub fn validity(&self) -> Option<Validity> {
        self.pooled.as_ref().map(|p| p.validity.clone())
    }

    /// Resets the stream, so that the peer sees a failure and no end.
    pub fn abort(&mut self) {
        self.send.send_reset(Reason::CANCEL);
        self.read_closed = true;
        self.write_closed = true;
    }
}

impl Io for Stream {
    /// Without effect: dropped before both directions ended, it resets anyway.
    fn cut(&self) -> Cut {
        Cut::default()
    }

    fn retires(&self) -> Option<Instant> {
        self.pooled.as_ref().map(|p| p.retires)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if self.chunk.has_remaining() {
                let n = self.chunk.remaining().min(buf.remaining());
                buf.put_slice(&self.chunk[..n]);
                self.chunk.advance(n);
                // Credit goes back only for what was delivered: a reader that stalls stalls its own stream.
                self.recv.flow_control().release_capacity(n).map_err(to_io)?;
                return Poll::Ready(Ok(()));
            }
            if self.read_closed {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.recv.poll_data(cx)) {
                Some(Ok(chunk)) => self.chunk = chunk,
                Some(Err(error)) => return Poll::Ready(Err(to_io(error))),
                None => self.read_closed = true,
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.write_closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.send.reserve_capacity(data.len().min(MAX_WRITE));
        while self.send.capacity() == 0 {
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(to_io(error))),
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            }
        }
        let n = self.send.capacity().min(data.len());
        self.send.send_data(Bytes::copy_from_slice(&data[..n]), false).map_err(to_io)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.write_closed {
            self.write_closed = true;
            self.send.send_data(Bytes::new(), true).map_err(to_io)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("id", &self.send.stream_id()).finish_non_exhaustive()
    }
}

fn to_io(error: h2::Error) -> io::Error {
    let kind = if error.is_io() { io::ErrorKind::BrokenPipe } else { io::ErrorKind::ConnectionReset };
    io::Error::new(kind, error)
}
