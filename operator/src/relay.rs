//! The relay: people ask the operator for flows and states, and it asks the agents over the streams that they opened to
//! it. It never dials a node. A replica speaks for the agents that are connected to it; the caller asks every replica.
//!
//! Every question has an id of its stream. Flows are answered against credit, so that a slow reader holds up neither
//! other questions of the stream nor this process's memory; what waits too long is counted as lost in the agent's store.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tonic::{Code, Status};
use weft_proto::weft_relay::{
    Answer, Cancel, Credit, End, Flows, NodeStatus, Probe, ProbeResult, Question, answer::Answer as Body,
    question::Question as Asked,
};

pub mod agents;
mod flows;
pub mod people;
#[cfg(test)]
mod tests;
pub mod viewers;
mod within;

/// Answers to one question that may wait here.
const CREDIT: u32 = 256;
/// How many are taken before more may come.
const RETURN: u32 = CREDIT / 2;
/// Questions to one agent at one time.
const MAX_ASKED: usize = 16;
/// Messages on their way to an agent.
const QUEUE: usize = 256;
/// Streams of one node: an agent and its successor, and what has not been noticed to be gone.
const MAX_STREAMS: usize = 4;

/// The agents that can be asked. Clones are handles to the same set.
#[derive(Debug, Clone, Default)]
pub struct Relay {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// By node; the newest last.
    agents: Mutex<BTreeMap<Arc<str>, Vec<Arc<Agent>>>>,
    changed: watch::Sender<u64>,
}

/// One stream of an agent.
#[derive(Debug)]
struct Agent {
    node: Arc<str>,
    questions: mpsc::Sender<Result<Question, Status>>,
    open: Mutex<HashMap<u64, mpsc::Sender<Body>>>,
    next: AtomicU64,
    /// The stream shall end: the agent does not read, or says more than it may.
    broken: Notify,
}

/// A question of which the answers are awaited. Dropped, it is cancelled.
#[derive(Debug)]
struct Ask {
    agent: Arc<Agent>,
    id: u64,
    answers: mpsc::Receiver<Body>,
    taken: u32,
}

/// An agent cannot be asked now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many ask it already, or it does not read; try again")]
struct Busy;

impl Relay {
    /// Adds a stream; what is sent to the agent comes from the receiver.
    fn join(&self, node: &str) -> (Joined, mpsc::Receiver<Result<Question, Status>>) {
        let (questions, receiver) = mpsc::channel(QUEUE);
        let node: Arc<str> = node.into();
        let agent = Arc::new(Agent {
            node: Arc::clone(&node),
            questions,
            open: Mutex::default(),
            next: AtomicU64::new(1),
            broken: Notify::new(),
        });
        {
            let mut agents = self.shared.agents.lock();
            let streams = agents.entry(node).or_default();
            streams.push(Arc::clone(&agent));
            if streams.len() > MAX_STREAMS {
                streams.remove(0).broken.notify_one();
            }
        }
        self.shared.changed.send_modify(|n| *n = n.wrapping_add(1));
        (Joined { relay: self.clone(), agent }, receiver)
    }

    /// The newest stream of each node, by name.
    fn agents(&self) -> Vec<Arc<Agent>> {
        self.shared.agents.lock().values().filter_map(|s| s.last().cloned()).collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }
}

/// A stream's place among the agents; it is given up with the value.
#[derive(Debug)]
struct Joined {
    relay: Relay,
    agent: Arc<Agent>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        {
            let mut agents = self.relay.shared.agents.lock();
            if let Some(streams) = agents.get_mut(&self.agent.node) {
                streams.retain(|a| !Arc::ptr_eq(a, &self.agent));
                if streams.is_empty() {
                    agents.remove(&self.agent.node);
                }
            }
        }
        // Who waits for an answer learns that none comes.
        self.agent.open.lock().clear();
        self.relay.shared.changed.send_modify(|n| *n = n.wrapping_add(1));
    }
}

impl Agent {
    fn ask(self: &Arc<Self>, question: Asked) -> Result<Ask, Busy> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        // One more than the credit: the end costs none.
        let (sender, answers) = mpsc::channel(CREDIT as usize + 1);
        {
            let mut open = self.open.lock();
            if open.len() >= MAX_ASKED {
                return Err(Busy);
            }
            open.insert(id, sender);
        }
        let ask = Ask { agent: Arc::clone(self), id, answers, taken: 0 };
        if self.tell(id, question) { Ok(ask) } else { Err(Busy) }
    }

    fn tell(&self, id: u64, question: Asked) -> bool {
        let sent = self.questions.try_send(Ok(Question { id, question: Some(question) }));
        if sent.is_err() {
            self.broken.notify_one();
        }
        sent.is_ok()
    }

    /// Hands an answer to who asked.
    fn answered(&self, answer: Answer) -> Result<(), Status> {
        // An agent of a later version says something that this one does not know.
        let Some(body) = answer.answer else { return Ok(()) };
        let mut open = self.open.lock();
        // A question that was cancelled in the meantime is not there any more.
        let Some(sender) = open.get(&answer.id) else { return Ok(()) };
        let last = matches!(body, Body::End(_));
        let outcome = match sender.try_send(body) {
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(Status::resource_exhausted("the agent sent more than it had credit for"))
            }
            _ => Ok(()),
        };
        if last {
            open.remove(&answer.id);
        }
        outcome
    }
}

impl Ask {
    /// The next answer; `None` where the stream is gone.
    async fn next(&mut self) -> Option<Body> {
        let body = self.answers.recv().await?;
        self.taken += 1;
        if self.taken >= RETURN && !matches!(body, Body::End(_)) {
            self.agent.tell(self.id, Asked::Credit(Credit { count: self.taken }));
            self.taken = 0;
        }
        Some(body)
    }
}

impl Drop for Ask {
    fn drop(&mut self) {
        // Still there: the agent has not ended its answer.
        if self.agent.open.lock().remove(&self.id).is_some() {
            self.agent.tell(self.id, Asked::Cancel(Cancel {}));
        }
    }
}

fn flows_question(request: weft_proto::observer::GetFlowsRequest) -> Asked {
    Asked::Flows(Flows { request: Some(request), credit: CREDIT })
}

/// The state that an agent tells of itself, or why there is none.
async fn status_of(agent: &Arc<Agent>) -> Result<NodeStatus, String> {
    let mut ask = agent.ask(Asked::Status(weft_proto::weft_relay::Status {})).map_err(|e| e.to_string())?;
    match ask.next().await {
        Some(Body::Status(status)) => Ok(status),
        Some(Body::End(end)) => Err(end.message),
        Some(_) => Err("it answers something else".into()),
        None => Err("it went away".into()),
    }
}

/// Has an agent make a probe.
async fn probe_by(agent: &Arc<Agent>, probe: Probe) -> Result<ProbeResult, Status> {
    let mut ask = agent.ask(Asked::Probe(probe)).map_err(|e| Status::resource_exhausted(e.to_string()))?;
    match ask.next().await {
        Some(Body::Probe(result)) => Ok(result),
        Some(Body::End(End { code, message })) => Err(Status::new(Code::from(code), message)),
        Some(_) => Err(Status::internal("its agent answers something else")),
        None => Err(Status::unavailable("its agent went away; try again")),
    }
}
