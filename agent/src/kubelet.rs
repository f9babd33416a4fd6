//! Which cgroup the node's kubelet is in. Its probes come from the node's address, which masqueraded traffic and every
//! process of the node have too; only the cgroup of the sending socket tells them apart.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::sync::watch;
use weft_runtime::DrainWatcher;

use crate::{
    datapath::{Datapath, DatapathError, cgroup2_mount, in_the_nodes_cgroups},
    enrolment::chain,
};

/// How often the kubelet is looked at. Until a restarted one is known, its probes are refused.
const LOOK: Duration = Duration::from_secs(3);
/// How long a node of a cluster may be without a kubelet before that is a problem.
const ABSENT: Duration = Duration::from_secs(60);
/// Longest file of `/proc` that is read, in bytes; a cgroup has more processes than fit into a line.
const MAX_FILE: u64 = 256 << 10;
/// Generations between the kubelet and a process it started.
const GENERATIONS: usize = 16;
/// The name of its process.
const NAME: &str = "kubelet";
/// Processes that a message names.
const NAMED: usize = 3;

/// Why a kubelet's probes are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It has no cgroup that would tell it from others.
    #[error(
        "the kubelet (process {pid}) runs in the root cgroup, together with everything: its probes are refused by \
         strict Pods. Run it as a systemd service, or set `kubeletCgroups: /system.slice/kubelet.service` in its \
         configuration, and restart it"
    )]
    Root {
        /// Its process.
        pid: u32,
    },
    /// Others are in its cgroup.
    #[error(
        "the kubelet (process {pid}) shares its cgroup {cgroup} with {others}: its probes are refused by strict Pods. \
         Run it as a systemd service, or set `kubeletCgroups: /system.slice/kubelet.service` in its configuration, \
         and restart it"
    )]
    Shared {
        /// Its process.
        pid: u32,
        /// Where it is.
        cgroup: String,
        /// Some of the others.
        others: String,
    },
    /// The folder of its cgroup was not found.
    #[error(
        "the cgroup {cgroup:?} of the kubelet (process {pid}) is in no cgroup2 mount: its probes are refused by strict \
         Pods. The agent has to see the node's processes and cgroups (hostPID, privileged), and the node needs cgroup2"
    )]
    Hidden {
        /// Its process.
        pid: u32,
        /// Where it says that it is.
        cgroup: String,
    },
    /// There is none.
    #[error(
        "no process named kubelet, of root and outside every Pod, is seen on this node: probes are refused by strict \
         Pods. The agent needs hostPID; a distribution whose kubelet is part of another program is not supported"
    )]
    Absent,
}

/// What is known of the kubelet; a clone sees the same.
#[derive(Debug, Clone)]
pub struct Kubelet {
    found: watch::Receiver<Option<Arc<Problem>>>,
}

impl Kubelet {
    /// Why its probes do not reach strict Pods; `None` where they do, or where there is no kubelet to expect.
    pub fn problem(&self) -> Option<Arc<Problem>> {
        self.found.borrow().clone()
    }
}

/// Keeps the kernel's list of the kubelet's cgroups.
#[derive(Debug)]
pub struct Keeper {
    finder: Finder,
    datapath: Datapath,
    /// Whether a node without a kubelet is a problem.
    expected: bool,
    problem: watch::Sender<Option<Arc<Problem>>>,
    told: BTreeSet<u64>,
    absent: Option<Instant>,
    exempt: Gauge,
    refused: Gauge,
}

impl Keeper {
    /// For a node; `expected` where it is a cluster's, which has a kubelet.
    pub fn new(datapath: Datapath, expected: bool, registry: &mut Registry) -> (Self, Kubelet) {
        let (exempt, refused) = (Gauge::default(), Gauge::default());
        registry.register(
            "weft_kubelet_cgroups",
            "Cgroups whose probes reach Pods beside the proxy",
            exempt.clone(),
        );
        registry.register(
            "weft_kubelet_problem",
            "1 while the kubelet's probes are refused by strict Pods",
            refused.clone(),
        );
        let (problem, found) = watch::channel(None);
        let keeper = Self {
            finder: Finder::new(),
            datapath,
            expected,
            problem,
            told: BTreeSet::new(),
            absent: None,
            exempt,
            refused,
        };
        (keeper, Kubelet { found })
    }

