//! Drives one connection: reads as much as there is, lets the streams work, and writes what all of them had to say.

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::BytesMut;
use rustls::AlertDescription;
use tokio::{io::AsyncWrite as _, net::TcpStream};
use tokio_util::io::poll_read_buf;

use super::{
    Control, Opener, Requests, Settings, Shared, buffers,
    core::{Core, Error, Role},
};
use crate::tls::{
    Established, Records,
    record::{self, ALERT, Content},
};

/// A connection, to be polled for as long as it is used. Dropped, all its streams fail.
#[derive(Debug)]
pub struct Connection {
    socket: TcpStream,
    records: Records,
    shared: Shared,
    /// Frames on their way into records.
    frames: Vec<u8>,
    /// How many bytes of them are sealed.
    taken: usize,
    /// Records on their way into the socket.
    sealed: Option<Sealed>,
    /// The end of the handshake, which goes along with the first frames.
    lead: Vec<u8>,
    /// The beginning of a record that is not complete.
    part: Vec<u8>,
    /// Nothing has been read yet.
    fresh: bool,
    /// The peer said that it sends no more.
    closed: bool,
    farewell: Farewell,
    /// What there is to say waits for what the sockets bring meanwhile.
    waits: bool,
}

/// Records that the socket did not take yet.
#[derive(Debug)]
struct Sealed {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

/// The last record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Farewell {
    None,
    Due(AlertDescription),
    Said,
}

impl Connection {
    /// Begins to speak after a TLS handshake, as the end that opens streams.
    pub fn client(socket: TcpStream, tls: Established, settings: Settings) -> (Opener, Control, Self) {
        let shared = Shared::new(Role::Client, settings);
        (Opener(shared.clone()), Control(shared.clone()), Self::new(socket, tls, shared))
    }

    /// As the end that takes them.
    pub fn server(socket: TcpStream, tls: Established, settings: Settings) -> (Requests, Control, Self) {
        let shared = Shared::new(Role::Server, settings);
        (Requests(shared.clone()), Control(shared.clone()), Self::new(socket, tls, shared))
    }

    fn new(socket: TcpStream, tls: Established, shared: Shared) -> Self {
        Self {
            socket,
            records: tls.records,
            shared,
            frames: Vec::new(),
            taken: 0,
            sealed: None,
            lead: tls.unsent,
            part: tls.received,
            fresh: true,
            closed: false,
            farewell: Farewell::None,
            waits: false,
        }
    }

