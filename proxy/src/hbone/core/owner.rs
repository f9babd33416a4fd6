//! What the streams' owners do.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::{BufMut as _, buf::Limit};
use http::{HeaderMap, StatusCode};

use super::{
    super::{
        buffers,
        frame::{self, Code, MAX, flag, kind},
        hpack,
        received::PARTS,
    },
    Asked, BACKLOG, Core, DEFAULT_FRAME, FORGOTTEN, Leaving, Lost, PRIORITY, QUANTUM, Role, SHARE,
};
use crate::copy::Failed;

impl Core {
    /// Streams that may be open at a time.
    pub(in crate::hbone) fn most_streams(&self) -> usize {
        self.peer_streams.min(self.settings.streams) as usize
    }

    /// Sends a CONNECT.
    pub(in crate::hbone) fn open(&mut self, authority: SocketAddr, headers: &HeaderMap) -> Result<u32, Lost> {
        if self.over.is_some() || self.goaway.is_some() || self.next > MAX - 2 {
            return Err(Lost::Connection);
        }
        if self.streams.len() >= self.most_streams() {
            return Err(Lost::Refused);
        }
        let id = self.next;
        self.next += 2;
        let mut block = self.block(512);
        hpack::named(&mut block, hpack::index::METHOD, b"CONNECT");
        hpack::named(&mut block, hpack::index::AUTHORITY, authority.to_string().as_bytes());
        for (name, value) in headers {
            hpack::literal(&mut block, name.as_str().as_bytes(), value.as_bytes());
        }
        // A CONNECT's few headers fit into the frame that every peer takes.
        frame::head(&mut self.out, block.len().min(DEFAULT_FRAME), kind::HEADERS, flag::END_HEADERS, id);
        self.out.extend_from_slice(&block[..block.len().min(DEFAULT_FRAME)]);
        let stream = self.stream();
        self.streams.insert(id, stream);
        self.wake_driver();
        Ok(id)
    }

