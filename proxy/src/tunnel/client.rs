//! The dialling end of tunnels: a pool of connections of one source Pod.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Instant, SystemTime},
};

use foldhash::HashMap;
use http::{HeaderMap, StatusCode};
use parking_lot::Mutex;
use weft_core::{SpiffeId, WorkloadUid, flow::Reason};
use weft_identity::{CredentialReader, Credentials};
use weft_runtime::Tasks;

use self::{
    drive::{Driver, Proof},
    slot::{Place, Slot, Tunnel},
};
use super::{ConnectRequest, Session, Stream, Times, validity::Validities};
use crate::{early::Early, hbone::Lost, l7::ConnectError, platform::PodNet};

mod dial;
mod drive;
mod slot;

/// Connections of one key; with [`MAX_STREAMS`] each this allows more streams than a Pod has ports.
const MAX_CONNECTIONS: usize = 1024;
/// How often a CONNECT is tried again on another connection, after its connection went away before the answer.
const RETRIES: usize = 3;
/// The two ends of a tunnel: nothing is shared but between the same source Pod and identity and the same destination
/// Pod, address and expected identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The source Pod.
    pub source: WorkloadUid,
    /// Its identity.
    pub identity: SpiffeId,
    /// The destination Pod.
    pub destination: WorkloadUid,
    /// Where the destination's proxy listens.
    pub address: SocketAddr,
    /// Who must answer there.
    pub expected: SpiffeId,
}

/// The tunnels of one source Pod. They live in its network namespace, so no two Pods share one.
pub struct Pool(Arc<Inner>);

struct Inner {
    net: Arc<dyn PodNet>,
    times: Times,
    tasks: Tasks,
    credentials: CredentialReader,
    /// By the two ends and [`Credentials::generation`]: renewed credentials are not mixed with earlier ones.
    slots: Mutex<HashMap<(Key, u64), Arc<Slot>>>,
    /// Until when the peers' certificates hold.
    theirs: Validities<Key>,
    /// Until when ours do, as the peers have seen them.
    ours: Validities<Key>,
    open: Arc<AtomicUsize>,
}

/// Boxed, because each connection made so may make the next one.
type Attested = Pin<Box<dyn Future<Output = Result<(), ConnectError>> + Send>>;

enum OpenError {
    /// Another connection may do.
    Connection(String),
    Refused(ConnectError),
}

impl Pool {
    /// An empty pool; `open` counts the connections of all pools. `credentials` are those that connections which have
    /// streams are proven anew with.
    pub fn new(
        net: Arc<dyn PodNet>,
        times: Times,
        tasks: Tasks,
        credentials: CredentialReader,
        open: Arc<AtomicUsize>,
    ) -> Self {
        Self(Arc::new(Inner {
            net,
            times,
            tasks,
            credentials,
            slots: Mutex::default(),
            theirs: Validities::default(),
            ours: Validities::default(),
            open,
        }))
    }

    /// Opens a stream, over an open connection of these ends under these credentials or a new one. What the application
    /// has said by then goes along.
    ///
    /// # Errors
    /// When the destination cannot be reached, is not who it should be, or refuses.
    pub async fn connect(
        &self,
        key: &Key,
        credentials: &Credentials,
        request: &ConnectRequest,
        early: &mut Early<'_>,
    ) -> Result<(Stream, Session), ConnectError> {
        let slot = self.0.slot(key, credentials);
        let mut problem = String::new();
        for _ in 0..RETRIES {
            let place = match slot.reserve() {
                Some(place) => place,
                // Boxed: few dial, and the handshake's state would lie in all that wait.
                None => Box::pin(self.0.place(key, &slot, credentials)).await?,
            };
            let session = place.0.session.clone();
            match tokio::time::timeout(self.0.times.answer, open(place, request, early)).await {
                Ok(Ok(stream)) => return Ok((stream, session)),
                Ok(Err(OpenError::Refused(error))) => return Err(error),
                Ok(Err(OpenError::Connection(text))) => problem = text,
                Err(_) => {
                    let text = format!("the proxy at {} did not answer the CONNECT in time", key.address);
                    return Err(ConnectError::new(Reason::Timeout, text).settled(early.heard()));
                }
            }
        }
        let text = format!("the tunnel to {} broke before an answer: {problem}", key.address);
        Err(ConnectError::new(Reason::ConnectFailure, text))
    }

    /// Streams of each open connection.
    #[cfg(test)]
    pub(crate) fn streams(&self) -> Vec<usize> {
        let slots = self.0.slots.lock();
        let connections = slots.values().flat_map(|slot| slot.connections.lock().clone());
        connections.map(|tunnel| tunnel.streams.load(Ordering::Acquire)).collect()
    }

    /// Connections that are open towards all destinations.
    pub fn connections(&self) -> usize {
        self.0.slots.lock().values().map(|s| s.connections.lock().len()).sum()
    }
}

impl Inner {
    fn slot(&self, key: &Key, credentials: &Credentials) -> Arc<Slot> {
        let key = (key.clone(), credentials.generation());
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.get(&key) {
            return slot.clone();
        }
        // A renewed credential makes new slots; those that nobody uses any more go here.
        slots.retain(|_, s| Arc::strong_count(s) > 1 || !s.connections.lock().is_empty());
        let slot = Arc::new(Slot::new());
        slots.insert(key, slot.clone());
        slot
    }

