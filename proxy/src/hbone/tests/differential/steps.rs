//! What the peer sends and the application wants, as drawn by chance.

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{
    history::History,
    wire::{Frame, Wish},
};
use crate::hbone::{
    frame::{flag, kind},
    hpack,
};

/// Which stream.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    /// None: the connection.
    Connection,
    /// One that was used, counted from the last.
    Used(usize),
    /// So many after the next.
    Next(u32),
    /// One with an even number.
    Even(u32),
    /// One before the last that was never used, where there is one.
    Skipped,
}

/// How a field is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// For nobody to remember.
    Plain,
    /// To be remembered.
    Remembered,
    /// Never to be remembered.
    Never,
}

/// A part of a header block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Field(&'static str, &'static str, How),
    /// An entry of a table.
    Entry(u8),
    Raw(&'static [u8]),
    /// A field whose value is so long.
    Long(usize),
}

/// One frame, or several that belong together.
#[derive(Debug, Clone)]
pub(super) enum Sent {
    Settings {
        ack: bool,
        pairs: Vec<(u16, u32)>,
        excess: usize,
    },
    Ping {
        ack: bool,
        length: usize,
    },
    Window {
        increment: u32,
        length: usize,
    },
    Headers {
        block: Vec<Part>,
        end: bool,
        pad: Option<u8>,
        priority: bool,
        cuts: Vec<usize>,
        within: Option<u8>,
    },
    Continuation {
        flags: u8,
    },
    Data {
        length: usize,
        end: bool,
        pad: Option<u8>,
    },
    Reset {
        code: u32,
        length: usize,
    },
    Goaway {
        last: u32,
        code: u32,
        length: usize,
    },
    Push,
    Priority {
        on: u32,
        length: usize,
    },
    Other {
        kind: u8,
        flags: u8,
        length: usize,
    },
}

/// One step of a conversation.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Sent(Target, Sent),
    Reset(usize),
    Send(usize, usize),
    Finish(usize),
}

impl Step {
    /// The frames of it, as things stand.
    pub(super) fn frames(&self, history: &History) -> Vec<Frame> {
        let Self::Sent(target, sent) = self else { return Vec::new() };
        sent.frames(history.resolve(*target))
    }

    /// The header block of it.
    pub(super) fn block(&self) -> &[Part] {
        match self {
            Self::Sent(_, Sent::Headers { block, .. }) => block,
            _ => &[],
        }
    }

    /// The wish that it is.
    pub(super) fn wish(&self, history: &History) -> Option<Wish> {
        let id = |n: &usize| history.resolve(Target::Used(*n));
        Some(match self {
            Self::Sent(..) => return None,
            Self::Reset(n) => Wish::Reset(id(n)),
            Self::Send(n, bytes) => Wish::Send(id(n), *bytes),
            Self::Finish(n) => Wish::Finish(id(n)),
        })
    }
}

