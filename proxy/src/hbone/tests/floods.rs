//! What a hostile client may send: the offender's connection ends, with the code that says why.

use std::time::Instant;

use super::{super::frame::*, *};
use crate::hbone::{core::Core, hpack};

mod neighbours;

struct Peer {
    core: Core,
    bytes: Vec<u8>,
}

impl Peer {
    /// A client that has greeted.
    fn new() -> Self {
        let mut bytes = PREFACE.to_vec();
        settings(&mut bytes, &[]);
        let mut peer = Self { core: Core::new(Role::Server, SETTINGS, Instant::now()), bytes };
        assert_eq!(peer.send(), Ok(()));
        peer
    }

    fn send(&mut self) -> Result<(), Code> {
        let sent = self.core.receive(std::mem::take(&mut self.bytes).into());
        sent.map_err(|error| match error {
            Error::Protocol { code, .. } => code,
            other => panic!("{other}"),
        })
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> &mut Self {
        head(&mut self.bytes, payload.len(), kind, flags, stream);
        self.bytes.extend_from_slice(payload);
        self
    }

    fn connect(&mut self, stream: u32) -> &mut Self {
        let mut block = Vec::new();
        hpack::named(&mut block, hpack::index::METHOD, b"CONNECT");
        hpack::named(&mut block, hpack::index::AUTHORITY, b"10.0.0.1:80");
        self.frame(kind::HEADERS, flag::END_HEADERS, stream, &block)
    }
}

#[test]
fn rapid_resets_end_the_connection() {
    let mut peer = Peer::new();
    for n in 0..5_000 {
        peer.connect(1 + 2 * n).frame(kind::RST_STREAM, 0, 1 + 2 * n, &Code::CANCEL.0.to_be_bytes());
    }
    assert_eq!(peer.send(), Err(Code::ENHANCE_YOUR_CALM));
}

#[test]
fn streams_that_we_are_made_to_reset_end_it_too() {
    let mut peer = Peer::new();
    for n in 0..5_000 {
        let id = 1 + 2 * n;
        peer.connect(id).frame(kind::WINDOW_UPDATE, 0, id, &[0; 4]);
    }
    assert_eq!(peer.send(), Err(Code::ENHANCE_YOUR_CALM));
}

#[test]
fn frames_that_carry_nothing_end_it() {
    let cases: [(u8, u8, u32, &[u8]); 7] = [
        (kind::DATA, 0, 9, b"x"),
        (kind::PING, 0, 0, &[0; 8]),
        (kind::SETTINGS, 0, 0, &[]),
        (kind::PRIORITY, 0, 1, &[0; 5]),
        (kind::DATA, 0, 1, &[]),
        (kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]),
        (0xfe, 0, 0, &[]),
    ];
    for (kind, flags, stream, payload) in cases {
        let mut peer = Peer::new();
        peer.connect(1).connect(11);
        for _ in 0..20_000 {
            peer.frame(kind, flags, stream, payload);
        }
        assert_eq!(peer.send(), Err(Code::ENHANCE_YOUR_CALM), "frame type {kind}");
    }
}

#[test]
fn answers_to_a_peer_that_does_not_read_stop_the_reading() {
    let mut peer = Peer::new();
    for n in 0..16 {
        peer.connect(1 + 2 * n);
    }
    for _ in 0..900 {
        peer.frame(kind::PING, 0, 0, &[0; 8]);
    }
    assert_eq!(peer.send(), Ok(()));
    assert!(!peer.core.choked() && peer.core.crowded());
    // With a budget that time has filled again.
    for hour in 1..6 {
        peer.core.set_now(Instant::now() + hour * Duration::from_secs(3_600));
        for _ in 0..900 {
            peer.frame(kind::PING, 0, 0, &[0; 8]);
        }
        assert_eq!(peer.send(), Ok(()));
    }
    assert!(peer.core.choked() && !peer.core.crowded(), "nothing is waited for, as nothing is read");
    peer.core.take_out(&mut Vec::new());
    assert!(!peer.core.choked());
}

