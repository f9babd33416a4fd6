//! People's end of the relay: flows as Hubble's clients expect them, and the states of all agents.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use weft_proto::{
    observer::{self, observer_server},
    relay::NodeState,
    weft_relay::{NodeStatus, ProbeRequest, ProbeResult, Silent, StatusRequest, StatusResponse, mesh_server},
};
use weft_runtime::{DrainWatcher, Tasks};

use super::{
    Relay, flows, probe_by, status_of,
    viewers::{self, Scope, Viewers},
};
use crate::{
    auth::{Refused, bearer},
    objects::is_object_name,
};

/// How long an agent may take to say how it is.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a probe may take.
const PROBE: Duration = Duration::from_secs(12);
/// Calls of people at one time.
const MAX_CALLS: usize = 32;
/// Answers that wait for a person.
const QUEUE: usize = 64;

/// Both services.
#[derive(Debug, Clone)]
pub struct People {
    relay: Relay,
    viewers: Arc<dyn Viewers>,
    calls: Arc<Semaphore>,
    tasks: Tasks,
    drain: DrainWatcher,
    started: Instant,
}

impl People {
    /// Over the relay's agents.
    pub fn new(relay: Relay, viewers: Arc<dyn Viewers>, tasks: Tasks, drain: DrainWatcher) -> Self {
        let calls = Arc::new(Semaphore::new(MAX_CALLS));
        Self { relay, viewers, calls, tasks, drain, started: Instant::now() }
    }

    /// Who may see everything, and a place for the call.
    async fn enter<T: Sync>(&self, request: &Request<T>) -> Result<OwnedSemaphorePermit, Status> {
        self.admit(request, None).await.map(|(_, permit)| permit)
    }

    /// What the caller may see, and a place for the call.
    async fn admit<T: Sync>(
        &self,
        request: &Request<T>,
        namespace: Option<&str>,
    ) -> Result<(Scope, OwnedSemaphorePermit), Status> {
        let outcome = match bearer(request.metadata()) {
            Ok(token) => self.viewers.see(token, namespace).await,
            Err(refused) => Err(refused),
        };
        let scope = outcome.map_err(|refused| {
            tracing::warn!(peer = ?request.remote_addr(), "a person's call is refused: {refused}");
            match refused {
                Refused::Unavailable(why) => Status::unavailable(why),
                Refused::Forbidden(why) => Status::permission_denied(why),
                other => Status::unauthenticated(other.to_string()),
            }
        })?;
        let permit = Arc::clone(&self.calls).try_acquire_owned();
        let permit = permit.map_err(|_| {
            Status::resource_exhausted("the operator answers enough people already; try again")
        })?;
        Ok((scope, permit))
    }

    async fn states(&self) -> (Vec<NodeStatus>, Vec<Silent>) {
        let asked = self.relay.agents().into_iter().map(|agent| async move {
            let problem = match timeout(ANSWER, status_of(&agent)).await {
                Ok(Ok(status)) => return Ok(status),
                Ok(Err(why)) => why,
                Err(_) => format!("its agent did not answer within {} s", ANSWER.as_secs()),
            };
            Err(Silent { node: agent.node.to_string(), problem })
        });
        let (mut nodes, mut silent) = (Vec::new(), Vec::new());
        for outcome in join_all(asked).await {
            match outcome {
                Ok(status) => nodes.push(status),
                Err(node) => silent.push(node),
            }
        }
        (nodes, silent)
    }
}

/// The namespace that a call is about.
fn namespace<T>(request: &Request<T>) -> Result<Option<String>, Status> {
    let mut given = request.metadata().get_all(viewers::NAMESPACE).iter();
    let Some(first) = given.next() else { return Ok(None) };
    match first.to_str() {
        Ok(name) if is_object_name(name) && given.next().is_none() => Ok(Some(name.to_owned())),
        _ => {
            Err(Status::invalid_argument(format!("{} must be the name of one namespace", viewers::NAMESPACE)))
        }
    }
}

#[tonic::async_trait]
impl mesh_server::Mesh for People {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let _permit = self.enter(&request).await?;
        let (nodes, silent) = self.states().await;
        Ok(Response::new(StatusResponse { nodes, silent }))
    }

    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<ProbeResult>, Status> {
        let _permit = self.enter(&request).await?;
        let ProbeRequest { node, probe } = request.into_inner();
        let probe = probe.ok_or_else(|| Status::invalid_argument("it says no Pod"))?;
        let agent = self.relay.agents().into_iter().find(|agent| *agent.node == *node);
        let agent =
            agent.ok_or_else(|| Status::not_found("the node's agent is not connected to this replica"))?;
        let outcome = timeout(PROBE, probe_by(&agent, probe)).await;
        let late = |_| Status::deadline_exceeded(format!("no answer within {} s", PROBE.as_secs()));
        outcome.map_err(late)?.map(Response::new)
    }
}

