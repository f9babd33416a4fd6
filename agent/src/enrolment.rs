//! Which Pods of this node are enrolled: what the state wants against what is.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use weft_core::{MeshState, SpiffeId, Workload, WorkloadUid};
use weft_proxy::{PodHandle, Proxy};

use crate::datapath::{Datapath, PodSpec};

/// A Pod that is the mesh's business on this node.
#[derive(Debug, Clone)]
pub struct LocalPod {
    /// As the state describes it.
    pub workload: Arc<Workload>,
    /// Why it is not enrolled; empty where it is.
    pub problem: Option<String>,
}

#[derive(Debug)]
enum Standing {
    Enrolled(PodSpec),
    Passed(PathBuf),
    Failed(String),
}

#[derive(Debug, Clone)]
struct Metrics {
    enrolled: Gauge,
    failures: Counter,
    seconds: Histogram,
}

/// The enrolment of a node.
pub struct Enrolment {
    node: String,
    datapath: Datapath,
    proxy: Proxy,
    pods: BTreeMap<WorkloadUid, (Arc<Workload>, Standing)>,
    metrics: Metrics,
}

/// The Pods of `node`.
pub fn local<'a>(state: &'a MeshState, node: &'a str) -> impl Iterator<Item = &'a Arc<Workload>> {
    state.workloads().filter(move |w| &*w.node == node)
}

/// The identities for which `node` needs SVIDs: from the moment a Pod is scheduled, not when it first talks.
pub fn identities(state: &MeshState, node: &str) -> BTreeSet<SpiffeId> {
    local(state, node).filter(|w| w.mode.enrolled()).map(|w| w.identity.clone()).collect()
}

/// The UIDs of the Pods that `node` must keep.
pub fn wanted(state: &MeshState, node: &str) -> HashSet<WorkloadUid> {
    local(state, node).filter(|w| w.mode.enrolled()).map(|w| w.uid.clone()).collect()
}

impl Enrolment {
    /// Nothing enrolled yet.
    pub fn new(node: &str, datapath: Datapath, proxy: Proxy, registry: &mut Registry) -> Self {
        let metrics = Metrics {
            enrolled: Gauge::default(),
            failures: Counter::default(),
            seconds: Histogram::new([0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0]),
        };
        registry.register("weft_enrolled_pods", "Pods enrolled on this node", metrics.enrolled.clone());
        registry.register(
            "weft_enrolment_failures",
            "Attempts to enrol a Pod that failed",
            metrics.failures.clone(),
        );
        registry.register("weft_enrolment_duration_seconds", "Time to enrol a Pod", metrics.seconds.clone());
        Self { node: node.into(), datapath, proxy, pods: BTreeMap::new(), metrics }
    }

    /// Brings the node's Pods to what `state` wants; a Pod that fails is noted and tried again by the next call.
    /// With `anew`, every Pod is enrolled again, its listeners with it.
    pub fn reconcile(&mut self, state: &MeshState, anew: bool) {
        let desired: BTreeMap<_, _> = local(state, &self.node).map(|w| (w.uid.clone(), w.clone())).collect();
        let gone: Vec<_> = self.pods.keys().filter(|uid| !desired.contains_key(uid)).cloned().collect();
        for uid in gone {
            self.proxy.remove_pod(&uid);
            match self.datapath.remove(&uid) {
                Ok(()) => {
                    self.pods.remove(&uid);
                    tracing::info!(pod = %uid, "removed");
                }
                // It stays in the list, so that the next call tries again.
                Err(error) => tracing::error!(pod = %uid, %error, "cannot be removed; trying again"),
            }
        }
        for (uid, workload) in desired {
            let before = self.pods.remove(&uid).map(|(_, standing)| standing);
            let standing = self.place(&workload, before.as_ref(), anew);
            self.pods.insert(uid, (workload, standing));
        }
        let enrolled = self.pods.values().filter(|(_, s)| matches!(s, Standing::Enrolled(_))).count();
        self.metrics.enrolled.set(i64::try_from(enrolled).unwrap_or(i64::MAX));
    }

