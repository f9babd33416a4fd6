//! What came for a stream and was not delivered yet.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf as _, Bytes, BytesMut};

/// Parts that are shown at a time.
pub(super) const PARTS: usize = 32;
/// Up to here a copy costs less than a part does.
const SMALL: usize = 2 * 1024;

/// Bytes in the order of their arrival: what was kept, then what still lies where the socket was read.
///
/// What is lent holds the whole of a large buffer, so it is for one turn: [`Self::keep`] ends it.
#[derive(Debug, Default)]
pub(super) struct Received {
    kept: BytesMut,
    lent: VecDeque<Bytes>,
}

impl Received {
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.lent.is_empty()
    }

    /// Takes bytes in; says whether they are the first that are lent.
    pub(super) fn push(&mut self, data: Bytes) -> bool {
        if self.lent.is_empty() && data.len() <= SMALL {
            self.kept.extend_from_slice(&data);
            return false;
        }
        self.lent.push_back(data);
        self.lent.len() == 1
    }

    /// Copies what is lent.
    pub(super) fn keep(&mut self) {
        self.kept.reserve(self.lent.iter().map(Bytes::len).sum());
        for part in std::mem::take(&mut self.lent) {
            self.kept.extend_from_slice(&part);
        }
    }

    /// Puts the first parts into `parts`, and says how many.
    pub(super) fn show<'a>(&'a self, parts: &mut [IoSlice<'a>; PARTS]) -> usize {
        let kept = Some(&self.kept[..]).filter(|kept| !kept.is_empty());
        let all = kept.into_iter().chain(self.lent.iter().map(|part| &part[..]));
        let mut count = 0;
        for (place, part) in parts.iter_mut().zip(all) {
            *place = IoSlice::new(part);
            count += 1;
        }
        count
    }

    /// Lets go of the first `n` bytes, and of all room once there are none.
    pub(super) fn advance(&mut self, n: usize) {
        let kept = n.min(self.kept.len());
        self.kept.advance(kept);
        let mut left = n - kept;
        while let Some(part) = self.lent.front_mut().filter(|_| left > 0) {
            let taken = left.min(part.len());
            part.advance(taken);
            left -= taken;
            if part.is_empty() {
                self.lent.pop_front();
            }
        }
        if self.is_empty() {
            *self = Self::default();
        }
    }
}
