//! Every live connection, so that a change of policy, identity or Pods cuts those that it no longer allows.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use weft_core::{
    MeshState, SpiffeId, WorkloadUid,
    flow::Reason,
    policy::eval::{self, Access, Caller, Outcome},
};
use weft_identity::CredentialReader;
use weft_runtime::DrainWatcher;

use crate::{pod::Pod, tunnel::validity::Validity};

/// TCP's protocol number.
pub const TCP: u8 = 6;
/// How often expiry of credentials is looked at; changes of the state are acted on at once.
const TICK: Duration = Duration::from_millis(500);

/// Who calls, owned.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// Proven.
    Authenticated(SpiffeId),
    /// Known by address only.
    Unauthenticated(IpAddr),
}

impl Source {
    /// As the interpreter takes it.
    pub fn caller(&self) -> Caller<'_> {
        match self {
            Self::Authenticated(id) => Caller::Authenticated(id),
            Self::Unauthenticated(address) => Caller::Unauthenticated(*address),
        }
    }
}

/// What a connection's right to live rests on.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The cookie of the application's socket, where it is one of this node's.
    pub connection: Option<u64>,
    /// The source Pod, where it was known, and the identity that it had.
    pub source: Option<(WorkloadUid, SpiffeId)>,
    /// The destination Pod, where it was known.
    pub destination: Option<WorkloadUid>,
    /// Credentials without which it ends.
    pub credentials: Option<SpiffeId>,
    /// Until when the peer is proven; the connection ends then.
    pub validity: Option<Validity>,
    /// What the destination's policy is asked.
    pub judged: Option<Judged>,
}

/// A question to policy.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Judged {
    /// Who calls.
    pub source: Source,
    /// The port at the destination.
    pub port: u16,
}

struct Live {
    entry: Entry,
    /// True where its bytes are not judged as HTTP requests.
    opaque: bool,
    cancel: oneshot::Sender<Reason>,
}

/// The registry. Cheap to clone.
#[derive(Clone, Default)]
pub struct Connections {
    live: Arc<Mutex<BTreeMap<u64, Live>>>,
    next: Arc<AtomicU64>,
}

/// A registered connection; dropped, it is no longer registered.
pub struct Registration {
    id: u64,
    registry: Connections,
    cancelled: oneshot::Receiver<Reason>,
    cut: Option<Reason>,
}

impl Registration {
    /// Says whether its bytes pass unseen (true) or are judged request by request (false).
    pub fn set_opaque(&self, opaque: bool) {
        if let Some(live) = self.registry.live.lock().get_mut(&self.id) {
            live.opaque = opaque;
        }
    }

    /// Says until when the peer is proven, known only once the peer is connected to.
    pub fn set_validity(&self, validity: Option<Validity>) {
        if let Some(live) = self.registry.live.lock().get_mut(&self.id) {
            live.entry.validity = validity;
        }
    }

    /// Ends when the connection must, with the reason.
    pub async fn cut(&mut self) -> Reason {
        std::future::poll_fn(|cx| self.poll_cut(cx)).await
    }

    /// As [`Registration::cut`], or with the end of one of its Pods.
    pub async fn ended(&mut self, pod: &Pod) -> Reason {
        tokio::select! {
            biased;
            reason = self.cut() => reason,
            () = pod.closed() => Reason::Revoked,
        }
    }

    /// [`Registration::cut`] for use inside a stream; stays ready.
    pub fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<Reason> {
        if self.cut.is_none() {
            let reason = ready!(Pin::new(&mut self.cancelled).poll(cx));
            self.cut = Some(reason.unwrap_or(Reason::Revoked));
        }
        Poll::Ready(self.cut.unwrap_or(Reason::Revoked))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.live.lock().remove(&self.id);
    }
}

impl Connections {
    /// Registers a connection. Its right is to be judged after this, so that no change is missed in between.
    pub fn register(&self, entry: Entry) -> Registration {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (cancel, cancelled) = oneshot::channel();
        self.live.lock().insert(id, Live { entry, opaque: false, cancel });
        Registration { id, registry: self.clone(), cancelled, cut: None }
    }

