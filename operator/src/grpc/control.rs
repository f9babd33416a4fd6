//! The stream by which a node follows the mesh.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weft_core::Version;
use weft_proto::control::{
    self as proto, SubscribeRequest, SubscribeResponse, control_server::Control, subscribe_request::Message,
};
use weft_runtime::{DrainWatcher, Tasks};

use super::caller;
use crate::{
    auth::Authenticator,
    distribution::{Distribution, Snapshot, nodes::Stream},
    metrics::Metrics,
};

/// How long an agent has to say where it stands.
const HELLO: Duration = Duration::from_secs(10);
/// Messages that wait for a slow agent; further changes join the next message.
const QUEUE: usize = 2;

/// The service.
#[derive(Debug, Clone)]
pub struct ControlService {
    /// What is sent.
    pub distribution: Arc<Distribution>,
    /// Who may listen.
    pub callers: Arc<dyn Authenticator>,
    /// What is counted.
    pub metrics: Metrics,
    /// Where streams run.
    pub tasks: Tasks,
    /// When they end.
    pub drain: DrainWatcher,
}

#[tonic::async_trait]
impl Control for ControlService {
    type SubscribeStream = ReceiverStream<Result<SubscribeResponse, Status>>;

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
                    let _ = sender.try_send(Err(status));
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

type Sender = mpsc::Sender<Result<SubscribeResponse, Status>>;

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
        loop {
            let ready = due && newest.borrow().is_some();
            tokio::select! {
                () = self.drain.draining() => return Err(Status::unavailable("the operator stops; try again")),
                message = incoming.message() => match message? {
                    None => return Ok(()),
                    Some(SubscribeRequest { message: Some(Message::Ack(ack)) }) => self.ack(stream.node(), ack),
                    Some(_) => return Err(Status::invalid_argument("after hello only acks are understood")),
                },
                changed = newest.changed(), if !ready => {
                    changed.map_err(|_| Status::unavailable("the operator stops; try again"))?;
                    due = true;
                }
                permit = sender.reserve(), if ready => {
                    let Ok(permit) = permit else { return Ok(()) };
                    due = false;
                    if let Some(snapshot) = current(&mut newest) {
                        permit.send(encode(&snapshot, sent, node));
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

fn encode(snapshot: &Snapshot, held: Version, node: &str) -> Result<SubscribeResponse, Status> {
    let failed = |e: serde_json::Error| Status::internal(format!("a resource does not serialise: {e}"));
    let difference = snapshot.since(held);
    let upserted = (difference.upserted.iter())
        .map(|r| Ok(proto::Resource { json: r.json(node).map_err(failed)? }))
        .collect::<Result<_, Status>>()?;
    let removed = (difference.removed.iter())
        .map(|k| serde_json::to_string(k).map_err(failed))
        .collect::<Result<_, Status>>()?;
    let Version { epoch, sequence } = snapshot.version;
    let version = Some(proto::Version { epoch, sequence });
    Ok(SubscribeResponse { version, full: difference.full, upserted, removed })
}
