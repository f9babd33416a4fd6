//! A connection towards a destination, whichever way it goes.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use weft_core::flow::Tls;

use crate::{
    copy::{Copied, Failed},
    inbound::Opened,
    l7::Io,
    metrics::Pair,
    pipe::Pipe,
    socket::{Cut, Socket},
    tunnel::{self, validity::Validity},
};

/// Counts a connection as open until dropped.
pub struct OpenConnection(Arc<Pair>);

impl OpenConnection {
    /// Counts it.
    pub fn new(pair: Arc<Pair>) -> Self {
        pair.opened.inc();
        Self(pair)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.closed.inc();
    }
}

/// The ways.
pub enum Way {
    /// A plain connection.
    Plain(Socket),
    /// A tunnel to another proxy.
    Tunnel(tunnel::Stream),
    /// Straight into a Pod of this node.
    Local(Box<Opened>),
    /// To a Pod of this node whose requests are judged one by one.
    Judged(Pipe),
}

/// A connection towards a destination.
pub struct Upstream {
    way: Way,
    /// How it is protected.
    pub tls: Tls,
    open: OpenConnection,
}

impl Upstream {
    /// Counts it in `pair`.
    pub fn new(way: Way, tls: Tls, pair: Arc<Pair>) -> Self {
        Self { way, tls, open: OpenConnection::new(pair) }
    }

    /// Where it is counted.
    pub fn pair(&self) -> &Arc<Pair> {
        &self.open.0
    }

    /// Until when the peer that a tunnel leads to is proven; the tunnel ends then.
    pub fn validity(&self) -> Option<Validity> {
        match &self.way {
            Way::Tunnel(stream) => stream.validity(),
            Way::Plain(_) | Way::Local(_) | Way::Judged(_) => None,
        }
    }
}

impl Io for Upstream {
    fn cut(&self) -> Cut {
        match &self.way {
            Way::Plain(socket) => socket.cut(),
            Way::Tunnel(stream) => stream.cut(),
            Way::Local(opened) => opened.cut.clone(),
            Way::Judged(pipe) => pipe.cut(),
        }
    }

    fn retires(&self) -> Option<Instant> {
        match &self.way {
            Way::Tunnel(stream) => stream.retires(),
            Way::Plain(_) | Way::Local(_) | Way::Judged(_) => None,
        }
    }
}

impl Copied for Upstream {
    fn poll_to<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
    ) -> Option<Poll<Result<usize, Failed>>> {
        match &mut self.way {
            Way::Tunnel(stream) => stream.poll_to(cx, to),
            Way::Plain(_) | Way::Local(_) | Way::Judged(_) => None,
        }
    }

    fn poll_from<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
    ) -> Option<Poll<Result<usize, Failed>>> {
        match &mut self.way {
            Way::Tunnel(stream) => stream.poll_from(cx, from),
            Way::Plain(_) | Way::Local(_) | Way::Judged(_) => None,
        }
    }

    fn closes(&self) -> bool {
        match &self.way {
            Way::Plain(_) | Way::Local(_) => true,
            Way::Tunnel(_) | Way::Judged(_) => false,
        }
    }
}

impl AsyncRead for Upstream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.way {
            Way::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Way::Tunnel(io) => Pin::new(io).poll_read(cx, buf),
            Way::Local(io) => Pin::new(&mut **io).poll_read(cx, buf),
            Way::Judged(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Upstream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.way {
            Way::Plain(io) => Pin::new(io).poll_write(cx, data),
            Way::Tunnel(io) => Pin::new(io).poll_write(cx, data),
            Way::Local(io) => Pin::new(&mut **io).poll_write(cx, data),
            Way::Judged(io) => Pin::new(io).poll_write(cx, data),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.way {
            Way::Plain(io) => Pin::new(io).poll_flush(cx),
            Way::Tunnel(io) => Pin::new(io).poll_flush(cx),
            Way::Local(io) => Pin::new(&mut **io).poll_flush(cx),
            Way::Judged(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.way {
            Way::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Way::Tunnel(io) => Pin::new(io).poll_shutdown(cx),
            Way::Local(io) => Pin::new(&mut **io).poll_shutdown(cx),
            Way::Judged(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for Opened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(reason) = self.seldom.registration.poll_cut(cx) {
            self.seldom.session.fail(reason);
            self.cut.set(true);
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the destination no longer allows it",
            )));
        }
        let before = buf.filled().len();
        let result = Pin::new(&mut self.socket).poll_read(cx, buf);
        self.traffic.add_received((buf.filled().len() - before) as u64);
        result
    }
}

impl AsyncWrite for Opened {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.socket).poll_write(cx, data);
        if let Poll::Ready(Ok(n)) = &result {
            self.traffic.add_sent(*n as u64);
        }
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
