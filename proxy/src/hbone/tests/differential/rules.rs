//! Where two conforming ends may differ. A rule says for which frame, in which state, and what our end must do; the
//! sections are of RFC 9113. Whatever no rule names must be the same.

use super::{
    history::{History, Stream},
    steps::{ANSWER, Part, REQUEST},
    wire::{Frame, Verdict},
};
use crate::hbone::{
    Role,
    frame::{Code, flag, kind, setting},
};

/// One frame and what both ends made of it.
pub(super) struct Case<'a> {
    pub(super) history: &'a History,
    pub(super) frame: &'a Frame,
    /// The header block that the frame is of.
    pub(super) block: &'a [Part],
    pub(super) ours: &'a Verdict,
    pub(super) theirs: &'a Verdict,
}

/// A difference that is permitted.
pub(super) struct Rule {
    pub(super) name: &'static str,
    pub(super) holds: fn(&Case<'_>) -> bool,
    /// Both ends are in the same state afterwards: the conversation goes on.
    pub(super) goes_on: bool,
}

impl Case<'_> {
    fn stream(&self) -> Stream {
        self.history.stream(self.frame.stream).unwrap_or_default()
    }

    /// Whether the frame is, or completes, a header block.
    fn headers(&self) -> bool {
        matches!(self.frame.kind, kind::HEADERS | kind::CONTINUATION) && self.frame.has(flag::END_HEADERS)
    }

    fn we_end(&self, code: Code) -> bool {
        self.ours.over == Some(code.0)
    }

    fn they_end(&self, code: Code) -> bool {
        self.theirs.over == Some(code.0)
    }

    /// Whether our end does nothing but reset the frame's stream.
    fn we_reset(&self, code: Code) -> bool {
        let resets = [(self.frame.stream, code.0)];
        self.ours.over.is_none_or(|code| code == 0)
            && self.ours.resets.iter().eq(&resets)
            && self.ours.nothing_came()
    }

    fn they_reset(&self) -> bool {
        self.theirs.resets.contains(&(self.frame.stream, Code::PROTOCOL_ERROR.0))
    }

    fn we_ignore(&self) -> bool {
        *self.ours == Verdict::default()
    }

    /// Whether the stream is closed, or was by the use of a later one (section 5.1.1).
    fn closed(&self) -> bool {
        match self.history.stream(self.frame.stream) {
            Some(stream) => stream.closed(),
            None => !self.history.idle(self.frame.stream),
        }
    }

    /// Whether the length cannot be right (section 4.2 and those of the frames).
    fn wrong_length(&self) -> bool {
        let Frame { kind, flags, payload, .. } = self.frame;
        let length = payload.len();
        match *kind {
            kind::SETTINGS if flags & flag::ACK != 0 => length > 0,
            kind::SETTINGS => !length.is_multiple_of(6),
            kind::PING => length != 8,
            kind::WINDOW_UPDATE | kind::RST_STREAM => length != 4,
            kind::PRIORITY => length != 5,
            kind::GOAWAY => length < 8,
            kind::DATA => flags & flag::PADDED != 0 && length == 0,
            kind::HEADERS => {
                length < usize::from(flags & flag::PADDED != 0) + 5 * usize::from(flags & flag::PRIORITY != 0)
            }
            _ => false,
        }
    }

    /// Whether the frame's data is more than what one end granted.
    fn beyond(&self, end: usize) -> bool {
        self.history.granted[end].left(self.frame.stream) < self.frame.payload.len() as i64
    }

    fn sets(&self, which: impl Fn(u16, u32) -> bool) -> bool {
        self.frame.kind == kind::SETTINGS && self.frame.settings().any(|(id, value)| which(id, value))
    }

    fn has(&self, which: impl Fn(&Part) -> bool) -> bool {
        self.headers() && self.block.iter().any(which)
    }
}

/// What may be in a table under such an index.
fn remembered(part: &Part) -> bool {
    matches!(part, Part::Entry(62..))
}

