//! HTTP/2 (RFC 9113) with one method, CONNECT: the framing of the tunnel between node proxies.
//!
//! A general HTTP/2 library hands every frame through queues of its own, wakes a task for each, and gives a
//! connection's credit back only as streams deliver. Here a connection's frames are gathered in one buffer, sealed
//! into full TLS records and written once a turn ([`connection`]); credit is decoupled ([`core`]); and what a hostile
//! peer may send is counted ([`flood`]). Nothing below this module knows policy or Pods.

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use http::{HeaderMap, Method, StatusCode};
use parking_lot::{Mutex, MutexGuard};

mod buffers;
mod connection;
mod core;
mod flood;
mod frame;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod hpack;
mod pace;
mod reader;
mod received;
mod stream;
mod window;

pub use connection::Connection;
pub use core::{Error, Lost, Role};
pub use frame::Code;
pub use stream::Stream;

use core::Core;

/// What we grant.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// First window of a stream, bytes; it grows while the reader keeps up.
    pub window: u32,
    /// Streams at a time.
    pub streams: u32,
    /// Largest frame, bytes.
    pub frame: usize,
}

/// What the driver and the streams' owners share.
#[derive(Debug, Clone)]
pub(crate) struct Shared(Arc<Mutex<Core>>);

impl Shared {
    fn new(role: Role, settings: Settings) -> Self {
        Self(Arc::new(Mutex::new(Core::new(role, settings, Instant::now()))))
    }

    /// Works on the state, and wakes whom it concerns after the lock is gone.
    fn with<T>(&self, work: impl FnOnce(&mut Core) -> T) -> T {
        let mut core: MutexGuard<'_, Core> = self.0.lock();
        let done = work(&mut core);
        let mut woken = std::mem::take(&mut core.woken);
        drop(core);
        woken.drain(..).for_each(std::task::Waker::wake);
        done
    }
}

/// Opens streams. The connection ends once this is gone and the streams are over.
#[derive(Debug)]
pub struct Opener(Shared);

impl Opener {
    /// Streams that the peer allows at a time.
    pub fn most_streams(&self) -> usize {
        self.0.with(|core| core.most_streams())
    }

    /// Whether a stream moves, or moved a moment ago, so much that it delays what else goes over this connection.
    pub fn carries_bulk(&self) -> bool {
        self.0.with(|core| core.carries_bulk(Instant::now()))
    }

    /// Sends a CONNECT to `authority`.
    ///
    /// # Errors
    /// When the connection takes no more streams; nothing was sent.
    pub fn open(&self, authority: SocketAddr, headers: &HeaderMap) -> Result<Opening, Lost> {
        let id = self.0.with(|core| core.open(authority, headers))?;
        Ok(Opening(Some(Stream::new(self.0.clone(), id))))
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        self.0.with(|core| {
            core.abandoned = true;
            if core.done() {
                core.woken.extend(core.driver.take());
            }
        });
    }
}

/// A CONNECT that waits for its answer. Dropped, it is reset.
#[derive(Debug)]
pub struct Opening(Option<Stream>);

impl Opening {
    /// Sends what of `data` fits along with the CONNECT, and says how much that is.
    pub fn send(&self, data: &[u8]) -> usize {
        let Some(stream) = &self.0 else { return 0 };
        stream.send_now(data)
    }

    /// The answer, with the stream.
    ///
    /// # Errors
    /// When the stream is reset or the connection ends.
    pub async fn answer(mut self) -> Result<(StatusCode, Stream), Lost> {
        let Some(stream) = self.0.take() else { return Err(Lost::Connection) };
        let status = std::future::poll_fn(|cx| stream.poll_answer(cx)).await?;
        Ok((status, stream))
    }
}

/// A CONNECT, or what should have been one, of the peer.
#[derive(Debug)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// Where to.
    pub authority: Option<String>,
    /// The other headers.
    pub headers: HeaderMap,
    stream: Stream,
}

impl Request {
    /// Answers 200.
    ///
    /// # Errors
    /// When the stream is over already.
    pub fn accept(self) -> Result<Stream, Lost> {
        self.stream.answer(StatusCode::OK)?;
        Ok(self.stream)
    }

    /// Answers with another status, and ends the stream.
    pub fn refuse(self, status: StatusCode) {
        let _ = self.stream.answer(status);
        self.stream.close(Code::NO_ERROR);
    }

    /// Says that nothing of it was done (RFC 9113 section 8.7).
    pub fn postpone(self) {
        self.stream.close(Code::REFUSED_STREAM);
    }
}

/// Takes the peer's streams.
#[derive(Debug)]
pub struct Requests(Shared);

impl Requests {
    /// The next one; `None` once none will come.
    pub async fn next(&mut self) -> Option<Request> {
        let asked =
            std::future::poll_fn(|cx: &mut Context<'_>| self.0.with(|core| core.poll_asked(cx))).await?;
        Some(Request {
            method: asked.fields.method.unwrap_or_default(),
            authority: asked.fields.authority,
            headers: asked.fields.headers,
            stream: Stream::new(self.0.clone(), asked.id),
        })
    }
}

/// Asks the peer for signs of life, says goodbye, and notices bulk.
#[derive(Debug, Clone)]
pub struct Control(Shared);

impl Control {
    /// A PING, until its answer.
    ///
    /// # Errors
    /// When the connection ends.
    pub async fn ping(&self) -> Result<(), Lost> {
        let ping = self.0.with(Core::ping);
        std::future::poll_fn(|cx| -> Poll<_> { self.0.with(|core| core.poll_pong(ping, cx)) }).await
    }

    /// Waits until a stream carries bulk; see [`Opener::carries_bulk`].
    pub async fn bulk(&self) {
        std::future::poll_fn(|cx| self.0.with(|core| core.poll_bulk(cx))).await;
    }

    /// Takes no more streams; the connection ends once all are over.
    pub fn leave(&self) {
        self.0.with(Core::leave);
    }
}

#[cfg(test)]
mod tests;
