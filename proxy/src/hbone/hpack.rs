//! Header compression (RFC 7541): a whole decoder, because a peer may use everything, and an encoder that uses the
//! static table and literals only, because a CONNECT has nothing worth remembering.

use std::{borrow::Cow, collections::VecDeque, sync::LazyLock};

/// Size of the dynamic table that peers may use, in the RFC's bytes: its default, which we never change.
pub(super) const TABLE: usize = 4096;
/// What an entry counts beside its text (section 4.1).
const OVERHEAD: usize = 32;
/// Largest header list that is read, counted as the RFC's section 6.5.2 does.
pub(super) const MAX_LIST: usize = 16 * 1024;

/// What is wrong with a header block. It ends the connection: the two tables would no longer agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum HpackError {
    /// It ends in the middle of a field.
    #[error("a header block ends in the middle of a field")]
    Truncated,
    /// An integer that does not fit.
    #[error("an integer of a header block is too large")]
    Integer,
    /// An index without an entry.
    #[error("a header block names an entry that there is not")]
    Index,
    /// Not the Huffman code of section 5.2.
    #[error("a string of a header block is not in the Huffman code")]
    Huffman,
    /// A table size that was not granted, or in the wrong place.
    #[error("a header block changes the table's size to what it may not")]
    Size,
    /// The list is larger than what was granted.
    #[error("a header list is too large")]
    TooLarge,
}

type Field = (Cow<'static, [u8]>, Cow<'static, [u8]>);

/// The decoder's state of one connection.
#[derive(Debug)]
pub(super) struct Decoder {
    entries: VecDeque<(Vec<u8>, Vec<u8>)>,
    used: usize,
    size: usize,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { entries: VecDeque::new(), used: 0, size: TABLE }
    }

    /// Reads a whole block and gives each field to `take`.
    pub(super) fn decode(
        &mut self,
        mut block: &[u8],
        mut take: impl FnMut(&[u8], &[u8]),
    ) -> Result<(), HpackError> {
        let (mut list, mut fields) = (0, 0_usize);
        while let Some(first) = block.first().copied() {
            let field = match first {
                // Indexed (section 6.1).
                0x80.. => {
                    let index = integer(&mut block, 7)?;
                    self.entry(index)?
                }
                // With incremental indexing (6.2.1).
                0x40.. => {
                    let (name, value) = self.literal(&mut block, 6)?;
                    self.insert(&name, &value);
                    (name, value)
                }
                // A new size of the table (6.3), only before the first field.
                0x20.. => {
                    let size = integer(&mut block, 5)?;
                    if size > TABLE || fields > 0 {
                        return Err(HpackError::Size);
                    }
                    self.size = size;
                    self.evict(0);
                    continue;
                }
                // Not indexed, or never (6.2.2, 6.2.3).
                _ => self.literal(&mut block, 4)?,
            };
            fields += 1;
            list += field.0.len() + field.1.len() + OVERHEAD;
            if list > MAX_LIST {
                return Err(HpackError::TooLarge);
            }
            take(&field.0, &field.1);
        }
        Ok(())
    }

    fn literal(&self, block: &mut &[u8], prefix: u8) -> Result<Field, HpackError> {
        let index = integer(block, prefix)?;
        let name = if index == 0 { string(block)?.into() } else { self.entry(index)?.0 };
        Ok((name, string(block)?.into()))
    }

    fn entry(&self, index: usize) -> Result<Field, HpackError> {
        let index = index.checked_sub(1).ok_or(HpackError::Index)?;
        if let Some((name, value)) = STATIC.get(index) {
            return Ok((name.as_bytes().into(), value.as_bytes().into()));
        }
        let (name, value) = self.entries.get(index - STATIC.len()).ok_or(HpackError::Index)?;
        Ok((name.clone().into(), value.clone().into()))
    }

    fn insert(&mut self, name: &[u8], value: &[u8]) {
        let size = name.len() + value.len() + OVERHEAD;
        self.evict(size);
        // One that is larger than the table empties it and is not kept (section 4.4).
        if size <= self.size {
            self.used += size;
            self.entries.push_front((name.to_vec(), value.to_vec()));
        }
    }

    fn evict(&mut self, room: usize) {
        while self.used + room > self.size
            && let Some((name, value)) = self.entries.pop_back()
        {
            self.used -= name.len() + value.len() + OVERHEAD;
        }
    }
}

