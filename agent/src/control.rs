//! The link to the operator: subscribes with the last version, hands each change on, acknowledges what is enforced.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};
use weft_core::{Delta, MeshState, Resource, ResourceKey, Version};
use weft_identity::client::TokenFile;
use weft_proto::control::{
    self as wire, Ack, Hello, Rejected, SubscribeRequest, SubscribeResponse, control_client::ControlClient,
    subscribe_request::Message,
};
use weft_runtime::{Backoff, DrainWatcher};

use crate::{
    bundle::Operator,
    node::{Command, NodeStatus},
};

/// Largest message from the operator, in bytes.
const MAX_MESSAGE: usize = 256 << 20;
/// Acknowledgements on their way.
const REQUESTS: usize = 16;
/// Longest error of a rejected resource, in characters.
const MAX_ERROR: usize = 400;
/// Rejected resources named in one acknowledgement.
const MAX_REJECTED: usize = 256;

/// The link, as the rest of the agent sees it.
#[derive(Debug, Clone, Default)]
pub struct Link {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    connected: AtomicBool,
    rejected: Mutex<BTreeMap<String, String>>,
    problem: Mutex<Option<String>>,
}

impl Link {
    /// Whether the stream stands.
    pub fn connected(&self) -> bool {
        self.shared.connected.load(Ordering::Relaxed)
    }

    /// Resources that could not be applied, with the error.
    pub fn rejected(&self) -> Vec<(String, String)> {
        self.shared.rejected.lock().iter().map(|(k, e)| (k.clone(), e.clone())).collect()
    }

    /// Why there is no stream.
    pub fn problem(&self) -> Option<String> {
        self.shared.problem.lock().clone()
    }
}

/// A stream that ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("{0}; check --token-file")]
    Token(#[from] std::io::Error),
    #[error("the operator says: {message} ({code:?})", message = .0.message(), code = .0.code())]
    Refused(#[from] Box<Status>),
    #[error("the operator ended the stream")]
    Ended,
    #[error("the node does not take changes any more")]
    Stopped,
}

/// What the control loop works with.
#[derive(Debug)]
pub struct Control {
    /// The way to the operator.
    pub operator: Operator,
    /// The node's token.
    pub token: TokenFile,
    /// The state that is held.
    pub state: watch::Receiver<Arc<MeshState>>,
    /// What is enforced.
    pub status: watch::Receiver<Arc<NodeStatus>>,
    /// Where changes go.
    pub commands: mpsc::Sender<Command>,
    /// What others see of the link.
    pub link: Link,
    /// Ends it.
    pub drain: DrainWatcher,
}

impl Control {
    /// Keeps the stream until the drain is over.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let drain = self.drain.clone();
        let work = async {
            loop {
                let mut began = false;
                let error = match self.stream(&mut began).await {
                    Ok(()) => return,
                    Err(error) => error,
                };
                self.link.shared.connected.store(false, Ordering::Relaxed);
                if began {
                    backoff.reset();
                }
                let wait = backoff.next();
                let first = self.link.shared.problem.lock().replace(error.to_string()).is_none();
                if first {
                    tracing::warn!(%error, "no link to the operator; the last configuration goes on");
                } else {
                    tracing::debug!(%error, ?wait, "no link to the operator yet");
                }
                if matches!(error, StreamError::Stopped) {
                    return;
                }
                tokio::time::sleep(wait).await;
            }
        };
        tokio::select! {
            () = work => {}
            () = drain.drained() => {}
        }
    }

    async fn stream(&mut self, began: &mut bool) -> Result<(), StreamError> {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let held = self.state.borrow().version();
        let hello = Hello { version: Some(to_wire(held)), agent_version: env!("CARGO_PKG_VERSION").into() };
        send(&requests, Message::Hello(hello)).await?;
        let mut request = Request::new(ReceiverStream::new(receiver));
        request.metadata_mut().insert("authorization", self.token.read().await?);
        let mut client = ControlClient::new(self.operator.clone()).max_decoding_message_size(MAX_MESSAGE);
        let mut answers = client.subscribe(request).await.map_err(Box::new)?.into_inner();
        self.link.shared.connected.store(true, Ordering::Relaxed);
        *self.link.shared.problem.lock() = None;
        tracing::info!(%held, "linked to the operator");
        *began = true;
        let mut acked = held;
        // A link that returns learns at once what was enforced meanwhile.
        self.status.mark_changed();
        loop {
            tokio::select! {
                answer = answers.message() => {
                    let answer = answer.map_err(Box::new)?.ok_or(StreamError::Ended)?;
                    self.hand_on(answer).await?;
                }
                changed = self.status.changed() => {
                    changed.map_err(|_| StreamError::Stopped)?;
                    let enforced = self.status.borrow_and_update().version;
                    // Zero: nothing was enforced by this agent yet.
                    if enforced != acked && enforced != Version::default() {
                        acked = enforced;
                        send(&requests, Message::Ack(self.ack(enforced))).await?;
                    }
                }
            }
        }
    }

    async fn hand_on(&self, answer: SubscribeResponse) -> Result<(), StreamError> {
        let decoded = decode(&answer);
        {
            let mut rejected = self.link.shared.rejected.lock();
            if answer.full {
                rejected.clear();
            }
            for key in &decoded.good {
                rejected.remove(key);
            }
            for (key, error) in &decoded.rejected {
                tracing::error!(key, error, "a resource cannot be applied; its last good form goes on");
                rejected.insert(key.clone(), error.clone());
            }
        }
        let command = Command::Apply { delta: decoded.delta, keep: decoded.keep, live: true };
        self.commands.send(command).await.map_err(|_| StreamError::Stopped)
    }

    fn ack(&self, version: Version) -> Ack {
        let rejected = self.link.rejected().into_iter().take(MAX_REJECTED);
        Ack {
            version: Some(to_wire(version)),
            rejected: rejected.map(|(key, error)| Rejected { key, error }).collect(),
        }
    }
}

