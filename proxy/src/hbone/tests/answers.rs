//! What a server may say after a whole answer (RFC 9113 section 8.1).

use std::{
    io,
    task::{Context, Waker},
    time::Instant,
};

use bytes::{BufMut as _, buf::Limit};

use super::{super::frame::*, *};
use crate::{
    copy::Failed,
    hbone::{core::Core, hpack},
};

/// A client whose request was answered 200 with "all", an end, and a reset.
fn answered(code: Code) -> (Core, u32) {
    let mut core = Core::new(Role::Client, SETTINGS, Instant::now());
    let id = core.open(authority(), &headers()).unwrap();
    let mut bytes = Vec::new();
    settings(&mut bytes, &[]);
    let mut block = Vec::new();
    hpack::indexed(&mut block, hpack::index::STATUS);
    head(&mut bytes, block.len(), kind::HEADERS, flag::END_HEADERS, id);
    bytes.extend_from_slice(&block);
    head(&mut bytes, 3, kind::DATA, flag::END_STREAM, id);
    bytes.extend_from_slice(b"all");
    reset(&mut bytes, id, code);
    core.receive(bytes.into()).unwrap();
    core.take_out(&mut Vec::new());
    (core, id)
}

fn read(core: &mut Core, id: u32) -> Poll<Result<Vec<u8>, Failed>> {
    let mut came = Vec::new();
    let take = |_: &mut Context<'_>, parts: &[io::IoSlice<'_>]| {
        parts.iter().for_each(|part| came.extend_from_slice(part));
        Poll::Ready(Ok(came.len()))
    };
    let read = core.deliver(id, &mut Context::from_waker(Waker::noop()), take);
    read.map_ok(|_| came)
}

fn send(core: &mut Core, id: u32, has: Poll<io::Result<&[u8]>>) -> Poll<Result<usize, Failed>> {
    let from = |_: &mut Context<'_>, into: &mut Limit<&mut Vec<u8>>| {
        has.map_ok(|data| {
            let n = data.len().min(into.remaining_mut());
            into.put_slice(&data[..n]);
            n
        })
    };
    core.fill(id, &mut Context::from_waker(Waker::noop()), from)
}

#[test]
fn a_reset_of_what_is_sent_spoils_no_answer() {
    // INTERNAL_ERROR is what Envoy says.
    for code in [Code::NO_ERROR, Code(2)] {
        spoils_nothing(code);
    }
}

fn spoils_nothing(code: Code) {
    let (mut core, id) = answered(code);
    assert!(matches!(send(&mut core, id, Poll::Pending), Poll::Pending), "nothing was sent that could fail");
    assert!(matches!(read(&mut core, id), Poll::Ready(Ok(came)) if came == b"all"));
    assert!(matches!(read(&mut core, id), Poll::Ready(Ok(came)) if came.is_empty()), "an end, not a failure");
    // The application ends its half as well: nobody has to be told.
    assert!(matches!(send(&mut core, id, Poll::Ready(Ok(b""))), Poll::Ready(Ok(0))));
    core.finish(id).unwrap();
    core.drop_stream(id, Code::CANCEL);
    let mut out = Vec::new();
    core.take_out(&mut out);
    assert!(out.is_empty(), "{out:?}");
}

#[test]
fn what_is_sent_after_it_fails() {
    let (mut core, id) = answered(Code::NO_ERROR);
    let sent = send(&mut core, id, Poll::Ready(Ok(b"more")));
    assert!(matches!(sent, Poll::Ready(Err(Failed::Writer(_)))), "{sent:?}");
}

#[test]
fn a_cut_is_a_failure() {
    let (mut core, id) = answered(Code::CANCEL);
    assert!(matches!(send(&mut core, id, Poll::Pending), Poll::Ready(Err(Failed::Writer(_)))));
    assert!(matches!(read(&mut core, id), Poll::Ready(Ok(came)) if came == b"all"));
    assert!(matches!(read(&mut core, id), Poll::Ready(Err(Failed::Reader(_)))));
}

#[test]
fn what_a_connection_that_failed_has_delivered_holds_no_read_buffer() {
    let (mut core, id) = (Core::new(Role::Client, SETTINGS, Instant::now()), 1);
    assert_eq!(core.open(authority(), &headers()), Ok(id));
    let mut bytes = Vec::new();
    settings(&mut bytes, &[]);
    let mut block = Vec::new();
    hpack::indexed(&mut block, hpack::index::STATUS);
    head(&mut bytes, block.len(), kind::HEADERS, flag::END_HEADERS, id);
    bytes.extend_from_slice(&block);
    head(&mut bytes, 8_000, kind::DATA, 0, id);
    bytes.extend_from_slice(&[7; 8_000]);
    let buffer = Bytes::from(bytes);
    core.receive(buffer.clone()).unwrap();
    assert!(!buffer.is_unique(), "it is lent for the turn");
    core.fail(Error::Closed);
    assert!(buffer.is_unique());
    assert_eq!(read(&mut core, id).map(|read| read.unwrap().len()), Poll::Ready(8_000));
}
