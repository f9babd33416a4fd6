//! The guard on the node: what holds Pods of the mesh that start while no agent runs, after a reboot too.
//!
//! It is a CNI plugin (crate `weft-cni`) at the end of the node's CNI chain. The agent puts it there, answers it while it
//! runs itself, and writes down for it which namespaces are in the mesh.

use std::{
    collections::BTreeMap,
    future::ready,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt as _, stream};
use inotify::{Inotify, WatchMask};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::{sync::watch, time::sleep};
use weft_cni::list::{FailMode, List, Mode, Namespace};
use weft_core::{MeshConfig, MeshState, workload};
use weft_runtime::{DrainWatcher, Tasks};

use crate::{discovery::Gate, enrolment::chain, files};

mod conf;
mod install;
mod serve;

pub use install::{Problem, remove};

use install::Installer;

/// The list's name in the state folder.
const LIST: &str = "namespaces.json";
/// How often the guard is looked at without a sign of a change.
const LOOK: Duration = Duration::from_secs(5);
/// How long changes of the folder are collected.
const BURST: Duration = Duration::from_millis(50);

/// Where the guard is. Paths are the node's own, which the agent sees as they are or has mounted there.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The folder of the node's CNI configuration, as the agent sees it.
    pub conf_dir: PathBuf,
    /// The folder of the node's CNI plugins, as the agent sees it.
    pub bin_dir: PathBuf,
    /// The folder of the list, on the node's disk; the same path for both.
    pub state_dir: PathBuf,
    /// The socket at which the agent answers; the same path for both.
    pub socket: PathBuf,
    /// The plugin's program in the agent's image.
    pub program: PathBuf,
}

impl Settings {
    fn list(&self) -> PathBuf {
        self.state_dir.join(LIST)
    }
}

/// What is known of the guard; a clone sees the same.
#[derive(Debug, Clone)]
pub struct Guard {
    problem: watch::Receiver<Option<Arc<str>>>,
}

impl Guard {
    /// Why Pods that start while no agent runs are not held; `None` where they are, or where nobody asked for it.
    pub fn problem(&self) -> Option<Arc<str>> {
        self.problem.borrow().clone()
    }
}

/// Answers the guard at `socket`, and installs it where `settings` say so, until the drain begins.
///
/// # Errors
/// When the socket cannot be made.
pub fn start(
    socket: &Path,
    gate: Gate,
    settings: Option<Settings>,
    state: watch::Receiver<Arc<MeshState>>,
    tasks: &Tasks,
    drain: &DrainWatcher,
    registry: &mut Registry,
) -> io::Result<Guard> {
    let listener = files::listen(socket)?;
    let draining = drain.clone();
    tasks.spawn("cni-questions", async move {
        let answer = |question| gate.answer(question);
        // Hanging up, so that the plugin asks the successor.
        tokio::select! {
            () = serve::serve(listener, answer) => {}
            () = draining.draining() => {}
        }
    });
    let (told, problem) = watch::channel(None);
    if let Some(settings) = settings {
        let installed = Gauge::<i64>::default();
        registry.register(
            "weft_cni_guard_installed",
            "Whether Pods of the mesh that start while no agent runs are held on this node",
            installed.clone(),
        );
        let keeper = Keeper { installer: Installer::new(settings.clone()), settings, told, installed };
        let draining = drain.clone();
        tasks.spawn("cni-guard", async move {
            tokio::select! {
                () = keeper.run(state) => {}
                () = draining.draining() => {}
            }
        });
    }
    Ok(Guard { problem })
}

/// Keeps list and plugin.
struct Keeper {
    settings: Settings,
    installer: Installer,
    told: watch::Sender<Option<Arc<str>>>,
    installed: Gauge,
}

