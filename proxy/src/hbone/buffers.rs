//! Large buffers, lent to the connections of a thread for as long as they have something in them. Of each kind a thread
//! keeps one.

use std::cell::{Cell, RefCell};

use bytes::BytesMut;

use crate::tls::record::{MAX_PLAIN, OVERHEAD};

/// What is read from a socket at a time.
const READ: usize = 256 * 1024;
/// What is sealed at a time: full records.
const SEALED: usize = 16 * (MAX_PLAIN + OVERHEAD);
/// What a connection may keep of its own.
const SMALL: usize = 4 * 1024;
/// A buffer of frames that is larger came from a burst.
const LARGE: usize = 1024 * 1024;

thread_local! {
    static INPUT: RefCell<BytesMut> = RefCell::new(BytesMut::new());
    static FRAMES: Cell<Option<Vec<u8>>> = const { Cell::new(None) };
    static RECORDS: Cell<Option<Vec<u8>>> = const { Cell::new(None) };
}

/// Makes room for `more` bytes, with a buffer that somebody gave back where that helps.
pub(super) fn reserve(frames: &mut Vec<u8>, more: usize) {
    let wanted = frames.len() + more;
    if wanted <= frames.capacity() {
        return;
    }
    if wanted > SMALL
        && let Some(mut spare) = FRAMES.take()
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
        if frames.capacity() <= LARGE {
            FRAMES.set(Some(frames));
        }
    }
}

/// Room for [`SEALED`] bytes of records.
pub(super) fn records() -> Vec<u8> {
    RECORDS.take().unwrap_or_else(|| vec![0; SEALED])
}

/// Gives it back.
pub(super) fn give_back(records: Vec<u8>) {
    if records.len() == SEALED {
        RECORDS.set(Some(records));
    }
}

/// The buffer that sockets are read into, empty, with room for up to [`READ`] bytes. What is left in it afterwards is
/// lost; what was split off stays.
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
