//! Frames on the wire, and what can be seen of an end that took some.

use std::collections::{BTreeMap, BTreeSet};

use crate::hbone::frame::{self, Head, flag, kind};

/// A whole frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

impl Frame {
    pub(super) fn new(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Self {
        Self { kind, flags, stream, payload: payload.to_vec() }
    }

    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        frame::head(&mut out, self.payload.len(), self.kind, self.flags, self.stream);
        out.extend_from_slice(&self.payload);
        out
    }

    /// A number of four bytes in the payload.
    pub(super) fn number(&self, at: usize) -> u32 {
        self.payload.get(at..at + 4).map_or(0, |n| u32::from_be_bytes(n.try_into().unwrap()))
    }

    /// The pairs of a SETTINGS.
    pub(super) fn settings(&self) -> impl Iterator<Item = (u16, u32)> + '_ {
        self.payload.chunks_exact(6).map(|pair| {
            (u16::from_be_bytes([pair[0], pair[1]]), u32::from_be_bytes([pair[2], pair[3], pair[4], pair[5]]))
        })
    }
}

/// Takes whole frames apart.
pub(super) fn frames(mut bytes: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk() {
        let Head { length, kind, flags, stream } = Head::parse(*head);
        frames.push(Frame::new(kind, flags, stream, &rest[..length]));
        bytes = &rest[length..];
    }
    frames
}

/// A request as the application sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) authority: Option<String>,
    pub(super) headers: Vec<(String, Vec<u8>)>,
}

/// What an end made of one frame, or of one wish of its application.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// The connection is over; the code of the error.
    pub(super) over: Option<u32>,
    /// Streams that it reset, and the codes.
    pub(super) resets: BTreeSet<(u32, u32)>,
    /// Answers to PINGs.
    pub(super) pongs: Vec<Vec<u8>>,
    /// Answers to SETTINGS.
    pub(super) acks: u32,
    /// Requests that it took.
    pub(super) asked: BTreeMap<u32, Seen>,
    /// Statuses that came.
    pub(super) answers: BTreeMap<u32, u16>,
    /// Data that was delivered.
    pub(super) data: BTreeMap<u32, Vec<u8>>,
    /// Streams whose end was delivered.
    pub(super) ended: BTreeSet<u32>,
    /// Streams whose application was told that they failed, not because it reset them.
    pub(super) lost: BTreeSet<u32>,
    /// Bytes of DATA that it sent.
    pub(super) sent: BTreeMap<u32, i64>,
    /// Streams that it ended.
    pub(super) finished: BTreeSet<u32>,
    /// Credit that it gave.
    pub(super) credit: Vec<(u32, u32)>,
}

impl Verdict {
    /// Takes in what the end wrote.
    pub(super) fn wrote(&mut self, frame: &Frame) {
        match frame.kind {
            kind::RST_STREAM => {
                self.resets.insert((frame.stream, frame.number(0)));
            }
            kind::PING if frame.has(flag::ACK) => self.pongs.push(frame.payload.clone()),
            kind::SETTINGS if frame.has(flag::ACK) => self.acks += 1,
            kind::DATA if !frame.payload.is_empty() => {
                *self.sent.entry(frame.stream).or_default() += frame.payload.len() as i64;
            }
            kind::GOAWAY => self.over = Some(frame.number(4)),
            kind::WINDOW_UPDATE => self.credit.push((frame.stream, frame.number(0))),
            _ => {}
        }
        if matches!(frame.kind, kind::DATA | kind::HEADERS) && frame.has(flag::END_STREAM) {
            self.finished.insert(frame.stream);
        }
    }

    /// Whether the application had nothing of it but perhaps a loss.
    pub(super) fn nothing_came(&self) -> bool {
        self.asked.is_empty() && self.answers.is_empty() && self.data.is_empty() && self.ended.is_empty()
    }

    /// Whether two ends did the same as far as anybody can see. When credit is given is each end's own affair (RFC
    /// 9113 section 5.2.1), and where a connection is over its streams are too.
    pub(super) fn same(&self, other: &Self) -> bool {
        if self.over.is_some() {
            return self.over == other.over;
        }
        other.over.is_none()
            && self.resets == other.resets
            && self.pongs == other.pongs
            && self.acks == other.acks
            && self.asked == other.asked
            && self.answers == other.answers
            && self.data == other.data
            && self.ended == other.ended
            && self.lost == other.lost
            && self.sent == other.sent
            && self.finished == other.finished
    }
}

/// One wish of the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// To reset a stream.
    Reset(u32),
    /// To send bytes.
    Send(u32, usize),
    /// To end its half.
    Finish(u32),
}

/// One end of a connection with an application that takes every request and reads all that comes, ends its half of a
/// stream once the peer ended the other unless it keeps it, and lets go of streams that are over.
pub(super) trait End {
    /// The peer sent this.
    fn take(&mut self, bytes: &[u8]) -> Verdict;
    /// The application wants this.
    fn wish(&mut self, wish: Wish) -> Verdict;
}
