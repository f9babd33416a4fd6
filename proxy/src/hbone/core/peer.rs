//! What the peer sent, as the reader took it apart.

use bytes::Bytes;

use super::{
    super::{
        frame::{self, Code, MAX, flag, kind, setting},
        hpack::HpackError,
    },
    Asked, CONNECTION_WINDOW, Core, Error, Fields, Leaving, Lost, Role,
};

/// DATA of closed streams costs nothing from this length: much may be under way when streams of bulk are reset.
const WORTH: usize = 1024;

impl Core {
    pub(in crate::hbone) fn on_settings(&mut self, ack: bool, payload: &[u8]) -> Result<(), Error> {
        self.costs("too many SETTINGS")?;
        if ack {
            return if payload.is_empty() {
                Ok(())
            } else {
                Err(self.broken(Code::FRAME_SIZE_ERROR, "an acknowledgement with values"))
            };
        }
        if !payload.len().is_multiple_of(6) {
            return Err(self.broken(Code::FRAME_SIZE_ERROR, "SETTINGS of a wrong length"));
        }
        for pair in payload.chunks_exact(6) {
            let id = u16::from_be_bytes([pair[0], pair[1]]);
            let value = u32::from_be_bytes([pair[2], pair[3], pair[4], pair[5]]);
            match id {
                setting::HEADER_TABLE_SIZE => {
                    self.shrunk |= value < self.peer_table;
                    self.peer_table = value;
                }
                // A server has nothing to enable (section 6.5.2).
                setting::ENABLE_PUSH if value > u32::from(self.role == Role::Server) => {
                    return Err(self.broken(Code::PROTOCOL_ERROR, "ENABLE_PUSH is what it may not be"));
                }
                setting::MAX_CONCURRENT_STREAMS => self.peer_streams = value,
                setting::INITIAL_WINDOW_SIZE => {
                    if value > MAX {
                        return Err(
                            self.broken(Code::FLOW_CONTROL_ERROR, "an initial window that is too large")
                        );
                    }
                    let change = i64::from(value) - i64::from(self.peer_window);
                    self.peer_window = value;
                    for stream in self.streams.values_mut() {
                        stream.credit += change;
                        if stream.credit > i64::from(MAX) {
                            return Err(self.broken(Code::FLOW_CONTROL_ERROR, "a window that is too large"));
                        }
                        self.woken.extend(stream.writer.take());
                    }
                }
                setting::MAX_FRAME_SIZE => {
                    if !(16_384..=16_777_215).contains(&value) {
                        return Err(self.broken(Code::PROTOCOL_ERROR, "a frame size out of range"));
                    }
                    self.peer_frame = value as usize;
                }
                _ => {}
            }
        }
        frame::head(&mut self.out, 0, kind::SETTINGS, flag::ACK, 0);
        self.answers += frame::HEAD;
        Ok(())
    }

    /// A frame that carries nothing.
    pub(in crate::hbone) fn costs(&mut self, what: &'static str) -> Result<(), Error> {
        let now = self.now;
        if self.flood.control(now) { Ok(()) } else { Err(self.broken(Code::ENHANCE_YOUR_CALM, what)) }
    }

    pub(in crate::hbone) fn on_ping(&mut self, ack: bool, data: [u8; 8]) -> Result<(), Error> {
        self.costs("too many PINGs")?;
        if ack {
            if u64::from_be_bytes(data) <= self.pings {
                self.pongs = self.pongs.max(u64::from_be_bytes(data));
                self.woken.extend(self.pinger.take());
                if self.leaving == Leaving::Announced {
                    self.leaving = Leaving::Said;
                    frame::goaway(&mut self.out, self.last, Code::NO_ERROR);
                }
            }
        } else {
            frame::ping(&mut self.out, true, data);
            self.answers += frame::HEAD + 8;
        }
        Ok(())
    }

    pub(in crate::hbone) fn on_goaway(&mut self, payload: &[u8]) -> Result<(), Error> {
        let (Some(last), Some(code)) = (number(payload, 0), number(payload, 4)) else {
            return Err(self.broken(Code::FRAME_SIZE_ERROR, "a GOAWAY that is too short"));
        };
        let last = last & MAX;
        if self.goaway.is_some_and(|before| last > before) {
            return Err(self.broken(Code::PROTOCOL_ERROR, "a GOAWAY that takes an earlier one back"));
        }
        self.goaway = Some(last);
        if Code(code) != Code::NO_ERROR {
            return Err(Error::Goaway(Code(code)));
        }
        if self.role == Role::Client {
            for (_, stream) in self.streams.iter_mut().filter(|(id, _)| **id > last) {
                stream.lost.get_or_insert(Lost::Refused);
                self.woken.extend(stream.reader.take().into_iter().chain(stream.writer.take()));
            }
        }
        Ok(())
    }

