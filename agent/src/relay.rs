//! The agent's side of the relay: one stream to the operator, over which people's questions come (`weft status`,
//! `weft observe`). A node is never dialled; without the stream everything else goes on.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};
use weft_identity::client::TokenFile;
use weft_proto::{
    agent::{StatusRequest, agent_server::Agent as _},
    observer::observer_server::Observer as _,
    weft_relay::{
        Answer, End, Flows, Hello, NodeStatus, Question, answer::Answer as Body, question::Question as Asked,
        relay_client::RelayClient,
    },
};
use weft_runtime::{Backoff, DrainWatcher};

use crate::{bundle::Operator, flow::server::Observer, probe::Prober, status::AgentStatus};

mod routes;

/// Questions that are answered at one time.
const MAX_QUESTIONS: usize = 16;
/// Answers that may be on their way for one question.
const MAX_CREDIT: u32 = 1024;
/// Answers that wait for the stream.
const QUEUE: usize = 32;
/// Longest message of an end, in characters.
const MAX_MESSAGE: usize = 400;

/// What the relay works with.
pub struct Relay {
    /// The way to the operator.
    pub operator: Operator,
    /// The node's token.
    pub token: TokenFile,
    /// Answers for flows.
    pub observer: Observer,
    /// Answers for the state.
    pub status: AgentStatus,
    /// Makes probes.
    pub prober: Prober,
    /// Ends it.
    pub drain: DrainWatcher,
}

/// A question that is being answered.
struct Open {
    credit: Arc<Semaphore>,
    _cancel: oneshot::Sender<()>,
}

type Work = BoxFuture<'static, u64>;

impl Relay {
    /// Keeps the stream until the drain begins.
    pub async fn run(self) {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
        loop {
            let mut began = false;
            let outcome = tokio::select! {
                outcome = self.serve(&mut began) => outcome,
                () = self.drain.draining() => return,
            };
            match outcome {
                Ok(()) => tracing::debug!("the operator ended the relay's stream"),
                // An operator of an earlier version; `weft status` on the node goes on.
                Err(status) if status.code() == Code::Unimplemented => {
                    tracing::debug!("the operator has no relay yet");
                }
                Err(status) => tracing::debug!(code = ?status.code(), "no relay: {}", status.message()),
            }
            if began {
                backoff.reset();
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next()) => {}
                () = self.drain.draining() => return,
            }
        }
    }

    async fn serve(&self, began: &mut bool) -> Result<(), Status> {
        let (answers, receiver) = mpsc::channel(QUEUE);
        let hello = Hello { agent_version: env!("CARGO_PKG_VERSION").into() };
        let first = Answer { id: 0, answer: Some(Body::Hello(hello)) };
        answers.send(first).await.map_err(|_| Status::internal("the stream has no reader"))?;
        let mut request = Request::new(ReceiverStream::new(receiver));
        let token = self.token.read().await.map_err(|e| Status::unauthenticated(e.to_string()))?;
        request.metadata_mut().insert("authorization", token);
        let mut questions = RelayClient::new(self.operator.clone()).serve(request).await?.into_inner();
        *began = true;
        let mut open: HashMap<u64, Open> = HashMap::new();
        let mut works: FuturesUnordered<Work> = FuturesUnordered::new();
        loop {
            tokio::select! {
                question = questions.message() => match question? {
                    Some(question) => {
                        if let Some(work) = self.asked(question, &mut open, &answers) {
                            works.push(work);
                        }
                    }
                    None => return Ok(()),
                },
                Some(id) = works.next() => drop(open.remove(&id)),
            }
        }
    }

    /// Begins the answer to a question, or changes one that is being answered.
    fn asked(
        &self,
        question: Question,
        open: &mut HashMap<u64, Open>,
        answers: &mpsc::Sender<Answer>,
    ) -> Option<Work> {
        let id = question.id;
        match question.question {
            Some(Asked::Cancel(_)) => {
                open.remove(&id);
                return None;
            }
            Some(Asked::Credit(more)) => {
                if let Some(open) = open.get(&id) {
                    let room = (MAX_CREDIT as usize).saturating_sub(open.credit.available_permits());
                    open.credit.add_permits((more.count as usize).min(room));
                }
                return None;
            }
            _ => {}
        }
        let answers = answers.clone();
        if open.len() >= MAX_QUESTIONS || open.contains_key(&id) {
            let refused = Status::resource_exhausted("the agent answers enough questions already; try again");
            return Some(Box::pin(async move {
                // Its own number stands for no question of the table.
                send(&answers, 0, id, Body::End(end(&Err(refused)))).await
            }));
        }
        let first = match &question.question {
            Some(Asked::Flows(flows)) => flows.credit.clamp(1, MAX_CREDIT),
            _ => 1,
        };
        let credit = Arc::new(Semaphore::new(first as usize));
        let (cancel, cancelled) = oneshot::channel::<()>();
        open.insert(id, Open { credit: Arc::clone(&credit), _cancel: cancel });
        let (observer, status, prober) = (self.observer.clone(), self.status.clone(), self.prober.clone());
        Some(Box::pin(async move {
            let work = async {
                let outcome = match question.question {
                    Some(Asked::Status(_)) => {
                        let told = node_status(&status).await;
                        if let Ok(told) = &told {
                            send(&answers, id, id, Body::Status(told.clone())).await;
                        }
                        told.map(drop)
                    }
                    Some(Asked::Probe(probe)) => {
                        let told = prober.probe(&probe).await;
                        if let Ok(told) = &told {
                            send(&answers, id, id, Body::Probe(told.clone())).await;
                        }
                        told.map(drop)
                    }
                    Some(Asked::Flows(flows)) => answer_flows(&observer, flows, id, &credit, &answers).await,
                    _ => Err(Status::unimplemented("the agent does not know this question; upgrade it")),
                };
                send(&answers, id, id, Body::End(end(&outcome))).await
            };
            tokio::select! {
                // An error too: the sender went with the question.
                _ = cancelled => id,
                id = work => id,
            }
        }))
    }
}

