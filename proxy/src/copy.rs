//! Copying between two byte streams, both ways, with half-close.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::Either;
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use weft_core::flow::Reason;

use crate::beside::beside;

/// What is read at a time. One buffer serves all connections of a thread: what was read is written at once, and only
/// what the writer does not take is kept, so that a connection at rest holds no memory.
const BUFFER: usize = 64 * 1024;
/// Reads of one direction before the task yields to others.
const BURST: usize = 4;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Counts the bytes of one connection, here and in the metrics.
#[derive(Debug, Default)]
pub struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    metrics: Option<(Counter, Counter)>,
}

impl Traffic {
    /// With the counters of bytes sent and received that it feeds too.
    pub fn new(sent: Counter, received: Counter) -> Self {
        Self { metrics: Some((sent, received)), ..Self::default() }
    }

    /// Counts bytes from client to server.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        if let Some((sent, _)) = &self.metrics {
            sent.inc_by(bytes);
        }
    }

    /// Counts bytes from server to client.
    pub fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        if let Some((_, received)) = &self.metrics {
            received.inc_by(bytes);
        }
    }

    /// Bytes from client to server.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes from server to client.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// Why copying stopped before both directions ended.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The client's side failed.
    #[error("the client's connection failed: {0}")]
    Client(#[source] io::Error),
    /// The server's side failed.
    #[error("the server's connection failed: {0}")]
    Server(#[source] io::Error),
    /// No byte moved for too long.
    #[error("no byte moved for {0:?}")]
    Idle(Duration),
    /// It had to end.
    #[error("it was ended: {0:?}")]
    Ended(Reason),
}

impl CopyError {
    /// As records name it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Client(_) | Self::Server(_) => Reason::PeerReset,
            Self::Idle(_) => Reason::Timeout,
            Self::Ended(reason) => *reason,
        }
    }
}

/// Copies until both directions ended; the end of one is passed on as a half-close while the other goes on, that of the
/// last one perhaps only as the close that follows. `early` has been read from the client already.
///
/// # Errors
/// On the first failure of either side, when nothing moved for `idle` (noticed after at most twice that), or with what
/// `end` gives. The caller then resets both.
pub fn both<'a, C, S>(
    client: &'a mut C,
    server: &'a mut S,
    early: Vec<u8>,
    traffic: &'a Traffic,
    idle: Duration,
    end: impl Future<Output = Reason> + 'a,
) -> impl Future<Output = Result<(), CopyError>> + 'a
where
    C: Copied,
    S: Copied,
{
    // Here and not in the block, where what is given and what it becomes would both have room in every connection.
    let mut up = Direction { rest: early, ..Direction::default() };
    let mut down = Direction::default();
    let rare = Box::pin(async move {
        tokio::select! {
            () = nothing_moves(traffic, idle) => CopyError::Idle(idle),
            reason = end => CopyError::Ended(reason),
        }
    });
    async move {
        let copy = beside(
            std::future::poll_fn(|cx| {
                let sent = up.poll(cx, client, server, down.done, |n| traffic.add_sent(n));
                if let Poll::Ready(Err(side)) = sent {
                    return Poll::Ready(Err(side.error(true)));
                }
                let received = down.poll(cx, server, client, up.done, |n| traffic.add_received(n));
                if let Poll::Ready(Err(side)) = received {
                    return Poll::Ready(Err(side.error(false)));
                }
                ready!(sent.is_ready().then_some(()).map_or(Poll::Pending, Poll::Ready));
                received.map(|_| Ok(()))
            }),
            rare,
        );
        match copy.await {
            Either::Left(copied) => copied,
            Either::Right(error) => Err(error),
        }
    }
}

/// Ends when no byte moved for so long, or up to twice that.
async fn nothing_moves(traffic: &Traffic, idle: Duration) {
    let mut last = (traffic.sent(), traffic.received());
    loop {
        tokio::time::sleep(idle).await;
        let now = (traffic.sent(), traffic.received());
        if now == last {
            return;
        }
        last = now;
    }
}

/// One side of a connection that is copied.
///
/// A side that keeps buffers of its own may hand bytes from there straight to the other side, or let the other side
/// fill them: a copy less in each direction. The other side is never part of it.
pub trait Copied: AsyncRead + AsyncWrite + Unpin {
    /// Writes what came to `to`, as far as `to` takes it; 0 at the end. `None` where it cannot.
    fn poll_to<W: AsyncWrite + Unpin>(
        &mut self,
        _cx: &mut Context<'_>,
        _to: &mut W,
    ) -> Option<Poll<Result<usize, Failed>>> {
        None
    }

