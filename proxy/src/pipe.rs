//! Two ends of a connection inside this process. Unlike tokio's, an end that fails is told apart from one that
//! closes.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

use crate::{l7::Io, socket::Cut};

/// One end. Dropped while its [`Cut`] is set, the other end reads a reset where it would have read the end.
#[derive(Debug)]
pub struct Pipe {
    io: DuplexStream,
    cut: Cut,
    broken: Arc<AtomicBool>,
    other_broken: Arc<AtomicBool>,
}

/// Two ends that hold up to `buffer` bytes in each direction.
pub fn pipe(buffer: usize) -> (Pipe, Pipe) {
    let (near, far) = tokio::io::duplex(buffer);
    let (near_broken, far_broken) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let end = |io, broken: &Arc<AtomicBool>, other: &Arc<AtomicBool>| Pipe {
        io,
        cut: Cut::default(),
        broken: broken.clone(),
        other_broken: other.clone(),
    };
    (end(near, &near_broken, &far_broken), end(far, &far_broken, &near_broken))
}

impl Io for Pipe {
    fn cut(&self) -> Cut {
        self.cut.clone()
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // Before the stream itself is dropped: whoever reads its end then finds this.
        self.broken.store(self.cut.is_set(), Ordering::Release);
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let ended = buf.filled().len() == before && buf.remaining() > 0;
        if ended && self.other_broken.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_failure_is_no_end() {
        for fails in [false, true] {
            let (mut near, mut far) = pipe(64);
            near.write_all(b"part").await.expect("written");
            near.cut().set(fails);
            drop(near);
            let mut read = Vec::new();
            let end = far.read_to_end(&mut read).await;
            assert_eq!(read, b"part");
            assert_eq!(end.err().map(|e| e.kind()), fails.then_some(io::ErrorKind::ConnectionReset));
        }
    }

    #[tokio::test]
    async fn half_a_close_is_an_end_though_the_rest_may_fail() {
        let (mut near, mut far) = pipe(64);
        near.cut().set(true);
        near.shutdown().await.expect("closed");
        assert_eq!(far.read(&mut [0]).await.expect("an end"), 0);
        far.write_all(b"x").await.expect("the other half is open");
        drop(near);
        far.read(&mut [0]).await.expect_err("a reset");
    }
}
