//! What both ends of a conversation know of its streams and windows, by RFC 9113 sections 5 and 6.9.

use std::collections::BTreeMap;

use super::{
    steps::Target,
    wire::{Frame, Verdict},
};
use crate::hbone::{
    Role, Settings,
    frame::{MAX, flag, kind, setting},
};

/// A stream that was used.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Stream {
    /// The peer ended its half.
    pub(super) ended: bool,
    /// We ended ours.
    pub(super) finished: bool,
    /// The peer reset it.
    pub(super) lost: bool,
    /// We reset it.
    pub(super) reset: bool,
    /// Its request was answered.
    pub(super) answered: bool,
}

impl Stream {
    /// Whether it is in the state "closed" (section 5.1).
    pub(super) fn closed(&self) -> bool {
        self.lost || self.reset || (self.ended && self.finished)
    }
}

/// Credit of one end, by stream; stream 0 is the connection.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    first: i64,
    streams: BTreeMap<u32, i64>,
}

impl Ledger {
    pub(super) fn left(&self, id: u32) -> i64 {
        self.streams.get(&id).copied().unwrap_or(self.first)
    }

    fn add(&mut self, id: u32, bytes: i64) {
        let left = self.left(id);
        self.streams.insert(id, left + bytes);
    }
}

#[derive(Debug)]
pub(super) struct History {
    pub(super) role: Role,
    pub(super) streams: BTreeMap<u32, Stream>,
    /// A header block is not complete: its stream, and whether it ends it.
    pub(super) block: Option<(u32, bool)>,
    /// What our end lets the peer send, and what the oracle does.
    pub(super) granted: [Ledger; 2],
    /// What the peer lets both ends send.
    pub(super) credit: [Ledger; 2],
    window: u32,
}

impl History {
    pub(super) fn new(role: Role, settings: Settings, requests: u32) -> Self {
        let granted =
            |_| Ledger { first: settings.window.into(), streams: BTreeMap::from([(0, 16 * 1024 * 1024)]) };
        let credit = |_| Ledger { first: 65_535, ..Ledger::default() };
        let streams = (0..requests).map(|n| (1 + 2 * n, Stream::default())).collect();
        Self {
            role,
            streams,
            block: None,
            granted: [0, 1].map(granted),
            credit: [0, 1].map(credit),
            window: 65_535,
        }
    }

    pub(super) fn highest(&self) -> u32 {
        self.streams.last_key_value().map_or(0, |(id, _)| *id)
    }

    pub(super) fn next(&self) -> u32 {
        if self.streams.is_empty() { 1 } else { self.highest() + 2 }
    }

    pub(super) fn resolve(&self, target: Target) -> u32 {
        match target {
            Target::Connection => 0,
            Target::Used(n) => {
                let count = self.streams.len().max(1);
                self.streams.keys().rev().nth(n % count).copied().unwrap_or(self.next())
            }
            Target::Next(n) => self.next() + 2 * n,
            Target::Even(n) => 2 + 2 * n,
            Target::Skipped => {
                let skipped = (1..self.highest()).step_by(2).find(|id| !self.streams.contains_key(id));
                skipped.unwrap_or(self.next())
            }
        }
    }

    /// The stream of a frame, where it was used.
    pub(super) fn stream(&self, id: u32) -> Option<Stream> {
        self.streams.get(&id).copied()
    }

    /// Whether a stream is "idle" (section 5.1.1).
    pub(super) fn idle(&self, id: u32) -> bool {
        id.is_multiple_of(2) || id > self.highest()
    }

    /// Takes in a frame and what both ends made of it.
    pub(super) fn took(&mut self, frame: &Frame, ours: &Verdict, theirs: &Verdict) {
        let end = frame.has(flag::END_STREAM);
        let id = frame.stream;
        match frame.kind {
            kind::HEADERS | kind::CONTINUATION => {
                let (id, end) = if frame.kind == kind::HEADERS {
                    (id, end)
                } else {
                    self.block.take().unwrap_or((id, end))
                };
                if frame.has(flag::END_HEADERS) {
                    if self.role == Role::Server || self.streams.contains_key(&id) {
                        self.streams.entry(id).or_default().ended |= end;
                    }
                } else {
                    self.block = Some((id, end));
                }
            }
            kind::DATA => {
                for ledger in &mut self.granted {
                    ledger.add(0, -(frame.payload.len() as i64));
                    ledger.add(id, -(frame.payload.len() as i64));
                }
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.ended |= end;
                }
            }
            kind::RST_STREAM => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.lost = true;
                }
            }
            kind::WINDOW_UPDATE => {
                let ids = if id == 0 || self.streams.contains_key(&id) { Some(id) } else { None };
                for (ledger, id) in self.credit.iter_mut().flat_map(|ledger| ids.map(|id| (ledger, id))) {
                    ledger.add(id, (frame.number(0) & MAX).into());
                }
            }
            kind::SETTINGS if !frame.has(flag::ACK) => {
                for (_, value) in frame.settings().filter(|(id, _)| *id == setting::INITIAL_WINDOW_SIZE) {
                    let change = i64::from(value) - i64::from(self.window);
                    self.window = value;
                    for ledger in &mut self.credit {
                        let connection = ledger.left(0);
                        ledger.streams.values_mut().for_each(|left| *left += change);
                        ledger.streams.insert(0, connection);
                        ledger.first += change;
                    }
                }
            }
            _ => {}
        }
        self.said(ours, theirs);
    }

    /// Takes in what both ends said.
    pub(super) fn said(&mut self, ours: &Verdict, theirs: &Verdict) {
        for (id, stream) in &mut self.streams {
            stream.finished |= ours.finished.contains(id);
            stream.lost |= ours.lost.contains(id);
            stream.reset |= ours.resets.iter().any(|(reset, _)| reset == id);
            stream.answered |= ours.answers.contains_key(id);
        }
        for (side, verdict) in [ours, theirs].into_iter().enumerate() {
            for (id, bytes) in &verdict.sent {
                self.credit[side].add(0, -bytes);
                self.credit[side].add(*id, -bytes);
            }
            for (id, bytes) in &verdict.credit {
                self.granted[side].add(*id, (*bytes).into());
            }
        }
    }
}
