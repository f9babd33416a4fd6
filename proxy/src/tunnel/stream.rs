//! One CONNECT as a byte stream of the proxy.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::validity::Validity;
use crate::{
    copy::{Copied, Failed},
    hbone,
    l7::Io,
    socket::Cut,
};

/// A stream of a tunnel, with what it has of the connection that it was opened on.
#[derive(Debug)]
pub struct Stream {
    inner: hbone::Stream,
    pooled: Option<Pooled>,
}

/// What a stream has of the connection that it was opened on.
struct Pooled {
    /// Keeps the stream counted in its pool.
    _lease: Box<dyn Send + Sync>,
    validity: Validity,
    retires: Instant,
}

impl std::fmt::Debug for Pooled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pooled").field("validity", &self.validity).finish_non_exhaustive()
    }
}

impl Stream {
    pub(super) fn new(inner: hbone::Stream) -> Self {
        Self { inner, pooled: None }
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
        self.inner.abort();
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

impl Copied for Stream {
    fn poll_to<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
    ) -> Option<Poll<Result<usize, Failed>>> {
        self.inner.poll_to(cx, to)
    }

    fn poll_from<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
    ) -> Option<Poll<Result<usize, Failed>>> {
        self.inner.poll_from(cx, from)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