impl Sent {
    fn frames(&self, id: u32) -> Vec<Frame> {
        let one = |kind: u8, flags: u8, payload: &[u8]| vec![Frame::new(kind, flags, id, payload)];
        let cut = |bytes: &[u8], length: usize| {
            let mut bytes = bytes.to_vec();
            bytes.resize(length, 0);
            bytes
        };
        match self {
            Self::Settings { ack, pairs, excess } => {
                let mut payload = Vec::new();
                for (id, value) in pairs {
                    payload.extend_from_slice(&id.to_be_bytes());
                    payload.extend_from_slice(&value.to_be_bytes());
                }
                payload.resize(payload.len() + excess, 0);
                one(kind::SETTINGS, u8::from(*ack), &payload)
            }
            Self::Ping { ack, length } => one(kind::PING, u8::from(*ack), &cut(b"a ping..", *length)),
            Self::Window { increment, length } => {
                one(kind::WINDOW_UPDATE, 0, &cut(&increment.to_be_bytes(), *length))
            }
            Self::Headers { block, end, pad, priority, cuts, within } => {
                headers(id, &written(block), *end, *pad, *priority, cuts, *within)
            }
            Self::Continuation { flags } => one(kind::CONTINUATION, *flags, &[0x82]),
            Self::Data { length, end, pad } => {
                let mut payload: Vec<u8> = pad.iter().copied().collect();
                payload.resize(payload.len() + length, 3);
                // As much as there is of it: padding may be longer than what carries it.
                payload.resize(payload.len() + pad.map_or(0, |pad| usize::from(pad) % 20), 0);
                let flags = flags(&[(*end, flag::END_STREAM), (pad.is_some(), flag::PADDED)]);
                one(kind::DATA, flags, &payload)
            }
            Self::Reset { code, length } => one(kind::RST_STREAM, 0, &cut(&code.to_be_bytes(), *length)),
            Self::Goaway { last, code, length } => {
                let payload = [last.to_be_bytes(), code.to_be_bytes()].concat();
                one(kind::GOAWAY, 0, &cut(&payload, *length))
            }
            Self::Push => {
                let mut payload = vec![0, 0, 0, 2];
                payload.extend_from_slice(&written(&REQUEST));
                one(kind::PUSH_PROMISE, flag::END_HEADERS, &payload)
            }
            Self::Priority { on, length } => one(kind::PRIORITY, 0, &cut(&on.to_be_bytes(), *length)),
            Self::Other { kind, flags, length } => one(*kind, *flags, &vec![0; *length]),
        }
    }
}

fn flags(which: &[(bool, u8)]) -> u8 {
    which.iter().map(|(set, flag)| if *set { *flag } else { 0 }).sum()
}

fn headers(
    id: u32,
    block: &[u8],
    end: bool,
    pad: Option<u8>,
    priority: bool,
    cuts: &[usize],
    within: Option<u8>,
) -> Vec<Frame> {
    let mut parts = Vec::new();
    let mut rest = block;
    for cut in cuts {
        let (part, tail) = rest.split_at((*cut).min(rest.len()));
        parts.push(part);
        rest = tail;
    }
    parts.push(rest);
    let mut payload: Vec<u8> = pad.iter().copied().collect();
    if priority {
        payload.extend_from_slice(&[0, 0, 0, 99, 7]);
    }
    payload.extend_from_slice(parts[0]);
    payload.resize(payload.len() + pad.map_or(0, |pad| usize::from(pad) % 20), 0);
    let flags = flags(&[
        (end, flag::END_STREAM),
        (pad.is_some(), flag::PADDED),
        (priority, flag::PRIORITY),
        (parts.len() == 1, flag::END_HEADERS),
    ]);
    let mut frames = vec![Frame::new(kind::HEADERS, flags, id, &payload)];
    for (n, part) in parts.iter().enumerate().skip(1) {
        if let Some(kind) = within {
            frames.push(Frame::new(kind, 0, id, &[0; 8]));
        }
        let flags = if n + 1 == parts.len() { flag::END_HEADERS } else { 0 };
        frames.push(Frame::new(kind::CONTINUATION, flags, id, part));
    }
    frames
}

fn written(block: &[Part]) -> Vec<u8> {
    let mut out = Vec::new();
    for part in block {
        match part {
            Part::Field(name, value, how) => {
                let at = out.len();
                hpack::literal(&mut out, name.as_bytes(), value.as_bytes());
                out[at] = match how {
                    How::Plain => 0,
                    How::Remembered => 0x40,
                    How::Never => 0x10,
                };
            }
            Part::Entry(index) => hpack::indexed(&mut out, *index),
            Part::Raw(bytes) => out.extend_from_slice(bytes),
            Part::Long(length) => hpack::literal(&mut out, b"long", &vec![b'x'; *length]),
        }
    }
    out
}

const METHOD: Part = Part::Field(":method", "CONNECT", How::Plain);
const AUTHORITY: Part = Part::Field(":authority", "10.0.0.1:80", How::Plain);
/// A CONNECT as it should be.
pub(super) const REQUEST: [Part; 2] = [METHOD, AUTHORITY];
/// The answer as it should be.
pub(super) const ANSWER: [Part; 1] = [Part::Entry(8)];

