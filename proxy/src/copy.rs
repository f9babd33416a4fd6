//! Copying between two byte streams, both ways, with half-close.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is read at a time. One buffer serves all connections of a thread: what was read is written at once, and only
/// what the writer does not take is kept, so that a connection at rest holds no memory.
const BUFFER: usize = 64 * 1024;
/// Reads of one direction before the task yields to others.
const BURST: usize = 16;

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
}

/// Copies until both directions ended; the end of one is passed on as a half-close while the other goes on.
///
/// # Errors
/// On the first failure of either side, or when nothing moved for `idle` (noticed after at most twice that).
/// The caller then resets both.
pub async fn both<C, S>(
    client: &mut C,
    server: &mut S,
    traffic: &Traffic,
    idle: Duration,
) -> Result<(), CopyError>
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut up = Direction::default();
    let mut down = Direction::default();
    let copy = std::future::poll_fn(|cx| {
        let sent = up.poll(cx, client, server, |n| traffic.add_sent(n));
        if let Poll::Ready(Err(side)) = sent {
            return Poll::Ready(Err(side.error(true)));
        }
        let received = down.poll(cx, server, client, |n| traffic.add_received(n));
        if let Poll::Ready(Err(side)) = received {
            return Poll::Ready(Err(side.error(false)));
        }
        ready!(sent.is_ready().then_some(()).map_or(Poll::Pending, Poll::Ready));
        received.map(|_| Ok(()))
    });
    let watch = async {
        let mut last = (traffic.sent(), traffic.received());
        loop {
            tokio::time::sleep(idle).await;
            let now = (traffic.sent(), traffic.received());
            if now == last {
                return;
            }
            last = now;
        }
    };
    tokio::select! {
        result = copy => result,
        () = watch => Err(CopyError::Idle(idle)),
    }
}

/// The failing side of one direction.
enum Side {
    Reader(io::Error),
    Writer(io::Error),
}

impl Side {
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
    fn poll<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        count: impl Fn(u64),
    ) -> Poll<Result<(), Side>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..BURST {
            while self.start < self.rest.len() {
                self.start += ready!(write(cx, writer, &self.rest[self.start..], &count))?;
                self.dirty = true;
            }
            if self.start > 0 {
                (self.rest, self.start) = (Vec::new(), 0);
            }
            if self.read_done {
                ready!(Pin::new(&mut *writer).poll_shutdown(cx)).map_err(Side::Writer)?;
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            match SCRATCH.with_borrow_mut(|scratch| self.pass(cx, reader, writer, &count, scratch)) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    if self.dirty {
                        ready!(Pin::new(&mut *writer).poll_flush(cx)).map_err(Side::Writer)?;
                        self.dirty = false;
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once and writes what came, as far as the writer takes it.
    fn pass<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        count: &impl Fn(u64),
        scratch: &mut Vec<u8>,
    ) -> Poll<Result<(), Side>> {
        scratch.resize(BUFFER, 0);
        let mut buf = ReadBuf::new(scratch);
        ready!(Pin::new(reader).poll_read(cx, &mut buf)).map_err(Side::Reader)?;
        let mut data = buf.filled();
        self.read_done = data.is_empty();
        while !data.is_empty() {
            match write(cx, writer, data, count) {
                Poll::Ready(written) => {
                    data = &data[written?..];
                    self.dirty = true;
                }
                Poll::Pending => {
                    self.rest = data.to_vec();
                    break;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn write<W: AsyncWrite + Unpin>(
    cx: &mut Context<'_>,
    writer: &mut W,
    data: &[u8],
    count: &impl Fn(u64),
) -> Poll<Result<usize, Side>> {
    let written = ready!(Pin::new(writer).poll_write(cx, data)).map_err(Side::Writer)?;
    if written == 0 {
        return Poll::Ready(Err(Side::Writer(io::ErrorKind::WriteZero.into())));
    }
    count(written as u64);
    Poll::Ready(Ok(written))
}