    /// Whether a Pod waits for another try.
    pub fn incomplete(&self, state: &MeshState) -> bool {
        self.pods.values().any(|(_, s)| matches!(s, Standing::Failed(_)))
            || self.pods.keys().any(|uid| state.workload(uid).is_none_or(|w| *w.node != *self.node))
    }

    /// How the node's Pods are; those outside the mesh only where something is wrong.
    pub fn status(&self) -> Vec<LocalPod> {
        let pod = |(workload, standing): &(Arc<Workload>, Standing)| match standing {
            Standing::Enrolled(_) => Some(LocalPod { workload: workload.clone(), problem: None }),
            Standing::Passed(_) => None,
            Standing::Failed(e) => Some(LocalPod { workload: workload.clone(), problem: Some(e.clone()) }),
        };
        self.pods.values().filter_map(pod).collect()
    }

    fn place(&self, workload: &Workload, before: Option<&Standing>, anew: bool) -> Standing {
        let Some(netns) = workload.netns.as_ref().map(PathBuf::from) else {
            return Standing::Failed(
                "its network namespace is not known; the directory source takes it from the annotation weft.mesh/netns"
                    .into(),
            );
        };
        if !workload.mode.enrolled() {
            return self.pass(workload, netns, before);
        }
        let spec = PodSpec {
            uid: workload.uid.clone(),
            subject: workload.subject,
            mode: workload.mode,
            fail_mode: workload.fail_mode,
            addresses: workload.addresses.clone(),
            netns,
        };
        if let Some(Standing::Enrolled(old)) = before
            && !anew
            && old.addresses == spec.addresses
            && old.netns == spec.netns
        {
            let same =
                old.subject == spec.subject && old.mode == spec.mode && old.fail_mode == spec.fail_mode;
            if same {
                return Standing::Enrolled(spec);
            }
            match self.datapath.update(&spec.uid, spec.subject, spec.mode, spec.fail_mode) {
                Ok(()) => return Standing::Enrolled(spec),
                Err(error) => {
                    tracing::warn!(pod = %workload.name, %error, "cannot be updated; enrolling it anew");
                }
            }
        }
        let again = matches!(before, Some(Standing::Failed(_)));
        match self.enrol(&spec) {
            Ok(()) => {
                tracing::info!(pod = %workload.name, identity = %workload.identity, mode = ?workload.mode, "enrolled");
                Standing::Enrolled(spec)
            }
            Err(problem) => {
                self.metrics.failures.inc();
                if !again {
                    tracing::error!(pod = %workload.name, %problem, "cannot be enrolled; trying again every second");
                }
                Standing::Failed(problem)
            }
        }
    }

    fn enrol(&self, spec: &PodSpec) -> Result<(), String> {
        let began = Instant::now();
        let enrolled = self.datapath.enroll(spec).map_err(|e| chain(&e))?;
        self.proxy
            .add_pod(PodHandle { uid: spec.uid.clone(), net: enrolled.net, listeners: enrolled.listeners })
            .map_err(|e| format!("the proxy cannot take its listeners: {e}"))?;
        self.metrics.seconds.observe(began.elapsed().as_secs_f64());
        Ok(())
    }

    fn pass(&self, workload: &Workload, netns: PathBuf, before: Option<&Standing>) -> Standing {
        if let Some(Standing::Passed(old)) = before
            && *old == netns
        {
            return Standing::Passed(netns);
        }
        let quiet = matches!(before, Some(Standing::Failed(_)));
        self.proxy.remove_pod(&workload.uid);
        match self.datapath.remove(&workload.uid).and_then(|()| self.datapath.pass(&netns)) {
            Ok(()) => Standing::Passed(netns),
            Err(error) => {
                if !quiet {
                    tracing::error!(pod = %workload.name, %error, "cannot be let pass; trying again every second");
                }
                Standing::Failed(chain(&error))
            }
        }
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