    pub(in crate::hbone) fn on_window(&mut self, id: u32, payload: &[u8]) -> Result<(), Error> {
        let now = self.now;
        if !self.flood.update(now) {
            return Err(self.broken(Code::ENHANCE_YOUR_CALM, "too many WINDOW_UPDATEs"));
        }
        let Some(increment) = number(payload, 0).filter(|_| payload.len() == 4) else {
            return Err(self.broken(Code::FRAME_SIZE_ERROR, "a WINDOW_UPDATE of a wrong length"));
        };
        let increment = i64::from(increment & MAX);
        if id == 0 {
            self.credit += increment;
            if increment == 0 || self.credit > i64::from(MAX) {
                let code = if increment == 0 { Code::PROTOCOL_ERROR } else { Code::FLOW_CONTROL_ERROR };
                return Err(self.broken(code, "a WINDOW_UPDATE of nothing, or of too much"));
            }
            self.admit();
            return Ok(());
        }
        self.not_idle(id)?;
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.lost.is_none()) else {
            return Ok(());
        };
        stream.credit += increment;
        if increment == 0 || stream.credit > i64::from(MAX) {
            let code = if increment == 0 { Code::PROTOCOL_ERROR } else { Code::FLOW_CONTROL_ERROR };
            return self.reset_by_us(id, code);
        }
        self.woken.extend(stream.writer.take());
        Ok(())
    }

    pub(in crate::hbone) fn on_reset(&mut self, id: u32, payload: &[u8]) -> Result<(), Error> {
        let Some(code) = number(payload, 0).filter(|_| payload.len() == 4) else {
            return Err(self.broken(Code::FRAME_SIZE_ERROR, "a RST_STREAM of a wrong length"));
        };
        self.not_idle(id)?;
        let Some(stream) = self.streams.get_mut(&id) else { return self.costs("too many RST_STREAMs") };
        let lost = if Code(code) == Code::REFUSED_STREAM { Lost::Refused } else { Lost::Reset(Code(code)) };
        let early = !stream.answered;
        // After both ends it says nothing new. After a whole answer it says that nobody reads any more, which spoils no
        // answer: section 8.1 says so of NO_ERROR, TCP of every reset after an end, and Envoy sends INTERNAL_ERROR for
        // it. CANCEL is how our own kind cuts a connection.
        if self.role == Role::Client && stream.ended && Code(code) != Code::CANCEL {
            stream.deaf = !stream.finished;
            stream.finished = true;
        } else if !stream.ended || !stream.finished {
            stream.lost.get_or_insert(lost);
        }
        self.woken.extend(stream.reader.take().into_iter().chain(stream.writer.take()));
        let waited = self.asked.len();
        self.asked.retain(|asked| asked.id != id);
        if self.asked.len() < waited {
            // Nobody took it: nobody will let go of it.
            self.streams.remove(&id);
        }
        let now = self.now;
        if early && self.role == Role::Server && !self.flood.reset(now) {
            return Err(self.broken(Code::ENHANCE_YOUR_CALM, "too many streams are begun and taken back"));
        }
        Ok(())
    }

    /// A whole header block.
    pub(in crate::hbone) fn on_headers(&mut self, id: u32, end: bool, block: &[u8]) -> Result<(), Error> {
        let mut fields = Fields::default();
        let decoded = self.decoder.decode(block, |name, value| fields.take(name, value));
        match decoded {
            Ok(()) => {}
            Err(HpackError::TooLarge) => {
                return Err(self.broken(Code::ENHANCE_YOUR_CALM, "a header list that is too large"));
            }
            Err(_) => return Err(self.broken(Code::COMPRESSION_ERROR, "a header block that cannot be read")),
        }
        if self.streams.contains_key(&id) {
            return self.on_answer(id, end, &fields);
        }
        if self.role == Role::Client || id.is_multiple_of(2) {
            self.not_idle(id)?;
            return self.costs("too many headers of closed streams");
        }
        if self.forgotten.contains(&id) {
            return self.costs("too many headers of streams that were reset");
        }
        if id <= self.last {
            return Err(self.broken(Code::STREAM_CLOSED, "headers of a stream that is closed"));
        }
        self.last = id;
        if self.leaving == Leaving::Said {
            return self.deny(id, Code::REFUSED_STREAM);
        }
        // A reset stream counts until its task has let go of it, so that resets do not buy more of them.
        if self.streams.len() >= self.settings.streams as usize {
            return self.deny(id, Code::REFUSED_STREAM);
        }
        let mut stream = self.stream();
        stream.ended = end;
        self.streams.insert(id, stream);
        if fields.no_request() {
            self.streams.remove(&id);
            return self.deny(id, Code::PROTOCOL_ERROR);
        }
        self.asked.push_back(Asked { id, fields });
        self.woken.extend(self.acceptor.take());
        Ok(())
    }

    fn deny(&mut self, id: u32, code: Code) -> Result<(), Error> {
        self.say_reset(id, code);
        self.answers += frame::HEAD + 4;
        self.took_back()
    }

    fn took_back(&mut self) -> Result<(), Error> {
        let now = self.now;
        if self.flood.reset(now) {
            return Ok(());
        }
        Err(self.broken(Code::ENHANCE_YOUR_CALM, "too many streams that have to be refused"))
    }

    /// Headers of a stream that there is: the answer to our CONNECT, or trailers.
    fn on_answer(&mut self, id: u32, end: bool, fields: &Fields) -> Result<(), Error> {
        let role = self.role;
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if stream.lost.is_some() {
            return self.costs("too many headers of streams that were reset");
        }
        if stream.ended {
            return self.reset_by_us(id, Code::STREAM_CLOSED);
        }
        if role == Role::Client && !stream.answered {
            let Some(status) = fields.status.filter(|_| !fields.no_answer()) else {
                return self.reset_by_us(id, Code::PROTOCOL_ERROR);
            };
            // Interim answers say nothing to us (section 8.1).
            if status.is_informational() {
                return if end {
                    self.reset_by_us(id, Code::PROTOCOL_ERROR)
                } else {
                    self.costs("too many 1xx")
                };
            }
            stream.answer = Some(status);
            stream.answered = true;
        } else {
            // A CONNECT has no trailers (section 8.5).
            return self.reset_by_us(id, Code::PROTOCOL_ERROR);
        }
        stream.ended = end;
        self.woken.extend(stream.reader.take());
        Ok(())
    }

    /// The head of a DATA frame, whose whole length counts, padding included.
    pub(in crate::hbone) fn on_data(&mut self, id: u32, length: usize) -> Result<(), Error> {
        self.not_idle(id)?;
        let role = self.role;
        let Some(stream) = self.streams.get_mut(&id) else {
            return if length < WORTH { self.costs("DATA of closed streams") } else { Ok(()) };
        };
        if stream.lost.is_some() {
            Ok(())
        } else if stream.ended {
            self.reset_by_us(id, Code::STREAM_CLOSED)
        } else if role == Role::Client && !stream.answered {
            self.reset_by_us(id, Code::PROTOCOL_ERROR)
        } else if stream.window.take(length as u32) {
            Ok(())
        } else {
            self.reset_by_us(id, Code::FLOW_CONTROL_ERROR)
        }
    }

    /// A part of its payload: data, and so many bytes of padding.
    pub(in crate::hbone) fn on_data_part(&mut self, id: u32, data: Bytes, padding: usize) {
        // On receipt: what streams hold does not slow the others.
        self.taken += (data.len() + padding) as u32;
        if self.taken >= CONNECTION_WINDOW / 4 {
            frame::window(&mut self.out, 0, self.taken);
            self.taken = 0;
        }
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.lost.is_none()) else { return };
        // Padding is delivered to nobody, so its credit goes back at once.
        if padding > 0
            && let Some(increment) = stream.window.deliver(padding as u32, false, self.now)
        {
            frame::window(&mut self.out, id, increment);
        }
        if !data.is_empty() {
            if stream.received.push(data) {
                self.lent.push(id);
            }
            self.woken.extend(stream.reader.take());
        }
    }

    /// The end of a DATA frame.
    pub(in crate::hbone) fn on_data_end(&mut self, id: u32, end: bool, empty: bool) -> Result<(), Error> {
        if empty && !end {
            self.costs("too many empty DATA frames")?;
        }
        match self.streams.get_mut(&id) {
            Some(stream) if end && stream.lost.is_none() => {
                stream.ended = true;
                self.woken.extend(stream.reader.take());
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn not_idle(&mut self, id: u32) -> Result<(), Error> {
        // Only clients open streams, those with odd numbers (section 5.1.1).
        let next = if self.role == Role::Client { self.next } else { self.last + 1 };
        if id.is_multiple_of(2) || id >= next {
            return Err(self.broken(Code::PROTOCOL_ERROR, "a frame of a stream that nobody opened"));
        }
        Ok(())
    }

    fn reset_by_us(&mut self, id: u32, code: Code) -> Result<(), Error> {
        self.say_reset(id, code);
        self.answers += frame::HEAD + 4;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.lost.get_or_insert(Lost::Reset(code));
            self.woken.extend(stream.reader.take().into_iter().chain(stream.writer.take()));
        }
        self.took_back()
    }
}

/// A number of four bytes.
fn number(payload: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(payload.get(at..at + 4)?.try_into().ok()?))
}
