//! The plugin that the container runtime asks before it starts a Pod's containers: the runtime waits for the answer,
//! so a Pod's hooks are in place before its first process runs.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use prost::Message as _;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    sync::mpsc,
    time::{Instant, timeout_at},
};
use weft_core::NamespacedName;
use weft_proto::{
    nri::{
        ConfigureRequest, ConfigureResponse, Empty, Event as Happened, PodSandbox, PodSandboxRequest,
        RegisterPluginRequest, StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
    },
    ttrpc::{Request, Status},
};

use super::{Event, Sandbox, Verdicts, asked, isolation, netns, uid};

mod wire;

use wire::{Incoming, Wire, WireError};

const PLUGIN: &str = "nri.pkg.api.v1alpha1.Plugin";
const RUNTIME: &str = "nri.pkg.api.v1alpha1.Runtime";
/// The plugin's name, and its place among others: late, so that what others add to a Pod is there.
const NAME: (&str, &str) = ("weft", "90");
/// How long registration and configuration may take.
const REGISTER: Duration = Duration::from_secs(5);
/// How long a Pod waits for its enrolment. The runtime starts no other Pod meanwhile and gives a plugin 2 s unless
/// told otherwise.
const ENROL: Duration = Duration::from_millis(1200);
/// The stream id of the one call that the plugin makes.
const REGISTRATION: u32 = 1;
/// `google.rpc.Code`.
const FAILED_PRECONDITION: i32 = 9;
const UNIMPLEMENTED: i32 = 12;
const INVALID_ARGUMENT: i32 = 3;

/// Why the runtime does not ask any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum NriError {
    /// No connection.
    #[error("the runtime's NRI socket {socket} cannot be used")]
    Connect {
        /// Where.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It broke.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It does not want us.
    #[error("the runtime refuses the plugin: {message}")]
    Refused {
        /// What it says.
        message: String,
    },
    /// Nothing came.
    #[error("the runtime does not configure the plugin within {REGISTER:?}")]
    Silent,
    /// The node's work has ended.
    #[error("the node takes no sandboxes any more")]
    Stopped,
}

/// The plugin.
#[derive(Debug, Clone)]
pub(super) struct Plugin {
    /// The runtime's root folder as we see it.
    pub(super) root: PathBuf,
    /// Where sandboxes go.
    pub(super) events: mpsc::Sender<Event>,
    /// What became of them.
    pub(super) verdicts: Verdicts,
}

