//! Body framing (RFC 9112 sections 6 and 7): lengths, chunks, trailers.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{
    super::message::{Known, Malformed},
    fields::{Fields, MAX_FIELDS, put_field},
    scan::HeadScan,
};

/// How long a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Length {
    /// There is none.
    None,
    /// So many bytes.
    Known(u64),
    /// In chunks.
    Chunked,
    /// Until the connection ends; responses only.
    UntilClose,
}

impl Length {
    /// Whether bytes follow the head.
    pub(crate) fn is_some(self) -> bool {
        !matches!(self, Self::None | Self::Known(0))
    }

    /// Writes the field that announces it.
    pub(crate) fn encode(self, out: &mut BytesMut) {
        match self {
            Self::Known(length) => {
                let mut digits = [0u8; 20];
                put_field(out, b"content-length", decimal(length, &mut digits));
            }
            Self::Chunked => put_field(out, b"transfer-encoding", b"chunked"),
            Self::None | Self::UntilClose => {}
        }
    }
}

fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut start = digits.len();
    for (index, digit) in digits.iter_mut().enumerate().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        start = index;
        if number == 0 {
            break;
        }
    }
    digits.get(start..).unwrap_or_default()
}

/// A piece of a body.
#[derive(Debug)]
pub(crate) enum Piece {
    Data(Bytes),
    /// The end, with the trailers of a chunked body.
    End(Fields),
    /// Not enough bytes yet.
    More,
}

/// Takes a body out of a buffer, piece by piece.
#[derive(Debug)]
pub(crate) struct Decoder(State);

#[derive(Debug)]
enum State {
    Counted(u64),
    UntilClose,
    ChunkSize,
    Chunk(u64),
    ChunkEnd,
    Trailers(HeadScan),
    Done,
}

/// The longest chunk-size line: 16 digits, extensions, CRLF. Extensions are dropped, never forwarded.
const MAX_CHUNK_LINE: usize = 256;
/// The most bytes of a trailer section.
const MAX_TRAILERS: usize = 16 * 1024;

impl Decoder {
    pub(crate) fn new(length: Length) -> Self {
        Self(match length {
            Length::None | Length::Known(0) => State::Done,
            Length::Known(length) => State::Counted(length),
            Length::Chunked => State::ChunkSize,
            Length::UntilClose => State::UntilClose,
        })
    }

    /// The next piece; `ended` says that nothing will come after what is in the buffer.
    pub(crate) fn next(&mut self, buf: &mut BytesMut, ended: bool) -> Result<Piece, Malformed> {
        loop {
            let more = if ended { Err(Malformed("the body ended early")) } else { Ok(Piece::More) };
            match &mut self.0 {
                State::Done => return Ok(Piece::End(Fields::default())),
                State::UntilClose if buf.is_empty() => {
                    return if ended { self.end() } else { Ok(Piece::More) };
                }
                State::UntilClose => return Ok(Piece::Data(buf.split().freeze())),
                State::Counted(_) | State::Chunk(_) if buf.is_empty() => return more,
                State::Counted(left) => {
                    let data = take(buf, left);
                    if *left == 0 {
                        self.0 = State::Done;
                    }
                    return Ok(Piece::Data(data));
                }
                State::Chunk(left) => {
                    let data = take(buf, left);
                    if *left == 0 {
                        self.0 = State::ChunkEnd;
                    }
                    return Ok(Piece::Data(data));
                }
                State::ChunkEnd => match (buf.first(), buf.get(1)) {
                    (Some(b'\r'), Some(b'\n')) => {
                        buf.advance(2);
                        self.0 = State::ChunkSize;
                    }
                    (None, _) | (Some(b'\r'), None) => return more,
                    _ => return Err(Malformed("a chunk does not end where it says")),
                },
                State::ChunkSize => {
                    let Some((size, line)) = chunk_size(buf)? else { return more };
                    buf.advance(line);
                    self.0 =
                        if size == 0 { State::Trailers(HeadScan::default()) } else { State::Chunk(size) };
                }
                State::Trailers(scan) => {
                    let Some(end) = scan.advance(buf, MAX_TRAILERS)? else { return more };
                    let raw = buf.split_to(end).freeze();
                    self.0 = State::Done;
                    return trailers(&raw).map(Piece::End);
                }
            }
        }
    }

    fn end(&mut self) -> Result<Piece, Malformed> {
        self.0 = State::Done;
        Ok(Piece::End(Fields::default()))
    }
}

fn take(buf: &mut BytesMut, left: &mut u64) -> Bytes {
    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(buf.len());
    *left -= count as u64;
    buf.split_to(count).freeze()
}

/// The size of a chunk and the length of its line. Stricter than the grammar: no white space before or after the
/// size, and extensions of visible bytes only.
fn chunk_size(buf: &[u8]) -> Result<Option<(u64, usize)>, Malformed> {
    const INVALID: Malformed = Malformed("invalid chunk size");
    let mut size: u64 = 0;
    let mut digits = 0;
    let mut extension = false;
    for (index, byte) in buf.iter().enumerate() {
        match *byte {
            b'\r' if digits > 0 => {
                return match buf.get(index + 1) {
                    None => Ok(None),
                    Some(b'\n') => Ok(Some((size, index + 2))),
                    Some(_) => Err(INVALID),
                };
            }
            _ if index >= MAX_CHUNK_LINE => return Err(Malformed("the chunk extensions are too long")),
            b';' if digits > 0 => extension = true,
            b' '..=b'~' | b'\t' if extension => {}
            digit => {
                let value = (digit as char).to_digit(16).ok_or(INVALID)?;
                digits += 1;
                // 15 digits cannot overflow, and no honest chunk is longer.
                if digits > 15 {
                    return Err(INVALID);
                }
                size = size << 4 | u64::from(value);
            }
        }
    }
    Ok(None)
}

fn trailers(raw: &Bytes) -> Result<Fields, Malformed> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_FIELDS];
    match httparse::parse_headers(raw, &mut headers) {
        Ok(httparse::Status::Complete((_, parsed))) => {
            let mut fields = Fields::new(raw, parsed);
            // A trailer may describe the body, never frame, address or attribute the message (RFC 9110 6.5.1).
            for known in [
                Known::ContentLength,
                Known::TransferEncoding,
                Known::Host,
                Known::Connection,
                Known::HopByHop,
                Known::Te,
                Known::Trailer,
                Known::Upgrade,
                Known::Expect,
                Known::Http2Settings,
                Known::Ours,
            ] {
                fields.drop_known(known);
            }
            Ok(fields)
        }
        _ => Err(Malformed("invalid trailers")),
    }
}

/// Writes what stands before a chunk's data.
pub(crate) fn put_chunk_head(out: &mut BytesMut, length: usize) {
    let mut digits = [0u8; 16];
    let mut start = digits.len();
    let mut rest = length;
    for (index, digit) in digits.iter_mut().enumerate().rev() {
        let nibble = (rest & 15) as u8;
        *digit = if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
        rest >>= 4;
        start = index;
        if rest == 0 {
            break;
        }
    }
    out.put_slice(digits.get(start..).unwrap_or_default());
    out.put_slice(b"\r\n");
}

/// Writes the last chunk with its trailers.
pub(crate) fn put_last_chunk(out: &mut BytesMut, trailers: &Fields) {
    out.put_slice(b"0\r\n");
    trailers.encode(&weft_core::route::HeaderChanges::default(), out);
    out.put_slice(b"\r\n");
}