pub(super) const RULES: &[Rule] = &[
    Rule {
        // Section 4.2; the library knows one code for all that it cannot parse.
        name: "a wrong length is FRAME_SIZE_ERROR",
        holds: |c| c.wrong_length() && c.we_end(Code::FRAME_SIZE_ERROR) && c.they_end(Code::PROTOCOL_ERROR),
        goes_on: false,
    },
    Rule {
        // Section 4.3.
        name: "what is no header compression is COMPRESSION_ERROR",
        holds: |c| c.headers() && c.we_end(Code::COMPRESSION_ERROR) && c.they_end(Code::PROTOCOL_ERROR),
        goes_on: false,
    },
    Rule {
        // RFC 7541 section 4.2; the library takes each frame for a beginning.
        name: "the table's size changes at the beginning of a block only",
        holds: |c| {
            c.has(|part| matches!(part, Part::Raw([0x20 | 0x3f, ..])))
                && c.frame.kind == kind::CONTINUATION
                && c.we_end(Code::COMPRESSION_ERROR)
        },
        goes_on: false,
    },
    Rule {
        // Section 6.9.1; the library does not count what it will not use.
        name: "a window that overflows after our end of the stream",
        holds: |c| {
            let update = c.frame.kind == kind::WINDOW_UPDATE
                && c.stream().finished
                && c.we_reset(Code::FLOW_CONTROL_ERROR);
            let initial = c.sets(|id, _| id == setting::INITIAL_WINDOW_SIZE)
                && c.history.streams.values().any(|stream| stream.finished)
                && c.we_end(Code::FLOW_CONTROL_ERROR);
            (update || initial) && c.theirs.over.is_none()
        },
        goes_on: false,
    },
    Rule {
        // Section 6.5.2.
        name: "an initial window that is too large is FLOW_CONTROL_ERROR",
        holds: |c| {
            c.sets(|id, value| id == setting::INITIAL_WINDOW_SIZE && value > 0x7fff_ffff)
                && c.we_end(Code::FLOW_CONTROL_ERROR)
                && c.they_end(Code::PROTOCOL_ERROR)
        },
        goes_on: false,
    },
    Rule {
        // Section 5.1 permits either for streams that are closed, section 5.1.1 says the other.
        name: "headers of a closed stream end the connection, with STREAM_CLOSED",
        holds: |c| {
            c.headers()
                && c.closed()
                && c.we_end(Code::STREAM_CLOSED)
                && (c.they_end(Code::PROTOCOL_ERROR) || c.theirs.over.is_none())
        },
        goes_on: false,
    },
    Rule {
        // Sections 8.1.1, 8.1 and 6.9: stream errors; section 5.4.1 lets the library do more.
        name: "a stream error that the library takes for one of the connection",
        holds: |c| {
            let window = c.frame.kind == kind::WINDOW_UPDATE && c.frame.number(0) & 0x7fff_ffff == 0;
            let early = c.frame.kind == kind::DATA && !c.stream().ended;
            (c.headers() || window || early)
                && c.we_reset(Code::PROTOCOL_ERROR)
                && c.they_end(Code::PROTOCOL_ERROR)
        },
        goes_on: false,
    },
    Rule {
        // Section 5.1, "half-closed (remote)".
        name: "what comes after the end is STREAM_CLOSED, of the stream",
        holds: |c| {
            (c.headers() || c.frame.kind == kind::DATA)
                && c.stream().ended
                && c.we_reset(Code::STREAM_CLOSED)
                && (c.they_end(Code::PROTOCOL_ERROR) || c.they_reset())
        },
        goes_on: false,
    },
    Rule {
        // Section 5.1, "closed": minimal processing will do for every closed stream.
        name: "what comes for a closed stream is ignored, where the library resets it once more",
        holds: |c| c.closed() && c.we_ignore() && c.theirs.over.is_none() && c.theirs.nothing_came(),
        goes_on: true,
    },
    Rule {
        name: "what comes for a closed stream is ignored, where the library looks at its form",
        holds: |c| c.closed() && c.we_ignore() && c.they_end(Code::PROTOCOL_ERROR),
        goes_on: false,
    },
    Rule {
        // It tells of a faulty block with its last frame.
        name: "a header block is read when it is complete",
        holds: |c| {
            matches!(c.frame.kind, kind::HEADERS | kind::CONTINUATION)
                && !c.headers()
                && c.we_ignore()
                && *c.theirs != Verdict::default()
        },
        goes_on: false,
    },
    Rule {
        // Section 8.5: only DATA and frames about the stream follow on a CONNECT.
        name: "a CONNECT has no trailers",
        holds: |c| {
            let open = c.history.stream(c.frame.stream).is_some_and(|stream| !stream.ended);
            c.headers()
                && open
                && c.we_reset(Code::PROTOCOL_ERROR)
                && c.theirs.ended.contains(&c.frame.stream)
        },
        goes_on: false,
    },
    Rule {
        // Section 8.3; the library knows it of requests only.
        name: "a request's pseudo-header makes an answer malformed",
        holds: |c| {
            c.has(|part| {
                let pseudo =
                    |name: &str| [":method", ":authority", ":scheme", ":path", ":protocol"].contains(&name);
                matches!(part, Part::Field(name, ..) if pseudo(name))
                    || matches!(part, Part::Entry(1..=7) | Part::Raw([0x41, ..]))
                    || remembered(part)
            }) && c.we_reset(Code::PROTOCOL_ERROR)
                && c.theirs.over.is_none()
        },
        goes_on: false,
    },
    Rule {
        // Section 8.1; the library takes it, and misses the answer.
        name: "an interim answer that ends the stream is malformed",
        holds: |c| {
            c.has(|part| matches!(part, Part::Field(":status", "103", _)) || remembered(part))
                && c.we_reset(Code::PROTOCOL_ERROR)
                && c.theirs.lost.contains(&c.frame.stream)
        },
        goes_on: false,
    },
    Rule {
        // Section 8.2.1; the library does not look for it.
        name: "white space at the ends of a value makes a message malformed",
        holds: |c| {
            c.has(|part| matches!(part, Part::Field("x-space", ..)) || remembered(part))
                && c.we_reset(Code::PROTOCOL_ERROR)
                && c.theirs.resets.is_empty()
        },
        goes_on: false,
    },
    Rule {
        // Section 8.1.1. The library reads each frame by itself: what it found malformed before a field that is cut, or
        // a name that is empty, it has forgotten with the next.
        name: "what is malformed in a block of several frames",
        holds: |c| {
            c.headers()
                && c.frame.kind == kind::CONTINUATION
                && c.block != REQUEST
                && c.block != ANSWER
                && c.we_reset(Code::PROTOCOL_ERROR)
                && c.theirs.resets.is_empty()
                && c.theirs.over.is_none()
        },
        goes_on: false,
    },
    Rule {
        // Section 10.5.1. Close to the limit the library refuses some lists that are within it.
        name: "a header list that is too large ends the connection",
        holds: |c| {
            let close = c.has(|part| matches!(part, Part::Long(16_000..)));
            let large = c.has(|part| matches!(part, Part::Long(_)) || remembered(part));
            (large && c.we_end(Code::ENHANCE_YOUR_CALM))
                || (close && c.ours.over.is_none() && c.ours.resets.is_empty() && c.they_reset())
        },
        goes_on: false,
    },
    Rule {
        // Section 8.3.1 lets a server answer; the tunnel does, with 400.
        name: "a request that is no CONNECT needs no path",
        holds: |c| {
            let other = |seen: &super::wire::Seen| seen.method != "CONNECT";
            c.headers() && c.ours.asked.get(&c.frame.stream).is_some_and(other) && c.they_reset()
        },
        goes_on: false,
    },
    Rule {
        // Section 8.5 wants a host and port; the tunnel answers 400 where it is none.
        name: "an authority that is none is the tunnel's affair",
        holds: |c| {
            c.has(|part| matches!(part, Part::Field(":authority", "a b" | "", _)) || remembered(part))
                && c.ours.asked.contains_key(&c.frame.stream)
                && c.they_reset()
        },
        goes_on: false,
    },
    Rule {
        // Section 5.1.1: what is wrong with its number is wrong with the connection.
        name: "headers that are malformed, of a stream that may not be",
        holds: |c| {
            c.headers()
                && (c.history.idle(c.frame.stream) || c.closed())
                && c.we_end(Code::PROTOCOL_ERROR)
                && c.they_reset()
        },
        goes_on: false,
    },
    Rule {
        // Sections 5.1.2 and 8.1.1: it is two faults at once.
        name: "a request that is malformed and one too many is refused",
        holds: |c| {
            c.headers()
                && c.we_reset(Code::REFUSED_STREAM)
                && (c.they_reset() || c.they_end(Code::PROTOCOL_ERROR))
        },
        goes_on: false,
    },
    Rule {
        // Section 8.1: the answer is not thrown away for it. The library leaves that to whoever reads the code.
        name: "a reset of what is sent after a whole answer is no failure",
        holds: |c| {
            c.frame.kind == kind::RST_STREAM
                && c.history.role == Role::Client
                && c.frame.number(0) != Code::CANCEL.0
                && c.stream().ended
                && c.we_ignore()
                && c.theirs.lost.contains(&c.frame.stream)
        },
        goes_on: false,
    },
    Rule {
        // Section 5.3.2: the scheme is gone, and with it what a priority says.
        name: "a priority says nothing",
        holds: |c| c.frame.kind == kind::PRIORITY && c.we_ignore() && c.they_reset(),
        goes_on: false,
    },
    Rule {
        // Section 6.5.3 names no error.
        name: "an acknowledgement of nothing says nothing",
        holds: |c| {
            c.frame.kind == kind::SETTINGS
                && c.frame.has(flag::ACK)
                && c.we_ignore()
                && c.they_end(Code::PROTOCOL_ERROR)
        },
        goes_on: false,
    },
    Rule {
        // Section 6.5.2; RFC 8441 is not spoken.
        name: "a setting that is not known is ignored",
        holds: |c| {
            c.sets(|id, value| id == 8 && value > 1) && c.ours.acks == 1 && c.they_end(Code::PROTOCOL_ERROR)
        },
        goes_on: false,
    },
    Rule {
        // Section 6.5.2; the library takes it.
        name: "a server enables no push",
        holds: |c| {
            c.sets(|id, value| id == setting::ENABLE_PUSH && value == 1) && c.we_end(Code::PROTOCOL_ERROR)
        },
        goes_on: false,
    },
    Rule {
        // Section 6.9.2 leaves to each end when it grants more.
        name: "data within one window and beyond the other",
        holds: |c| {
            let reset =
                |verdict: &Verdict| verdict.resets.contains(&(c.frame.stream, Code::FLOW_CONTROL_ERROR.0));
            c.frame.kind == kind::DATA
                && c.beyond(0) != c.beyond(1)
                && reset(c.ours) == c.beyond(0)
                && (reset(c.theirs) == c.beyond(1))
        },
        goes_on: false,
    },
    Rule {
        // Section 6.8 and 5.4.1: who says so closes; what it had is lost.
        name: "a GOAWAY with an error ends the connection",
        holds: |c| {
            c.frame.kind == kind::GOAWAY && c.frame.number(4) != 0 && c.ours.over == Some(c.frame.number(4))
        },
        goes_on: false,
    },
    Rule {
        // The message ends both halves.
        name: "a malformed answer is told of, though with it the stream is over",
        holds: |c| {
            c.headers()
                && c.stream().finished
                && c.we_reset(Code::PROTOCOL_ERROR)
                && c.theirs.lost.contains(&c.frame.stream)
        },
        goes_on: false,
    },
];