    /// Takes what `from` has to say; 0 at its end. `None` where it cannot.
    fn poll_from<R: AsyncRead + Unpin>(
        &mut self,
        _cx: &mut Context<'_>,
        _from: &mut R,
    ) -> Option<Poll<Result<usize, Failed>>> {
        None
    }

    /// Whether to drop it, once all that it sends was read, tells its peer that no more comes.
    fn closes(&self) -> bool {
        false
    }
}

/// The failing side of one direction.
#[derive(Debug)]
pub enum Failed {
    /// The one that was read.
    Reader(io::Error),
    /// The one that was written to.
    Writer(io::Error),
}

impl Failed {
    /// What happened.
    pub fn into_inner(self) -> io::Error {
        let (Self::Reader(error) | Self::Writer(error)) = self;
        error
    }

    fn error(self, client_reads: bool) -> CopyError {
        match (self, client_reads) {
            (Self::Reader(e), true) | (Self::Writer(e), false) => CopyError::Client(e),
            (Self::Reader(e), false) | (Self::Writer(e), true) => CopyError::Server(e),
        }
    }
}

#[derive(Default)]
struct Direction {
    /// Read, and not taken by the writer.
    rest: Vec<u8>,
    start: usize,
    read_done: bool,
    dirty: bool,
    done: bool,
}

impl Direction {
    fn poll<R: Copied, W: Copied>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        last: bool,
        count: impl Fn(u64),
    ) -> Poll<Result<(), Failed>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..BURST {
            while self.start < self.rest.len() {
                let written = ready!(write(cx, writer, &self.rest[self.start..])).map_err(Failed::Writer)?;
                count(written as u64);
                self.start += written;
                self.dirty = true;
            }
            if self.start > 0 {
                (self.rest, self.start) = (Vec::new(), 0);
            }
            if self.read_done {
                if !(last && writer.closes()) {
                    ready!(Pin::new(&mut *writer).poll_shutdown(cx)).map_err(Failed::Writer)?;
                }
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            let direct = reader.poll_to(cx, writer).or_else(|| writer.poll_from(cx, reader));
            let passed = direct.unwrap_or_else(|| {
                SCRATCH.with_borrow_mut(|scratch| self.pass(cx, reader, writer, &mut *scratch))
            });
            match passed {
                Poll::Ready(Ok(0)) => self.read_done = self.rest.is_empty(),
                Poll::Ready(Ok(n)) => {
                    count(n as u64);
                    self.dirty = true;
                }
                Poll::Ready(Err(failed)) => return Poll::Ready(Err(failed)),
                Poll::Pending => {
                    if self.dirty {
                        ready!(Pin::new(&mut *writer).poll_flush(cx)).map_err(Failed::Writer)?;
                        self.dirty = false;
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once and writes what came, as far as the writer takes it; the others lie in `rest` then.
    fn pass<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        scratch: &mut Vec<u8>,
    ) -> Poll<Result<usize, Failed>> {
        scratch.resize(BUFFER, 0);
        let mut buf = ReadBuf::new(scratch);
        ready!(Pin::new(reader).poll_read(cx, &mut buf)).map_err(Failed::Reader)?;
        let data = buf.filled();
        let mut written = 0;
        while written < data.len() {
            match write(cx, writer, &data[written..]) {
                Poll::Ready(n) => written += n.map_err(Failed::Writer)?,
                Poll::Pending => {
                    self.rest = data[written..].to_vec();
                    break;
                }
            }
        }
        Poll::Ready(Ok(written))
    }
}

/// As [`write`], of several parts.
pub(crate) fn write_parts<W: AsyncWrite + Unpin>(
    cx: &mut Context<'_>,
    writer: &mut W,
    parts: &[io::IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    match ready!(Pin::new(writer).poll_write_vectored(cx, parts))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        written => Poll::Ready(Ok(written)),
    }
}

/// Writes, and takes a writer that takes nothing for a failure.
pub(crate) fn write<W: AsyncWrite + Unpin>(
    cx: &mut Context<'_>,
    writer: &mut W,
    data: &[u8],
) -> Poll<io::Result<usize>> {
    match ready!(Pin::new(writer).poll_write(cx, data))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        written => Poll::Ready(Ok(written)),
    }
}