#[test]
fn header_blocks_that_do_not_end_end_it() {
    let mut peer = Peer::new();
    peer.frame(kind::HEADERS, 0, 1, &[]);
    for _ in 0..50 {
        peer.frame(kind::CONTINUATION, 0, 1, &[]);
    }
    assert_eq!(peer.send(), Err(Code::ENHANCE_YOUR_CALM));
    let mut peer = Peer::new();
    peer.frame(kind::HEADERS, 0, 1, &[0; 10_000]).frame(kind::CONTINUATION, 0, 1, &[0; 10_000]);
    assert_eq!(peer.send(), Err(Code::ENHANCE_YOUR_CALM));
}

#[test]
fn more_data_than_the_window_resets_the_stream() {
    let mut peer = Peer::new();
    peer.connect(1);
    for _ in 0..5 {
        peer.frame(kind::DATA, 0, 1, &[0; 60_000]);
    }
    assert_eq!(peer.send(), Ok(()));
    let mut out = Vec::new();
    peer.core.take_out(&mut out);
    let mut expected = Vec::new();
    reset(&mut expected, 1, Code::FLOW_CONTROL_ERROR);
    assert!(out.windows(expected.len()).any(|part| part == expected));
}

#[test]
fn more_streams_than_granted_are_refused() {
    let mut peer = Peer::new();
    for n in 0..150 {
        peer.connect(1 + 2 * n);
    }
    assert_eq!(peer.send(), Ok(()));
    let mut out = Vec::new();
    peer.core.take_out(&mut out);
    let mut expected = Vec::new();
    reset(&mut expected, 1 + 2 * SETTINGS.streams, Code::REFUSED_STREAM);
    assert!(out.windows(expected.len()).any(|part| part == expected));
}

/// What is sent, how the connection ends, and how it is sent.
type Case = (&'static str, Code, fn(&mut Peer));

#[test]
fn what_breaks_the_protocol_ends_it_with_its_code() {
    let cases: [Case; 14] = [
        ("DATA of an idle stream", Code::PROTOCOL_ERROR, |p| {
            p.frame(kind::DATA, 0, 5, b"x");
        }),
        ("RST_STREAM of an idle stream", Code::PROTOCOL_ERROR, |p| {
            p.frame(kind::RST_STREAM, 0, 5, &[0; 4]);
        }),
        ("a PUSH_PROMISE", Code::PROTOCOL_ERROR, |p| {
            p.frame(kind::PUSH_PROMISE, 0, 1, &[0; 4]);
        }),
        ("a stream with an even number", Code::PROTOCOL_ERROR, |p| {
            p.connect(2);
        }),
        ("a stream with a number from before", Code::STREAM_CLOSED, |p| {
            p.connect(5).connect(3);
        }),
        ("SETTINGS of a wrong length", Code::FRAME_SIZE_ERROR, |p| {
            p.frame(kind::SETTINGS, 0, 0, &[0; 5]);
        }),
        ("SETTINGS of a stream", Code::PROTOCOL_ERROR, |p| {
            p.frame(kind::SETTINGS, 0, 1, &[]);
        }),
        ("a PING of a wrong length", Code::FRAME_SIZE_ERROR, |p| {
            p.frame(kind::PING, 0, 0, &[0; 7]);
        }),
        ("a WINDOW_UPDATE of nothing", Code::PROTOCOL_ERROR, |p| {
            p.frame(kind::WINDOW_UPDATE, 0, 0, &[0; 4]);
        }),
        ("a window that overflows", Code::FLOW_CONTROL_ERROR, |p| {
            p.frame(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]);
        }),
        ("padding longer than its frame", Code::PROTOCOL_ERROR, |p| {
            p.connect(1).frame(kind::DATA, flag::PADDED, 1, &[9, 1, 2]);
        }),
        ("a frame within a header block", Code::PROTOCOL_ERROR, |p| {
            p.frame(kind::HEADERS, 0, 1, &[]).frame(kind::PING, 0, 0, &[0; 8]);
        }),
        ("a CONTINUATION of nothing", Code::PROTOCOL_ERROR, |p| {
            p.frame(kind::CONTINUATION, 0, 1, &[]);
        }),
        ("a block that cannot be read", Code::COMPRESSION_ERROR, |p| {
            p.frame(kind::HEADERS, flag::END_HEADERS, 1, &[0x80]);
        }),
    ];
    for (what, code, send) in cases {
        let mut peer = Peer::new();
        send(&mut peer);
        assert_eq!(peer.send(), Err(code), "{what}");
    }
    let mut peer =
        Peer { core: Core::new(Role::Server, SETTINGS, Instant::now()), bytes: b"GET / HTTP/1.1".to_vec() };
    assert_eq!(peer.send(), Err(Code::PROTOCOL_ERROR));
}