/// Sends one answer; returns `own`, by which the work is known.
async fn send(answers: &mpsc::Sender<Answer>, own: u64, id: u64, body: Body) -> u64 {
    // Where the stream is gone, so is the question.
    let _ = answers.send(Answer { id, answer: Some(body) }).await;
    own
}

async fn answer_flows(
    observer: &Observer,
    flows: Flows,
    id: u64,
    credit: &Semaphore,
    answers: &mpsc::Sender<Answer>,
) -> Result<(), Status> {
    let request = flows.request.unwrap_or_default();
    let mut stream = observer.get_flows(Request::new(request)).await?.into_inner();
    loop {
        // What the asker cannot take yet stays in the store, and is counted as lost if it is overwritten there.
        let Ok(permit) = credit.acquire().await else { return Ok(()) };
        let Some(flow) = stream.next().await else { return Ok(()) };
        permit.forget();
        send(answers, id, id, Body::Flow(flow?)).await;
    }
}

async fn node_status(status: &AgentStatus) -> Result<NodeStatus, Status> {
    let agent = status.status(Request::new(StatusRequest {})).await?.into_inner();
    // Small files of the kernel.
    let routes = routes::all();
    let mtu = routes.iter().find(|r| r.destination.ends_with("/0")).map(|r| r.mtu).unwrap_or_default();
    let routes = routes.into_iter().filter(|r| !r.destination.ends_with("/0")).collect();
    Ok(NodeStatus { agent: Some(agent), clock: Some(SystemTime::now().into()), mtu, routes })
}

fn end(outcome: &Result<(), Status>) -> End {
    match outcome {
        Ok(()) => End::default(),
        Err(status) => {
            End { code: status.code().into(), message: status.message().chars().take(MAX_MESSAGE).collect() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_short() {
        let long = Status::internal("x".repeat(10_000));
        assert_eq!(end(&Err(long)).message.len(), MAX_MESSAGE);
        assert_eq!(end(&Ok(())), End::default());
    }
}