/// Fields that say something of their own to a reader of messages. `content-length` is not among them: it says nothing
/// of a CONNECT (RFC 9110 sections 8.6 and 9.3.6), but the library holds any stream to it.
const FIELDS: [(&str, &str); 28] = [
    (":method", "CONNECT"),
    (":method", "GET"),
    (":method", ""),
    (":authority", "10.0.0.2:81"),
    (":authority", ""),
    (":authority", "a b"),
    (":scheme", "https"),
    (":path", "/"),
    (":status", "200"),
    (":status", "103"),
    (":status", "404"),
    (":status", "20"),
    (":protocol", "websocket"),
    (":other", "x"),
    ("x-one", "1"),
    ("x-one", ""),
    ("cookie", "a=b"),
    ("X-Capital", "1"),
    ("x-space", " lead"),
    ("x-space", "trail\t"),
    ("x-nul", "a\0b"),
    ("x-line", "a\r\nb"),
    ("x y", "1"),
    ("", "1"),
    ("connection", "close"),
    ("transfer-encoding", "chunked"),
    ("te", "trailers"),
    ("te", "gzip"),
];

/// Pieces of blocks that say something to a reader of header compression.
const RAW: [&[u8]; 13] = [
    // An entry of index 0, and one that there is not.
    &[0x80],
    &[0xff, 0x50],
    // Sizes of the table: none, all, too much; in two steps.
    &[0x20],
    &[0x3f, 0xe1, 0x1f],
    &[0x3f, 0xe2, 0x1f],
    &[0x20, 0x3f, 0xe1, 0x1f],
    // An integer that does not end, and one that is too large.
    &[0xff],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
    // A string that does not end.
    &[0x00, 0x05, b'a'],
    // `:authority` in the Huffman code (RFC 7541 appendix C.4.1), remembered.
    &[0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff],
    // The same with padding that is not all ones, with too much of it, and with the end of the string inside.
    &[0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xfe],
    &[0x41, 0x8d, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff, 0xff],
    &[0x41, 0x84, 0xff, 0xff, 0xff, 0xff],
];

fn part() -> impl Strategy<Value = Part> {
    let how = select(vec![How::Plain, How::Remembered, How::Never]);
    prop_oneof![
        12 => (select(FIELDS.to_vec()), how).prop_map(|((name, value), how)| Part::Field(name, value, how)),
        2 => select(vec![2_u8, 8, 9, 15, 62, 63, 64]).prop_map(Part::Entry),
        3 => select(RAW.to_vec()).prop_map(Part::Raw),
        1 => select(vec![200_usize, 5_000, 16_260]).prop_map(Part::Long),
    ]
}

fn block(good: &'static [Part]) -> impl Strategy<Value = Vec<Part>> {
    let with = |parts: Vec<Part>, first: bool| {
        let good = good.to_vec();
        if first { [parts, good].concat() } else { [good, parts].concat() }
    };
    prop_oneof![
        6 => Just(good.to_vec()),
        5 => (vec(part(), 1..3), prop::bool::weighted(0.2)).prop_map(move |(parts, first)| with(parts, first)),
        1 => vec(part(), 0..4),
        1 => part().prop_map(|part| vec![METHOD, part]),
    ]
}

fn pad() -> impl Strategy<Value = Option<u8>> {
    option::weighted(0.15, select(vec![0_u8, 1, 19, 200, 255]))
}

