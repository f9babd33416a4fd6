//! `weft.agent.v1.Agent`: what the agent says of itself.

use std::{sync::Arc, time::SystemTime};

use tokio::sync::watch;
use tonic::{Request, Response, Status};
use weft_core::{NamespacedName, WorkloadUid};
use weft_identity::CredentialManager;
use weft_proto::agent::{
    Config, FlowRing, Map, Pod, Program, StatusRequest, StatusResponse, Svid, agent_server,
};
use weft_runtime::Readiness;

use crate::{
    control::Link, datapath::Datapath, files, flow::FlowStore, guard::Guard, kubelet::Kubelet,
    node::NodeStatus,
};

/// Everything the answer is made of.
#[derive(Clone)]
pub struct AgentStatus {
    /// The node's name.
    pub node: String,
    /// `uname -r`.
    pub kernel: String,
    /// When the agent began.
    pub started: SystemTime,
    /// The kernel side, for the maps.
    pub datapath: Datapath,
    /// The node's kubelet.
    pub kubelet: Kubelet,
    /// The guard on the node; `None` in directory mode.
    pub guard: Option<Guard>,
    /// The node.
    pub status: watch::Receiver<Arc<NodeStatus>>,
    /// The credentials.
    pub credentials: CredentialManager,
    /// The link to the operator.
    pub link: Link,
    /// The flows.
    pub flows: FlowStore,
    /// What is missing.
    pub readiness: Readiness,
}

impl AgentStatus {
    fn answer(&self) -> StatusResponse {
        let node = self.status.borrow().clone();
        let totals = self.flows.totals();
        StatusResponse {
            node: self.node.clone(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel: self.kernel.clone(),
            started: Some(self.started.into()),
            programs: node
                .attachments
                .iter()
                .map(|a| Program {
                    name: a.program.into(),
                    id: a.id,
                    attached_to: match pod_of(&node, a.pod.as_ref()) {
                        Some(name) => format!("Pod {name} ({})", a.attached_to),
                        None => a.attached_to.clone(),
                    },
                    healthy: a.healthy,
                    repairs: a.repairs,
                    // A problem that a repair has ended is history.
                    problem: a.problem.clone().filter(|_| !a.healthy).unwrap_or_default(),
                })
                .chain(self.kubelet.problem().map(|problem| Program {
                    name: "kubelet-probes".into(),
                    attached_to: "strict Pods".into(),
                    problem: problem.to_string(),
                    ..Program::default()
                }))
                .chain(self.guard.as_ref().and_then(Guard::problem).map(|problem| Program {
                    name: "cni-guard".into(),
                    attached_to: "the node's CNI chain".into(),
                    problem: problem.to_string(),
                    ..Program::default()
                }))
                .collect(),
            pods: node
                .pods
                .iter()
                .map(|p| {
                    let workload = p.workload.as_deref();
                    Pod {
                        namespace: p.name.namespace.to_string(),
                        name: p.name.name.to_string(),
                        uid: p.uid.to_string(),
                        identity: workload.map(|w| w.identity.to_string()).unwrap_or_default(),
                        subject: workload.map(|w| w.subject.0).unwrap_or_default(),
                        mode: workload.map(|w| format!("{:?}", w.mode).to_lowercase()).unwrap_or_default(),
                        addresses: workload
                            .map(|w| w.addresses.iter().map(ToString::to_string).collect())
                            .unwrap_or_default(),
                        problem: p.problem.clone().unwrap_or_default(),
                    }
                })
                .collect(),
            svids: self
                .credentials
                .status()
                .into_iter()
                .map(|s| Svid {
                    identity: s.id.to_string(),
                    problem: match (s.not_after, s.problem) {
                        (_, Some(problem)) => problem,
                        (None, None) => "not issued yet".into(),
                        (Some(_), None) => String::new(),
                    },
                    not_after: s.not_after.map(Into::into),
                    issued_by: s.issued_by.unwrap_or_default(),
                    serial: s.serial.unwrap_or_default(),
                })
                .collect(),
            config: Some(Config {
                version: node.version.to_string(),
                connected: self.link.connected(),
                last_change: node.changed.map(Into::into),
                problem: [node.problem.clone(), self.link.problem(), node.unkept.clone()]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join("; "),
                rejected: self
                    .link
                    .rejected()
                    .into_iter()
                    .map(|(key, error)| format!("{key}: {error}"))
                    .collect(),
            }),
            maps: self
                .datapath
                .maps()
                .unwrap_or_default()
                .into_iter()
                .map(|m| Map { name: m.name.into(), entries: m.entries as u64, capacity: m.capacity.into() })
                .collect(),
            flows: Some(FlowRing {
                capacity: totals.capacity,
                held: totals.held,
                seen: totals.seen,
                lost: totals.lost_kernel,
            }),
            open_files: files::open(),
            max_open_files: files::max_open(),
            not_ready: self.readiness.missing().into_iter().map(Into::into).collect(),
        }
    }
}

/// The name of the Pod that a program is for.
fn pod_of<'a>(node: &'a NodeStatus, uid: Option<&WorkloadUid>) -> Option<&'a NamespacedName> {
    node.pods.iter().find(|p| Some(&p.uid) == uid).map(|p| &p.name)
}

#[tonic::async_trait]
impl agent_server::Agent for AgentStatus {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let this = self.clone();
        // Counting map entries walks them: not on a thread that serves.
        let answer = tokio::task::spawn_blocking(move || this.answer()).await;
        answer
            .map(Response::new)
            .map_err(|_| Status::internal("the status could not be put together; see the log"))
    }
}
