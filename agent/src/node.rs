//! The node's state machine: takes configuration, brings kernel, proxy and Pods to it in a safe order.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::sync::{mpsc, oneshot, watch};
use weft_core::{Delta, MeshState, NamespacedName, ResourceKey, Version};
use weft_identity::CredentialManager;
use weft_runtime::{DrainWatcher, ReadyGuard};

use crate::{
    datapath::{AttachmentStatus, Datapath, Tables},
    discovery::Sandboxes,
    enrolment::{self, Enrolment, LocalPod, chain},
    flow::FlowStore,
    issuers::Issuers,
    snapshot,
};

mod revocation;

pub use revocation::denied;

/// How often attachments are looked at, failed Pods are tried again, ring losses are noted and sockets given back.
const TICK: Duration = Duration::from_secs(1);
/// How long a snapshot that could not be written waits for another try.
const KEEP_AGAIN: Duration = Duration::from_secs(5);
/// How long a takeover waits for credentials.
const CREDENTIALS_WAIT: Duration = Duration::from_secs(10);

/// What the node is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Go to the state after `delta`; [`NodeStatus::version`] says when it is enforced.
    Apply {
        /// The change.
        delta: Delta,
        /// Resources that could not be read: their last good form goes on.
        keep: Vec<ResourceKey>,
        /// Whether it comes from the operator (and not from the snapshot).
        live: bool,
    },
    /// Another agent is taking over: leave the kernel alone.
    Pause(oneshot::Sender<()>),
    /// It went away without taking over: everything is ours again.
    Resume,
}

/// What others may know of the node.
#[derive(Debug, Clone, Default)]
pub struct NodeStatus {
    /// The version that is enforced.
    pub version: Version,
    /// When it last changed.
    pub changed: Option<SystemTime>,
    /// Why the newest configuration is not enforced.
    pub problem: Option<String>,
    /// Why the newest configuration is not kept for a restart.
    pub unkept: Option<String>,
    /// The Pods.
    pub pods: Vec<LocalPod>,
    /// The programs.
    pub attachments: Vec<AttachmentStatus>,
}

/// What is seen by the rest of the agent.
#[derive(Debug, Clone)]
pub struct Published {
    /// The state.
    pub state: watch::Sender<Arc<MeshState>>,
    /// The names of the policies that kernel events number.
    pub policies: watch::Sender<Arc<Vec<NamespacedName>>>,
    /// How the node is.
    pub status: watch::Sender<Arc<NodeStatus>>,
}

/// The readiness that the node tells of.
#[derive(Debug, Default)]
pub struct Guards {
    /// A configuration is enforced.
    pub config: Option<ReadyGuard>,
    /// The programs are attached.
    pub datapath: Option<ReadyGuard>,
    /// Every identity of the node has a credential.
    pub credentials: Option<ReadyGuard>,
}

/// The node.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its kernel side.
    pub datapath: Datapath,
    /// Its Pods.
    pub enrolment: Enrolment,
    /// Its credentials.
    pub credentials: CredentialManager,
    /// Where they come from.
    pub issuers: Issuers,
    /// Its flows, which learn of losses.
    pub flows: FlowStore,
    /// Where its state goes.
    pub published: Published,
    /// Where its snapshot goes.
    pub snapshot: PathBuf,
    /// Ends its work on the kernel.
    pub drain: DrainWatcher,
    /// What waits for it.
    pub guards: Guards,
    /// Its own counters.
    pub metrics: Metrics,
    /// Where it stands.
    pub progress: Progress,
}

/// Counters of the node.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    repairs: Counter,
    lost: Counter,
    applied: Counter,
    failed: Counter,
    unkept: Counter,
    revoked: Counter,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "weft_attachment_repairs",
            "Programs that were attached again",
            metrics.repairs.clone(),
        );
        registry.register(
            "weft_kernel_events_lost",
            "Events that found no room in the kernel's ring",
            metrics.lost.clone(),
        );
        registry.register("weft_config_changes", "Configuration changes enforced", metrics.applied.clone());
        registry.register(
            "weft_config_failures",
            "Configuration changes that could not be enforced at once",
            metrics.failed.clone(),
        );
        registry.register(
            "weft_snapshot_failures",
            "Configuration changes that could not be kept for a restart",
            metrics.unkept.clone(),
        );
        registry.register(
            "weft_kernel_connections_revoked",
            "Connections beside the proxy that were ended because policy or a Pod's mode changed",
            metrics.revoked.clone(),
        );
        metrics
    }
}

impl Progress {
    /// At the beginning; `takeover` where another agent serves still.
    pub fn new(takeover: bool) -> Self {
        Self { takeover, ..Self::default() }
    }
}