fn sent(good: &'static [Part]) -> impl Strategy<Value = Sent> {
    let number = select(vec![
        0_u32,
        1,
        2,
        100,
        16_383,
        16_384,
        20_000,
        0xff_ffff,
        0x100_0000,
        0x7fff_ffff,
        0x8000_0000,
    ]);
    let pairs = vec((0_u16..10, number.clone()), 0..3);
    let usual = |length: usize| prop_oneof![9 => Just(length), 1 => 0..length + 4];
    let within = option::weighted(0.05, select(vec![kind::PING, kind::DATA, kind::PRIORITY, 0xb0]));
    let cuts = prop_oneof![4 => Just(Vec::new()), 1 => vec(0_usize..9, 1..4)];
    let size = select(vec![0_usize, 1, 10, 900, 5_000, 9_000, 16_000, 16_384, 16_385]);
    prop_oneof![
        3 => (prop::bool::weighted(0.1), pairs, prop_oneof![9 => Just(0_usize), 1 => 1_usize..6])
            .prop_map(|(ack, pairs, excess)| Sent::Settings { ack, pairs, excess }),
        2 => (any::<bool>(), usual(8)).prop_map(|(ack, length)| Sent::Ping { ack, length }),
        6 => (number, usual(4)).prop_map(|(increment, length)| Sent::Window { increment, length }),
        12 => (block(good), prop::bool::weighted(0.2), pad(), prop::bool::weighted(0.1), cuts, within).prop_map(
            |(block, end, pad, priority, cuts, within)| Sent::Headers { block, end, pad, priority, cuts, within }
        ),
        1 => select(vec![0_u8, 4]).prop_map(|flags| Sent::Continuation { flags }),
        14 => (size.clone(), prop::bool::weighted(0.2), pad())
            .prop_map(|(length, end, pad)| Sent::Data { length, end, pad }),
        4 => (0_u32..15, usual(4)).prop_map(|(code, length)| Sent::Reset { code, length }),
        1 => (select(vec![0_u32, 1, 3, 0x7fff_ffff]), prop_oneof![3 => Just(0_u32), 1 => 1_u32..14], usual(8))
            .prop_map(|(last, code, length)| Sent::Goaway { last, code, length }),
        1 => Just(Sent::Push),
        2 => (select(vec![0_u32, 1, 3, 99]), usual(5)).prop_map(|(on, length)| Sent::Priority { on, length }),
        1 => (select(vec![0xa_u8, 0xb0, 0xff]), any::<u8>(), size)
            .prop_map(|(kind, flags, length)| Sent::Other { kind, flags, length }),
    ]
}

/// A stream that suits the frame more often than not.
fn target(sent: &Sent, server: bool) -> BoxedStrategy<Target> {
    let used = (0_usize..4).prop_map(Target::Used);
    let odd = prop_oneof![
        Just(Target::Connection),
        (0_u32..3).prop_map(Target::Next),
        (0_u32..3).prop_map(Target::Even),
        Just(Target::Skipped),
        (0_usize..9).prop_map(Target::Used),
    ];
    match sent {
        Sent::Settings { .. } | Sent::Ping { .. } | Sent::Goaway { .. } => {
            prop_oneof![19 => Just(Target::Connection), 1 => odd].boxed()
        }
        Sent::Window { .. } | Sent::Other { .. } => {
            prop_oneof![6 => used, 3 => Just(Target::Connection), 1 => odd].boxed()
        }
        Sent::Headers { .. } if server => prop_oneof![
            14 => Just(Target::Next(0)),
            1 => Just(Target::Next(1)),
            2 => used,
            1 => odd
        ]
        .boxed(),
        _ => prop_oneof![11 => used, 1 => odd].boxed(),
    }
}

/// One step of a peer of this kind.
pub(super) fn step(server: bool) -> impl Strategy<Value = Step> {
    let good: &'static [Part] = if server { &REQUEST } else { &ANSWER };
    let sent = sent(good).prop_flat_map(move |sent| (target(&sent, server), Just(sent)));
    prop_oneof![
        20 => sent.prop_map(|(target, sent)| Step::Sent(target, sent)),
        1 => (0_usize..3).prop_map(Step::Reset),
        2 => (0_usize..3, select(vec![1_usize, 10_000, 30_000])).prop_map(|(n, bytes)| Step::Send(n, bytes)),
        1 => (0_usize..3).prop_map(Step::Finish),
    ]
}
