//! The open connections of one key and credential, and the places on them.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Instant, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::super::{MAX_STREAMS, Session, validity::Validity};
use crate::{hbone::Opener, l7::ConnectError};

pub(super) struct Slot {
    pub(super) connections: Mutex<Vec<Arc<Tunnel>>>,
    /// One dial at a time: those that wait find the new connection, or share the failure.
    pub(super) dialling: Semaphore,
    pub(super) failed: Mutex<Option<(Instant, ConnectError)>>,
}

pub(super) struct Tunnel {
    pub(super) opener: Opener,
    pub(super) session: Session,
    /// Until when the peer, for its part, takes us for who we are.
    pub(super) ours: Validity,
    /// When it takes no more streams.
    pub(super) retires: Instant,
    pub(super) streams: AtomicUsize,
    pub(super) closed: AtomicBool,
}

impl Tunnel {
    /// When one of the two certificates ends, unless both ends prove themselves anew.
    pub(super) fn ends(&self) -> SystemTime {
        self.session.validity.until().min(self.ours.until())
    }

    /// Whether it takes another stream.
    fn free(&self, now: Instant) -> bool {
        !self.closed.load(Ordering::Acquire)
            && now < self.retires
            && self.streams.load(Ordering::Acquire) < self.opener.most_streams().min(MAX_STREAMS as usize)
    }
}

/// Connections from which on a further one is made only when they are full, and not because of bulk on all of them.
const APART: usize = 4;

/// One stream's place on a connection.
pub(super) struct Place(pub(super) Arc<Tunnel>);

impl Place {
    pub(super) fn take(tunnel: &Arc<Tunnel>) -> Self {
        tunnel.streams.fetch_add(1, Ordering::AcqRel);
        Self(tunnel.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Slot {
    pub(super) fn new() -> Self {
        Self { connections: Mutex::new(Vec::new()), dialling: Semaphore::new(1), failed: Mutex::new(None) }
    }

    /// A place on an open connection: on one without bulk where there is one, and the fullest first, so that spare
    /// ones become idle.
    pub(super) fn reserve(&self) -> Option<Place> {
        let now = Instant::now();
        let connections = self.connections.lock();
        let mut free = connections.iter().filter(|tunnel| tunnel.free(now));
        let first = free.next()?;
        let quiet = std::iter::once(first).chain(free).find(|tunnel| !tunnel.opener.carries_bulk());
        Some(Place::take(quiet.unwrap_or(first)))
    }

    /// Whether whoever comes now has to share a connection with bulk, though there are few.
    pub(super) fn crowded(&self) -> bool {
        let now = Instant::now();
        let connections = self.connections.lock();
        (1..APART).contains(&connections.len())
            && connections.iter().all(|tunnel| !tunnel.free(now) || tunnel.opener.carries_bulk())
    }

    pub(super) fn forget(&self, tunnel: &Weak<Tunnel>) {
        self.connections.lock().retain(|t| !Weak::ptr_eq(&Arc::downgrade(t), tunnel));
    }

    /// Closes a connection to new streams if it has none.
    pub(super) fn close_if_unused(&self, tunnel: &Arc<Tunnel>) -> bool {
        let _no_reserve = self.connections.lock();
        let unused = tunnel.streams.load(Ordering::Acquire) == 0;
        if unused {
            tunnel.closed.store(true, Ordering::Release);
        }
        unused
    }
}