    /// How many are live.
    pub fn len(&self) -> usize {
        self.live.lock().len()
    }

    /// True where none is live.
    pub fn is_empty(&self) -> bool {
        self.live.lock().is_empty()
    }

    /// Cuts everything from and to a Pod.
    pub fn cut_pod(&self, uid: &WorkloadUid) -> usize {
        self.cut_where(Reason::Revoked, |live| {
            let source = live.entry.source.as_ref().is_some_and(|(source, _)| source == uid);
            source || live.entry.destination.as_ref() == Some(uid)
        })
    }

    /// Cuts what `state` no longer allows.
    pub fn judge_all(&self, state: &MeshState) -> usize {
        let mut known: HashMap<(Judged, WorkloadUid), Option<Outcome>> = HashMap::new();
        self.cut_where(Reason::Revoked, |live| {
            let entry = &live.entry;
            let source_changed = entry
                .source
                .as_ref()
                .is_some_and(|(uid, id)| state.workload(uid).is_none_or(|w| w.identity != *id));
            if source_changed || entry.destination.as_ref().is_some_and(|uid| state.workload(uid).is_none()) {
                return true;
            }
            let (Some(judged), Some(uid)) = (&entry.judged, &entry.destination) else { return false };
            let outcome = *known.entry((judged.clone(), uid.clone())).or_insert_with(|| {
                let caller = judged.source.caller();
                let destination = state.workload(uid)?;
                Some(
                    eval::judge(state, &Access { caller, destination, port: judged.port, protocol: TCP })
                        .outcome,
                )
            });
            match outcome {
                Some(Outcome::Allow) => false,
                Some(Outcome::JudgeHttp) => live.opaque,
                Some(Outcome::Deny) | None => true,
            }
        })
    }

    /// Cuts the connection of an application of this node whose socket has this cookie.
    pub fn cut_connection(&self, cookie: u64, reason: Reason) -> usize {
        self.cut_where(reason, |live| live.entry.connection == Some(cookie))
    }

    /// Cuts what rests on a peer that is no longer proven at `now`: its certificate has expired, and no later
    /// handshake showed a newer one.
    pub fn expire(&self, now: SystemTime) -> usize {
        self.cut_where(Reason::NoCredentials, |live| {
            live.entry.validity.as_ref().is_some_and(|v| v.ended(now))
        })
    }

    /// Cuts what rests on credentials that are gone or expired.
    pub fn check_credentials(&self, credentials: &CredentialReader) -> usize {
        let mut held: HashMap<SpiffeId, bool> = HashMap::new();
        self.cut_where(Reason::Revoked, |live| {
            live.entry.credentials.as_ref().is_some_and(|id| {
                !*held.entry(id.clone()).or_insert_with(|| credentials.current(id).is_some())
            })
        })
    }

    /// Judges all connections after each change, for as long as the state is published: to the end of the drain,
    /// and beyond it while connections are left.
    pub async fn watch(
        self,
        mut state: watch::Receiver<Arc<MeshState>>,
        credentials: CredentialReader,
        drain: DrainWatcher,
    ) {
        let mut drained = false;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !(drained && self.is_empty()) {
            let cut = tokio::select! {
                changed = state.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = state.borrow_and_update().clone();
                    self.judge_all(&now)
                }
                _ = tick.tick() => {
                    self.check_credentials(&credentials) + self.expire(SystemTime::now())
                }
                () = drain.drained(), if !drained => {
                    drained = true;
                    0
                }
            };
            if cut > 0 {
                tracing::info!(connections = cut, "connections were cut: policy, identity or Pods changed");
            }
        }
    }

    fn cut_where(&self, reason: Reason, mut unwanted: impl FnMut(&Live) -> bool) -> usize {
        let mut live = self.live.lock();
        let ids: Vec<u64> = live.iter().filter(|(_, l)| unwanted(l)).map(|(id, _)| *id).collect();
        for id in &ids {
            if let Some(gone) = live.remove(id) {
                // The connection may have ended by itself meanwhile.
                let _ = gone.cancel.send(reason);
            }
        }
        ids.len()
    }
}