impl Plugin {
    /// Connects, registers, and answers until the connection ends. `registered` is called once the runtime asks us.
    pub(super) async fn run(
        &self,
        socket: &Path,
        registered: impl FnOnce(&str),
    ) -> Result<Infallible, NriError> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| NriError::Connect { socket: socket.into(), source })?;
        self.serve(stream, registered).await
    }

    /// As [`Self::run`], over a connection that stands.
    pub(super) async fn serve<S>(
        &self,
        stream: S,
        registered: impl FnOnce(&str),
    ) -> Result<Infallible, NriError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut wire = Wire::new(stream);
        let registration =
            RegisterPluginRequest { plugin_name: NAME.0.into(), plugin_idx: NAME.1.into() }.encode_to_vec();
        let call = Request {
            service: RUNTIME.into(),
            method: "RegisterPlugin".into(),
            payload: registration,
            timeout_nano: i64::try_from(REGISTER.as_nanos()).unwrap_or(i64::MAX),
        };
        wire.call(REGISTRATION, &call).await?;
        let (mut registered, mut wait) = (Some(registered), ENROL);
        let deadline = Instant::now() + REGISTER;
        loop {
            let incoming = match registered {
                Some(_) => timeout_at(deadline, wire.receive()).await.map_err(|_| NriError::Silent)??,
                None => wire.receive().await?,
            };
            let (stream, request) = match incoming {
                Incoming::Response { stream, response } => {
                    if stream != REGISTRATION {
                        continue;
                    }
                    let status = response.status.unwrap_or_default();
                    if status.code != 0 {
                        return Err(NriError::Refused {
                            message: status.message.chars().take(300).collect(),
                        });
                    }
                    continue;
                }
                Incoming::Request { stream, request } => (stream, request),
            };
            let answer = match (request.service.as_str(), request.method.as_str()) {
                (PLUGIN, "Configure") => match decode::<ConfigureRequest>(&request.payload) {
                    Ok(configuration) => {
                        wait = patience(configuration.request_timeout);
                        if let Some(registered) = registered.take() {
                            registered(&configuration.runtime_version);
                        }
                        Ok(ConfigureResponse { events: subscription() }.encode_to_vec())
                    }
                    Err(status) => Err(status),
                },
                (PLUGIN, method) => self.answer(method, &request.payload, wait).await?,
                (service, _) => Err(status(UNIMPLEMENTED, format!("there is no service {service:?} here"))),
            };
            wire.answer(stream, answer).await?;
        }
    }

    async fn answer(
        &self,
        method: &str,
        payload: &[u8],
        wait: Duration,
    ) -> Result<Result<Vec<u8>, Status>, NriError> {
        let pod = |request: PodSandboxRequest| request.pod.unwrap_or_default();
        let (event, pod) = match method {
            // The lists of CRI say the same and more.
            "Synchronize" => {
                let answer = |r: SynchronizeRequest| SynchronizeResponse { more: r.more }.encode_to_vec();
                return Ok(decode(payload).map(answer));
            }
            "RunPodSandbox" => (Happened::RunPodSandbox, decode(payload).map(pod)),
            "StopPodSandbox" => (Happened::StopPodSandbox, decode(payload).map(pod)),
            "RemovePodSandbox" => (Happened::RemovePodSandbox, decode(payload).map(pod)),
            "StateChange" => match decode::<StateChangeEvent>(payload) {
                Ok(change) => (change.event(), Ok(change.pod.unwrap_or_default())),
                Err(status) => (Happened::Unknown, Err(status)),
            },
            "Shutdown" => (Happened::Unknown, Ok(PodSandbox::default())),
            _ => return Ok(Err(status(UNIMPLEMENTED, format!("there is no method {method:?} here")))),
        };
        let pod = match pod {
            Ok(pod) => pod,
            Err(status) => return Ok(Err(status)),
        };
        let answer = match event {
            Happened::RunPodSandbox => self.began(pod, wait).await?,
            Happened::StopPodSandbox | Happened::RemovePodSandbox => {
                self.events.send(Event::Ended(pod.id)).await.map_err(|_| NriError::Stopped)?;
                Ok(())
            }
            Happened::Unknown => Ok(()),
        };
        Ok(match answer {
            Ok(()) => Ok(Empty {}.encode_to_vec()),
            // The runtime then takes the sandbox down, and the kubelet shows this text and tries again.
            Err(why) => Err(status(FAILED_PRECONDITION, format!("weft: {why}"))),
        })
    }

    /// Waits until the node has put the Pod where it belongs.
    async fn began(&self, pod: PodSandbox, wait: Duration) -> Result<Result<(), String>, NriError> {
        let root = self.root.clone();
        let described = tokio::task::spawn_blocking(move || describe(&root, pod)).await;
        let Ok(Some(sandbox)) = described else {
            tracing::warn!("the runtime starts a sandbox that is no Pod's; it is left alone");
            return Ok(Ok(()));
        };
        if sandbox.host_network {
            return Ok(Ok(()));
        }
        let key = sandbox.clone();
        self.events.send(Event::Began(Box::new(sandbox))).await.map_err(|_| NriError::Stopped)?;
        Ok(self.verdicts.wait(&key, wait).await)
    }
}

/// How long a Pod may wait, given the runtime's own limit in milliseconds.
fn patience(limit: i64) -> Duration {
    let limit = u64::try_from(limit).ok().filter(|l| *l > 0).map(Duration::from_millis);
    limit.map_or(ENROL, |limit| ENROL.min(limit * 3 / 5))
}

/// The events that are asked for.
fn subscription() -> i32 {
    [Happened::RunPodSandbox, Happened::StopPodSandbox, Happened::RemovePodSandbox]
        .into_iter()
        .map(|event| 1 << (event as i32 - 1))
        .sum()
}

fn decode<M: prost::Message + Default>(payload: &[u8]) -> Result<M, Status> {
    M::decode(payload).map_err(|e| status(INVALID_ARGUMENT, e.to_string()))
}

fn status(code: i32, message: String) -> Status {
    Status { code, message }
}

fn describe(root: &Path, pod: PodSandbox) -> Option<Sandbox> {
    let uid = uid(&pod.uid)?;
    let namespaces = pod.linux.unwrap_or_default().namespaces;
    let network = namespaces.iter().find(|n| n.r#type == "network").map(|n| n.path.as_str());
    let netns = netns::locate(root, network, Some(pod.pid));
    // A specification that has namespaces and none for the network shares the host's.
    let shared = !namespaces.is_empty() && network.is_none();
    let host_network = shared || netns.as_deref().is_some_and(netns::is_host);
    let addresses = pod.ips.iter().filter_map(|text| text.parse().ok()).collect();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Some(Sandbox {
        id: pod.id,
        uid,
        name: NamespacedName::new(&pod.namespace, &pod.name),
        mode: asked(&pod.labels),
        isolated: isolation(&pod.runtime_handler, None),
        created: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        ..Sandbox::network(netns, host_network, addresses)
    })
}

#[cfg(test)]
mod tests;