    /// Looks every few seconds, until the drain begins.
    pub async fn run(mut self, drain: DrainWatcher) {
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = drain.draining() => return,
            }
            let looked = tokio::task::spawn_blocking(move || {
                self.look(Instant::now());
                self
            });
            match looked.await {
                Ok(keeper) => self = keeper,
                Err(error) => {
                    tracing::error!(%error, "the kubelet is not looked for any more; restart the agent");
                    return;
                }
            }
        }
    }

    fn look(&mut self, now: Instant) {
        let found = self.finder.find();
        let cgroups: BTreeSet<u64> = found.iter().filter_map(|k| k.as_ref().ok().copied()).collect();
        let problem = match found.iter().find_map(|k| k.as_ref().err().cloned()) {
            Some(problem) => Some(problem),
            None if !found.is_empty() => {
                self.absent = None;
                None
            }
            None => {
                let since = *self.absent.get_or_insert(now);
                (self.expected && now.duration_since(since) >= ABSENT).then_some(Problem::Absent)
            }
        };
        match self.datapath.exempt(&cgroups) {
            Ok(()) => {}
            // The new agent looks for itself.
            Err(DatapathError::Superseded) => return,
            Err(error) => {
                tracing::error!(error = %chain(&error), "the kernel cannot be told the kubelet's cgroup: its probes may be refused");
                return;
            }
        }
        if cgroups != self.told {
            tracing::info!(?cgroups, "probes from these cgroups reach Pods beside the proxy");
        }
        self.exempt.set(i64::try_from(cgroups.len()).unwrap_or(i64::MAX));
        self.refused.set(i64::from(problem.is_some()));
        self.told = cgroups;
        if self.problem.borrow().as_deref() != problem.as_ref() {
            if let Some(problem) = &problem {
                tracing::error!(%problem, "kubelet");
            }
            self.problem.send_replace(problem.map(Arc::new));
        }
    }
}

/// A process, told apart from later ones of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    pid: u32,
    started: u64,
}

/// Looks for kubelets.
#[derive(Debug)]
struct Finder {
    proc: PathBuf,
    /// Whose programs are trusted: root's.
    owner: u32,
    /// Folders where the cgroup2 hierarchy's root may be.
    mounts: Option<Vec<PathBuf>>,
    /// Kubelets seen last time, with where they were and whether they were alone there.
    known: BTreeMap<Process, (String, u64)>,
}

impl Finder {
    fn new() -> Self {
        Self { proc: "/proc".into(), owner: 0, mounts: None, known: BTreeMap::new() }
    }

    /// The cgroup id of each kubelet, or why it is not exempt.
    fn find(&mut self) -> Vec<Result<u64, Problem>> {
        let mut processes: Vec<Process> =
            self.known.keys().copied().filter(|known| self.kubelet(known.pid) == Some(*known)).collect();
        if processes.is_empty() {
            processes = self.scan();
        }
        let before = std::mem::take(&mut self.known);
        let mut found = Vec::new();
        // There a path begins at the hierarchy's root; one that does not leads to no folder that holds the process.
        let places = in_the_nodes_cgroups(|| {
            let mounts = self.mounts.clone().unwrap_or_else(|| mounts(&self.proc));
            processes
                .iter()
                .filter_map(|process| Some((*process, self.place(process.pid)?)))
                .map(|(process, path)| {
                    let folder = mounts.iter().find_map(|mount| holds(mount, &path, process.pid));
                    (process, path, folder)
                })
                .collect::<Vec<_>>()
        });
        for (process, path, folder) in places {
            // What a Pod holds is no kubelet, whatever its name.
            if path.contains("kubepods") {
                continue;
            }
            let judged = self.judge(process.pid, &path, folder, before.get(&process));
            if let Ok(id) = judged {
                self.known.insert(process, (path, id));
            }
            found.push(judged);
        }
        found
    }

