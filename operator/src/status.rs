//! Conditions of the objects, and where they are written.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use futures_util::future::BoxFuture;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use tokio::{sync::watch, time::sleep};
use weft_core::{NamespacedName, ResourceKey};
use weft_runtime::DrainWatcher;

use crate::{
    controller::Overview,
    distribution::{Distribution, nodes::NodeState},
    index::{Finding, Report},
    objects::{Kind, ObjectKey},
};

/// The pause after a write, as a multiple of what the write took.
const PAUSE: u32 = 3;
/// Nodes that a message names.
const NAMED: usize = 5;

/// A condition, as in Kubernetes; times have milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the fields of metav1.Condition")]
pub struct Condition {
    pub r#type: &'static str,
    pub status: &'static str,
    pub reason: String,
    pub message: String,
    pub observed_generation: i64,
    pub last_transition_time: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary<'a> {
    epoch: u64,
    sequence: u64,
    nodes: Vec<NodeLine<'a>>,
    objects: Vec<ObjectLine<'a>>,
    unreadable: &'a BTreeMap<Arc<str>, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeLine<'a> {
    node: &'a str,
    connected: bool,
    version: Option<weft_core::Version>,
    agent_version: &'a str,
    rejected: &'a [(String, String)],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ObjectLine<'a> {
    api_version: &'static str,
    kind: &'static str,
    namespace: &'a str,
    name: &'a str,
    file: &'a str,
    generation: i64,
    conditions: &'a [Condition],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StatusFile<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: Meta<'a>,
    status: Conditions<'a>,
}

#[derive(Serialize)]
struct Meta<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    namespace: &'a str,
}

#[derive(Serialize)]
struct Conditions<'a> {
    conditions: &'a [Condition],
}

/// Writes what becomes of the objects to where users see it.
pub(crate) trait WriteStatus: Send {
    /// Writes after every change of an object and every ack, until the process drains.
    fn run(
        self: Box<Self>,
        overview: watch::Receiver<Arc<Overview>>,
        distribution: Arc<Distribution>,
        drain: DrainWatcher,
    ) -> BoxFuture<'static, ()>;
}

impl WriteStatus for StatusWriter {
    fn run(
        self: Box<Self>,
        overview: watch::Receiver<Arc<Overview>>,
        distribution: Arc<Distribution>,
        drain: DrainWatcher,
    ) -> BoxFuture<'static, ()> {
        Box::pin((*self).follow(overview, distribution, drain))
    }
}

/// Writes status into a folder: one file per object of the kinds that carry status (and per object of any kind that
/// is not well), and `summary.json`.
#[derive(Debug)]
pub(crate) struct StatusWriter {
    dir: PathBuf,
    /// When a condition took its present status.
    since: HashMap<(ObjectKey, &'static str), (&'static str, String)>,
    /// What each file holds.
    written: BTreeMap<String, String>,
    problem: Option<String>,
}

impl StatusWriter {
    /// Over the folder, which is made, and emptied of files of an earlier process.
    pub(crate) fn new(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.path().extension().is_some_and(|e| e == "yaml") {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { dir, since: HashMap::new(), written: BTreeMap::new(), problem: None })
    }