async fn send(requests: &mpsc::Sender<SubscribeRequest>, message: Message) -> Result<(), StreamError> {
    requests.send(SubscribeRequest { message: Some(message) }).await.map_err(|_| StreamError::Ended)
}

fn to_wire(version: Version) -> wire::Version {
    wire::Version { epoch: version.epoch, sequence: version.sequence }
}

/// An answer, read resource by resource.
#[derive(Debug, Default)]
struct Decoded {
    delta: Delta,
    /// Unreadable resources whose last good form goes on.
    keep: Vec<ResourceKey>,
    /// Keys of readable and removed resources.
    good: Vec<String>,
    /// Keys of unreadable resources, with the error.
    rejected: Vec<(String, String)>,
}

fn decode(answer: &SubscribeResponse) -> Decoded {
    let version = answer.version.unwrap_or_default();
    let version = Version { epoch: version.epoch, sequence: version.sequence };
    let mut decoded =
        Decoded { delta: Delta { version, full: answer.full, ..Delta::default() }, ..Decoded::default() };
    for (index, resource) in answer.upserted.iter().enumerate() {
        match serde_json::from_slice::<Resource>(&resource.json) {
            Ok(resource) => {
                decoded.good.extend(text(&resource.key()));
                decoded.delta.upserted.push(resource);
            }
            Err(error) => {
                let key = key_of(&resource.json);
                let name =
                    key.as_ref().and_then(text).unwrap_or_else(|| format!("#{index} of version {version}"));
                decoded.rejected.push((name, cut(&error)));
                decoded.keep.extend(key);
            }
        }
    }
    for removed in &answer.removed {
        match serde_json::from_str::<ResourceKey>(removed) {
            Ok(key) => {
                decoded.good.extend(text(&key));
                decoded.delta.removed.push(key);
            }
            Err(error) => decoded.rejected.push((removed.chars().take(MAX_ERROR).collect(), cut(&error))),
        }
    }
    decoded
}

/// Reads an answer of the operator as the link does, for the fuzzer: the change, and how many resources were rejected.
#[cfg(feature = "fuzzing")]
pub fn fuzz(answer: &SubscribeResponse) -> (Delta, usize) {
    let decoded = decode(answer);
    (decoded.delta, decoded.rejected.len())
}

fn cut(error: &dyn std::fmt::Display) -> String {
    error.to_string().chars().take(MAX_ERROR).collect()
}

fn text(key: &ResourceKey) -> Option<String> {
    serde_json::to_string(key).ok()
}

/// The key of a resource that as a whole cannot be read.
fn key_of(json: &[u8]) -> Option<ResourceKey> {
    let value: serde_json::Value = serde_json::from_slice(json).ok()?;
    let spec = value.get("spec")?;
    let name = || serde_json::from_value(spec.get("name")?.clone()).ok();
    match value.get("kind")?.as_str()? {
        "Config" => Some(ResourceKey::Config),
        "Workload" => Some(ResourceKey::Workload(spec.get("uid")?.as_str()?.into())),
        "Service" => name().map(ResourceKey::Service),
        "Route" => name().map(ResourceKey::Route),
        "Policy" => name().map(ResourceKey::Policy),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
