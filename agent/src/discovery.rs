//! Which Pods run on this node, as the container runtime says: their UIDs, names, network namespaces and addresses.
//!
//! Three sources. CRI lists are the truth and are read each second, and at once when the runtime tells of a change. NRI
//! tells of a sandbox before the Pod's first process runs, and the runtime waits for the answer. Where the runtime does
//! not answer at all, Pods are found by their processes.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future::BoxFuture, stream};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, sleep},
};
use weft_core::{MeshState, NamespacedName, WorkloadUid, workload::Mode};
use weft_runtime::{Backoff, DrainWatcher, Tasks};

mod cri;
mod gate;
mod netns;
mod nri;
mod proc;
mod table;
mod verdict;

pub use cri::CriError;
pub use gate::Gate;
pub(crate) use verdict::expected;

use cri::{Cri, List};
use nri::Plugin;
use table::Table;
use verdict::Verdicts;

/// How often the runtime is asked for its list.
const POLL: Duration = Duration::from_secs(1);
/// How long after a change the list is read: changes come in bursts.
const BURST: Duration = Duration::from_millis(50);
/// How long the runtime may be silent at the beginning before Pods are looked for by their processes.
const SILENCE: Duration = Duration::from_secs(5);
/// Sandboxes that are asked about at the same time.
const QUESTIONS: usize = 8;
/// Events on their way.
const EVENTS: usize = 64;
/// Waits between tries to reach a part of the runtime.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Runtime handlers and types whose Pods have a network stack of their own, which no hook of this kernel sees.
const ISOLATING: [&str; 4] = ["gvisor", "runsc", "kata", "firecracker"];
/// The label that asks for a mode.
const MODE: &str = "weft.mesh/mode";

/// What is said where the runtime asks nobody.
const NO_NRI: &str = "there is no NRI socket, so a Pod is noticed only after it has started; switch NRI on in the container runtime (containerd 2 has it on), or see --nri";

/// The network of one Pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// The runtime's id.
    pub id: String,
    /// The Pod's UID, as the kubelet gave it to the runtime.
    pub uid: WorkloadUid,
    /// Namespace and name of the Pod; empty where only its processes are known.
    pub name: NamespacedName,
    /// A path to its network namespace that this process can open.
    pub netns: Option<PathBuf>,
    /// Whether it shares the host's network.
    pub host_network: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// What the Pod's own label asked for when the sandbox began.
    pub mode: Mode,
    /// The runtime handler, where its Pods have a network stack that this kernel does not see (gVisor, Kata).
    pub isolated: Option<String>,
    /// When it was made; comparable among the sandboxes of one Pod.
    pub created: i64,
}

impl Sandbox {
    /// Whether everything is known that enrolment needs.
    fn complete(&self) -> bool {
        self.host_network || (self.netns.is_some() && !self.addresses.is_empty())
    }

    /// A sandbox of which only the network is known. Addresses that the runtime does not tell are those that the
    /// namespace holds. Blocks for a moment.
    fn network(netns: Option<PathBuf>, host_network: bool, told: Vec<IpAddr>) -> Self {
        let mut addresses: Vec<IpAddr> = told.into_iter().filter(netns::usable).collect();
        if addresses.is_empty()
            && !host_network
            && let Some(path) = &netns
        {
            addresses = netns::addresses(path).unwrap_or_default();
        }
        Self {
            id: String::new(),
            uid: "".into(),
            name: NamespacedName::new("", ""),
            netns,
            host_network,
            addresses,
            mode: Mode::Disabled,
            isolated: None,
            created: 0,
        }
    }
}

/// The node's sandboxes that run, by the UID of their Pod.
pub type Sandboxes = BTreeMap<WorkloadUid, Arc<Sandbox>>;

/// What the node made of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// In the mesh: hooks and listeners are in place.
    Enrolled,
    /// Outside the mesh.
    Passed,
    /// Belongs to the mesh and is closed until the operator has described it.
    Held,
    /// Nothing is known of its namespace; it may not reach the mesh.
    Unknown,
    /// Belongs to the mesh and cannot be enrolled: why.
    Refused(String),
}

/// What the node made of its sandboxes, by the runtime's ids.
pub type Placements = HashMap<String, Placement>;

/// Where discovery looks.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The runtime's CRI socket.
    pub cri: PathBuf,
    /// Its NRI socket; `None`: where runtimes have it.
    pub nri: Option<PathBuf>,
    /// The runtime's root folder as this process sees it, e.g. `/proc/1/root`.
    pub host_root: PathBuf,
}

/// The end of discovery that the node holds.
#[derive(Debug, Clone)]
pub struct Discovered {
    /// The sandboxes; `None` until they are known for the first time.
    pub sandboxes: watch::Receiver<Option<Arc<Sandboxes>>>,
    /// What became of them.
    pub placements: watch::Sender<Arc<Placements>>,
    /// Answers the node's CNI plugin.
    pub gate: Gate,
}