    /// One turn: writes, then reads. Whoever is woken by what was read works before the next turn, which writes for
    /// all of them at once. Where many streams are open, those that the sockets wake have a turn before it writes, too.
    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        // What came with the handshake's end is answered along with our own beginning.
        if self.fresh
            && let Poll::Ready(Err(error)) = self.read(cx)
        {
            return self.failed(error, cx);
        }
        // Once: the next turn writes.
        self.waits = !self.waits && self.shared.with(|core| core.crowded());
        if self.waits {
            // Wakes this task once all sockets were looked at and whom they concern had a turn.
            let _ = pin!(tokio::task::yield_now()).poll(cx);
            return self.take_in(cx);
        }
        let now = Instant::now();
        // Frames are taken once those before them are on their way.
        let room = !self.unsent() || self.write(cx)?.is_ready();
        let (over, choked) = self.shared.with(|core| {
            core.set_now(now);
            core.keep();
            core.part();
            if room {
                core.take_out(&mut self.frames);
            }
            core.driver = Some(cx.waker().clone());
            (core.over.clone().or_else(|| core.done().then_some(Error::Closed)), core.choked())
        });
        if over.is_some() && self.farewell == Farewell::None {
            self.farewell = Farewell::Due(AlertDescription::CloseNotify);
        }
        let written = if room { self.write(cx)? } else { Poll::Pending };
        if let Some(over) = over {
            ready!(written);
            let _ = Pin::new(&mut self.socket).poll_shutdown(cx);
            return Poll::Ready(if over == Error::Closed { Ok(()) } else { Err(over) });
        }
        if choked {
            // Its answers come first; writability wakes this task.
            return Poll::Pending;
        }
        self.take_in(cx)
    }

    /// Reads, and asks for another turn where something came.
    fn take_in(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        match ready!(self.read(cx)) {
            Ok(()) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Err(error) => self.failed(error, cx),
        }
    }

    /// Ends after a failure; what the peer is told of it may still be written.
    fn failed(&mut self, error: Error, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let room = !self.unsent();
        self.shared.with(|core| {
            if room {
                core.take_out(&mut self.frames);
            }
            core.fail(error.clone());
        });
        if self.farewell == Farewell::None {
            self.farewell = Farewell::Due(AlertDescription::CloseNotify);
        }
        let _ = self.write(cx);
        Poll::Ready(if error == Error::Closed { Ok(()) } else { Err(error) })
    }

    /// Whether something waits for the socket.
    fn unsent(&self) -> bool {
        self.sealed.is_some() || self.taken < self.frames.len()
    }

    /// Seals and writes all that there is.
    fn write(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Error> {
        loop {
            if let Some(sealed) = &mut self.sealed {
                while sealed.start < sealed.end {
                    let bytes = &sealed.bytes[sealed.start..sealed.end];
                    match Pin::new(&mut self.socket).poll_write(cx, bytes) {
                        Poll::Ready(Ok(0)) => return Err(failed(&io::ErrorKind::WriteZero.into())),
                        Poll::Ready(written) => sealed.start += written.map_err(|error| failed(&error))?,
                        Poll::Pending => return Ok(Poll::Pending),
                    }
                }
                self.sealed.take().into_iter().for_each(|sealed| buffers::give_back(sealed.bytes));
            }
            if self.taken == self.frames.len()
                && self.lead.is_empty()
                && !self.records.due()
                && !matches!(self.farewell, Farewell::Due(_))
            {
                buffers::clear(&mut self.frames);
                self.taken = 0;
                return Ok(Poll::Ready(()));
            }
            let mut bytes = buffers::records();
            let rest = &self.frames[self.taken..];
            let lead = std::mem::take(&mut self.lead);
            bytes[..lead.len()].copy_from_slice(&lead);
            let sealed = self.records.seal(rest, &mut bytes[lead.len()..]);
            let (taken, written) = sealed.map_err(|error| insecure(&error))?;
            let mut end = lead.len() + written;
            self.taken += taken;
            // In one piece with what comes before it: the peer may be gone for whatever comes later.
            if let Farewell::Due(alert) = self.farewell
                && taken == rest.len()
                && end + ALERT <= bytes.len()
            {
                end += self.records.alert(alert, &mut bytes[end..]).map_err(|error| insecure(&error))?;
                self.farewell = Farewell::Said;
            }
            self.sealed = Some(Sealed { bytes, start: 0, end });
        }
    }

    /// Reads once, and takes in what came.
    fn read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        // Whom the last frames ended had a turn to let go of it.
        if self.closed {
            return Poll::Ready(Err(self.ended()));
        }
        buffers::input(|input| {
            input.extend_from_slice(&self.part);
            // What came with the handshake's end is looked at first.
            if !std::mem::take(&mut self.fresh) {
                match ready!(poll_read_buf(Pin::new(&mut self.socket), cx, input)) {
                    Ok(0) => return Poll::Ready(Err(self.ended())),
                    Ok(_) => {}
                    Err(error) => return Poll::Ready(Err(failed(&error))),
                }
            }
            self.part = Vec::new();
            Poll::Ready(self.open(input))
        })
    }

    /// Opens the records that are whole, takes their frames in, and keeps the beginning of the next one.
    fn open(&mut self, input: &mut BytesMut) -> Result<(), Error> {
        let Self { shared, records, farewell, .. } = self;
        let opened = shared.with(|core: &mut Core| {
            loop {
                let length = Records::length(input).map_err(|error| refused(&error, farewell))?;
                let Some(length) = length.filter(|length| *length <= input.len()) else { return Ok(false) };
                let mut record = input.split_to(length);
                match records.open(&mut record).map_err(|error| refused(&error, farewell))? {
                    Content::Data => core.receive(record.freeze())?,
                    Content::Control => {}
                    Content::Closed => return Ok(true),
                }
            }
        });
        self.closed = opened?;
        self.part = input.to_vec();
        Ok(())
    }

    /// The peer closed: in order where nobody waits for anything.
    fn ended(&self) -> Error {
        self.shared.with(
            |core| {
                if core.unused() { Error::Closed } else { Error::Io("the peer closed it".into()) }
            },
        )
    }
}

impl Future for Connection {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
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

fn insecure(error: &rustls::Error) -> Error {
    Error::Io(error.to_string())
}

/// The peer's records are not acceptable: it is told, unless it told us.
fn refused(error: &rustls::Error, farewell: &mut Farewell) -> Error {
    *farewell = record::answer(error).map_or(Farewell::Said, Farewell::Due);
    insecure(error)
}
