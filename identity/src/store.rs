//! Where credentials are published: one writer, many readers, one watch for each id.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;
use tokio::sync::watch;
use weft_core::SpiffeId;

use crate::Credentials;

/// A publisher without issuer, and its reader: for files, and for tests of what reads credentials.
///
/// Nobody watches the time here: what expires is not handed out as current, but subscribers are not told.
pub fn credentials() -> (CredentialPublisher, CredentialReader) {
    let store = Arc::new(Store::default());
    (CredentialPublisher { store: Arc::clone(&store) }, CredentialReader { store })
}

/// The only writer of a [`CredentialReader`].
#[derive(Debug)]
pub struct CredentialPublisher {
    store: Arc<Store>,
}

/// Hands out what is published. It cannot fetch, sign or revoke.
#[derive(Clone, Debug)]
pub struct CredentialReader {
    store: Arc<Store>,
}

#[derive(Default)]
pub(crate) struct Store {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    wanted: BTreeSet<SpiffeId>,
    channels: HashMap<SpiffeId, watch::Sender<Option<Arc<Credentials>>>>,
}

impl CredentialPublisher {
    /// Publishes a credential in place of the last of its id.
    pub fn publish(&self, credentials: Credentials) -> Arc<Credentials> {
        let credentials = Arc::new(credentials);
        let mut inner = self.store.inner.lock();
        inner.wanted.insert(credentials.id().clone());
        inner.send(credentials.id(), Some(Arc::clone(&credentials)));
        credentials
    }

    /// Takes back the credential of an id; its subscribers see `None` at once.
    pub fn revoke(&self, id: &SpiffeId) {
        let mut inner = self.store.inner.lock();
        inner.wanted.remove(id);
        inner.send(id, None);
    }
}

impl CredentialReader {
    /// Follows the credential of `id`: `None` before the first one, after expiry, and when `id` is no longer
    /// wanted on this node. The channel stays open as long as a reader or the manager exists.
    pub fn subscribe(&self, id: &SpiffeId) -> watch::Receiver<Option<Arc<Credentials>>> {
        self.store.inner.lock().channel(id).subscribe()
    }

    /// The credential of `id` that is valid now.
    pub fn current(&self, id: &SpiffeId) -> Option<Arc<Credentials>> {
        self.store.get(id).filter(|credentials| SystemTime::now() < credentials.not_after())
    }
}

impl Store {
    pub(crate) fn reader(self: &Arc<Self>) -> CredentialReader {
        CredentialReader { store: Arc::clone(self) }
    }

    /// Makes `wanted` the ids that may be published and takes back all others; true when anything changed.
    pub(crate) fn want(&self, wanted: BTreeSet<SpiffeId>) -> bool {
        let mut inner = self.inner.lock();
        if inner.wanted == wanted {
            return false;
        }
        inner.wanted = wanted;
        let Inner { wanted, channels } = &mut *inner;
        channels.retain(|id, channel| {
            if wanted.contains(id) {
                return true;
            }
            take_back(channel);
            channel.receiver_count() > 0
        });
        true
    }

    pub(crate) fn wanted(&self) -> BTreeSet<SpiffeId> {
        self.inner.lock().wanted.clone()
    }

    /// Publishes, unless the id is no longer wanted: then the credential is dropped and the answer is false.
    pub(crate) fn publish(&self, credentials: &Arc<Credentials>) -> bool {
        let mut inner = self.inner.lock();
        if !inner.wanted.contains(credentials.id()) {
            return false;
        }
        inner.send(credentials.id(), Some(Arc::clone(credentials)));
        true
    }

    /// Takes back the credential of `id` where it is not valid at `now`; true when there was one to take back.
    pub(crate) fn expire(&self, id: &SpiffeId, now: SystemTime) -> bool {
        let inner = self.inner.lock();
        let Some(channel) = inner.channels.get(id) else { return false };
        let expired = channel.borrow().as_ref().is_some_and(|credentials| credentials.not_after() <= now);
        if expired {
            take_back(channel);
        }
        expired
    }

    pub(crate) fn get(&self, id: &SpiffeId) -> Option<Arc<Credentials>> {
        self.inner.lock().channels.get(id)?.borrow().clone()
    }

    /// Everything published.
    pub(crate) fn all(&self) -> Vec<Arc<Credentials>> {
        self.inner.lock().channels.values().filter_map(|channel| channel.borrow().clone()).collect()
    }
}

impl Inner {
    fn send(&mut self, id: &SpiffeId, credentials: Option<Arc<Credentials>>) {
        self.channel(id).send_replace(credentials);
    }

    fn channel(&mut self, id: &SpiffeId) -> &watch::Sender<Option<Arc<Credentials>>> {
        if !self.channels.contains_key(id) {
            // A peer's churn must not grow the map: ids that nobody wants and nobody follows go first.
            let wanted = &self.wanted;
            self.channels.retain(|id, channel| wanted.contains(id) || channel.receiver_count() > 0);
        }
        self.channels.entry(id.clone()).or_insert_with(|| watch::Sender::new(None))
    }
}

/// Tells the subscribers only where something changes.
fn take_back(channel: &watch::Sender<Option<Arc<Credentials>>>) {
    channel.send_if_modified(|credentials| credentials.take().is_some());
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.lock();
        f.debug_struct("Store")
            .field("wanted", &inner.wanted)
            .field("channels", &inner.channels.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{HOUR, ca, credentials as signed, id};

    #[test]
    fn what_is_not_wanted_is_not_published() {
        let store = Arc::new(Store::default());
        let web = Arc::new(signed(&ca(), &id("web")));
        let receiver = store.reader().subscribe(&id("web"));
        assert!(!store.publish(&web) && receiver.borrow().is_none());
        assert!(store.want([id("web")].into()) && !store.want([id("web")].into()));
        assert!(store.publish(&web) && receiver.borrow().is_some());
        assert!(store.want(BTreeSet::new()));
        assert!(receiver.borrow().is_none() && !store.publish(&web));
    }

    #[test]
    fn expiry_is_exact_and_told_once() {
        let store = Arc::new(Store::default());
        let web = Arc::new(signed(&ca(), &id("web")));
        store.want([id("web")].into());
        store.publish(&web);
        let mut receiver = store.reader().subscribe(&id("web"));
        assert!(!store.expire(&id("web"), web.not_after() - HOUR / 2));
        assert!(store.expire(&id("web"), web.not_after()));
        assert!(receiver.has_changed().unwrap() && receiver.borrow_and_update().is_none());
        assert!(!store.expire(&id("web"), web.not_after()) && !receiver.has_changed().unwrap());
    }

    #[test]
    fn a_publisher_without_issuer_publishes_and_revokes() {
        let (publisher, reader) = credentials();
        let ca = ca();
        let first = publisher.publish(signed(&ca, &id("web")));
        assert_eq!(reader.current(&id("web")).unwrap().generation(), first.generation());
        let second = publisher.publish(signed(&ca, &id("web")));
        assert!(second.generation() > first.generation());
        assert_eq!(reader.current(&id("web")).unwrap().generation(), second.generation());
        publisher.revoke(&id("web"));
        assert!(reader.current(&id("web")).is_none() && reader.current(&id("api")).is_none());
    }
}