    /// A place on a connection that somebody else has made meanwhile, or on a new one.
    async fn place(
        self: &Arc<Self>,
        key: &Key,
        slot: &Arc<Slot>,
        credentials: &Credentials,
    ) -> Result<Place, ConnectError> {
        let since = Instant::now();
        let Ok(_permit) = slot.dialling.acquire().await else {
            return Err(ConnectError::new(Reason::Draining, "the pool is closed"));
        };
        if let Some(place) = slot.reserve() {
            return Ok(place);
        }
        if let Some((_, error)) = slot.failed.lock().as_ref().filter(|(at, _)| *at >= since) {
            return Err(error.clone());
        }
        let dialled = self.dial(key, slot, credentials).await;
        dialled.inspect_err(|error| *slot.failed.lock() = Some((Instant::now(), error.clone())))
    }

    /// Proves both ends to each other by a new connection, under the credentials of now. It stays in the pool.
    ///
    /// # Errors
    /// When we have no credentials, or the destination cannot be reached or is not who it should be.
    fn attest(self: Arc<Self>, key: Key) -> Attested {
        Box::pin(async move {
            let identity = &key.identity;
            let Some(credentials) = self.credentials.current(identity) else {
                let text = format!("no credentials for {identity} any more; is the operator reachable?");
                return Err(ConnectError::new(Reason::NoCredentials, text));
            };
            let slot = self.slot(&key, &credentials);
            let Ok(_permit) = slot.dialling.acquire().await else { return Ok(()) };
            self.dial(&key, &slot, &credentials).await.map(drop)
        })
    }

    /// Makes a further connection where bulk goes over all there are. It stays in the pool for whoever comes next.
    fn spare(self: Arc<Self>, key: Key) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let Some(credentials) = self.credentials.current(&key.identity) else { return };
            let slot = self.slot(&key, &credentials);
            let Ok(_permit) = slot.dialling.acquire().await else { return };
            if slot.crowded()
                && let Err(error) = self.dial(&key, &slot, &credentials).await
            {
                tracing::debug!(peer = %key.expected, %error, "streams share their tunnel with bulk");
            }
        })
    }

    async fn dial(
        self: &Arc<Self>,
        key: &Key,
        slot: &Arc<Slot>,
        credentials: &Credentials,
    ) -> Result<Place, ConnectError> {
        if slot.connections.lock().len() >= MAX_CONNECTIONS {
            let text = format!("{MAX_CONNECTIONS} tunnels to {} are full", key.address);
            return Err(ConnectError::new(Reason::LimitReached, text));
        }
        let (opener, control, connection, mut session) =
            dial::handshake(&*self.net, key, credentials, self.times).await?;
        session.validity = self.theirs.share(key.clone(), session.expires);
        let ours = self.ours.share(key.clone(), credentials.not_after());
        let proof = Proof {
            theirs: (session.validity.clone(), session.expires),
            ours: (ours.clone(), credentials.not_after()),
        };
        let tunnel = Arc::new(Tunnel {
            opener,
            ours,
            retires: session.retires(SystemTime::now()),
            session,
            streams: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        });
        let place = Place::take(&tunnel);
        let driver = Driver {
            pool: Arc::downgrade(self),
            key: key.clone(),
            slot: Arc::downgrade(slot),
            tunnel: Arc::downgrade(&tunnel),
            times: self.times,
            proof,
        };
        slot.connections.lock().push(tunnel);
        let count = Count::new(&self.open);
        self.tasks.spawn("tunnel", async move {
            driver.run(control, connection).await;
            drop(count);
        });
        Ok(place)
    }
}

struct Count(Arc<AtomicUsize>);

impl Count {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(open.clone())
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn open(place: Place, request: &ConnectRequest, early: &mut Early<'_>) -> Result<Stream, OpenError> {
    let tunnel = place.0.clone();
    let lost = |lost: Lost| {
        // A connection that no longer takes streams is left to end with those it has.
        tunnel.closed.store(true, Ordering::Release);
        OpenError::Connection(lost.to_string())
    };
    let refused = |reason, text: String| Err(OpenError::Refused(ConnectError::new(reason, text)));
    let authority = request.authority;
    let mut headers = HeaderMap::new();
    request.source.write(tunnel.session.local.ip(), &mut headers);
    let data = early.data().map_err(|error| {
        let text = format!("the application's connection failed: {error}");
        OpenError::Refused(ConnectError::new(Reason::PeerReset, text).settled(true))
    })?;
    let opening = tunnel.opener.open(authority, &headers).map_err(lost)?;
    let sent = opening.send(data);
    early.sent(sent);
    let (status, stream) = match opening.answer().await {
        Ok(answer) => answer,
        Err(Lost::Reset(_)) => {
            let text = format!("the proxy of {authority} reset the CONNECT");
            let error = ConnectError::new(Reason::PeerReset, text).settled(early.heard());
            return Err(OpenError::Refused(error));
        }
        // It says nothing of how far the stream had come.
        Err(error @ Lost::Connection) if early.heard() => {
            tunnel.closed.store(true, Ordering::Release);
            let text = format!("the tunnel to {authority} broke before an answer to what was said: {error}");
            return Err(OpenError::Refused(ConnectError::new(Reason::PeerReset, text).settled(true)));
        }
        Err(error) => {
            early.unheard();
            return Err(lost(error));
        }
    };
    if status != StatusCode::OK {
        early.unheard();
    }
    match status {
        StatusCode::OK => {
            let (validity, retires) = (tunnel.session.validity.clone(), tunnel.retires);
            Ok(Stream::new(stream).of(Box::new(place), validity, retires))
        }
        StatusCode::UNAUTHORIZED => {
            refused(Reason::PolicyDenied, format!("the proxy of {authority} refuses this identity by policy"))
        }
        StatusCode::SERVICE_UNAVAILABLE => {
            refused(Reason::ConnectFailure, format!("the application at {authority} cannot be connected to"))
        }
        status => refused(Reason::ProtocolError, format!("the proxy of {authority} answered {status}")),
    }
}