impl Discovered {
    /// Waits until the sandboxes are known.
    pub async fn first(&mut self) {
        // It fails only with the end of discovery, which ends the process.
        let _ = self.sandboxes.wait_for(Option::is_some).await;
    }
}

/// What happens to sandboxes.
#[derive(Debug)]
enum Event {
    /// One is being made.
    Began(Box<Sandbox>),
    /// One ended.
    Ended(String),
    /// A whole list; the answer is which of them to ask about.
    Listed(List, oneshot::Sender<Vec<String>>),
    /// The answer to such a question.
    Described(Box<Sandbox>),
    /// Every question about a list is answered.
    Complete,
    /// The runtime is silent; these have processes.
    Scanned(Vec<Sandbox>),
}

/// Starts to discover; until the drain begins the runtime also asks before it starts a Pod.
///
/// # Errors
/// When the socket's path cannot be one. Whether somebody listens there is not tried here.
pub fn start(
    settings: Settings,
    state: watch::Receiver<Arc<MeshState>>,
    tasks: &Tasks,
    drain: &DrainWatcher,
    registry: &mut Registry,
) -> Result<Discovered, CriError> {
    let cri = Cri::new(&settings.cri, &settings.host_root)?;
    let (known, sandboxes) = watch::channel(None);
    let placements = watch::Sender::new(Arc::default());
    let (events, queue) = mpsc::channel(EVENTS);
    let asked = Gauge::<i64>::default();
    registry.register(
        "weft_nri_registered",
        "Whether the container runtime asks the agent before it starts a Pod",
        asked.clone(),
    );
    let changed = Arc::new(Notify::new());
    let verdicts = Verdicts { placements: placements.subscribe(), state };
    let gate = Gate { root: settings.host_root.clone(), events: events.clone(), verdicts: verdicts.clone() };
    let plugin = Plugin { root: settings.host_root.clone(), events: events.clone(), verdicts };
    let until_drained = |work: BoxFuture<'static, ()>| {
        let drain = drain.clone();
        async move {
            tokio::select! {
                () = work => {}
                () = drain.drained() => {}
            }
        }
    };
    let vital = |name, work| {
        let work = until_drained(work);
        tasks.vital(name, async move {
            work.await;
            Ok(())
        });
    };
    vital("sandboxes", Box::pin(keep(queue, known)));
    vital("cri", Box::pin(list(cri.clone(), events, changed.clone())));
    // A runtime may have none: the list is read each second all the same.
    tasks.spawn("cri-events", until_drained(Box::pin(watch_events(cri, changed))));
    let draining = drain.clone();
    tasks.spawn("nri", async move {
        // The successor answers from then on.
        tokio::select! {
            () = register(plugin, settings, asked.clone()) => {}
            () = draining.draining() => {}
        }
        asked.set(0);
    });
    Ok(Discovered { sandboxes, placements, gate })
}

/// Keeps the table, alone.
async fn keep(mut queue: mpsc::Receiver<Event>, known: watch::Sender<Option<Arc<Sandboxes>>>) {
    let mut table = Table::default();
    let mut complete = false;
    while let Some(event) = queue.recv().await {
        let now = Instant::now();
        match event {
            Event::Began(sandbox) => {
                table.ended(&early(&sandbox.id));
                table.began(*sandbox, now);
            }
            Event::Ended(id) => {
                table.ended(&early(&id));
                table.ended(&id);
            }
            Event::Listed(list, open) => {
                // Whoever does not wait any more asks again.
                let _ = open.send(table.listed(&list.listed(), now));
            }
            Event::Described(sandbox) => table.described(*sandbox, now),
            Event::Complete => complete = true,
            Event::Scanned(found) => {
                let list: Vec<_> = found.iter().map(|s| table::Listed { id: &s.id, ready: true }).collect();
                table.listed(&list, now);
                found.into_iter().for_each(|sandbox| table.described(sandbox, now));
                complete = true;
            }
        }
        if complete {
            let sandboxes = table.sandboxes();
            known.send_if_modified(|known| {
                let changed = known.as_deref() != Some(&sandboxes);
                if changed {
                    *known = Some(Arc::new(sandboxes));
                }
                changed
            });
        }
    }
}

/// Reads the runtime's list, each second and after each change.
async fn list(cri: Cri, events: mpsc::Sender<Event>, changed: Arc<Notify>) {
    let began = Instant::now();
    let mut tick = interval(POLL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut answered, mut silent) = (false, false);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = changed.notified() => sleep(BURST).await,
        }
        match round(&cri, &events).await {
            Ok(true) => {
                if !answered || silent {
                    let runtime = cri.version().await.unwrap_or_default();
                    tracing::info!(runtime, "the container runtime tells of the node's Pods");
                }
                (answered, silent) = (true, false);
            }
            Ok(false) => return,
            Err(error) => {
                if !silent {
                    tracing::warn!(%error, "the node's Pods are not known anew; those that are known stay as they are");
                }
                silent = true;
                if !answered && began.elapsed() > SILENCE && !by_process(&events).await {
                    return;
                }
            }
        }
    }
}