    fn judge(
        &self,
        pid: u32,
        path: &str,
        folder: Option<(u64, Vec<u32>)>,
        before: Option<&(String, u64)>,
    ) -> Result<u64, Problem> {
        if path == "/" {
            return Err(Problem::Root { pid });
        }
        let Some((id, members)) = folder else {
            return Err(Problem::Hidden { pid, cgroup: path.into() });
        };
        // Decided once: a helper that outlives its parent for a moment must not fail the node's probes.
        if before.is_some_and(|(then, known)| then == path && *known == id) {
            return Ok(id);
        }
        let others: BTreeSet<String> = members
            .into_iter()
            .filter(|member| !self.descends(*member, pid))
            .filter_map(|member| self.read(member, "comm"))
            .map(|name| name.trim().to_owned())
            .collect();
        if others.is_empty() {
            return Ok(id);
        }
        let others = others.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
        Err(Problem::Shared { pid, cgroup: path.into(), others })
    }

    fn scan(&self) -> Vec<Process> {
        let Ok(entries) = fs::read_dir(&self.proc) else { return Vec::new() };
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(|pid| self.kubelet(pid)).collect()
    }

    /// The process where it is called kubelet, runs as root from a program of root's, and is of the node's own process
    /// namespace.
    fn kubelet(&self, pid: u32) -> Option<Process> {
        if self.read(pid, "comm")?.trim() != NAME {
            return None;
        }
        let folder = self.proc.join(pid.to_string());
        let namespace = |folder: &Path| fs::read_link(folder.join("ns/pid")).ok();
        if namespace(&folder)? != namespace(&self.proc.join("1"))? {
            return None;
        }
        // Real, effective, saved and file system user: proc_pid_status(5).
        let status = self.read(pid, "status")?;
        let mut users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace();
        let trusted = users.all(|user| user.parse() == Ok(self.owner))
            && fs::metadata(folder.join("exe")).ok()?.uid() == self.owner;
        let started = stat(&self.read(pid, "stat")?, 19)?;
        trusted.then_some(Process { pid, started })
    }

    /// Its path in cgroup2.
    fn place(&self, pid: u32) -> Option<String> {
        let text = self.read(pid, "cgroup")?;
        text.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
    }

    fn descends(&self, mut pid: u32, from: u32) -> bool {
        for _ in 0..GENERATIONS {
            if pid == from {
                return true;
            }
            match self.read(pid, "stat").and_then(|text| stat(&text, 1)) {
                Some(parent) if parent > 1 => pid = u32::try_from(parent).unwrap_or_default(),
                // It is gone, or nobody's child.
                Some(_) => return false,
                None => return true,
            }
        }
        false
    }

    fn read(&self, pid: u32, file: &str) -> Option<String> {
        read(&self.proc.join(pid.to_string()).join(file))
    }
}

/// Where the cgroup2 hierarchy is seen from its root: by the node's first process, and by us.
fn mounts(proc: &Path) -> Vec<PathBuf> {
    let tables = [("1/mountinfo", proc.join("1/root")), ("self/mountinfo", PathBuf::from("/"))];
    let point = |(table, root): (&str, PathBuf)| {
        let point = cgroup2_mount(&read(&proc.join(table))?)?;
        Some(root.join(point.trim_start_matches('/')))
    };
    tables.into_iter().filter_map(point).collect()
}

/// The id of the cgroup `path` below `mount`, and its processes, where `pid` is one of them. Its id is its inode.
fn holds(mount: &Path, path: &str, pid: u32) -> Option<(u64, Vec<u32>)> {
    let folder = mount.join(path.trim_start_matches('/'));
    let id = fs::metadata(&folder).ok()?.ino();
    let text = read(&folder.join("cgroup.procs"))?;
    let members: Vec<u32> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    members.contains(&pid).then_some((id, members))
}

fn read(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

/// A field of proc_pid_stat(5), counted from 0 behind the name, which may hold anything.
fn stat(text: &str, field: usize) -> Option<u64> {
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_whitespace().nth(field)?.parse().ok()
}

#[cfg(test)]
mod tests;
