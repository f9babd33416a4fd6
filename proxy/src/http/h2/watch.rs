//! Sees the streams that the HTTP/2 library refuses by itself: it says nothing of them but what it writes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
};

/// Resets that may wait to be looked at; further ones are not told.
const WAITING: usize = 64;
/// A frame's head (RFC 9113 section 4.1), in bytes.
const HEAD: usize = 9;
/// The type of RST_STREAM frames, and the length of their payload, in bytes (section 6.4).
const RST_STREAM: (u8, usize) = (3, 4);

/// A stream's id and the code that it was reset with.
pub(super) type Reset = (u32, u32);

/// Passes everything on, and tells of each RST_STREAM frame that goes out.
pub(super) struct Watch<I> {
    io: I,
    frames: Frames,
    told: mpsc::Sender<Reset>,
}

impl<I> Watch<I> {
    /// Watches what is written to `io`.
    pub(super) fn new(io: I) -> (Self, mpsc::Receiver<Reset>) {
        let (told, resets) = mpsc::channel(WAITING);
        (Self { io, frames: Frames::default(), told }, resets)
    }
}

/// Follows a stream of frames that comes in pieces.
#[derive(Default)]
struct Frames {
    head: [u8; HEAD + RST_STREAM.1],
    have: usize,
    skip: usize,
}

impl Frames {
    fn see(&mut self, mut data: &[u8], mut reset: impl FnMut(Reset)) {
        while !data.is_empty() {
            if self.skip > 0 {
                let skipped = self.skip.min(data.len());
                self.skip -= skipped;
                data = data.get(skipped..).unwrap_or_default();
                continue;
            }
            let is_reset = self.have >= HEAD && self.head[3] == RST_STREAM.0;
            let wanted = if is_reset { HEAD + RST_STREAM.1 } else { HEAD };
            let taken = wanted.saturating_sub(self.have).min(data.len());
            if let (Some(to), Some(from)) =
                (self.head.get_mut(self.have..self.have + taken), data.get(..taken))
            {
                to.copy_from_slice(from);
            }
            self.have += taken;
            data = data.get(taken..).unwrap_or_default();
            self.finish(&mut reset);
        }
    }

    /// Goes on to the next frame once all that matters of this one is there.
    fn finish(&mut self, reset: &mut impl FnMut(Reset)) {
        let [l0, l1, l2, kind, _flags, s0, s1, s2, s3, code @ ..] = self.head;
        if self.have < HEAD {
            return;
        }
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        let mut seen = 0;
        if kind == RST_STREAM.0 && length == RST_STREAM.1 {
            if self.have < self.head.len() {
                return;
            }
            reset((u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]), u32::from_be_bytes(code)));
            seen = RST_STREAM.1;
        }
        (self.have, self.skip) = (0, length - seen);
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Watch<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watch<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, &[io::IoSlice::new(data)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl<I: AsyncWrite + Unpin> Watch<I> {
    fn write(&mut self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        let mut left = written;
        for buf in bufs {
            let seen = left.min(buf.len());
            left -= seen;
            let told = &self.told;
            // A full channel has told enough of this caller.
            self.frames.see(buf.get(..seen).unwrap_or_default(), |reset| _ = told.try_send(reset));
        }
        Poll::Ready(Ok(written))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_are_seen_however_the_frames_are_cut() {
        let frame = |kind: u8, stream: u8, payload: &[u8]| {
            let length = u8::try_from(payload.len()).expect("short");
            [&[0, 0, length, kind, 0, 0, 0, 0, stream], payload].concat()
        };
        let all = [
            frame(4, 0, &[]),
            frame(3, 1, &[0, 0, 0, 1]),
            frame(0, 3, &[3; 40]),
            frame(3, 5, &[0, 0, 0, 8]),
            frame(3, 7, &[0, 0, 0, 7]),
            frame(1, 9, &[0, 0, 1, 3]),
        ]
        .concat();
        for piece in 1..all.len() {
            let (mut frames, mut seen) = (Frames::default(), Vec::new());
            for part in all.chunks(piece) {
                frames.see(part, |reset| seen.push(reset));
            }
            assert_eq!(seen, [(1, 1), (5, 8), (7, 7)], "in pieces of {piece}");
        }
    }
}
