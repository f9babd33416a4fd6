//! Which Pods of this node are enrolled: what the state wants against what is.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tokio::sync::watch;
use weft_core::{MeshState, NamespacedName, SpiffeId, Workload, WorkloadUid, workload::Mode};
use weft_proxy::{PodHandle, Proxy};

use crate::{
    datapath::{Datapath, PodSpec},
    discovery::{Discovered, Placement, Placements, Sandboxes},
};

mod goal;
mod host;

use goal::{Goal, Wanted, goals};

/// What is shown of a Pod that is held.
const HELD: &str = "the operator has not described it: its connections are refused until it does; is the operator reachable?";
/// What is shown of a Pod that is not here.
const WAITING: &str = "the container runtime has no running sandbox of it yet";

/// A Pod that is the mesh's business on this node.
#[derive(Debug, Clone)]
pub struct LocalPod {
    /// Its UID.
    pub uid: WorkloadUid,
    /// Its namespace and name.
    pub name: NamespacedName,
    /// As the state describes it; `None` where only the container runtime has told of it.
    pub workload: Option<Arc<Workload>>,
    /// Why it is not enrolled; empty where it is.
    pub problem: Option<String>,
}

#[derive(Debug)]
enum Standing {
    Enrolled(PodSpec),
    /// In the kernel as a Pod that nothing serves: whatever goes in or out is refused.
    Held(PodSpec),
    Passed(PathBuf),
    /// The agent does nothing for it.
    Out,
    Failed(String),
}

#[derive(Debug, Clone)]
struct Metrics {
    enrolled: Gauge,
    held: Gauge,
    failures: Counter,
    seconds: Histogram,
}

/// The enrolment of a node.
pub struct Enrolment {
    node: String,
    datapath: Datapath,
    proxy: Proxy,
    discovered: Option<Discovered>,
    pods: BTreeMap<WorkloadUid, (Wanted, Standing)>,
    host: host::Standing,
    /// Pods that are gone and cannot be removed yet.
    leaving: bool,
    /// Pods that became strict and may have connections from before.
    earlier: HashSet<WorkloadUid>,
    metrics: Metrics,
}

/// The Pods of `node`.
pub fn local<'a>(state: &'a MeshState, node: &'a str) -> impl Iterator<Item = &'a Arc<Workload>> {
    state.workloads().filter(move |w| &*w.node == node && !w.is_node())
}

/// The identities for which `node` needs SVIDs: from the moment a Pod is scheduled, not when it first talks.
pub fn identities(state: &MeshState, node: &str) -> BTreeSet<SpiffeId> {
    local(state, node)
        .filter(|w| w.mode.enrolled())
        .chain(state.node(node))
        .map(|w| w.identity.clone())
        .collect()
}

impl Enrolment {
    /// Nothing enrolled yet.
    pub fn new(node: &str, datapath: Datapath, proxy: Proxy, registry: &mut Registry) -> Self {
        let metrics = Metrics {
            enrolled: Gauge::default(),
            held: Gauge::default(),
            failures: Counter::default(),
            seconds: Histogram::new([0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0]),
        };
        registry.register("weft_enrolled_pods", "Pods enrolled on this node", metrics.enrolled.clone());
        registry.register(
            "weft_held_pods",
            "Pods of the mesh on this node that the operator has not described",
            metrics.held.clone(),
        );
        registry.register(
            "weft_enrolment_failures",
            "Attempts to enrol a Pod that failed",
            metrics.failures.clone(),
        );
        registry.register("weft_enrolment_duration_seconds", "Time to enrol a Pod", metrics.seconds.clone());
        Self {
            node: node.into(),
            datapath,
            proxy,
            discovered: None,
            pods: BTreeMap::new(),
            host: host::Standing::default(),
            leaving: false,
            earlier: HashSet::new(),
            metrics,
        }
    }

    /// Takes network namespaces from the container runtime, and not from the Pods' descriptions.
    #[must_use]
    pub fn with_discovery(mut self, discovered: Discovered) -> Self {
        self.discovered = Some(discovered);
        self
    }

