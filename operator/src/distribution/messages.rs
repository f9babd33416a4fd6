//! What is sent, as bytes: a message is made once for all agents that hold the same version.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Weak},
};

use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use prost::{Message, encoding::message};
use weft_core::Version;
use weft_proto::control::{self as proto, Resource, SubscribeResponse};

use super::{Difference, Snapshot};

/// About how long a piece is, in bytes.
const PIECE: usize = 32 << 10;
/// `SubscribeResponse.upserted`.
const UPSERTED: u32 = 3;
/// Messages that are kept until the next version, in bytes together. A connection takes a message of some hundred KiB at
/// once, and one made for each of a thousand that do not read at the moment would be hundreds of MiB.
const KEPT: usize = 32 << 20;
/// The longest state that is kept. A longer one is shared by those who are sent it at the same time.
const KEPT_STATE: usize = 1 << 20;

/// Why a message cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// A resource has no JSON.
    #[error("a resource does not serialise: {0}")]
    Json(#[from] serde_json::Error),
    /// gRPC's lengths have 32 bits.
    #[error("the state is larger than a message can be")]
    TooLong,
}

/// A message of gRPC (gRPC over HTTP/2, Length-Prefixed-Message), in pieces. Those who send it share its memory: a state
/// of 8 MB for each of a thousand agents would be 8 GB.
#[derive(Debug, PartialEq, Eq)]
pub struct Encoded {
    pieces: Vec<Bytes>,
}

impl Encoded {
    /// Of what stands before the resources, and those as JSON.
    ///
    /// # Errors
    /// When it is longer than gRPC allows.
    pub(crate) fn new(head: &SubscribeResponse, upserted: &[Resource]) -> Result<Self, MessageError> {
        let all = upserted.iter().map(|r| message::encoded_len(UPSERTED, r)).sum::<usize>();
        let length = u32::try_from(head.encoded_len() + all).map_err(|_| MessageError::TooLong)?;
        let mut piece = BytesMut::with_capacity(5 + head.encoded_len() + all.min(PIECE));
        piece.put_u8(0);
        piece.put_u32(length);
        piece.put_slice(&head.encode_to_vec());
        let (mut pieces, mut left) = (Vec::new(), all);
        for resource in upserted {
            if piece.len() >= PIECE {
                pieces.push(piece.freeze());
                piece = BytesMut::with_capacity(left.min(PIECE));
            }
            left -= message::encoded_len(UPSERTED, resource);
            piece.reserve(message::encoded_len(UPSERTED, resource));
            message::encode(UPSERTED, resource, &mut piece);
        }
        pieces.push(piece.freeze());
        Ok(Self { pieces })
    }

    /// The pieces in their order; there is at least one.
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }
}

/// The messages that lead to one snapshot, by what their receivers hold, and how many bytes of them are kept. There are
/// as many as versions in its history.
#[derive(Debug, Default)]
pub(super) struct Messages(Mutex<(HashMap<u64, Known>, usize)>);

#[derive(Debug, Default)]
struct Known {
    difference: Option<Outline>,
    made: Weak<Encoded>,
    /// Holds it.
    _kept: Option<Arc<Encoded>>,
}

/// What is asked of a difference for each agent: to look at its resources for each would cost more than to send it.
#[derive(Debug)]
struct Outline {
    /// About how long it is, in bytes.
    size: usize,
    /// The nodes that are told more than the others.
    told_more: BTreeSet<Arc<str>>,
}

impl Outline {
    fn new(difference: &Difference<'_>) -> Result<Self, serde_json::Error> {
        let (mut size, mut told_more) = (0, BTreeSet::new());
        for published in &difference.upserted {
            size += published.foreign()?.len();
            told_more.extend(published.tells_more().cloned());
        }
        Ok(Self { size, told_more })
    }
}

impl Known {
    fn outline(
        &mut self,
        difference: impl FnOnce() -> Result<Outline, serde_json::Error>,
    ) -> Result<&Outline, serde_json::Error> {
        let known = match self.difference.take() {
            Some(known) => known,
            None => difference()?,
        };
        Ok(self.difference.insert(known))
    }
}

impl Snapshot {
    /// About how long the message is that leads here from `held`, in bytes.
    ///
    /// # Errors
    /// When a resource does not serialise.
    pub fn size(&self, held: Version) -> Result<usize, MessageError> {
        let mut messages = self.messages.0.lock();
        let known = messages.0.entry(self.from(held)).or_default();
        Ok(known.outline(|| Outline::new(&self.since(held)))?.size)
    }

