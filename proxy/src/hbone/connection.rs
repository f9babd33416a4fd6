//! Drives one connection: reads as much as there is, lets the streams work, and writes what all of them had to say.

use std::{
    cell::RefCell,
    future::Future,
    io::{self, BufRead as _, IoSlice, Write},
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use rustls::Connection as Tls;
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    net::TcpStream,
};

use super::{
    Control, Opener, Requests, Settings, Shared,
    core::{Core, Error, Role},
};

/// What is read from a socket at a time. One buffer serves all connections of a thread.
const READ: usize = 256 * 1024;
/// Sealed bytes that wait for the socket before no more frames are sealed.
const SEALED: usize = 256 * 1024;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A connection, to be polled for as long as it is used. Dropped, all its streams fail.
#[derive(Debug)]
pub struct Connection {
    socket: TcpStream,
    tls: Tls,
    shared: Shared,
    /// Frames on their way into TLS; empty between turns, its room is used again.
    frames: Vec<u8>,
    /// What was sealed and not written, roughly.
    sealed: usize,
    closing: bool,
}

impl Connection {
    /// Begins to speak after a TLS handshake, as the end that opens streams.
    pub fn client(
        socket: TcpStream,
        tls: rustls::ClientConnection,
        settings: Settings,
    ) -> (Opener, Control, Self) {
        let shared = Shared::new(Role::Client, settings);
        (Opener(shared.clone()), Control(shared.clone()), Self::new(socket, tls.into(), shared))
    }

    /// As the end that takes them.
    pub fn server(
        socket: TcpStream,
        tls: rustls::ServerConnection,
        settings: Settings,
    ) -> (Requests, Control, Self) {
        let shared = Shared::new(Role::Server, settings);
        (Requests(shared.clone()), Control(shared.clone()), Self::new(socket, tls.into(), shared))
    }

    fn new(socket: TcpStream, mut tls: Tls, shared: Shared) -> Self {
        // Bounded by `SEALED` instead.
        tls.set_buffer_limit(None);
        Self { socket, tls, shared, frames: Vec::new(), sealed: 0, closing: false }
    }

    /// One turn: writes, then reads. Whoever is woken by what was read works before the next turn, which writes for
    /// all of them at once.
    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let now = Instant::now();
        let room = self.sealed < SEALED;
        let (over, choked) = self.shared.with(|core| {
            core.set_now(now);
            core.part();
            if room {
                core.take_out(&mut self.frames);
            }
            core.driver = Some(cx.waker().clone());
            (core.over.clone().or_else(|| core.done().then_some(Error::Closed)), core.choked())
        });
        if !self.frames.is_empty() {
            self.sealed += self.frames.len();
            self.tls.writer().write_all(&self.frames).map_err(|error| failed(&error))?;
            self.frames.clear();
            // One burst does not hold memory for the life of a connection.
            if self.frames.capacity() > 2 * SEALED {
                self.frames = Vec::new();
            }
        }
        if over.is_some() && !self.closing {
            self.closing = true;
            self.tls.send_close_notify();
        }
        let flushed = self.flush(cx).map_err(|error| failed(&error))?;
        if let Some(over) = over {
            if flushed.is_pending() {
                return Poll::Pending;
            }
            let _ = Pin::new(&mut self.socket).poll_shutdown(cx);
            return Poll::Ready(if over == Error::Closed { Ok(()) } else { Err(over) });
        }
        if !room && flushed.is_ready() {
            // What waited behind the sealed bytes has nobody else to send it.
            cx.waker().wake_by_ref();
        }
        if choked {
            // Its answers come first; writability wakes this task.
            return Poll::Pending;
        }
        let read = BUFFER.with_borrow_mut(|buffer| {
            if buffer.is_empty() {
                buffer.resize(READ, 0);
            }
            self.read(buffer, cx)
        });
        match read {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Poll::Ready(Err(error)) => {
                // What the peer is told of it may still be written.
                self.shared.with(|core| {
                    core.take_out(&mut self.frames);
                    core.fail(error.clone());
                });
                let _ = self.tls.writer().write_all(&self.frames);
                self.tls.send_close_notify();
                let _ = self.flush(cx);
                Poll::Ready(if error == Error::Closed { Ok(()) } else { Err(error) })
            }
        }
    }

    /// Reads once, and takes in what came.
    fn read(&mut self, buffer: &mut [u8], cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let mut buf = ReadBuf::new(buffer);
        match Pin::new(&mut self.socket).poll_read(cx, &mut buf) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(failed(&error))),
            Poll::Ready(Ok(())) => {}
        }
        let mut records = buf.filled();
        if records.is_empty() {
            return Poll::Ready(Err(self.ended()));
        }
        while !records.is_empty() {
            self.tls.read_tls(&mut records).map_err(|error| failed(&error))?;
            self.opened()?;
        }
        Poll::Ready(Ok(()))
    }

    /// Opens the records that TLS has, and takes their frames in.
    fn opened(&mut self) -> Result<(), Error> {
        let processed = self.tls.process_new_packets();
        let error = processed.err();
        let shared = &self.shared;
        let mut reader = self.tls.reader();
        let taken = shared.with(|core: &mut Core| {
            loop {
                let length = match reader.fill_buf() {
                    Ok([]) => return Ok(()),
                    Ok(chunk) => {
                        core.receive(chunk)?;
                        chunk.len()
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) => return Err(failed(&error)),
                };
                reader.consume(length);
            }
        });
        taken?;
        match error {
            Some(error) => Err(Error::Io(error.to_string())),
            None => Ok(()),
        }
    }

    /// The peer closed: in order where nobody waits for anything.
    fn ended(&self) -> Error {
        self.shared.with(
            |core| {
                if core.unused() { Error::Closed } else { Error::Io("the peer closed it".into()) }
            },
        )
    }

    fn flush(&mut self, cx: &mut Context<'_>) -> io::Result<Poll<()>> {
        while self.tls.wants_write() {
            let mut writer = Writer { socket: &mut self.socket, cx };
            match self.tls.write_tls(&mut writer) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Poll::Pending),
                Err(error) => return Err(error),
            }
        }
        self.sealed = 0;
        Ok(Poll::Ready(()))
    }
}

impl Future for Connection {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // What came in one piece with the handshake's end.
        if let Err(error) = self.opened() {
            self.shared.with(|core| core.fail(error.clone()));
            return Poll::Ready(Err(error));
        }
        self.turn(cx)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.with(|core| core.fail(Error::Closed));
    }
}

fn failed(error: &io::Error) -> Error {
    Error::Io(error.to_string())
}

/// The socket as rustls writes to it.
struct Writer<'a, 'b> {
    socket: &'a mut TcpStream,
    cx: &'a mut Context<'b>,
}

impl Writer<'_, '_> {
    fn now<T>(poll: Poll<io::Result<T>>) -> io::Result<T> {
        match poll {
            Poll::Ready(result) => result,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Write for Writer<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::now(Pin::new(&mut *self.socket).poll_write(self.cx, bytes))
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Self::now(Pin::new(&mut *self.socket).poll_write_vectored(self.cx, parts))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