/// Where the node stands.
#[derive(Debug, Default)]
pub struct Progress {
    paused: bool,
    swept: bool,
    /// The state is published but not in the kernel yet.
    pending: Option<Version>,
    /// What passes beside the proxy was looked at since what is enforced last changed. A new agent does not know: the one
    /// before may have died in between.
    revoked: bool,
    /// Another agent serves until this one has taken over.
    takeover: bool,
    lost: Option<u64>,
    /// Losses that are to be recorded by the next tick.
    unrecorded: u64,
    repairs: u64,
    /// When the snapshot, which could not be written, is tried again.
    keep_again: Option<Instant>,
}

/// Runs the node until the commands end. Work on the kernel runs on the blocking pool.
///
/// # Errors
/// When the work panicked.
pub async fn run(
    mut node: Node,
    mut commands: mpsc::Receiver<Command>,
) -> Result<(), tokio::task::JoinError> {
    let mut sandboxes = node.enrolment.sandboxes();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let work = tokio::select! {
            command = commands.recv() => match command {
                Some(command) => Work::Command(command),
                None => return Ok(()),
            },
            () = changed(&mut sandboxes) => Work::Sandboxes,
            _ = tick.tick() => Work::Tick,
        };
        node = tokio::task::spawn_blocking(move || {
            match work {
                Work::Command(command) => node.handle(command),
                Work::Sandboxes => node.look(),
                Work::Tick => node.tick(),
            }
            node
        })
        .await?;
    }
}

/// What the node does next.
enum Work {
    Command(Command),
    Sandboxes,
    Tick,
}

/// Waits for a change of the node's sandboxes.
async fn changed(sandboxes: &mut Option<watch::Receiver<Option<Arc<Sandboxes>>>>) {
    let ended = match sandboxes {
        Some(sandboxes) => sandboxes.changed().await.is_err(),
        None => true,
    };
    if ended {
        std::future::pending::<()>().await;
    }
}

impl Node {
    fn handle(&mut self, command: Command) {
        match command {
            Command::Apply { delta, keep, live } => self.apply(delta, &keep, live),
            Command::Pause(done) => {
                self.progress.paused = true;
                tracing::info!("another agent is taking over: the kernel is left alone");
                let _ = done.send(());
            }
            Command::Resume => {
                self.progress.paused = false;
                tracing::warn!("the other agent went away without taking over: enrolling every Pod again");
                let state = self.published.state.borrow().clone();
                if state.config().is_some() {
                    self.enforce(&state, true);
                }
            }
        }
        self.publish_status();
    }

    /// Whether the kernel is another agent's now.
    fn retired(&self) -> bool {
        self.progress.paused || self.drain.is_draining()
    }

    fn apply(&mut self, mut delta: Delta, keep: &[ResourceKey], live: bool) {
        let before = self.published.state.borrow().clone();
        if delta.full && !keep.is_empty() {
            delta.upserted.extend(before.to_delta().upserted.into_iter().filter(|r| keep.contains(&r.key())));
        }
        let state = Arc::new(before.apply(&delta));
        if let Some(config) = state.config() {
            // First: a signature is asked of nobody who is not the issuer.
            self.issuers.choose(&config.issuer);
        }
        self.credentials.want(enrolment::identities(&state, &self.name));
        if let Some(config) = state.config() {
            self.flows.resize(usize::try_from(config.telemetry.flow_capacity).unwrap_or(usize::MAX));
        }
        self.progress.pending = Some(state.version());
        if self.retired() {
            // The proxy's connections still learn of policy; the other agent answers for the kernel.
            self.published.state.send_replace(state);
            return;
        }
        if std::mem::take(&mut self.progress.takeover) && !self.credentials_held() {
            tracing::warn!("taking over without every credential; their Pods are refused until these come");
        }
        self.enforce(&state, false);
        if live && !self.progress.swept && self.progress.pending.is_none() {
            self.progress.swept = self.sweep();
        }
    }