    async fn follow(
        mut self,
        mut overview: watch::Receiver<Arc<Overview>>,
        distribution: Arc<Distribution>,
        drain: DrainWatcher,
    ) {
        let mut nodes = distribution.nodes.changed();
        loop {
            // Marked as seen before they are read: what changes in between is written in the next round.
            let now = Arc::clone(&overview.borrow_and_update());
            nodes.borrow_and_update();
            let begin = Instant::now();
            if now.version.sequence > 0 {
                self.write(&now, &distribution.nodes.states());
            }
            // A thousand acks of one change are one row of writes that leaves most of a core to the rest.
            tokio::select! {
                () = drain.draining() => return,
                () = sleep(begin.elapsed() * PAUSE) => {}
            }
            tokio::select! {
                () = drain.draining() => return,
                changed = overview.changed() => if changed.is_err() { return },
                changed = nodes.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Writes what is different from what was written.
    pub(crate) fn write(&mut self, overview: &Overview, states: &BTreeMap<String, NodeState>) {
        let time = format!("{:.3}", Timestamp::now());
        let mut all: BTreeMap<&ObjectKey, Vec<Condition>> = BTreeMap::new();
        let mut progress = Progress::new(overview, states);
        for (key, (report, since)) in &overview.objects {
            all.insert(key, self.conditions(key, report, since.sequence, &mut progress, &time));
        }
        self.since.retain(|(key, _), _| overview.objects.contains_key(key));
        let mut files = BTreeMap::new();
        for (key, conditions) in &all {
            let carries = matches!(
                key.kind,
                Kind::AuthorizationPolicy | Kind::TrafficPolicy | Kind::MeshConfig | Kind::HttpRoute
            );
            if carries || conditions.iter().any(|c| c.status != "True") {
                let namespace =
                    if key.namespace.is_empty() { String::new() } else { format!("{}-", key.namespace) };
                let name = format!("{}-{namespace}{}.yaml", key.kind.as_str(), key.name);
                files.insert(name, status_file(key, conditions));
            }
        }
        for (place, message) in &overview.unreadable {
            files.insert(format!("File-{place}.yaml"), unreadable_file(place, message));
        }
        let objects = (all.iter())
            .map(|(key, conditions)| ObjectLine {
                api_version: key.kind.api_version(),
                kind: key.kind.as_str(),
                namespace: &key.namespace,
                name: &key.name,
                file: overview.objects.get(*key).map_or("", |(r, _)| &r.origin),
                generation: overview.objects.get(*key).map_or(0, |(r, _)| r.generation),
                conditions,
            })
            .collect();
        let unknown = NodeState::default();
        let names: BTreeSet<&String> = overview.nodes.iter().chain(states.keys()).collect();
        let nodes = (names.into_iter())
            .map(|node| {
                let state = states.get(node).unwrap_or(&unknown);
                NodeLine {
                    node,
                    connected: state.streams > 0,
                    version: state.acked,
                    agent_version: &state.agent_version,
                    rejected: &state.rejected,
                }
            })
            .collect();
        let unreadable = &overview.unreadable;
        let (epoch, sequence) = (overview.version.epoch, overview.version.sequence);
        let summary = Summary { epoch, sequence, nodes, objects, unreadable };
        match serde_json::to_string(&summary) {
            Ok(summary) => drop(files.insert("summary.json".into(), summary)),
            Err(error) => tracing::error!("the summary does not serialise: {error}"),
        }
        if let Err(error) = self.store(&files) {
            let problem = format!("cannot write status to {}: {error}", self.dir.display());
            if self.problem.as_ref() != Some(&problem) {
                tracing::error!("{problem}; make the folder writable");
                self.problem = Some(problem);
            }
        } else {
            self.problem = None;
        }
    }

    fn store(&mut self, files: &BTreeMap<String, String>) -> io::Result<()> {
        for (name, text) in files {
            let same = self.written.get(name).is_some_and(|old| old == text);
            if !same {
                replace(&self.dir, name, text)?;
                self.written.insert(name.clone(), text.clone());
            }
        }
        let gone: Vec<String> = self.written.keys().filter(|n| !files.contains_key(*n)).cloned().collect();
        for name in gone {
            match fs::remove_file(self.dir.join(&name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => drop(self.written.remove(&name)),
            }
        }
        Ok(())
    }

    fn conditions(
        &mut self,
        key: &ObjectKey,
        report: &Report,
        sequence: u64,
        progress: &mut Progress<'_>,
        time: &str,
    ) -> Vec<Condition> {
        (progress.findings(key, report, sequence).into_iter())
            .map(|(r#type, finding)| {
                let status = if finding.ok { "True" } else { "False" };
                let since =
                    self.since.entry((key.clone(), r#type)).or_insert_with(|| (status, time.to_owned()));
                if since.0 != status {
                    *since = (status, time.to_owned());
                }
                Condition {
                    r#type,
                    status,
                    reason: finding.reason.to_owned(),
                    message: finding.message,
                    observed_generation: report.generation,
                    last_transition_time: since.1.clone(),
                }
            })
            .collect()
    }
}

/// Which nodes enforce what. Most objects are rejected by nobody, so they differ only by the version that holds them:
/// a thousand nodes are gone through once per such version, not once per object.
pub(crate) struct Progress<'a> {
    /// The nodes that there are, with what is known of them.
    nodes: Vec<(&'a str, Option<&'a NodeState>)>,
    /// Rejections by the resource's key.
    rejected: HashMap<&'a str, BTreeMap<&'a str, &'a str>>,
    known: HashMap<u64, Finding>,
}

impl<'a> Progress<'a> {
    pub(crate) fn new(overview: &'a Overview, states: &'a BTreeMap<String, NodeState>) -> Self {
        let live = states.iter().filter(|(_, s)| s.streams > 0).map(|(n, _)| n);
        let wanted: BTreeSet<&String> = overview.nodes.iter().chain(live).collect();
        let nodes: Vec<_> = wanted.into_iter().map(|n| (n.as_str(), states.get(n))).collect();
        let mut rejected: HashMap<&str, BTreeMap<&str, &str>> = HashMap::new();
        for (node, state) in &nodes {
            for (key, error) in state.iter().flat_map(|s| &s.rejected) {
                rejected.entry(key).or_default().entry(node).or_insert(error);
            }
        }
        Self { nodes, rejected, known: HashMap::new() }
    }

    /// What is said of an object, by type of condition. `sequence` is the version that holds it first.
    pub(crate) fn findings(
        &mut self,
        key: &ObjectKey,
        report: &Report,
        sequence: u64,
    ) -> Vec<(&'static str, Finding)> {
        let mut findings = vec![("Accepted", report.accepted.clone())];
        findings.extend(report.resolved.clone().map(|r| ("ResolvedRefs", r)));
        findings.extend(report.programmable.as_ref().map(|p| {
            let finding = match p {
                Ok(()) => self.of(key, sequence),
                Err(finding) => finding.clone(),
            };
            ("Programmed", finding)
        }));
        findings
    }

    /// Those that acknowledged a version that holds the object, and did not reject it.
    fn of(&mut self, key: &ObjectKey, sequence: u64) -> Finding {
        let rejected = if self.rejected.is_empty() {
            None
        } else {
            resource_key(key).and_then(|resource| self.rejected.get(resource.as_str()))
        };
        match rejected {
            Some(rejected) => programmed(&self.nodes, Some(rejected), sequence),
            None => {
                let nodes = &self.nodes;
                self.known.entry(sequence).or_insert_with(|| programmed(nodes, None, sequence)).clone()
            }
        }
    }
}

fn programmed(
    nodes: &[(&str, Option<&NodeState>)],
    refusals: Option<&BTreeMap<&str, &str>>,
    sequence: u64,
) -> Finding {
    let (mut done, mut waiting, mut rejected) = (0, Vec::new(), Vec::new());
    for (node, state) in nodes {
        if let Some(error) = refusals.and_then(|r| r.get(node)) {
            rejected.push(format!("{node}: {error}"));
        } else if state.is_some_and(|s| s.acked.is_some_and(|a| a.sequence >= sequence)) {
            done += 1;
        } else {
            let away = if state.is_some_and(|s| s.streams > 0) { "" } else { " (not connected)" };
            waiting.push(format!("{node}{away}"));
        }
    }
    let count = format!("{done}/{} nodes", nodes.len());
    if nodes.is_empty() {
        Finding { ok: false, reason: "NoNodes", message: "no node is known; start weft-agent on one".into() }
    } else if !rejected.is_empty() {
        Finding { ok: false, reason: "Rejected", message: format!("{count}; {}", some(&rejected, "; ")) }
    } else if waiting.is_empty() {
        Finding { ok: true, reason: "Programmed", message: count }
    } else {
        let message = format!("{count}; waiting for {}", some(&waiting, ", "));
        Finding { ok: false, reason: "Pending", message }
    }
}

/// The first few, and how many more there are.
fn some(all: &[String], between: &str) -> String {
    let named = all.get(..NAMED.min(all.len())).unwrap_or_default().join(between);
    match all.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named}{between}and {more} more"),
    }
}

/// The key under which agents know the object.
fn resource_key(key: &ObjectKey) -> Option<String> {
    let name = NamespacedName::new(&key.namespace, &key.name);
    let resource = match key.kind {
        Kind::AuthorizationPolicy => ResourceKey::Policy(name),
        Kind::HttpRoute => ResourceKey::Route(name),
        Kind::Service => ResourceKey::Service(name),
        Kind::MeshConfig => ResourceKey::Config,
        _ => return None,
    };
    serde_json::to_string(&resource).ok()
}

fn status_file(key: &ObjectKey, conditions: &[Condition]) -> String {
    let file = StatusFile {
        api_version: key.kind.api_version(),
        kind: key.kind.as_str(),
        metadata: Meta { name: &key.name, namespace: &key.namespace },
        status: Conditions { conditions },
    };
    serde_yaml_ng::to_string(&file).unwrap_or_else(|e| format!("# does not serialise: {e}\n"))
}

fn unreadable_file(place: &str, message: &str) -> String {
    #[derive(Serialize)]
    struct Unreadable<'a> {
        file: &'a str,
        accepted: bool,
        message: &'a str,
    }
    serde_yaml_ng::to_string(&Unreadable { file: place, accepted: false, message })
        .unwrap_or_else(|e| format!("# does not serialise: {e}\n"))
}

/// A reader sees the old text or the new, never a part.
fn replace(dir: &Path, name: &str, text: &str) -> io::Result<()> {
    let apart = dir.join(format!(".{name}.new"));
    fs::write(&apart, text)?;
    fs::rename(apart, dir.join(name))
}

#[cfg(test)]
mod tests;
