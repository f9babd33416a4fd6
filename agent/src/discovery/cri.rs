//! The container runtime as the kubelet speaks to it: which sandboxes there are, and where their network is.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use tokio::time::timeout;
use tonic::{
    Code, Request, Status, Streaming,
    transport::{Channel, Endpoint},
};
use weft_core::NamespacedName;
use weft_proto::cri::{
    ContainerEventResponse, GetEventsRequest, ListPodSandboxRequest, NamespaceMode, PodSandboxState,
    PodSandboxStatus, PodSandboxStatusRequest, VersionRequest, runtime_service_client::RuntimeServiceClient,
};

use super::{Sandbox, asked, isolation, netns, table::Listed, uid};

/// How long the runtime may take to answer.
const CALL: Duration = Duration::from_secs(5);
/// Longest answer, in bytes: the kubelet's own limit.
const MAX_ANSWER: usize = 16 << 20;
/// The entry of a verbose status that holds the runtime's own description.
const INFO: &str = "info";

/// The runtime does not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum CriError {
    /// The socket's path is none.
    #[error("{socket} is no path of a socket; see --cri")]
    Socket {
        /// What was given.
        socket: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
    /// A call failed.
    #[error("the container runtime does not answer {call} ({message}); check --cri and the runtime's socket")]
    Call {
        /// Which one.
        call: &'static str,
        /// Why.
        message: String,
    },
}

/// A client of the runtime. Reconnects by itself.
#[derive(Debug, Clone)]
pub(super) struct Cri {
    client: RuntimeServiceClient<Channel>,
    root: PathBuf,
}

/// The sandboxes that the runtime lists.
#[derive(Debug, Default)]
pub(super) struct List(Vec<(String, bool)>);

impl List {
    /// Their ids and whether they run.
    pub(super) fn listed(&self) -> Vec<Listed<'_>> {
        self.0.iter().map(|(id, ready)| Listed { id, ready: *ready }).collect()
    }
}

impl Cri {
    /// Of the runtime at `socket`, whose root folder is `root` for us.
    pub(super) fn new(socket: &Path, root: &Path) -> Result<Self, CriError> {
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()))
            .map_err(|source| CriError::Socket { socket: socket.into(), source })?;
        let channel = endpoint.connect_timeout(CALL).connect_lazy();
        let client = RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        Ok(Self { client, root: root.into() })
    }

    /// Name and version of the runtime.
    pub(super) async fn version(&self) -> Result<String, CriError> {
        let mut client = self.client.clone();
        let answer = call("Version", client.version(VersionRequest { version: "v1".into() })).await?;
        Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
    }

    /// Every sandbox.
    pub(super) async fn list(&self) -> Result<List, CriError> {
        let mut client = self.client.clone();
        let answer = call("ListPodSandbox", client.list_pod_sandbox(ListPodSandboxRequest {})).await?;
        let ready = |item: &weft_proto::cri::PodSandbox| item.state() == PodSandboxState::SandboxReady;
        Ok(List(answer.items.into_iter().map(|item| (item.id.clone(), ready(&item))).collect()))
    }

    /// One sandbox; `None` where it is gone, is over, or is nobody's Pod.
    pub(super) async fn sandbox(&self, id: &str) -> Result<Option<Sandbox>, CriError> {
        let mut client = self.client.clone();
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        let answered = timeout(CALL, client.pod_sandbox_status(Request::new(request))).await;
        let answer = match answered {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) if status.code() == Code::NotFound => return Ok(None),
            Ok(Err(status)) => return Err(failed("PodSandboxStatus", &status)),
            Err(_) => return Err(slow("PodSandboxStatus")),
        };
        let Some(status) = answer.status else { return Ok(None) };
        let info = answer.info.get(INFO).map(|json| serde_json::from_str::<Info>(json));
        let info = match info {
            Some(Ok(info)) => info,
            Some(Err(error)) => {
                tracing::debug!(id, %error, "the runtime describes the sandbox in a way of its own");
                Info::default()
            }
            None => Info::default(),
        };
        let root = self.root.clone();
        let described = tokio::task::spawn_blocking(move || describe(&root, status, &info)).await;
        described.map_err(|e| CriError::Call { call: "PodSandboxStatus", message: e.to_string() })
    }

    /// Something happens in the runtime each time this stream yields. `None` where the runtime has no such stream.
    pub(super) async fn events(&self) -> Result<Option<Streaming<ContainerEventResponse>>, CriError> {
        let mut client = self.client.clone();
        // The answer's head comes with its first event: no limit to that.
        match client.get_container_events(GetEventsRequest {}).await {
            Ok(answer) => Ok(Some(answer.into_inner())),
            Err(status) if status.code() == Code::Unimplemented => Ok(None),
            Err(status) => Err(failed("GetContainerEvents", &status)),
        }
    }
}

