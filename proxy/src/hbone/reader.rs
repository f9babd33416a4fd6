//! Takes the peer's bytes apart, however they are cut, and gives frames to the [`Core`].

use bytes::{Buf as _, Bytes};

use super::{
    core::{Core, Error, Role},
    frame::{Code, HEAD, Head, PREFACE, flag, kind},
    hpack,
};

/// Frames that one header block may be cut into.
const MAX_PARTS: u32 = 8;

/// Where in a frame the bytes are.
#[derive(Debug)]
enum At {
    /// In what a client sends first.
    Preface,
    /// In a frame's head.
    Head,
    /// In a payload that is looked at as a whole.
    Whole(Head),
    /// In the length of a DATA frame's padding.
    PadLength(Head),
    /// In DATA: bytes left of data, and of padding after it.
    Data { id: u32, end: bool, empty: bool, left: usize, padding: usize },
}

/// The parser's state.
#[derive(Debug)]
pub(super) struct Reader {
    at: At,
    /// What came of a head or of a payload that is looked at as a whole.
    part: Vec<u8>,
    /// A header block that is not complete: stream, end of stream, frames so far, bytes.
    block: Option<(u32, bool, u32, Vec<u8>)>,
    /// The first frame must be SETTINGS.
    greeted: bool,
    most: usize,
}

impl Reader {
    pub(super) fn new(role: Role, most: usize) -> Self {
        let at = if role == Role::Server { At::Preface } else { At::Head };
        Self { at, part: Vec::new(), block: None, greeted: false, most }
    }
}

impl Core {
    /// Takes bytes from the peer.
    ///
    /// # Errors
    /// When the connection must end; what the peer is told lies in `out`.
    pub(super) fn receive(&mut self, mut input: Bytes) -> Result<(), Error> {
        while !input.is_empty() {
            self.step(&mut input)?;
        }
        Ok(())
    }

    fn step(&mut self, input: &mut Bytes) -> Result<(), Error> {
        match self.reader.at {
            At::Preface => {
                let whole = self.collect(input, PREFACE.len());
                if !PREFACE.starts_with(&self.reader.part) {
                    return Err(self.broken(Code::PROTOCOL_ERROR, "no HTTP/2 preface"));
                }
                if whole {
                    self.reader.part.clear();
                    self.reader.at = At::Head;
                }
                Ok(())
            }
            At::Head => {
                // The usual case: the head lies in one piece.
                if self.reader.part.is_empty()
                    && let Some(head) = input.first_chunk::<HEAD>().copied()
                {
                    input.advance(HEAD);
                    return self.begin(Head::parse(head));
                }
                if self.collect(input, HEAD)
                    && let Some(head) = self.reader.part.first_chunk::<HEAD>().copied()
                {
                    self.reader.part.clear();
                    self.begin(Head::parse(head))?;
                }
                Ok(())
            }
            At::Whole(head) => {
                if self.collect(input, head.length) {
                    self.whole(head)?;
                }
                Ok(())
            }
            At::PadLength(head) => {
                let pad = usize::from(input.get_u8());
                let Some(left) = (head.length - 1).checked_sub(pad) else {
                    return Err(self.broken(Code::PROTOCOL_ERROR, "padding that is longer than its frame"));
                };
                // The length's own byte counts too (RFC 9113 section 6.1).
                self.on_data_part(head.stream, Bytes::new(), 1);
                self.data(head, left, pad)
            }
            At::Data { id, end, empty, left, padding } => {
                let data = input.split_to(left.min(input.len()));
                let pad = padding.min(input.len());
                input.advance(pad);
                let (left, padding) = (left - data.len(), padding - pad);
                self.on_data_part(id, data, pad);
                self.reader.at = At::Data { id, end, empty, left, padding };
                if left + padding == 0 {
                    self.reader.at = At::Head;
                    self.on_data_end(id, end, empty)?;
                }
                Ok(())
            }
        }
    }

    /// Adds to what is collected, up to `wanted` bytes; says whether they are there.
    fn collect(&mut self, input: &mut Bytes, wanted: usize) -> bool {
        let missing = wanted - self.reader.part.len();
        let taken = missing.min(input.len());
        self.reader.part.extend_from_slice(&input[..taken]);
        input.advance(taken);
        taken == missing
    }

