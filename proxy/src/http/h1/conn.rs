//! One direction each of a connection: buffered reading of heads and bodies, buffered writing.

use std::{io, sync::atomic::Ordering, time::Instant};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use super::{
    super::{message::Malformed, record::Tally},
    body::{Decoder, Length, Piece, put_chunk_head, put_last_chunk},
    scan::HeadScan,
};
use crate::{l7::Io, socket::Cut};

/// The most bytes of a head.
pub(crate) const MAX_HEAD: usize = 64 * 1024;
const READ: usize = 16 * 1024;
/// Data up to this size is copied behind what waits to be written; more goes out without a copy.
const COPY: usize = 2 * 1024;

/// Why no head came.
#[derive(Debug)]
pub(crate) enum HeadError {
    /// The connection ended, or broke, with so many bytes of a head read.
    Ended(usize),
    Malformed(Malformed),
}

/// The reading side.
pub(crate) struct Reader<R> {
    io: R,
    pub(crate) buf: BytesMut,
    scan: HeadScan,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(crate) fn new(io: R, buf: BytesMut) -> Self {
        Self { io, buf, scan: HeadScan::default() }
    }

    /// Reads more; 0 at the end. Safe to cancel.
    pub(crate) async fn fill(&mut self) -> io::Result<usize> {
        self.buf.reserve(READ);
        self.io.read_buf(&mut self.buf).await
    }

    /// A whole head with its empty line. Safe to cancel: a later call goes on.
    pub(crate) async fn head(&mut self) -> Result<Bytes, HeadError> {
        loop {
            match self.scan.advance(&self.buf, MAX_HEAD) {
                Ok(Some(end)) => return Ok(self.buf.split_to(end).freeze()),
                Ok(None) => {}
                Err(problem) => return Err(HeadError::Malformed(problem)),
            }
            if !matches!(self.fill().await, Ok(count) if count > 0) {
                return Err(HeadError::Ended(self.buf.len()));
            }
        }
    }

    /// Whether nothing waits to be read: a kept upstream connection that has something to say is of no use.
    pub(crate) fn is_quiet(&mut self) -> bool {
        use futures_util::FutureExt;
        self.buf.is_empty() && self.fill().now_or_never().is_none()
    }
}

/// The writing side.
pub(crate) struct Writer<W> {
    io: W,
    pub(crate) out: BytesMut,
    /// A write was cut off in the middle: nothing may follow.
    pub(crate) torn: bool,
    /// Something was written that the stream may still hold back (TLS, a tunnel).
    held: bool,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(crate) fn new(io: W) -> Self {
        Self { io, out: BytesMut::new(), torn: false, held: false }
    }

    /// Writes out what waits.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        if self.out.is_empty() && !self.held {
            return Ok(());
        }
        self.torn = true;
        self.io.write_all_buf(&mut self.out).await?;
        self.io.flush().await?;
        (self.torn, self.held) = (false, false);
        Ok(())
    }

    async fn data(&mut self, data: Bytes, chunked: bool) -> io::Result<()> {
        if chunked {
            put_chunk_head(&mut self.out, data.len());
        }
        let end: &[u8] = if chunked { b"\r\n" } else { b"" };
        if data.len() <= COPY {
            self.out.extend_from_slice(&data);
            self.out.extend_from_slice(end);
            return if self.out.len() > READ { self.flush().await } else { Ok(()) };
        }
        self.torn = true;
        let mut all = (&mut self.out).chain(data).chain(end);
        self.io.write_all_buf(&mut all).await?;
        (self.torn, self.held) = (false, true);
        Ok(())
    }

    /// Writes out what waits and says that no more comes.
    pub(crate) async fn shutdown(&mut self) {
        if self.flush().await.is_ok() {
            // The peer may be gone already; there is nothing left to save.
            let _ = self.io.shutdown().await;
        }
    }
}

/// Both sides.
pub(crate) struct Conn<I> {
    pub(crate) reader: Reader<ReadHalf<I>>,
    pub(crate) writer: Writer<WriteHalf<I>>,
    /// Whether its drop is a failure for the other side.
    pub(crate) cut: Cut,
    /// From when on it takes no further requests.
    pub(crate) retires: Option<Instant>,
}

impl<I: Io> Conn<I> {
    pub(crate) fn new(io: I, buf: BytesMut) -> Self {
        let (cut, retires) = (io.cut(), io.retires());
        let (read, write) = tokio::io::split(io);
        Self { reader: Reader::new(read, buf), writer: Writer::new(write), cut, retires }
    }
}

/// Which end of a transfer failed.
#[derive(Debug)]
pub(crate) enum PumpError {
    Source,
    Malformed(Malformed),
    Sink,
}

/// Moves a body. What was read is written before more is read: the slower side sets the pace.
pub(crate) async fn pump<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    reader: &mut Reader<R>,
    decoder: &mut Decoder,
    writer: &mut Writer<W>,
    framing: Length,
    count: impl Fn(usize),
) -> Result<(), PumpError> {
    let chunked = framing == Length::Chunked;
    let mut ended = false;
    loop {
        match decoder.next(&mut reader.buf, ended).map_err(PumpError::Malformed)? {
            Piece::Data(data) => {
                count(data.len());
                writer.data(data, chunked).await.map_err(|_| PumpError::Sink)?;
            }
            Piece::End(trailers) => {
                if chunked {
                    put_last_chunk(&mut writer.out, &trailers);
                }
                return writer.flush().await.map_err(|_| PumpError::Sink);
            }
            Piece::More => {
                writer.flush().await.map_err(|_| PumpError::Sink)?;
                match reader.fill().await {
                    Ok(0) => ended = true,
                    Ok(_) => {}
                    Err(_) => return Err(PumpError::Source),
                }
            }
        }
    }
}

/// Moves bytes as they are until both directions ended; half-closes pass.
pub(crate) async fn opaque<A: Io, B: Io>(
    client: &mut Conn<A>,
    upstream: &mut Conn<B>,
    tally: &Tally,
) -> bool {
    let up = one_way(&mut client.reader, &mut upstream.writer, |n| {
        tally.sent.fetch_add(n as u64, Ordering::Relaxed);
    });
    let down = one_way(&mut upstream.reader, &mut client.writer, |n| {
        tally.received.fetch_add(n as u64, Ordering::Relaxed);
    });
    tokio::try_join!(up, down).is_ok()
}

async fn one_way<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    reader: &mut Reader<R>,
    writer: &mut Writer<W>,
    count: impl Fn(usize),
) -> Result<(), PumpError> {
    let mut decoder = Decoder::new(Length::UntilClose);
    pump(reader, &mut decoder, writer, Length::UntilClose, count).await?;
    writer.shutdown().await;
    Ok(())
}