async fn call<T>(
    name: &'static str,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, CriError> {
    match timeout(CALL, answer).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(failed(name, &status)),
        Err(_) => Err(slow(name)),
    }
}

fn failed(call: &'static str, status: &Status) -> CriError {
    let message: String = status.message().chars().take(300).collect();
    CriError::Call { call, message: format!("{:?}: {message}", status.code()) }
}

fn slow(call: &'static str) -> CriError {
    CriError::Call { call, message: format!("no answer within {CALL:?}") }
}

/// What containerd and CRI-O both put into a verbose status.
#[derive(Debug, Default, Deserialize)]
struct Info {
    #[serde(default)]
    pid: Option<u32>,
    #[serde(default, rename = "runtimeType")]
    runtime_type: Option<String>,
    #[serde(default, rename = "runtimeSpec")]
    spec: Option<Spec>,
}

#[derive(Debug, Default, Deserialize)]
struct Spec {
    #[serde(default)]
    linux: Option<Linux>,
}

#[derive(Debug, Default, Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Option<Vec<Namespace>>,
}

#[derive(Debug, Default, Deserialize)]
struct Namespace {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

impl Info {
    fn network(&self) -> Option<&str> {
        let namespaces = self.spec.as_ref()?.linux.as_ref()?.namespaces.as_ref()?;
        namespaces.iter().find(|n| n.kind == "network").map(|n| n.path.as_str())
    }
}

fn describe(root: &Path, status: PodSandboxStatus, info: &Info) -> Option<Sandbox> {
    if status.state() != PodSandboxState::SandboxReady {
        return None;
    }
    let metadata = status.metadata.unwrap_or_default();
    let uid = uid(&metadata.uid)?;
    let options = status.linux.and_then(|l| l.namespaces).and_then(|n| n.options);
    let netns = netns::locate(root, info.network(), info.pid);
    let host_network = options.is_some_and(|o| o.network() == NamespaceMode::Node)
        || netns.as_deref().is_some_and(netns::is_host);
    let network = status.network.unwrap_or_default();
    let addresses: Vec<IpAddr> = std::iter::once(network.ip)
        .chain(network.additional_ips.into_iter().map(|a| a.ip))
        .filter_map(|text| text.parse().ok())
        .collect();
    Some(Sandbox {
        id: status.id,
        uid,
        name: NamespacedName::new(&metadata.namespace, &metadata.name),
        mode: asked(&status.labels),
        isolated: isolation(&status.runtime_handler, info.runtime_type.as_deref()),
        created: status.created_at,
        ..Sandbox::network(netns, host_network, addresses)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbose_information_of_both_runtimes_is_understood() {
        let containerd = r#"{"pid":4711,"processStatus":"running","runtimeType":"io.containerd.runc.v2",
            "runtimeSpec":{"ociVersion":"1.2","linux":{"namespaces":[{"type":"pid"},
            {"type":"network","path":"/var/run/netns/cni-1"}]}},"cniResult":{}}"#;
        let info: Info = serde_json::from_str(containerd).unwrap();
        assert_eq!((info.pid, info.network()), (Some(4711), Some("/var/run/netns/cni-1")));
        let crio = r#"{"image":"pause","pid":12,"runtimeSpec":{"linux":{"namespaces":null}}}"#;
        let info: Info = serde_json::from_str(crio).unwrap();
        assert_eq!((info.pid, info.network()), (Some(12), None));
        assert!(serde_json::from_str::<Info>("{\"pid\":-1}").is_err());
    }

    #[test]
    fn a_sandbox_without_a_plain_uid_is_nobodys() {
        let status = |uid: &str| PodSandboxStatus {
            id: "a".into(),
            metadata: Some(weft_proto::cri::PodSandboxMetadata {
                name: "web".into(),
                uid: uid.into(),
                namespace: "shop".into(),
                attempt: 0,
            }),
            ..PodSandboxStatus::default()
        };
        let described = |uid: &str| describe(Path::new("/"), status(uid), &Info::default());
        assert_eq!(described("5e0b-1").unwrap().name, NamespacedName::new("shop", "web"));
        for bad in ["", "../x", "a b", &"a".repeat(65)] {
            assert_eq!(described(bad), None, "{bad:?}");
        }
        // This process's namespace is the host's.
        let own = Info { pid: Some(std::process::id()), ..Info::default() };
        assert!(describe(Path::new("/"), status("5e0b-1"), &own).unwrap().host_network);
    }
}
