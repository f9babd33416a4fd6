//! Gathers what the HTTP/2 library writes in a turn: it would write each longer piece of a body on its own.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is gathered at most, in bytes; the largest that the allocator keeps at hand for each thread.
const FULL: usize = 32 * 1024;
/// A write of so many bytes is not copied.
const LARGE: usize = 8 * 1024;

/// A connection whose writes go out at the end of a [`Gather::turn`]. The library owns one half of it, who polls the library
/// the other: the lock is never waited for.
pub(super) struct Gather<I>(Arc<Mutex<Gathered<I>>>);

struct Gathered<I> {
    io: I,
    /// Empty, and without memory of its own, between turns of a peer that reads.
    waiting: Vec<u8>,
    /// Of these, what went out.
    sent: usize,
    /// Why nothing more can go out; the library has not heard of it.
    failed: Option<io::Error>,
}

impl<I> Clone for Gather<I> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<I: AsyncWrite + Unpin> Gather<I> {
    pub(super) fn new(io: I) -> Self {
        Self(Arc::new(Mutex::new(Gathered { io, waiting: Vec::new(), sent: 0, failed: None })))
    }

    /// Polls what writes here, and sends what it wrote.
    pub(super) fn turn<T>(
        &self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let polled = poll(cx);
        let mut gathered = self.0.lock();
        if let Poll::Ready(Err(error)) = gathered.poll_send(cx) {
            gathered.failed = Some(error);
            // The library hears of it when it is polled again.
            cx.waker().wake_by_ref();
        }
        drop(gathered);
        polled
    }
}

impl<I: AsyncWrite + Unpin> Gathered<I> {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.waiting.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut self.io).poll_write(cx, rest)) {
                Ok(count) if count > 0 => self.sent += count,
                failed => {
                    self.give_back();
                    let zero = io::ErrorKind::WriteZero.into();
                    return Poll::Ready(Err(failed.err().unwrap_or(zero)));
                }
            }
        }
        self.give_back();
        Poll::Ready(Ok(()))
    }

    fn give_back(&mut self) {
        self.waiting = Vec::new();
        self.sent = 0;
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        let length: usize = bufs.iter().map(|buf| buf.len()).sum();
        if length >= LARGE || self.waiting.len() + length > FULL {
            ready!(self.poll_send(cx))?;
        }
        if length >= LARGE {
            return Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        }
        if self.waiting.capacity() == 0 {
            self.waiting = Vec::with_capacity(FULL);
        }
        bufs.iter().for_each(|buf| self.waiting.extend_from_slice(buf));
        Poll::Ready(Ok(length))
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Gather<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut gathered = self.0.lock();
        match gathered.failed.take() {
            Some(error) => Poll::Ready(Err(error)),
            None => Pin::new(&mut gathered.io).poll_read(cx, buf),
        }
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Gather<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().poll_write(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// What was written goes out at the end of the turn.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut gathered = self.0.lock();
        ready!(gathered.poll_send(cx))?;
        Pin::new(&mut gathered.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, task::noop_waker_ref};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Takes so many bytes, and notes how long each write was; nothing is ever read.
    #[derive(Default)]
    struct Peer {
        room: usize,
        got: Vec<u8>,
        writes: Vec<usize>,
        broken: bool,
    }

    impl AsyncWrite for Peer {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
            if self.broken {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let count = data.len().min(self.room);
            if count == 0 {
                return Poll::Pending;
            }
            self.room -= count;
            self.got.extend_from_slice(&data[..count]);
            self.writes.push(count);
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncRead for Peer {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    /// A turn in which each piece is written and flushed; how many of them were taken.
    fn turn<'a>(gather: &Gather<Peer>, pieces: impl IntoIterator<Item = &'a [u8]>) -> usize {
        let mut writer = gather.clone();
        let mut taken = 0;
        let polled = gather.turn(&mut Context::from_waker(noop_waker_ref()), |_| {
            for piece in pieces {
                if !matches!(writer.write_all(piece).now_or_never(), Some(Ok(()))) {
                    break;
                }
                assert!(matches!(writer.flush().now_or_never(), Some(Ok(()))));
                taken += 1;
            }
            Poll::Ready(taken)
        });
        assert_eq!(polled, Poll::Ready(taken));
        taken
    }

    fn gather(room: usize) -> Gather<Peer> {
        Gather::new(Peer { room, ..Peer::default() })
    }

    #[test]
    fn what_is_written_in_a_turn_is_one_write() {
        let gather = gather(usize::MAX);
        let pieces = [b"one ".repeat(300), b"two ".repeat(300), b"three".to_vec()];
        assert_eq!(turn(&gather, pieces.iter().map(Vec::as_slice)), 3);
        assert_eq!(turn(&gather, [&b"four"[..]]), 1);
        let gathered = gather.0.lock();
        assert_eq!(gathered.io.writes, [2_405, 4]);
        assert_eq!(gathered.io.got, [&pieces.concat()[..], b"four"].concat());
        assert_eq!(gathered.waiting.capacity(), 0, "a connection at rest keeps no buffer");
    }

    #[test]
    fn a_large_piece_goes_out_at_once_behind_what_waited() {
        let gather = gather(usize::MAX);
        let large = vec![7; LARGE];
        turn(&gather, [&b"small"[..], &large]);
        let gathered = gather.0.lock();
        assert_eq!(gathered.io.writes, [5, LARGE]);
        assert_eq!(gathered.io.got, [&b"small"[..], &large].concat());
    }

    #[test]
    fn a_peer_that_does_not_read_holds_the_writer_up() {
        let gather = gather(100);
        let pieces: Vec<Vec<u8>> = (0..=255_u8).map(|n| vec![n; 1_000]).collect();
        let mut taken = turn(&gather, pieces.iter().map(Vec::as_slice));
        assert!(taken * 1_000 <= FULL + 1_000, "{taken} pieces are held");
        assert_eq!(turn(&gather, [&pieces[taken][..]]), 0);
        while taken < pieces.len() {
            gather.0.lock().io.room += 1_500;
            taken += turn(&gather, [&pieces[taken][..]]);
        }
        gather.0.lock().io.room = usize::MAX;
        turn(&gather, []);
        assert_eq!(gather.0.lock().io.got, pieces.concat());
    }

    #[tokio::test]
    async fn who_writes_hears_of_a_failure_that_came_later() {
        let gather = gather(0);
        gather.0.lock().io.broken = true;
        assert_eq!(turn(&gather, [&b"lost"[..]]), 1);
        let mut reader = gather.clone();
        let told = reader.read_u8().await.expect_err("broken");
        assert_eq!(told.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(gather.0.lock().waiting.capacity(), 0);
        // Only once: what comes then is the connection's own.
        assert!(reader.read_u8().now_or_never().is_none());
    }
}