    /// Tells of every change of the node's sandboxes, where the container runtime is asked.
    pub fn sandboxes(&self) -> Option<watch::Receiver<Option<Arc<Sandboxes>>>> {
        self.discovered.as_ref().map(|d| d.sandboxes.clone())
    }

    /// Brings the node's Pods to what `state` wants; a Pod that fails is noted and tried again by the next call.
    /// With `anew`, every Pod is enrolled again, its listeners with it. True where a Pod came into the mesh or under
    /// a stricter mode: connections from before may have to end.
    pub fn reconcile(&mut self, state: &MeshState, anew: bool) -> bool {
        let found = match &self.discovered {
            None => None,
            Some(discovered) => match discovered.sandboxes.borrow().clone() {
                // Nothing is known to be gone before the runtime has spoken.
                None => return false,
                known => known,
            },
        };
        self.host.bring(&self.datapath, &self.proxy, state, &self.node, anew);
        let wanted = goals(state, &self.node, found.as_deref());
        let gone: Vec<_> = self.pods.keys().filter(|uid| !wanted.contains_key(uid)).cloned().collect();
        self.leaving = false;
        for uid in gone {
            self.proxy.remove_pod(&uid);
            match self.datapath.remove(&uid) {
                Ok(()) => {
                    self.pods.remove(&uid);
                    tracing::info!(pod = %uid, "removed");
                }
                Err(error) => {
                    self.leaving = true;
                    tracing::error!(pod = %uid, %error, "cannot be removed; trying again");
                }
            }
        }
        let mut tightened = false;
        // Those that leave go first: one that comes may have the address of one that leaves.
        let (come, leave): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|(_, one)| matches!(one.goal, Goal::Enrol(_) | Goal::Hold(_)));
        for (uid, mut one) in leave.into_iter().chain(come) {
            let before = self.pods.remove(&uid);
            one.keep_refusal(before.as_ref().and_then(refusal));
            tightened |= tighter(before.as_ref().map(|(w, s)| (&w.goal, s)), &one.goal);
            let standing = self.place(&uid, &one, before.as_ref(), anew);
            self.pods.insert(uid, (one, standing));
        }
        let count = |which: fn(&Standing) -> bool| {
            let n = self.pods.values().filter(|(_, standing)| which(standing)).count();
            i64::try_from(n).unwrap_or(i64::MAX)
        };
        self.metrics.enrolled.set(count(|s| matches!(s, Standing::Enrolled(_))));
        self.metrics.held.set(count(|s| matches!(s, Standing::Held(_))));
        self.tell();
        self.earlier.retain(|uid| self.pods.contains_key(uid));
        tightened || !self.earlier().is_empty()
    }

    /// Tells the container runtime's plugin what became of each sandbox.
    fn tell(&self) {
        let Some(discovered) = &self.discovered else { return };
        let placement = |(wanted, standing): &(Wanted, Standing)| {
            let placement = match standing {
                Standing::Failed(problem) => Placement::Refused(problem.clone()),
                _ => wanted.goal.placement()?,
            };
            Some((wanted.sandbox.clone()?, placement))
        };
        let placements: Placements = self.pods.values().filter_map(placement).collect();
        discovered.placements.send_if_modified(|known| {
            let changed = **known != placements;
            if changed {
                *known = Arc::new(placements);
            }
            changed
        });
    }

    /// Pods in the mesh that became strict since [`Self::settled`]: connections from before may have to end.
    pub fn earlier(&self) -> HashSet<WorkloadUid> {
        let enrolled = |uid: &&WorkloadUid| matches!(self.pods.get(*uid), Some((_, Standing::Enrolled(_))));
        self.earlier.iter().filter(enrolled).cloned().collect()
    }

    /// The connections from before of these Pods were looked at.
    pub fn settled(&mut self, pods: &HashSet<WorkloadUid>) {
        self.earlier.retain(|uid| !pods.contains(uid));
    }

    /// Whether a Pod waits for another try.
    pub fn incomplete(&self) -> bool {
        self.leaving
            || self.host.failed()
            || !self.earlier().is_empty()
            || self.pods.values().any(|(_, s)| matches!(s, Standing::Failed(_)))
    }

    /// The Pods whose traces in the kernel must stay; `None` while nobody can tell.
    pub fn kept(&self) -> Option<HashSet<WorkloadUid>> {
        if self.discovered.as_ref().is_some_and(|d| d.sandboxes.borrow().is_none()) {
            return None;
        }
        let keep = |goal: &Goal| matches!(goal, Goal::Enrol(_) | Goal::Hold(_) | Goal::Refuse(_));
        let kept = self.pods.iter().filter(|(_, (wanted, _))| keep(&wanted.goal));
        Some(kept.map(|(uid, _)| uid.clone()).collect())
    }

    /// How the node's Pods are; those outside the mesh only where something is wrong.
    pub fn status(&self) -> Vec<LocalPod> {
        let pod = |(uid, (wanted, standing)): (&WorkloadUid, &(Wanted, Standing))| {
            let problem = match (standing, &wanted.goal) {
                (Standing::Enrolled(_), _) => None,
                (Standing::Passed(_), _) | (_, Goal::Unknown) => return None,
                (Standing::Failed(e), _) | (_, Goal::Refuse(e)) => Some(e.clone()),
                (Standing::Held(_), _) => Some(HELD.to_owned()),
                (Standing::Out, _) if wanted.workload.as_ref().is_none_or(|w| !w.mode.enrolled()) => {
                    return None;
                }
                (Standing::Out, _) => Some(WAITING.to_owned()),
            };
            let (uid, name) = (uid.clone(), wanted.name.clone());
            Some(LocalPod { uid, name, workload: wanted.workload.clone(), problem })
        };
        self.pods.iter().filter_map(pod).collect()
    }

    fn place(
        &mut self,
        uid: &WorkloadUid,
        wanted: &Wanted,
        before: Option<&(Wanted, Standing)>,
        anew: bool,
    ) -> Standing {
        let standing = before.map(|(_, standing)| standing);
        match &wanted.goal {
            Goal::Enrol(spec) => self.member(wanted, spec, standing, anew),
            Goal::Hold(spec) => self.hold(wanted, spec, standing, anew),
            Goal::Pass(netns) => self.pass(uid, wanted, netns, standing),
            Goal::Refuse(why) => {
                if before.and_then(refusal).is_none_or(|known| known != why) {
                    self.metrics.failures.inc();
                    tracing::error!(pod = %wanted.name, why, "cannot be enrolled");
                }
                self.out(uid, wanted, standing)
            }
            Goal::Unknown | Goal::Wait => self.out(uid, wanted, standing),
        }
    }

    fn member(&mut self, wanted: &Wanted, spec: &PodSpec, before: Option<&Standing>, anew: bool) -> Standing {
        let pod = &wanted.name;
        if let Some(Standing::Enrolled(old)) = before
            && !anew
            && old.addresses == spec.addresses
            && old.netns == spec.netns
        {
            if old == spec {
                return Standing::Enrolled(spec.clone());
            }
            match self.datapath.update(&spec.uid, spec.subject, spec.mode, spec.fail_mode) {
                Ok(()) => {
                    if old.mode != Mode::Strict && spec.mode == Mode::Strict {
                        self.earlier.insert(spec.uid.clone());
                    }
                    return Standing::Enrolled(spec.clone());
                }
                Err(error) => tracing::warn!(%pod, %error, "cannot be updated; enrolling it anew"),
            }
        }
        match self.enrol(spec) {
            Ok(()) => {
                let identity = wanted.workload.as_ref().map(|w| w.identity.to_string());
                tracing::info!(%pod, identity, mode = ?spec.mode, "enrolled");
                Standing::Enrolled(spec.clone())
            }
            Err(problem) => self.failed(pod, problem, before),
        }
    }

    /// Puts a Pod into the kernel and closes its listeners at once: without them the hooks refuse.
    fn hold(&mut self, wanted: &Wanted, spec: &PodSpec, before: Option<&Standing>, anew: bool) -> Standing {
        if let Some(Standing::Held(old)) = before
            && !anew
            && old == spec
        {
            return Standing::Held(spec.clone());
        }
        self.proxy.remove_pod(&spec.uid);
        match self.datapath.enroll(spec) {
            Ok(enrolled) => {
                self.note(spec, enrolled.settled);
                tracing::info!(pod = %wanted.name, "held until the operator has described it");
                Standing::Held(spec.clone())
            }
            Err(error) => self.failed(&wanted.name, chain(&error), before),
        }
    }

    /// Notes that a Pod is strict now and may have something open from before, as the kernel says: an earlier agent may
    /// have enrolled it.
    fn note(&mut self, spec: &PodSpec, settled: bool) {
        if spec.mode == Mode::Strict && !settled {
            self.earlier.insert(spec.uid.clone());
        }
    }

    fn failed(&self, pod: &NamespacedName, problem: String, before: Option<&Standing>) -> Standing {
        self.metrics.failures.inc();
        if !matches!(before, Some(Standing::Failed(_))) {
            tracing::error!(%pod, %problem, "cannot be enrolled; trying again every second");
        }
        Standing::Failed(problem)
    }

    fn enrol(&mut self, spec: &PodSpec) -> Result<(), String> {
        let began = Instant::now();
        let enrolled = self.datapath.enroll(spec).map_err(|e| chain(&e))?;
        self.note(spec, enrolled.settled);
        self.proxy
            .add_pod(PodHandle { uid: spec.uid.clone(), net: enrolled.net, listeners: enrolled.listeners })
            .map_err(|e| format!("the proxy cannot take its listeners: {e}"))?;
        self.metrics.seconds.observe(began.elapsed().as_secs_f64());
        Ok(())
    }

    fn pass(&self, uid: &WorkloadUid, wanted: &Wanted, netns: &Path, before: Option<&Standing>) -> Standing {
        if let Some(Standing::Passed(old)) = before
            && old == netns
        {
            return Standing::Passed(netns.into());
        }
        self.proxy.remove_pod(uid);
        match self.datapath.remove(uid).and_then(|()| self.datapath.pass(uid, netns)) {
            Ok(()) => Standing::Passed(netns.into()),
            Err(error) => {
                if !matches!(before, Some(Standing::Failed(_))) {
                    tracing::error!(pod = %wanted.name, %error, "cannot be let pass; trying again every second");
                }
                Standing::Failed(chain(&error))
            }
        }
    }

    /// Takes a Pod out of the kernel: it is a stranger there, and may not reach the mesh.
    fn out(&self, uid: &WorkloadUid, wanted: &Wanted, before: Option<&Standing>) -> Standing {
        if matches!(before, None | Some(Standing::Out)) {
            return Standing::Out;
        }
        self.proxy.remove_pod(uid);
        match self.datapath.remove(uid) {
            Ok(()) => Standing::Out,
            Err(error) => {
                tracing::error!(pod = %wanted.name, %error, "cannot be removed; trying again every second");
                Standing::Failed(chain(&error))
            }
        }
    }
}

/// Why a Pod is not in the mesh that should be.
fn refusal((wanted, standing): &(Wanted, Standing)) -> Option<&str> {
    match (&wanted.goal, standing) {
        (Goal::Refuse(why), _) | (Goal::Enrol(_) | Goal::Hold(_), Standing::Failed(why)) => Some(why),
        _ => None,
    }
}

/// Whether a Pod comes into the mesh, or under a stricter mode, that may have connections from before. A Pod that has
/// only begun has none.
fn tighter(before: Option<(&Goal, &Standing)>, goal: &Goal) -> bool {
    let Goal::Enrol(spec) = goal else { return false };
    match before {
        Some((Goal::Enrol(earlier), Standing::Enrolled(_))) => earlier.mode < spec.mode,
        Some((_, Standing::Passed(_)) | (Goal::Unknown | Goal::Refuse(_), Standing::Out)) => true,
        _ => false,
    }
}

/// An error with its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