/// Reads the list once and asks about what is new in it; false where nobody listens any more.
async fn round(cri: &Cri, events: &mpsc::Sender<Event>) -> Result<bool, CriError> {
    let list = cri.list().await?;
    let (reply, open) = oneshot::channel();
    if events.send(Event::Listed(list, reply)).await.is_err() {
        return Ok(false);
    }
    let Ok(open) = open.await else { return Ok(false) };
    let mut answers = stream::iter(open)
        .map(|id| async move {
            let answer = cri.sandbox(&id).await;
            (id, answer)
        })
        .buffer_unordered(QUESTIONS);
    let mut failed = None;
    while let Some((id, answer)) = answers.next().await {
        match answer {
            Ok(Some(sandbox)) => {
                if events.send(Event::Described(Box::new(sandbox))).await.is_err() {
                    return Ok(false);
                }
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(id, %error, "a sandbox is not described");
                failed = Some(error);
            }
        }
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(events.send(Event::Complete).await.is_ok()),
    }
}

async fn by_process(events: &mpsc::Sender<Event>) -> bool {
    match tokio::task::spawn_blocking(|| proc::scan(Path::new("/proc"))).await {
        Ok(found) => events.send(Event::Scanned(found)).await.is_ok(),
        Err(_) => false,
    }
}

/// Tells of every change that the runtime tells of, where it does.
async fn watch_events(cri: Cri, changed: Arc<Notify>) {
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    loop {
        match cri.events().await {
            Ok(Some(mut events)) => {
                backoff.reset();
                while let Ok(Some(_)) = events.message().await {
                    changed.notify_one();
                }
            }
            Ok(None) => return,
            Err(error) => tracing::debug!(%error, "no events of the container runtime"),
        }
        sleep(backoff.next()).await;
    }
}

/// Keeps the plugin registered.
async fn register(plugin: Plugin, settings: Settings, registered: Gauge) {
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    let mut last = String::new();
    loop {
        let problem = match nri_socket(&settings) {
            None => NO_NRI.to_owned(),
            Some(socket) => {
                let began = |version: &str| {
                    tracing::info!(socket = %socket.display(), version, "the container runtime asks before it starts a Pod");
                    registered.set(1);
                };
                let end = plugin.run(&socket, began).await;
                if registered.set(0) == 1 {
                    backoff.reset();
                    last.clear();
                }
                end.map_or_else(|error| crate::enrolment::chain(&error), |never| match never {})
            }
        };
        // Said once for each problem.
        if problem != last {
            tracing::warn!(
                problem,
                "the container runtime does not ask before it starts a Pod; trying again"
            );
            last = problem;
        }
        sleep(backoff.next()).await;
    }
}

/// Where the NRI socket is: as given, beside the CRI socket's folder (`/run/containerd`, `/run/nri`), or in the host's.
fn nri_socket(settings: &Settings) -> Option<PathBuf> {
    if let Some(given) = &settings.nri {
        return given.exists().then(|| given.clone());
    }
    let beside = settings.cri.parent().and_then(Path::parent).map(|run| run.join("nri/nri.sock"));
    let host = ["run/nri/nri.sock", "var/run/nri/nri.sock"].map(|path| settings.host_root.join(path));
    beside.into_iter().chain(host).find(|path| path.exists())
}

/// The runtime handler, where it keeps its Pods' network from this kernel.
fn isolation(handler: &str, kind: Option<&str>) -> Option<String> {
    let isolating = |name: &str| {
        let name = name.to_ascii_lowercase();
        ISOLATING.iter().any(|i| name.contains(i))
    };
    let named = [Some(handler), kind].into_iter().flatten().find(|name| isolating(name))?;
    Some(if handler.is_empty() { named } else { handler }.to_owned())
}

/// A UID that may become part of a path.
fn uid(text: &str) -> Option<WorkloadUid> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    ((1..=64).contains(&text.len()) && text.bytes().all(plain)).then(|| text.into())
}

/// The id of a sandbox while only the CNI plugin has told of it.
fn early(id: &str) -> String {
    format!("cni:{id}")
}

/// The mode that a Pod's labels ask for; it may only tighten its namespace's.
fn asked<S: std::hash::BuildHasher>(labels: &HashMap<String, String, S>) -> Mode {
    match labels.get(MODE).map(String::as_str) {
        Some("strict") => Mode::Strict,
        Some("permissive") => Mode::Permissive,
        _ => Mode::Disabled,
    }
}

#[cfg(test)]
pub(crate) mod tests;
