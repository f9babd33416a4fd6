//! Finds the end of a head byte by byte, and refuses what two parsers could read in two ways.

use super::super::message::Malformed;

/// Looks at each byte of a head (or of a trailer section) once, across reads.
#[derive(Debug, Default)]
pub(crate) struct HeadScan {
    position: usize,
    after_cr: bool,
    line: usize,
    lines: usize,
}

impl HeadScan {
    /// The length of the head with its empty line, once it is complete.
    ///
    /// Refused: a CR or LF that stands alone, control bytes, and a line that starts with white space (obs-fold of
    /// RFC 9112 section 5.2, or white space before the first line).
    pub(crate) fn advance(&mut self, buf: &[u8], max: usize) -> Result<Option<usize>, Malformed> {
        const TOO_LARGE: Malformed = Malformed("the head is too large");
        for byte in buf.get(self.position..).unwrap_or_default() {
            self.position += 1;
            match *byte {
                b'\n' if !self.after_cr => return Err(Malformed("bare LF in the head")),
                b'\n' => {
                    self.after_cr = false;
                    if self.line == 0 {
                        let end = self.position;
                        *self = Self::default();
                        return if end > max { Err(TOO_LARGE) } else { Ok(Some(end)) };
                    }
                    self.line = 0;
                    self.lines += 1;
                }
                _ if self.after_cr => return Err(Malformed("bare CR in the head")),
                b'\r' => self.after_cr = true,
                b' ' | b'\t' if self.line == 0 => {
                    return Err(Malformed("a line of the head starts with white space"));
                }
                b'\t' if self.lines > 0 => self.line += 1,
                0..=31 | 127 => return Err(Malformed("control byte in the head")),
                _ => self.line += 1,
            }
        }
        if self.position > max { Err(TOO_LARGE) } else { Ok(None) }
    }
}
