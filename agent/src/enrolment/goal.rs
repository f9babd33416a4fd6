//! Where each Pod of the node belongs, from what the operator says and what the runtime says. No kernel in here.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
};

use weft_core::{
    MeshState, NamespacedName, SubjectId, Workload, WorkloadUid,
    workload::{FailMode, Mode},
};

use crate::{
    datapath::PodSpec,
    discovery::{Placement, Sandbox, Sandboxes, expected},
};

/// Namespaces that the mesh stands on: their Pods pass before anybody has described them.
const ALWAYS_PASS: [&str; 2] = ["kube-system", "weft-system"];

/// Where a Pod belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Goal {
    /// Into the mesh.
    Enrol(PodSpec),
    /// Into the mesh, and closed until somebody has described it.
    Hold(PodSpec),
    /// Outside the mesh.
    Pass(PathBuf),
    /// Nothing is known that would tell; it may not reach the mesh.
    Unknown,
    /// Not here yet: its sandbox does not run.
    Wait,
    /// Into the mesh, but it cannot be: why.
    Refuse(String),
}

/// A Pod and where it belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) name: NamespacedName,
    /// As the operator describes it.
    pub(super) workload: Option<Arc<Workload>>,
    /// The runtime's id of its sandbox.
    pub(super) sandbox: Option<String>,
    pub(super) goal: Goal,
}

/// Where every Pod of `node` belongs. Without `found`, network namespaces are those of the description.
pub(super) fn goals(
    state: &MeshState,
    node: &str,
    found: Option<&Sandboxes>,
) -> BTreeMap<WorkloadUid, Wanted> {
    let local: Vec<&Arc<Workload>> = super::local(state, node).collect();
    let Some(found) = found else {
        return local.into_iter().map(|w| (w.uid.clone(), described(w, None, annotated(w)))).collect();
    };
    let mut wanted = BTreeMap::new();
    // The kubelet gives a Pod of its own files another UID than the API server has for it.
    let mut by_name: HashMap<&NamespacedName, &Arc<Workload>> =
        local.iter().filter(|w| !found.contains_key(&w.uid)).map(|w| (&w.name, *w)).collect();
    for sandbox in found.values().filter(|s| !s.host_network) {
        let of_name = || by_name.remove(&sandbox.name);
        let workload = state.workload(&sandbox.uid).filter(|w| *w.node == *node).or_else(of_name);
        let (uid, one) = match workload {
            Some(w) => (&w.uid, described(w, Some(sandbox), discovered(w, sandbox))),
            None => (&sandbox.uid, undescribed(state, sandbox)),
        };
        wanted.insert(uid.clone(), one);
    }
    for workload in local {
        let waiting = || described(workload, None, Err(Goal::Wait));
        wanted.entry(workload.uid.clone()).or_insert_with(waiting);
    }
    wanted
}

/// What enrolment needs besides the description: namespace and addresses.
type Network = (PathBuf, Vec<IpAddr>);

fn annotated(workload: &Workload) -> Result<Network, Goal> {
    let missing = "its network namespace is not known; the directory source takes it from the annotation weft.mesh/netns";
    let netns = workload.netns.as_ref().map(PathBuf::from).ok_or_else(|| Goal::Refuse(missing.into()))?;
    Ok((netns, workload.addresses.clone()))
}

fn discovered(workload: &Workload, sandbox: &Sandbox) -> Result<Network, Goal> {
    let netns = netns(sandbox).map_err(Goal::Refuse)?;
    // What the runtime set up counts: the API server learns of an address late, and may still give an old one.
    let addresses = if sandbox.addresses.is_empty() { &workload.addresses } else { &sandbox.addresses };
    Ok((netns, addresses.clone()))
}

fn netns(sandbox: &Sandbox) -> Result<PathBuf, String> {
    sandbox.netns.clone().ok_or_else(|| {
        "the container runtime names no network namespace that the agent can open; it needs hostPID and the capability SYS_PTRACE".into()
    })
}

fn described(workload: &Arc<Workload>, sandbox: Option<&Sandbox>, network: Result<Network, Goal>) -> Wanted {
    let goal = match network {
        Ok((netns, _)) if !workload.mode.enrolled() => Goal::Pass(netns),
        Err(_) if !workload.mode.enrolled() && sandbox.is_some() => Goal::Unknown,
        Ok((netns, addresses)) => match sandbox.and_then(|s| s.isolated.as_deref()) {
            Some(runtime) => Goal::Refuse(isolated(runtime)),
            None => Goal::Enrol(PodSpec {
                uid: workload.uid.clone(),
                subject: workload.subject,
                mode: workload.mode,
                fail_mode: workload.fail_mode,
                addresses,
                netns,
            }),
        },
        Err(goal) => goal,
    };
    let sandbox = sandbox.map(|s| s.id.clone());
    Wanted { name: workload.name.clone(), workload: Some(workload.clone()), sandbox, goal }
}

fn isolated(runtime: &str) -> String {
    format!(
        "its runtime {runtime:?} keeps the Pod's network from this node's kernel, where the mesh works; give the Pod another runtimeClassName, or its namespace the mode disabled"
    )
}

/// A Pod that the operator has not spoken of: its namespace decides.
fn undescribed(state: &MeshState, sandbox: &Sandbox) -> Wanted {
    let passes = ALWAYS_PASS.contains(&&*sandbox.name.namespace);
    let goal = match (expected(state, sandbox), netns(sandbox)) {
        (_, Ok(netns)) if passes => Goal::Pass(netns),
        (Some(Mode::Disabled), Ok(netns)) => Goal::Pass(netns),
        (None | Some(Mode::Disabled), _) => Goal::Unknown,
        (Some(_), Err(problem)) => Goal::Refuse(problem),
        (Some(_), Ok(netns)) => match sandbox.isolated.as_deref() {
            Some(runtime) => Goal::Refuse(isolated(runtime)),
            // Strict and closed, whatever it will be: nothing goes in or out that nobody judged.
            None => Goal::Hold(PodSpec {
                uid: sandbox.uid.clone(),
                subject: SubjectId::UNKNOWN,
                mode: Mode::Strict,
                fail_mode: FailMode::Closed,
                addresses: sandbox.addresses.clone(),
                netns,
            }),
        },
    };
    Wanted { name: sandbox.name.clone(), workload: None, sandbox: Some(sandbox.id.clone()), goal }
}

impl Wanted {
    /// A Pod that was refused has no sandbox until the kubelet tries again; why it was refused is still the news.
    pub(super) fn keep_refusal(&mut self, why: Option<&str>) {
        let meshed = self.workload.as_ref().is_some_and(|w| w.mode.enrolled());
        if self.goal == Goal::Wait
            && meshed
            && let Some(why) = why
        {
            self.goal = Goal::Refuse(why.into());
        }
    }
}

impl Goal {
    /// What the runtime is told where the goal is reached.
    pub(super) fn placement(&self) -> Option<Placement> {
        match self {
            Self::Enrol(_) => Some(Placement::Enrolled),
            Self::Hold(_) => Some(Placement::Held),
            Self::Pass(_) => Some(Placement::Passed),
            Self::Unknown => Some(Placement::Unknown),
            Self::Refuse(why) => Some(Placement::Refused(why.clone())),
            Self::Wait => None,
        }
    }
}

#[cfg(test)]
mod tests;