    /// The message that leads `node` here from `held`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn message(&self, held: Version, node: &str) -> Result<Arc<Encoded>, MessageError> {
        // Held while it is made: others that need the same shall not make it beside.
        let mut messages = self.messages.0.lock();
        let (known, kept) = &mut *messages;
        let known = known.entry(self.from(held)).or_default();
        if known.outline(|| Outline::new(&self.since(held)))?.told_more.contains(node) {
            drop(messages);
            return self.encode(&self.since(held), Some(node)).map(Arc::new);
        }
        if let Some(made) = known.made.upgrade() {
            return Ok(made);
        }
        let difference = self.since(held);
        let made = Arc::new(self.encode(&difference, None)?);
        known.made = Arc::downgrade(&made);
        let length = made.pieces.iter().map(Bytes::len).sum::<usize>();
        if length <= KEPT.saturating_sub(*kept) && (!difference.full || length <= KEPT_STATE) {
            *kept += length;
            known._kept = Some(Arc::clone(&made));
        }
        Ok(made)
    }

    /// What messages are told apart by; 0 is everything.
    fn from(&self, held: Version) -> u64 {
        if self.knows(held) { held.sequence } else { 0 }
    }

    fn encode(&self, difference: &Difference<'_>, node: Option<&str>) -> Result<Encoded, MessageError> {
        let mut upserted = Vec::with_capacity(difference.upserted.len());
        for resource in &difference.upserted {
            let json = match node {
                Some(node) => resource.json(node)?,
                None => resource.foreign()?,
            };
            upserted.push(Resource { json });
        }
        let removed = difference.removed.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        let Version { epoch, sequence } = self.version;
        let version = Some(proto::Version { epoch, sequence });
        let head = SubscribeResponse { version, full: difference.full, upserted: Vec::new(), removed };
        Encoded::new(&head, &upserted)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use weft_core::{NamespacedName, Policy, Resource as Core, ResourceKey, policy::Action};

    use super::*;
    use crate::Distribution;

    #[test]
    fn the_pieces_are_the_message() {
        for resources in [0, 1, 500] {
            let json = |n: usize| Bytes::from(vec![b'a'; 100 + n * 37 % 9000]);
            let upserted: Vec<_> = (0..resources).map(|n| Resource { json: json(n) }).collect();
            let head = SubscribeResponse {
                version: Some(proto::Version { epoch: 7, sequence: 9 }),
                full: true,
                upserted: Vec::new(),
                removed: vec!["x".into(), "y".into()],
            };
            let encoded = Encoded::new(&head, &upserted).unwrap();
            assert!(encoded.pieces().iter().all(|p| p.len() < PIECE + 10_000));
            assert!(resources < 500 || encoded.pieces().len() > 10);
            let mut bytes = Bytes::from(encoded.pieces().concat());
            assert_eq!(bytes.split_to(1)[..], [0]);
            let length = u32::from_be_bytes(bytes.split_to(4)[..].try_into().unwrap());
            assert_eq!(bytes.len(), usize::try_from(length).unwrap());
            assert_eq!(SubscribeResponse::decode(bytes).unwrap(), SubscribeResponse { upserted, ..head });
        }
    }

    #[test]
    fn a_message_is_made_once_for_all_who_hold_the_same() {
        let distribution = Distribution::new();
        let publish = |names: &[String]| {
            let policy = |name: &String| {
                let name = NamespacedName::new("shop", name);
                let policy = Policy { name: name.clone(), action: Action::Allow, rules: vec![] };
                (ResourceKey::Policy(name), Some(Core::Policy(Arc::new(policy))))
            };
            distribution.update(names.iter().map(policy), Instant::now())
        };
        let first = publish(&["a".into()]);
        let many: Vec<String> = (0..20_000).map(|n| format!("{n}-{}", "x".repeat(100))).collect();
        publish(&many);
        let now = distribution.current().unwrap();
        let forget = |held| Arc::downgrade(&now.message(held, "node-a").unwrap());
        let (delta, everything) = (forget(first), forget(Version::default()));
        // The pieces of one that nobody holds any more may wait in connections still.
        let delta = delta.upgrade().unwrap();
        assert!(Arc::ptr_eq(&delta, &now.message(first, "node-b").unwrap()));
        assert!(everything.upgrade().is_none());
        let held = now.message(Version::default(), "node-a").unwrap();
        assert!(Arc::ptr_eq(&held, &now.message(Version::default(), "node-b").unwrap()));
    }
}