/// RFC 9113 section 4.3.1: the first block after a reduction begins with the table's new size.
#[test]
fn a_smaller_table_is_acknowledged_in_the_next_block() {
    let mut peer = Peer::new();
    peer.frame(kind::SETTINGS, 0, 0, &[0, 1, 0, 0, 0x10, 0]).connect(1);
    peer.frame(kind::SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0]).connect(3).connect(5);
    assert_eq!(peer.send(), Ok(()));
    peer.core.take_out(&mut Vec::new());
    for (id, block) in [(1, &[0x20, 0x88][..]), (3, &[0x88])] {
        peer.core.answer(id, StatusCode::OK).unwrap();
        let mut out = Vec::new();
        peer.core.take_out(&mut out);
        assert_eq!(&out[HEAD..], block, "stream {id}");
    }
}

/// What was under way when we reset a stream is no fault of the peer's (RFC 9113 section 5.1).
#[test]
fn what_follows_on_a_reset_is_ignored() {
    let mut peer = Peer::new();
    assert_eq!(peer.connect(1).send(), Ok(()));
    peer.core.drop_stream(1, Code::CANCEL);
    peer.frame(kind::DATA, 0, 1, b"late").connect(1).frame(kind::WINDOW_UPDATE, 0, 1, &[0; 4]);
    peer.frame(kind::RST_STREAM, 0, 1, &[0; 4]);
    assert_eq!(peer.send(), Ok(()));
    // As much as streams of bulk may have had on their way.
    for _ in 0..4_000 {
        peer.frame(kind::DATA, 0, 1, &[0; 4_000]);
    }
    assert_eq!(peer.send(), Ok(()));
    // Once it is long ago, it is one that was used before.
    for n in 1..70 {
        assert_eq!(peer.connect(1 + 2 * n).send(), Ok(()));
        peer.core.drop_stream(1 + 2 * n, Code::CANCEL);
    }
    assert_eq!(peer.connect(1).send(), Err(Code::STREAM_CLOSED));
}

/// The same bytes give the same, however they are cut.
#[test]
fn a_cut_makes_no_difference() {
    let mut peer = Peer::new();
    let mut bytes = Vec::new();
    std::mem::swap(
        &mut peer.connect(1).frame(kind::DATA, flag::PADDED, 1, b"\x02hello\0\0").bytes,
        &mut bytes,
    );
    for size in 1..bytes.len() {
        let mut peer = Peer::new();
        for part in bytes.chunks(size) {
            peer.bytes = part.to_vec();
            assert_eq!(peer.send(), Ok(()), "in parts of {size}");
        }
        let mut came = Vec::new();
        let take = |_: &mut std::task::Context<'_>, parts: &[std::io::IoSlice<'_>]| {
            parts.iter().for_each(|part| came.extend_from_slice(part));
            std::task::Poll::Ready(Ok(came.len()))
        };
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(peer.core.deliver(1, &mut cx, take).is_ready(), "nothing came");
        assert_eq!(came, b"hello", "in parts of {size}");
    }
}