#[tonic::async_trait]
impl observer_server::Observer for People {
    type GetFlowsStream = ReceiverStream<Result<observer::GetFlowsResponse, Status>>;
    type GetAgentEventsStream = ReceiverStream<Result<observer::GetAgentEventsResponse, Status>>;
    type GetDebugEventsStream = ReceiverStream<Result<observer::GetDebugEventsResponse, Status>>;

    async fn get_flows(
        &self,
        request: Request<observer::GetFlowsRequest>,
    ) -> Result<Response<Self::GetFlowsStream>, Status> {
        let namespace = namespace(&request)?;
        let (scope, permit) = self.admit(&request, namespace.as_deref()).await?;
        let request = request.into_inner();
        if request.first && request.follow {
            return Err(Status::invalid_argument("first cannot be used with follow"));
        }
        if request.number > flows::MAX_NUMBER {
            return Err(Status::invalid_argument(format!(
                "at most {} flows can be asked for; narrow it with since or a filter",
                flows::MAX_NUMBER
            )));
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (relay, drain) = (self.relay.clone(), self.drain.clone());
        self.tasks.spawn("flows for a person", async move {
            let _permit = permit;
            let last = sender.clone();
            tokio::select! {
                () = flows::answer(relay, request, scope, sender) => {}
                () = drain.draining() => {
                    let _ = last.try_send(Err(Status::unavailable("the operator stops; try again")));
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get_agent_events(
        &self,
        _: Request<observer::GetAgentEventsRequest>,
    ) -> Result<Response<Self::GetAgentEventsStream>, Status> {
        Err(Status::unimplemented("there are no agent events; see the agents' logs and /metrics"))
    }

    async fn get_debug_events(
        &self,
        _: Request<observer::GetDebugEventsRequest>,
    ) -> Result<Response<Self::GetDebugEventsStream>, Status> {
        Err(Status::unimplemented("there are no debug events; start an agent with --bpf-log"))
    }

    async fn get_nodes(
        &self,
        request: Request<observer::GetNodesRequest>,
    ) -> Result<Response<observer::GetNodesResponse>, Status> {
        let _permit = self.enter(&request).await?;
        let (states, silent) = self.states().await;
        let mut nodes: Vec<_> = states
            .into_iter()
            .filter_map(|s| s.agent)
            .map(|a| {
                let flows = a.flows.unwrap_or_default();
                observer::Node {
                    name: a.node,
                    version: a.agent_version,
                    state: NodeState::NodeConnected.into(),
                    num_flows: flows.held,
                    max_flows: flows.capacity,
                    seen_flows: flows.seen,
                    ..Default::default()
                }
            })
            .collect();
        nodes.extend(silent.into_iter().map(|s| observer::Node {
            name: s.node,
            state: NodeState::NodeUnavailable.into(),
            ..Default::default()
        }));
        Ok(Response::new(observer::GetNodesResponse { nodes }))
    }

    async fn get_namespaces(
        &self,
        request: Request<observer::GetNamespacesRequest>,
    ) -> Result<Response<observer::GetNamespacesResponse>, Status> {
        let _permit = self.enter(&request).await?;
        let (states, _) = self.states().await;
        let pods = states.into_iter().filter_map(|s| s.agent).flat_map(|a| a.pods);
        let names: BTreeSet<String> = pods.map(|p| p.namespace).collect();
        let namespace = |namespace| observer::Namespace { cluster: String::new(), namespace };
        let namespaces = names.into_iter().map(namespace).collect();
        Ok(Response::new(observer::GetNamespacesResponse { namespaces }))
    }

    async fn server_status(
        &self,
        request: Request<observer::ServerStatusRequest>,
    ) -> Result<Response<observer::ServerStatusResponse>, Status> {
        let _permit = self.enter(&request).await?;
        let (states, silent) = self.states().await;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut answer = observer::ServerStatusResponse {
            uptime_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            num_connected_nodes: Some(count(states.len())),
            num_unavailable_nodes: Some(count(silent.len())),
            unavailable_nodes: silent.into_iter().map(|s| s.node).collect(),
            version: format!("weft-operator v{}", env!("CARGO_PKG_VERSION")),
            ..Default::default()
        };
        for flows in states.into_iter().filter_map(|s| s.agent?.flows) {
            answer.num_flows = answer.num_flows.saturating_add(flows.held);
            answer.max_flows = answer.max_flows.saturating_add(flows.capacity);
            answer.seen_flows = answer.seen_flows.saturating_add(flows.seen);
        }
        Ok(Response::new(answer))
    }
}
