//! One CONNECT as a byte stream.

use std::{
    io::{self, IoSlice, Write as _},
    pin::Pin,
    task::{Context, Poll, Waker},
};

use bytes::buf::Limit;
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::{Shared, core::Lost, frame::Code};
use crate::copy::{self, Copied, Failed};

/// The bytes of one CONNECT. END_STREAM and half-close are the same thing in both directions; a reset of the stream
/// or the loss of its connection is an error, never an end. Dropped before both directions ended, it resets.
#[derive(Debug)]
pub struct Stream {
    shared: Shared,
    id: u32,
    closed: bool,
}

impl Stream {
    pub(super) fn new(shared: Shared, id: u32) -> Self {
        Self { shared, id, closed: false }
    }

    /// Its number on its connection.
    pub fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn poll_answer(&self, cx: &mut Context<'_>) -> Poll<Result<StatusCode, Lost>> {
        self.shared.with(|core| core.poll_answer(self.id, cx))
    }

    /// Writes what fits now.
    pub(super) fn send_now(&self, data: &[u8]) -> usize {
        let written =
            self.shared.with(|core| core.write(self.id, data, &mut Context::from_waker(Waker::noop())));
        match written {
            Poll::Ready(Ok(n)) => n,
            // Whoever waits for the answer hears what is wrong.
            Poll::Ready(Err(_)) | Poll::Pending => 0,
        }
    }

    pub(super) fn answer(&self, status: StatusCode) -> Result<(), Lost> {
        self.shared.with(|core| core.answer(self.id, status))
    }

    /// Lets go of it, with this code where it is not over.
    pub(super) fn close(mut self, code: Code) {
        self.closed = true;
        self.shared.with(|core| core.drop_stream(self.id, code));
    }

    /// Resets it, so that the peer sees a failure and no end.
    pub fn abort(&mut self) {
        self.shared.with(|core| core.reset(self.id, Code::CANCEL));
    }
}

impl Copied for Stream {
    fn poll_to<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
    ) -> Option<Poll<Result<usize, Failed>>> {
        let write = |cx: &mut Context<'_>, parts: &[IoSlice<'_>]| copy::write_parts(cx, to, parts);
        Some(self.shared.with(|core| core.deliver(self.id, cx, write)))
    }

    fn poll_from<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
    ) -> Option<Poll<Result<usize, Failed>>> {
        let read =
            |cx: &mut Context<'_>, into: &mut Limit<&mut Vec<u8>>| poll_read_buf(Pin::new(from), cx, into);
        Some(self.shared.with(|core| core.fill(self.id, cx, read)))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.closed {
            self.shared.with(|core| core.drop_stream(self.id, Code::CANCEL));
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let into = buf.initialize_unfilled();
        if into.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let copy = |_: &mut Context<'_>, parts: &[IoSlice<'_>]| {
            let mut rest = &mut into[..];
            // It never fails, and stops where there is no room.
            parts.iter().try_for_each(|part| rest.write_all(part)).ok();
            let left = rest.len();
            Poll::Ready(Ok(into.len() - left))
        };
        let read = self.shared.with(|core| core.deliver(self.id, cx, copy));
        read.map_ok(|n| buf.advance(n)).map_err(Failed::into_inner)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.shared.with(|core| core.write(self.id, data, cx))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What was written goes out at the end of the connection's turn.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shared.with(|core| core.finish(self.id)))
    }
}