    fn begin(&mut self, head: Head) -> Result<(), Error> {
        if head.length > self.reader.most {
            return Err(self.broken(Code::FRAME_SIZE_ERROR, "a frame that is too long"));
        }
        if !self.reader.greeted {
            if head.kind != kind::SETTINGS || head.has(flag::ACK) {
                return Err(self.broken(Code::PROTOCOL_ERROR, "the first frame is not SETTINGS"));
            }
            self.reader.greeted = true;
        }
        if let Some((id, ..)) = &self.reader.block
            && (head.kind != kind::CONTINUATION || head.stream != *id)
        {
            return Err(self.broken(Code::PROTOCOL_ERROR, "a frame in the middle of a header block"));
        }
        let of_stream = matches!(
            head.kind,
            kind::DATA | kind::HEADERS | kind::PRIORITY | kind::RST_STREAM | kind::CONTINUATION
        );
        let of_connection = matches!(head.kind, kind::SETTINGS | kind::PING | kind::GOAWAY);
        if (of_stream && head.stream == 0) || (of_connection && head.stream != 0) {
            return Err(self.broken(Code::PROTOCOL_ERROR, "a frame of the wrong stream"));
        }
        if head.kind == kind::DATA {
            self.on_data(head.stream, head.length)?;
            if head.has(flag::PADDED) {
                if head.length == 0 {
                    return Err(self.broken(Code::FRAME_SIZE_ERROR, "a padded frame without a length"));
                }
                self.reader.at = At::PadLength(head);
                return Ok(());
            }
            return self.data(head, head.length, 0);
        }
        self.reader.at = At::Whole(head);
        if head.length == 0 { self.whole(head) } else { Ok(()) }
    }

    fn data(&mut self, head: Head, left: usize, padding: usize) -> Result<(), Error> {
        let (id, end, empty) = (head.stream, head.has(flag::END_STREAM), left == 0);
        if left + padding == 0 {
            self.reader.at = At::Head;
            return self.on_data_end(id, end, empty);
        }
        self.reader.at = At::Data { id, end, empty, left, padding };
        Ok(())
    }

    /// A frame that is looked at as a whole; its payload lies in `part`.
    fn whole(&mut self, head: Head) -> Result<(), Error> {
        let payload = std::mem::take(&mut self.reader.part);
        self.reader.at = At::Head;
        let done = self.frame(head, &payload);
        // Its room is used again.
        self.reader.part = payload;
        self.reader.part.clear();
        if self.reader.part.capacity() > 4_096 {
            self.reader.part = Vec::new();
        }
        done
    }

    fn frame(&mut self, head: Head, payload: &[u8]) -> Result<(), Error> {
        let end = head.has(flag::END_STREAM);
        match head.kind {
            kind::SETTINGS => self.on_settings(head.has(flag::ACK), payload),
            kind::PING => match payload.try_into() {
                Ok(data) => self.on_ping(head.has(flag::ACK), data),
                Err(_) => Err(self.broken(Code::FRAME_SIZE_ERROR, "a PING of a wrong length")),
            },
            kind::GOAWAY => self.on_goaway(payload),
            kind::WINDOW_UPDATE => self.on_window(head.stream, payload),
            kind::RST_STREAM => self.on_reset(head.stream, payload),
            kind::PRIORITY if payload.len() == 5 => self.costs("too many PRIORITY frames"),
            kind::PRIORITY => Err(self.broken(Code::FRAME_SIZE_ERROR, "a PRIORITY of a wrong length")),
            kind::PUSH_PROMISE => {
                Err(self.broken(Code::PROTOCOL_ERROR, "a PUSH_PROMISE, which was not granted"))
            }
            // Too short for what its flags say is there (RFC 9113 section 4.2).
            kind::HEADERS
                if payload.len()
                    < usize::from(head.has(flag::PADDED)) + 5 * usize::from(head.has(flag::PRIORITY)) =>
            {
                Err(self.broken(Code::FRAME_SIZE_ERROR, "headers that are too short"))
            }
            kind::HEADERS => match fragment(head, payload) {
                Some(block) if head.has(flag::END_HEADERS) => self.on_headers(head.stream, end, block),
                Some(block) => {
                    self.reader.block = Some((head.stream, end, 1, block.to_vec()));
                    self.small()
                }
                None => Err(self.broken(Code::PROTOCOL_ERROR, "headers with padding that is too long")),
            },
            kind::CONTINUATION => {
                let Some((id, end, parts, mut block)) = self.reader.block.take() else {
                    return Err(self.broken(Code::PROTOCOL_ERROR, "a CONTINUATION of nothing"));
                };
                block.extend_from_slice(payload);
                if head.has(flag::END_HEADERS) {
                    return self.on_headers(id, end, &block);
                }
                self.reader.block = Some((id, end, parts + 1, block));
                self.small()
            }
            _ => self.costs("too many frames of unknown types"),
        }
    }

    /// Whether a header block that is not complete is still of a bearable size.
    fn small(&mut self) -> Result<(), Error> {
        let fits = |(_, _, parts, block): &(u32, bool, u32, Vec<u8>)| {
            *parts <= MAX_PARTS && block.len() <= hpack::MAX_LIST
        };
        if self.reader.block.as_ref().is_none_or(fits) {
            return Ok(());
        }
        Err(self.broken(Code::ENHANCE_YOUR_CALM, "a header block that does not end"))
    }
}

/// The header block fragment of a HEADERS frame, without padding and priority (RFC 9113 section 6.2).
fn fragment(head: Head, payload: &[u8]) -> Option<&[u8]> {
    let (pad, rest) = match head.has(flag::PADDED) {
        true => payload.split_first().map(|(pad, rest)| (usize::from(*pad), rest))?,
        false => (0, payload),
    };
    let rest = if head.has(flag::PRIORITY) { rest.get(5..)? } else { rest };
    rest.get(..rest.len().checked_sub(pad)?)
}
