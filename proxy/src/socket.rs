//! Sockets towards applications and peers: options, and closing as a failure.

use std::{
    io,
    os::fd::AsFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

use crate::{copy::Copied, l7::Io};

/// What a socket takes beyond what its peer has room for, in bytes. The kernel would take 4 MiB: memory that a reader
/// who stalls holds, and in a tunnel a queue that no other stream's bytes can overtake.
const UNSENT: u32 = 128 * 1024;

/// Sets what every data socket gets: no delay, a short queue (`TCP_NOTSENT_LOWAT`), and keepalive so that a peer that
/// vanished is noticed.
///
/// Set on a listener, what is accepted from it has it too.
pub fn tune(socket: &impl AsFd) {
    let socket = SockRef::from(socket);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    let set = socket
        .set_tcp_nodelay(true)
        .and_then(|()| socket.set_tcp_notsent_lowat(UNSENT))
        .and_then(|()| socket.set_tcp_keepalive(&keepalive));
    if let Err(error) = set {
        tracing::debug!(%error, "socket options were not set");
    }
}

/// Sets what a socket gets whose other end cannot vanish unnoticed: no delay and a short queue. An application of this
/// node is in the same kernel, and a tunnel is pinged.
pub fn tune_noticed(socket: &impl AsFd) {
    let socket = SockRef::from(socket);
    let set = socket.set_tcp_nodelay(true).and_then(|()| socket.set_tcp_notsent_lowat(UNSENT));
    if let Err(error) = set {
        tracing::debug!(%error, "socket options were not set");
    }
}

/// Decides, for a [`Socket`] that somebody else owns by now, that its close shall be a reset.
#[derive(Debug, Clone, Default)]
pub struct Cut(Arc<AtomicBool>);

impl Cut {
    /// Whether dropping the socket resets the connection.
    pub fn set(&self, reset: bool) {
        self.0.store(reset, Ordering::Release);
    }

    /// What was set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A TCP socket that closes with a reset where its [`Cut`] says so: the other side then sees a failure, never a
/// clean end.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    cut: Cut,
}

impl Socket {
    /// Wraps a connected socket.
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, cut: Cut::default() }
    }

    /// The handle that decides how it closes.
    pub fn cut(&self) -> Cut {
        self.cut.clone()
    }

    /// The socket.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.cut.is_set()
            && let Err(error) = self.stream.set_zero_linger()
        {
            tracing::debug!(%error, "a connection closes without a reset");
        }
    }
}

impl Copied for Socket {
    fn closes(&self) -> bool {
        true
    }
}

impl Io for Socket {
    fn cut(&self) -> Cut {
        self.cut.clone()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    /// By send(2) and sendmsg(2): writev(2) goes the way of files (`vfs_writev`), whose inode and entry are two more
    /// lines of memory, with many connections a µs for each write.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [one] = data {
            return Pin::new(&mut self.stream).poll_write(cx, one);
        }
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            let send = || SockRef::from(&self.stream).send_vectored(data);
            match self.stream.try_io(Interest::WRITABLE, send) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// How much a socket takes whose peer has read a lot, so that the kernel expects more of it, and then stalls.
    async fn taken(tuned: bool) -> usize {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        if tuned {
            tune(&listener);
        }
        let mut reader =
            TcpStream::connect(listener.local_addr().expect("an address")).await.expect("connected");
        let (mut sender, _) = listener.accept().await.expect("accepted");
        let (block, mut sink) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
        for _ in 0..256 {
            sender.write_all(&block).await.expect("written");
            reader.read_exact(&mut sink).await.expect("read");
        }
        let mut taken = 0;
        while let Ok(n) = sender.try_write(&block) {
            taken += n;
        }
        taken
    }

    #[tokio::test]
    async fn a_reader_that_stalls_holds_little() {
        let (tuned, untuned) = (taken(true).await, taken(false).await);
        assert!(tuned + 1024 * 1024 < untuned, "{tuned} bytes were taken, and {untuned} without");
    }
}
