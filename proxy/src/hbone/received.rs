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
    /// Small, since most streams have none at most times.
    lent: Option<Box<Lent>>,
}

#[derive(Debug, Default)]
struct Lent(VecDeque<Bytes>);

impl Received {
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.lent.is_none()
    }

    /// Takes bytes in, of which there are some; says whether they are the first that are lent.
    pub(super) fn push(&mut self, data: Bytes) -> bool {
        if self.lent.is_none() && data.len() <= SMALL {
            self.kept.extend_from_slice(&data);
            return false;
        }
        let first = self.lent.is_none();
        self.lent.get_or_insert_default().0.push_back(data);
        first
    }

    /// Copies what is lent.
    pub(super) fn keep(&mut self) {
        let Some(lent) = self.lent.take() else { return };
        self.kept.reserve(lent.0.iter().map(Bytes::len).sum());
        for part in lent.0 {
            self.kept.extend_from_slice(&part);
        }
    }

    /// Puts the first parts into `parts`, and says how many.
    pub(super) fn show<'a>(&'a self, parts: &mut [IoSlice<'a>; PARTS]) -> usize {
        let kept = Some(&self.kept[..]).filter(|kept| !kept.is_empty());
        let lent = self.lent.iter().flat_map(|lent| &lent.0);
        let all = kept.into_iter().chain(lent.map(|part| &part[..]));
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
        if let Some(Lent(lent)) = self.lent.as_deref_mut() {
            let mut left = n - kept;
            while let Some(part) = lent.front_mut().filter(|_| left > 0) {
                let taken = left.min(part.len());
                part.advance(taken);
                left -= taken;
                if part.is_empty() {
                    lent.pop_front();
                }
            }
            if lent.is_empty() {
                self.lent = None;
            }
        }
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(received: &Received) -> Vec<u8> {
        let mut parts = [IoSlice::new(&[]); PARTS];
        let count = received.show(&mut parts);
        parts[..count].iter().flat_map(|part| part.to_vec()).collect()
    }

    #[test]
    fn bytes_stay_in_order_whatever_is_kept_lent_and_delivered() {
        let (mut received, mut expected, mut next) = (Received::default(), Vec::new(), 0_u8);
        for round in 0..200_usize {
            for size in [10, SMALL, SMALL + 1, 5_000, 1] {
                let data: Vec<u8> = (0..size)
                    .map(|_| {
                        next = next.wrapping_add(1);
                        next
                    })
                    .collect();
                expected.extend_from_slice(&data);
                received.push(data.into());
            }
            if round % 3 == 0 {
                received.keep();
                assert!(received.lent.is_none());
            }
            let delivered = (round * 977) % (expected.len() + 1);
            received.advance(delivered);
            expected.drain(..delivered);
            assert!(expected.starts_with(&shown(&received)), "round {round}");
            assert_eq!(received.is_empty(), expected.is_empty());
        }
        received.advance(expected.len());
        assert!(received.is_empty() && received.kept.capacity() == 0, "it holds nothing");
    }

    #[test]
    fn what_is_lent_is_let_go_of() {
        let whole = Bytes::from(vec![1; 100_000]);
        let mut received = Received::default();
        assert!(received.push(whole.slice(..4_000)));
        assert!(!received.push(whole.slice(4_000..8_000)), "only the first is told");
        assert!(!whole.is_unique());
        received.keep();
        assert!(whole.is_unique(), "nothing of the large buffer is held");
        assert_eq!(shown(&received).len(), 8_000);
    }
}