/// An integer with a prefix of some bits (section 5.1).
fn integer(block: &mut &[u8], prefix: u8) -> Result<usize, HpackError> {
    let most = (1_usize << prefix) - 1;
    let (first, mut rest) = block.split_first().ok_or(HpackError::Truncated)?;
    let mut value = usize::from(*first) & most;
    if value == most {
        let mut shift = 0;
        loop {
            let (byte, tail) = rest.split_first().ok_or(HpackError::Truncated)?;
            rest = tail;
            // Four more bytes reach any size that a list may have.
            if shift > 21 {
                return Err(HpackError::Integer);
            }
            value += usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *block = rest;
    Ok(value)
}

/// A string, plain or in the Huffman code (section 5.2).
fn string(block: &mut &[u8]) -> Result<Vec<u8>, HpackError> {
    let coded = block.first().ok_or(HpackError::Truncated)? & 0x80 != 0;
    let length = integer(block, 7)?;
    if length > MAX_LIST {
        return Err(HpackError::TooLarge);
    }
    let (text, rest) = block.split_at_checked(length).ok_or(HpackError::Truncated)?;
    *block = rest;
    if coded { decoded(text) } else { Ok(text.to_vec()) }
}

/// Reads the Huffman code, whose codes of one length ascend with the symbols (appendix B).
fn decoded(text: &[u8]) -> Result<Vec<u8>, HpackError> {
    let code = &*CODE;
    let mut out = Vec::with_capacity(text.len() * 8 / 5);
    let (mut bits, mut length) = (0_u32, 0_usize);
    for byte in text {
        for shift in (0..8).rev() {
            bits = bits << 1 | u32::from(byte >> shift & 1);
            length += 1;
            let rank = &code[length];
            if let Some(offset) = bits.checked_sub(rank.first)
                && (offset as usize) < rank.symbols.len()
            {
                out.push(rank.symbols[offset as usize]);
                if out.len() > MAX_LIST {
                    return Err(HpackError::TooLarge);
                }
                (bits, length) = (0, 0);
            } else if length == LONGEST {
                // The only code of that kind is the end of the string, which may not be sent.
                return Err(HpackError::Huffman);
            }
        }
    }
    // What is left is padding: fewer than 8 bits, all set.
    if length > 7 || bits != (1 << length) - 1 {
        return Err(HpackError::Huffman);
    }
    Ok(out)
}

/// The longest code.
const LONGEST: usize = 30;

/// The symbols whose codes have one length.
#[derive(Debug, Default)]
struct Rank {
    first: u32,
    symbols: Vec<u8>,
}

static CODE: LazyLock<Vec<Rank>> = LazyLock::new(|| {
    let mut ranks: Vec<Rank> = Vec::new();
    let mut next = 0_u32;
    for length in 0..=LONGEST {
        next <<= 1;
        let of_length = |(symbol, l): (usize, &u8)| (usize::from(*l) == length).then_some(symbol as u8);
        let symbols: Vec<u8> = LENGTHS.iter().enumerate().filter_map(of_length).collect();
        let first = next;
        next += symbols.len() as u32;
        ranks.push(Rank { first, symbols });
    }
    ranks
});

/// Appends that the table is empty from here on.
pub(super) fn forget(out: &mut Vec<u8>) {
    out.push(0x20);
}

/// Appends a field of the static table.
pub(super) fn indexed(out: &mut Vec<u8>, index: u8) {
    out.push(0x80 | index);
}

/// Appends a field whose name is in the static table, to be remembered by nobody.
pub(super) fn named(out: &mut Vec<u8>, index: u8, value: &[u8]) {
    write_integer(out, 0, 4, usize::from(index));
    write_string(out, value);
}

/// Appends a field, to be remembered by nobody.
pub(super) fn literal(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.push(0);
    write_string(out, name);
    write_string(out, value);
}

fn write_string(out: &mut Vec<u8>, text: &[u8]) {
    write_integer(out, 0, 7, text.len());
    out.extend_from_slice(text);
}

fn write_integer(out: &mut Vec<u8>, bits: u8, prefix: u8, value: usize) {
    let most = (1_usize << prefix) - 1;
    if value < most {
        return out.push(bits | value as u8);
    }
    out.push(bits | most as u8);
    let mut rest = value - most;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// Indices of the static table that are used to write.
pub(super) mod index {
    pub(crate) const AUTHORITY: u8 = 1;
    pub(crate) const METHOD: u8 = 2;
    pub(crate) const STATUS: u8 = 8;
}

/// Appendix A.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// Lengths of the codes of the 256 symbols (appendix B).
#[rustfmt::skip]
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
];

#[cfg(test)]
mod tests;
