//! Flows of many agents as one stream, in the order of their time.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt, future::join_all, stream::SelectAll, stream::unfold};
use tokio::{sync::mpsc, time::timeout};
use tonic::{Code, Status};
use weft_proto::{
    observer::{GetFlowsRequest, GetFlowsResponse, get_flows_response::ResponseTypes},
    relay::{NodeState, NodeStatusEvent},
    weft_relay::{End, answer::Answer as Body},
};

use super::{Agent, Ask, Relay, flows_question, viewers::Scope, within};

/// How long one agent may keep the others waiting.
const ANSWER: Duration = Duration::from_secs(5);
/// Most flows that are sorted to find the newest.
pub(super) const MAX_NUMBER: u64 = 100_000;

type Sender = mpsc::Sender<Result<GetFlowsResponse, Status>>;

/// Why no more is said: the caller is gone, or is told why.
enum Stop {
    Gone,
    Failed(Status),
}

/// Answers a call until it is done or the caller leaves, with what the caller may see.
pub(super) async fn answer(relay: Relay, request: GetFlowsRequest, scope: Scope, sender: Sender) {
    let request = match &scope {
        Scope::All => Some(request),
        Scope::Namespace(namespace) => within::narrow(request, namespace),
    };
    // There is no flow that is asked for and may be seen.
    let Some(request) = request else { return };
    let work = async {
        if request.follow {
            follow(&relay, request, &scope, &sender).await
        } else {
            collect(&relay, request, &scope, &sender).await
        }
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        () = sender.closed() => return,
    };
    if let Err(Stop::Failed(status)) = outcome {
        let _ = sender.send(Err(status)).await;
    }
}

async fn say(sender: &Sender, answer: GetFlowsResponse) -> Result<(), Stop> {
    sender.send(Ok(answer)).await.map_err(|_| Stop::Gone)
}

/// A word about a node.
fn word(node: &str, state: NodeState, message: &str) -> GetFlowsResponse {
    let event = NodeStatusEvent {
        state_change: state.into(),
        node_names: vec![node.into()],
        message: message.chars().take(400).collect(),
    };
    GetFlowsResponse {
        response_types: Some(ResponseTypes::NodeStatus(event)),
        node_name: node.into(),
        time: Some(SystemTime::now().into()),
    }
}

/// One step of an agent's answer.
enum Step {
    Flow(Box<GetFlowsResponse>),
    /// Not for the caller.
    Hidden,
    Done,
    /// It failed, for a reason of the node's.
    Lost(String),
}

/// What an agent said; an error that is the caller's own fault ends the call.
fn step(body: Option<Body>, scope: &Scope) -> Result<Step, Status> {
    match body {
        Some(Body::Flow(flow)) if matches!(scope, Scope::Namespace(namespace) if !within::visible(&flow, namespace)) => {
            Ok(Step::Hidden)
        }
        Some(Body::Flow(flow)) => Ok(Step::Flow(Box::new(flow))),
        Some(Body::End(End { code: 0, .. })) => Ok(Step::Done),
        Some(Body::End(end)) if Code::from(end.code) == Code::InvalidArgument => {
            Err(Status::invalid_argument(end.message))
        }
        Some(Body::End(end)) => Ok(Step::Lost(end.message)),
        Some(_) => Ok(Step::Lost("its agent answers something else".into())),
        None => Ok(Step::Lost("its agent went away".into())),
    }
}

struct Head {
    agent: Arc<Agent>,
    ask: Ask,
    next: Option<GetFlowsResponse>,
}

impl Head {
    /// Takes the next flow; what is wrong with the node is returned.
    async fn fill(&mut self, scope: &Scope) -> Result<Option<String>, Status> {
        loop {
            let Ok(body) = timeout(ANSWER, self.ask.next()).await else {
                return Ok(Some(format!("its agent did not answer within {} s", ANSWER.as_secs())));
            };
            match step(body, scope)? {
                Step::Hidden => continue,
                Step::Flow(flow) => self.next = Some(*flow),
                Step::Done => {}
                Step::Lost(why) => return Ok(Some(why)),
            }
            return Ok(None);
        }
    }

