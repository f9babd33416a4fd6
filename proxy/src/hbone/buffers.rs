//! Large buffers, lent to the connections of a thread for as long as they have something in them.

use std::cell::RefCell;

use bytes::BytesMut;

use crate::tls::record::{MAX_PLAIN, OVERHEAD};

/// What is read from a socket at a time.
const READ: usize = 256 * 1024;
/// What is sealed at a time: full records.
pub(super) const SEALED: usize = 16 * (MAX_PLAIN + OVERHEAD);
/// Buffers of a kind that a thread keeps.
const SPARE: usize = 2;
/// What a connection may keep of its own.
const SMALL: usize = 4 * 1024;
/// A buffer of frames that is larger came from a burst.
const LARGE: usize = 1024 * 1024;

thread_local! {
    static INPUT: RefCell<BytesMut> = RefCell::new(BytesMut::new());
    static FRAMES: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static RECORDS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Makes room for `more` bytes, with a buffer that somebody gave back where that helps.
pub(super) fn reserve(frames: &mut Vec<u8>, more: usize) {
    let wanted = frames.len() + more;
    if wanted <= frames.capacity() {
        return;
    }
    if wanted > SMALL
        && let Some(mut spare) = FRAMES.with_borrow_mut(Vec::pop)
    {
        spare.extend_from_slice(frames);
        *frames = spare;
    }
    frames.reserve(more);
}

/// Empties a buffer of frames, and gives it back where it is large.
pub(super) fn clear(frames: &mut Vec<u8>) {
    frames.clear();
    if frames.capacity() > SMALL {
        let frames = std::mem::take(frames);
        FRAMES.with_borrow_mut(|spare| {
            if spare.len() < SPARE && frames.capacity() <= LARGE {
                spare.push(frames);
            }
        });
    }
}

/// Room for [`SEALED`] bytes of records.
pub(super) fn records() -> Vec<u8> {
    RECORDS.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; SEALED])
}

/// Gives it back.
pub(super) fn give_back(records: Vec<u8>) {
    RECORDS.with_borrow_mut(|spare| {
        if spare.len() < SPARE && records.len() == SEALED {
            spare.push(records);
        }
    });
}

/// The buffer that sockets are read into, empty, with room for up to [`READ`] bytes. What is left in it afterwards is lost; what
/// was split off stays.
pub(super) fn input<T>(read: impl FnOnce(&mut BytesMut) -> T) -> T {
    INPUT.with_borrow_mut(|input| {
        input.clear();
        // While parts are lent, what is left of the buffer does as well.
        if !input.try_reclaim(READ) && input.capacity() < READ / 4 {
            input.reserve(READ);
        }
        read(input)
    })
}
