//! The stream by which a node follows the mesh.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tonic::{Request, Response, Status, Streaming};
use weft_core::Version;
use weft_proto::control::{
    self as proto, SubscribeRequest, control_server::Control, subscribe_request::Message,
};
use weft_runtime::{DrainWatcher, Tasks};

use super::{
    caller, pieces,
    turns::{self, Outgoing, Sent, Turns},
};
use crate::{
    auth::Authenticator,
    distribution::{Distribution, MessageError, Snapshot, nodes::Stream},
    metrics::Metrics,
};

/// How long an agent has to say where it stands.
const HELLO: Duration = Duration::from_secs(10);
/// Messages that wait for a slow agent; further changes join the next message.
const QUEUE: usize = 2;

/// The service; to be served inside [`pieces::InPieces`].
#[derive(Debug, Clone)]
pub struct ControlService {
    /// What is sent.
    pub distribution: Arc<Distribution>,
    /// Who may listen.
    pub callers: Arc<dyn Authenticator>,
    /// What is counted.
    pub metrics: Metrics,
    /// Whose large message is sent when.
    pub turns: Turns,
    /// Where streams run.
    pub tasks: Tasks,
    /// When they end.
    pub drain: DrainWatcher,
}

#[tonic::async_trait]
impl Control for ControlService {
    type SubscribeStream = pieces::Nothing;

    async fn subscribe(
        &self,
        request: Request<Streaming<SubscribeRequest>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let node = caller(&*self.callers, &self.metrics, &request).await?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let service = self.clone();
        let incoming = request.into_inner();
        self.tasks.spawn("agent stream", async move {
            service.metrics.streams.inc();
            let end = service.follow(&node, incoming, &sender).await;
            service.metrics.streams.dec();
            match end {
                Ok(()) => tracing::info!(node, "the agent's stream ended"),
                Err(status) => {
                    tracing::warn!(node, code = ?status.code(), "the agent's stream ended: {}", status.message());
                    // Where the agent does not read any more it needs no reason.
                    let _ = sender.try_send(Sent::small(Err(status)));
                }
            }
        });
        Ok(pieces::answer(Outgoing::new(receiver)))
    }
}

type Sender = mpsc::Sender<Sent>;

impl ControlService {
    async fn follow(
        &self,
        node: &str,
        mut incoming: Streaming<SubscribeRequest>,
        sender: &Sender,
    ) -> Result<(), Status> {
        let first = timeout(HELLO, incoming.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no hello came"))??;
        let Some(SubscribeRequest { message: Some(Message::Hello(hello)) }) = first else {
            return Err(Status::invalid_argument("the first message must be hello"));
        };
        let held = version(hello.version.as_ref());
        let stream = Stream::open(&self.distribution, node, &hello.agent_version)
            .map_err(|e| Status::resource_exhausted(e.to_string()))?;
        tracing::info!(node, agent = hello.agent_version, %held, "an agent follows");
        let mut newest = self.distribution.subscribe();
        let mut sent = held;
        // What the agent holds it must still confirm, so it is always sent something first.
        let mut due = true;
        let mut turn = None;
        // Ends when a large message is on its way no more.
        let mut reading = futures_util::future::pending().boxed();
        loop {
            let now = newest.borrow().clone().filter(|_| due);
            let needed = match now {
                Some(snapshot) => Some(turns::needed(snapshot.size(sent).map_err(failed)?)),
                None => None,
            };
            // What it needs may be more by now; its turn stays what it was.
            let (waiting, ready) = match needed {
                Some(Some(kib)) if turn.is_none() => (kib, false),
                Some(_) => (0, true),
                None => (0, false),
            };
            tokio::select! {
                () = self.drain.draining() => return Err(Status::unavailable("the operator stops; try again")),
                message = incoming.message() => match message? {
                    None => return Ok(()),
                    Some(SubscribeRequest { message: Some(Message::Ack(ack)) }) => self.ack(stream.node(), ack),
                    // An agent of a later version says something that this one does not know.
                    Some(SubscribeRequest { message: None }) => {}
                    Some(_) => return Err(Status::invalid_argument("after hello only acks are understood")),
                },
                changed = newest.changed(), if needed.is_none() => {
                    changed.map_err(|_| Status::unavailable("the operator stops; try again"))?;
                    due = true;
                }
                () = &mut reading => reading = futures_util::future::pending().boxed(),
                own = self.turns.wait(waiting), if waiting > 0 => turn = own,
                permit = sender.reserve(), if ready => {
                    let Ok(permit) = permit else { return Ok(()) };
                    due = false;
                    if let Some(snapshot) = current(&mut newest) {
                        let message = snapshot.message(sent, node).map_err(failed);
                        match turn.take() {
                            None => permit.send(Sent::small(message)),
                            Some(turn) => {
                                let (large, taken) = Sent::large(message, turn);
                                permit.send(large);
                                reading = taken;
                            }
                        }
                        self.metrics.deltas.inc();
                        sent = snapshot.version;
                    }
                }
            }
        }
    }

    fn ack(&self, node: &str, ack: proto::Ack) {
        let version = version(ack.version.as_ref());
        for r in &ack.rejected {
            let text = |t: &str| t.chars().filter(|c| !c.is_control()).take(300).collect::<String>();
            self.metrics.rejected.inc();
            tracing::error!(node, "the agent cannot apply {}: {}", text(&r.key), text(&r.error));
        }
        let rejected = ack.rejected.into_iter().map(|r| (r.key, r.error)).collect();
        if self.distribution.nodes.ack(node, version, rejected)
            && let Some(noticed) = self.distribution.noticed(version)
        {
            self.metrics.enforced.observe(noticed.elapsed().as_secs_f64());
        }
    }
}

fn current(newest: &mut watch::Receiver<Option<Arc<Snapshot>>>) -> Option<Arc<Snapshot>> {
    newest.borrow_and_update().clone()
}

fn version(v: Option<&proto::Version>) -> Version {
    v.map_or_else(Version::default, |v| Version { epoch: v.epoch, sequence: v.sequence })
}

#[expect(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn failed(error: MessageError) -> Status {
    match error {
        MessageError::Json(_) => Status::internal(error.to_string()),
        MessageError::TooLong => Status::out_of_range(error.to_string()),
    }
}