    fn at(&self) -> (i64, i32) {
        let time = self.next.as_ref().and_then(|n| n.time);
        time.map_or((i64::MIN, 0), |t| (t.seconds, t.nanos))
    }
}

async fn collect(
    relay: &Relay,
    request: GetFlowsRequest,
    scope: &Scope,
    sender: &Sender,
) -> Result<(), Stop> {
    let (mut heads, mut words) = (Vec::new(), Vec::new());
    for agent in relay.agents() {
        match agent.ask(flows_question(request.clone())) {
            Ok(ask) => heads.push(Head { agent, ask, next: None }),
            Err(busy) => words.push(word(&agent.node, NodeState::NodeUnavailable, &busy.to_string())),
        }
    }
    let filled = join_all(heads.iter_mut().map(|head| head.fill(scope))).await;
    for (head, outcome) in heads.iter().zip(filled) {
        if let Some(why) = outcome.map_err(Stop::Failed)? {
            words.push(word(&head.agent.node, NodeState::NodeUnavailable, &why));
        }
    }
    for word in words.drain(..) {
        say(sender, word).await?;
    }
    let number = usize::try_from(request.number).unwrap_or(usize::MAX);
    let (mut newest, mut sent) = (VecDeque::new(), 0_usize);
    loop {
        heads.retain(|head| head.next.is_some());
        let Some(head) = heads.iter_mut().min_by_key(|head| head.at()) else { break };
        let Some(flow) = head.next.take() else { break };
        let counts = matches!(flow.response_types, Some(ResponseTypes::Flow(_)));
        if number == 0 || request.first || !counts {
            say(sender, flow).await?;
            sent += usize::from(counts);
            if request.first && number > 0 && sent >= number {
                return Ok(());
            }
        } else {
            newest.push_back(flow);
            if newest.len() > number {
                newest.pop_front();
            }
        }
        if let Some(why) = head.fill(scope).await.map_err(Stop::Failed)? {
            say(sender, word(&head.agent.node, NodeState::NodeUnavailable, &why)).await?;
        }
    }
    for flow in newest {
        say(sender, flow).await?;
    }
    Ok(())
}

async fn follow(relay: &Relay, request: GetFlowsRequest, scope: &Scope, sender: &Sender) -> Result<(), Stop> {
    let mut changes = relay.changes();
    let mut streams = SelectAll::new();
    // By node, the stream that is followed.
    let mut followed: HashMap<Arc<str>, Arc<Agent>> = HashMap::new();
    let mut request = request;
    loop {
        for agent in relay.agents() {
            if followed.get(&agent.node).is_some_and(|old| Arc::ptr_eq(old, &agent)) {
                continue;
            }
            let ask = match agent.ask(flows_question(request.clone())) {
                Ok(ask) => ask,
                Err(busy) => {
                    say(sender, word(&agent.node, NodeState::NodeError, &busy.to_string())).await?;
                    continue;
                }
            };
            say(sender, word(&agent.node, NodeState::NodeConnected, "")).await?;
            followed.insert(Arc::clone(&agent.node), Arc::clone(&agent));
            streams.push(Box::pin(unfold(Some((agent, ask)), |state| async {
                let (agent, mut ask) = state?;
                let body = ask.next().await;
                let more = matches!(body, Some(Body::Flow(_)));
                let from = Arc::clone(&agent);
                Some(((from, body), more.then_some((agent, ask))))
            })));
        }
        // Agents that come later are followed from now on.
        (request.number, request.since) = (0, None);
        loop {
            tokio::select! {
                changed = changes.changed() => {
                    changed.map_err(|_| Stop::Gone)?;
                    break;
                }
                Some((agent, body)) = streams.next() => match step(body, scope).map_err(Stop::Failed)? {
                    Step::Flow(flow) => say(sender, *flow).await?,
                    Step::Hidden => {}
                    Step::Done => {
                        followed.remove(&agent.node);
                    }
                    Step::Lost(why) => {
                        followed.remove(&agent.node);
                        say(sender, word(&agent.node, NodeState::NodeGone, &why)).await?;
                    }
                }
            }
        }
    }
}