    /// The answer to a CONNECT that we sent.
    pub(in crate::hbone) fn poll_answer(
        &mut self,
        id: u32,
        cx: &mut Context<'_>,
    ) -> Poll<Result<StatusCode, Lost>> {
        let Some(stream) = self.streams.get_mut(&id) else { return Poll::Ready(Err(Lost::Connection)) };
        if let Some(status) = stream.answer.take() {
            return Poll::Ready(Ok(status));
        }
        if let Some(lost) = stream.lost {
            return Poll::Ready(Err(lost));
        }
        stream.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// The next request of the peer; `None` once none will come.
    pub(in crate::hbone) fn poll_asked(&mut self, cx: &mut Context<'_>) -> Poll<Option<Asked>> {
        if let Some(asked) = self.asked.pop_front() {
            return Poll::Ready(Some(asked));
        }
        if self.over.is_some() {
            return Poll::Ready(None);
        }
        self.acceptor = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Answers a request, and ends it unless the status is 200.
    pub(in crate::hbone) fn answer(&mut self, id: u32, status: StatusCode) -> Result<(), Lost> {
        let Some(stream) = self.streams.get_mut(&id) else { return Err(Lost::Connection) };
        if let Some(lost) = stream.lost {
            return Err(lost);
        }
        stream.answered = true;
        let end = status != StatusCode::OK;
        stream.finished = end;
        let mut block = self.block(8);
        if end {
            hpack::named(&mut block, hpack::index::STATUS, status.as_str().as_bytes());
        } else {
            hpack::indexed(&mut block, hpack::index::STATUS);
        }
        let flags = flag::END_HEADERS | if end { flag::END_STREAM } else { 0 };
        frame::head(&mut self.out, block.len(), kind::HEADERS, flags, id);
        self.out.extend_from_slice(&block);
        self.wake_driver();
        Ok(())
    }

    /// Shows what came to `take`, which says how much of it it took; 0 at the end of the stream.
    pub(in crate::hbone) fn deliver(
        &mut self,
        id: u32,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut Context<'_>, &[IoSlice<'_>]) -> Poll<io::Result<usize>>,
    ) -> Poll<Result<usize, Failed>> {
        let (now, clock) = (self.now, self.clock);
        let Some(stream) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(Failed::Reader(Lost::Connection.into())));
        };
        if !stream.received.is_empty() {
            let mut parts = [IoSlice::new(&[]); PARTS];
            let count = stream.received.show(&mut parts);
            let n = ready!(take(cx, &parts[..count])).map_err(Failed::Writer)?;
            stream.received.advance(n);
            let drained = stream.received.is_empty();
            let bulk = stream.pace.add(n, clock);
            // On delivery: a reader that stalls stalls its own stream.
            let increment = if stream.ended { None } else { stream.window.deliver(n as u32, drained, now) };
            if let Some(increment) = increment {
                frame::window(&mut self.out, id, increment);
                self.wake_driver();
            }
            if bulk {
                self.saw_bulk();
            }
            return Poll::Ready(Ok(n));
        }
        if let Some(lost) = stream.lost {
            return Poll::Ready(Err(Failed::Reader(lost.into())));
        }
        if stream.ended {
            return Poll::Ready(Ok(0));
        }
        stream.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// How much windows, backlog and the other streams allow.
    fn room(&mut self, id: u32, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let queue = self.queue();
        let Some(stream) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(Lost::Connection.into()));
        };
        if let Some(lost) = stream.lost {
            return Poll::Ready(Err(lost.into()));
        }
        if stream.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let crowd = self.crowd || queue > usize::from(stream.waits);
        // Who seldom sends goes first, and who has sent in this turn after those that wait.
        let seldom = !stream.held && stream.sent + 1 < self.turn;
        let backlog = if seldom { BACKLOG + PRIORITY } else { BACKLOG };
        let full = self.credit <= 0 || self.out.len() >= backlog || (crowd && stream.sent == self.turn);
        let most = stream.credit.min(self.credit);
        if most <= 0 || full {
            stream.writer = Some(cx.waker().clone());
            if full {
                stream.held = true;
                if !std::mem::replace(&mut stream.waits, true) {
                    let queue = if stream.sent == self.turn { &mut self.served } else { &mut self.waiting };
                    queue.push_back(id);
                }
            }
            return Poll::Pending;
        }
        let share = (BACKLOG / queue.max(1)).clamp(SHARE, QUANTUM);
        Poll::Ready(Ok(usize::try_from(most).unwrap_or(share).min(share)))
    }

    fn spend(&mut self, id: u32, bytes: usize) {
        self.credit -= bytes as i64;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.credit -= bytes as i64;
            stream.sent = self.turn;
            stream.held = false;
            if stream.pace.add(bytes, self.clock) {
                self.saw_bulk();
            }
        }
        self.flood.sent();
        self.wake_driver();
    }

    /// Takes as much as windows and backlog allow.
    pub(in crate::hbone) fn write(
        &mut self,
        id: u32,
        data: &[u8],
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let n = data.len().min(ready!(self.room(id, cx))?);
        buffers::reserve(&mut self.out, n + frame::HEAD);
        for part in data[..n].chunks(self.peer_frame.min(self.settings.frame)) {
            frame::head(&mut self.out, part.len(), kind::DATA, 0, id);
            self.out.extend_from_slice(part);
            self.spend(id, part.len());
        }
        Poll::Ready(Ok(n))
    }

    /// Lets `read` put what it has straight into a frame, as much as windows and backlog allow; 0 where it is at its
    /// end.
    pub(in crate::hbone) fn fill(
        &mut self,
        id: u32,
        cx: &mut Context<'_>,
        read: impl FnOnce(&mut Context<'_>, &mut Limit<&mut Vec<u8>>) -> Poll<io::Result<usize>>,
    ) -> Poll<Result<usize, Failed>> {
        let room = match ready!(self.room(id, cx)) {
            Ok(room) => room,
            Err(_) if self.streams.get(&id).is_some_and(|stream| stream.deaf) => return unheard(cx, read),
            Err(error) => return Poll::Ready(Err(Failed::Writer(error))),
        };
        let most = room.min(self.peer_frame).min(self.settings.frame);
        let before = self.out.len();
        buffers::reserve(&mut self.out, frame::HEAD + most);
        frame::head(&mut self.out, 0, kind::DATA, 0, id);
        let read = read(cx, &mut (&mut self.out).limit(most));
        let n = match read {
            Poll::Ready(Ok(n)) if n > 0 => n,
            nothing => {
                self.out.truncate(before);
                return nothing.map_err(Failed::Reader);
            }
        };
        frame::set_length(&mut self.out[before..], n);
        self.spend(id, n);
        Poll::Ready(Ok(n))
    }

    /// Says that no more will be sent.
    pub(in crate::hbone) fn finish(&mut self, id: u32) -> io::Result<()> {
        let Some(stream) = self.streams.get_mut(&id) else { return Err(Lost::Connection.into()) };
        if let Some(lost) = stream.lost {
            return Err(lost.into());
        }
        if !std::mem::replace(&mut stream.finished, true) {
            frame::head(&mut self.out, 0, kind::DATA, flag::END_STREAM, id);
            self.wake_driver();
        }
        Ok(())
    }

    /// Resets a stream that is not over.
    pub(in crate::hbone) fn reset(&mut self, id: u32, code: Code) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.lost.is_none() && !(stream.ended && stream.finished) {
            stream.lost = Some(Lost::Reset(code));
            self.say_reset(id, code);
            self.wake_driver();
        }
    }

    /// Tells the peer, which may send more before it knows.
    pub(super) fn say_reset(&mut self, id: u32, code: Code) {
        frame::reset(&mut self.out, id, code);
        if self.role == Role::Server {
            if self.forgotten.len() == FORGOTTEN {
                self.forgotten.pop_front();
            }
            self.forgotten.push_back(id);
        }
    }

    /// Begins a header block.
    fn block(&mut self, room: usize) -> Vec<u8> {
        let mut block = Vec::with_capacity(room);
        // RFC 9113 section 4.3.1; we never use the table, whatever its size.
        if std::mem::take(&mut self.shrunk) {
            hpack::forget(&mut block);
        }
        block
    }

    /// Lets go of a stream, which is reset where it is not over.
    pub(in crate::hbone) fn drop_stream(&mut self, id: u32, code: Code) {
        self.reset(id, code);
        self.streams.remove(&id);
        if self.done() {
            self.wake_driver();
        }
    }

    /// Asks the peer for a sign of life, and gives the number of the ping.
    pub(in crate::hbone) fn ping(&mut self) -> u64 {
        self.pings += 1;
        frame::ping(&mut self.out, false, self.pings.to_be_bytes());
        self.wake_driver();
        self.pings
    }

    /// Whether that ping was answered.
    pub(in crate::hbone) fn poll_pong(&mut self, ping: u64, cx: &mut Context<'_>) -> Poll<Result<(), Lost>> {
        if self.over.is_some() {
            return Poll::Ready(Err(Lost::Connection));
        }
        if self.pongs >= ping {
            return Poll::Ready(Ok(()));
        }
        self.pinger = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Whether a stream carries bulk.
    pub(in crate::hbone) fn poll_bulk(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.carries_bulk(Instant::now()) {
            return Poll::Ready(());
        }
        self.watcher = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Takes no more streams, but for those that are under way; ends once all are over (section 6.8).
    pub(in crate::hbone) fn leave(&mut self) {
        if self.leaving == Leaving::No {
            self.leaving = Leaving::Announced;
            frame::goaway(&mut self.out, MAX, Code::NO_ERROR);
            self.ping();
        }
    }
}

/// Reads what nobody will hear: a failure as soon as there is anything.
fn unheard(
    cx: &mut Context<'_>,
    read: impl FnOnce(&mut Context<'_>, &mut Limit<&mut Vec<u8>>) -> Poll<io::Result<usize>>,
) -> Poll<Result<usize, Failed>> {
    match ready!(read(cx, &mut (&mut Vec::new()).limit(1))) {
        Ok(0) => Poll::Ready(Ok(0)),
        Ok(_) => Poll::Ready(Err(Failed::Writer(Lost::Reset(Code::NO_ERROR).into()))),
        Err(error) => Poll::Ready(Err(Failed::Reader(error))),
    }
}