impl Keeper {
    async fn run(mut self, mut state: watch::Receiver<Arc<MeshState>>) {
        let mut signs = pin!(signs(&self.settings.conf_dir));
        let mut written: Option<Arc<MeshConfig>> = None;
        loop {
            let config = state.borrow_and_update().config().cloned();
            // Most changes of the mesh leave the namespaces as they are.
            let new = config.filter(|c| !written.as_ref().is_some_and(|w| w.namespaces == c.namespaces));
            let list = new.as_deref().map(namespaces);
            let work = tokio::task::spawn_blocking(move || {
                let outcome = self.look(list.as_ref());
                (self, outcome)
            });
            let Ok((this, (kept, outcome))) = work.await else { return };
            self = this;
            if kept && new.is_some() {
                written = new;
            }
            self.tell(outcome);
            tokio::select! {
                changed = changed(&mut state, written.as_deref()) => if !changed { return },
                _ = signs.next() => sleep(BURST).await,
                () = sleep(LOOK) => {}
            }
        }
    }

    /// Writes the list where it is new, then looks after the plugin: whether the list is written, and whether anything of
    /// the plugin was. Nothing is installed on a node before its first list: until then the plugin holds nothing.
    fn look(&mut self, list: Option<&List>) -> (bool, Result<bool, Problem>) {
        let path = self.settings.list();
        if let Some(list) = list
            && let Err(problem) = write(&path, list)
        {
            return (false, Err(problem));
        }
        let outcome = if path.exists() { self.installer.install(Instant::now()) } else { Ok(false) };
        (true, outcome)
    }

    fn tell(&self, outcome: Result<bool, Problem>) {
        let known = self.told.borrow().clone();
        match outcome {
            Ok(wrote) => {
                if wrote || known.is_some() {
                    let folder = self.settings.conf_dir.display();
                    tracing::info!(%folder, "Pods of the mesh that start while no agent runs will be held");
                }
                self.installed.set(i64::from(self.settings.list().exists()));
                self.told.send_if_modified(|told| told.take().is_some());
            }
            Err(problem) => {
                let problem: Arc<str> =
                    format!("a strict Pod that starts while no agent runs is not held: {}", chain(&problem))
                        .into();
                self.installed.set(0);
                if known.as_ref() != Some(&problem) {
                    tracing::error!(%problem, "the guard is not as it should be; trying again");
                    self.told.send_replace(Some(problem));
                }
            }
        }
    }
}

/// Waits for a configuration with other namespaces; false when there will be none.
async fn changed(state: &mut watch::Receiver<Arc<MeshState>>, written: Option<&MeshConfig>) -> bool {
    let other = |state: &Arc<MeshState>| {
        state.config().is_some_and(|c| written.is_none_or(|w| w.namespaces != c.namespaces))
    };
    match state.changed().await {
        Err(_) => false,
        Ok(()) => state.wait_for(other).await.is_ok(),
    }
}

fn write(path: &Path, list: &List) -> Result<(), Problem> {
    let failed = |source| Problem::File { path: path.into(), done: "written", source };
    if let Some(folder) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    }
    let content = serde_json::to_vec(list).map_err(|e| failed(e.into()))?;
    files::replace(path, &content).map_err(failed)
}

fn namespaces(config: &MeshConfig) -> List {
    let one = |namespace: &weft_core::config::NamespaceMode| Namespace {
        mode: match namespace.mode {
            workload::Mode::Disabled => Mode::Disabled,
            workload::Mode::Permissive => Mode::Permissive,
            workload::Mode::Strict => Mode::Strict,
        },
        fail_mode: match namespace.fail_mode {
            workload::FailMode::Closed => FailMode::Closed,
            workload::FailMode::Open => FailMode::Open,
        },
    };
    let all: BTreeMap<_, _> = config.namespaces.iter().map(|(name, n)| (name.to_string(), one(n))).collect();
    List { namespaces: all }
}

/// An item for each change of the folder; none where it cannot be watched, which the regular look makes up for.
fn signs(folder: &Path) -> impl Stream<Item = ()> + use<> {
    let watched = || -> io::Result<inotify::EventStream<Vec<u8>>> {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVE | WatchMask::DELETE | WatchMask::ATTRIB;
        inotify.watches().add(folder, mask)?;
        inotify.into_event_stream(vec![0; 4096])
    };
    let events = match watched() {
        Ok(events) => events.filter_map(|event| ready(event.ok().map(drop))).left_stream(),
        Err(error) => {
            tracing::warn!(%error, folder = %folder.display(), "changes of the CNI configuration are seen some seconds late");
            stream::empty().right_stream()
        }
    };
    events.chain(stream::pending())
}

#[cfg(test)]
mod tests;