    /// Waits until every wanted identity has a credential: listeners that are taken over before would refuse.
    fn credentials_held(&self) -> bool {
        let deadline = Instant::now() + CREDENTIALS_WAIT;
        loop {
            if self.held() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether every Pod's identity has a credential. The node's own is for its own network, where all goes on without.
    fn held(&self) -> bool {
        self.credentials.status().iter().all(|s| s.not_after.is_some() || s.id.as_node().is_some())
    }

    /// Kernel first, so that nothing new is let through before its rows are there; then the proxy; then the Pods.
    fn enforce(&mut self, state: &Arc<MeshState>, anew: bool) {
        let tables = Tables::compile(state, &self.name);
        self.published.policies.send_replace(Arc::new(tables.policies.clone()));
        let reconciled = self.datapath.reconcile(&tables);
        self.published.state.send_replace(state.clone());
        let tightened = self.enrolment.reconcile(state, anew);
        let changes = match reconciled {
            Ok(changes) => changes,
            Err(error) => {
                let problem = chain(&error);
                self.metrics.failed.inc();
                tracing::error!(version = %state.version(), %problem, "the kernel's maps are not as they should be; trying again");
                self.progress.pending = Some(state.version());
                self.published.status.send_modify(|s| Arc::make_mut(s).problem = Some(problem));
                return;
            }
        };
        tracing::debug!(version = %state.version(), inserted = changes.inserted, removed = changes.removed, "enforced");
        self.progress.revoked &= !tightened && changes.inserted + changes.removed == 0;
        if !self.progress.revoked {
            self.revoke(state);
        }
        self.progress.pending = None;
        self.metrics.applied.inc();
        self.published.status.send_modify(|s| {
            let s = Arc::make_mut(s);
            (s.version, s.changed, s.problem) = (state.version(), Some(SystemTime::now()), None);
        });
        self.keep(state);
        if let Some(guard) = self.guards.config.take() {
            guard.ready();
        }
    }

    /// Keeps the state for a restart; a folder that is full is tried again, since no other change may come for long.
    fn keep(&mut self, state: &MeshState) {
        let unkept = snapshot::store(&self.snapshot, state).err().map(|error| chain(&error));
        self.progress.keep_again = unkept.as_ref().map(|_| Instant::now() + KEEP_AGAIN);
        let known = self.published.status.borrow().unkept.clone();
        if let Some(problem) = &unkept {
            self.metrics.unkept.inc();
            if known.is_none() {
                tracing::error!(%problem, "a restart without the operator would begin with older configuration; trying again");
            }
        } else if known.is_some() {
            tracing::info!("the configuration is kept for a restart again");
        }
        if known != unkept {
            self.published.status.send_modify(|s| Arc::make_mut(s).unkept = unkept);
        }
    }

    fn sweep(&self) -> bool {
        let Some(kept) = self.enrolment.kept() else { return false };
        match self.datapath.sweep(&kept) {
            Ok(0) => true,
            Ok(swept) => {
                tracing::info!(swept, "what belonged to Pods that are gone was removed");
                true
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "what belongs to Pods that are gone cannot be removed yet");
                false
            }
        }
    }

    fn tick(&mut self) {
        self.note_losses();
        self.datapath.give_back();
        if self.guards.config.is_none()
            && self.guards.credentials.is_some()
            && self.held()
            && let Some(guard) = self.guards.credentials.take()
        {
            guard.ready();
        }
        if !self.retired() {
            self.check();
            let state = self.published.state.borrow().clone();
            let known = state.config().is_some();
            if self.progress.pending.is_some() && known {
                self.enforce(&state, false);
            } else if self.enrolment.incomplete() || (known && !self.progress.revoked) {
                self.bring(&state);
            }
            if self.progress.keep_again.is_some_and(|at| Instant::now() >= at) {
                self.keep(&state);
            }
        }
        self.publish_status();
    }

    /// The node's sandboxes changed.
    fn look(&mut self) {
        // Until this agent has taken over, the other one's Pods are left to it.
        if self.retired() || self.progress.takeover {
            return;
        }
        let state = self.published.state.borrow().clone();
        self.bring(&state);
        self.publish_status();
    }

    /// Brings the Pods to what `state` wants; its tables are in the kernel already.
    fn bring(&mut self, state: &MeshState) {
        self.progress.revoked &= !self.enrolment.reconcile(state, false);
        if !self.progress.revoked {
            self.revoke(state);
        }
    }

    fn check(&mut self) {
        let attachments = self.datapath.check();
        let repairs: u64 = attachments.iter().map(|a| a.repairs).sum();
        self.metrics.repairs.inc_by(repairs.saturating_sub(self.progress.repairs));
        self.progress.repairs = repairs;
        for broken in attachments.iter().filter(|a| !a.healthy) {
            let problem = broken.problem.as_deref().unwrap_or_default();
            tracing::error!(program = broken.program, at = %broken.attached_to, problem, "is not attached");
        }
        if attachments.iter().all(|a| a.healthy)
            && let Some(guard) = self.guards.datapath.take()
        {
            guard.ready();
        }
        self.published.status.send_modify(|s| Arc::make_mut(s).attachments = attachments);
    }

    fn note_losses(&mut self) {
        let Ok(stats) = self.datapath.stats() else { return };
        let Some((_, lost)) = stats.into_iter().find(|(name, _)| *name == "ring_lost") else { return };
        // What an earlier agent lost is not this one's news.
        let before = self.progress.lost.replace(lost).unwrap_or(lost);
        let new = lost.saturating_sub(before);
        self.metrics.lost.inc_by(new);
        // What the full ring still held came before the loss, and could push its record out of the flows at once: a
        // tick later it has been read.
        let record = std::mem::replace(&mut self.progress.unrecorded, new);
        self.flows.lost_in_kernel(record, SystemTime::now());
    }

    fn publish_status(&self) {
        let pods = self.enrolment.status();
        self.published.status.send_modify(|s| Arc::make_mut(s).pods = pods);
    }
}

#[cfg(test)]
mod tests;
