//! What the operator does in a Kubernetes cluster besides reading objects: the lease that decides who writes, the CA in
//! a Secret, the trust bundle in a ConfigMap, the check of agents' tokens, statuses and Events.

use kube::{Client, Config, runtime::watcher};

pub mod acks;
pub mod bundle;
pub mod ca;
mod events;
pub mod lease;
pub mod review;
pub mod secret;
pub mod status;
pub mod viewers;

/// Who the operator is in `managedFields`, in Events and in route statuses' `controllerName`.
pub const MANAGER: &str = "weft-operator";
/// The Secret that holds the mesh's CA.
pub const CA_SECRET: &str = "weft-ca";
/// The ConfigMap with the roots that agents verify the operator by.
pub const BUNDLE: &str = "weft-trust-bundle";
/// Its key.
pub const BUNDLE_KEY: &str = "bundle.pem";
/// The lease.
pub const LEASE: &str = "weft-operator";
/// The ConfigMap in which the replicas that do not write tell what their agents enforce.
pub const ACKS: &str = "weft-operator-acks";
/// The agents' ServiceAccount.
pub const AGENT_ACCOUNT: &str = "weft-agent";

/// The cluster, and this process's place in it.
#[derive(Clone)]
pub struct Cluster {
    /// To the API server.
    pub client: Client,
    /// Weft's namespace.
    pub namespace: String,
    /// This process's Pod.
    pub pod: String,
}

/// The API server cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no configuration.
    #[error(
        "no way to the API server is known: {0}; run in a Pod with a ServiceAccount, or set KUBECONFIG to a file"
    )]
    Config(#[from] kube::config::InferConfigError),
    /// It cannot be used.
    #[error("the API server's configuration cannot be used: {0}")]
    Client(#[from] kube::Error),
}

impl Cluster {
    /// By `KUBECONFIG`, or as a Pod.
    ///
    /// # Errors
    /// Without configuration, or with one that makes no client. The API server itself is not asked yet.
    pub async fn connect(namespace: &str, pod: &str) -> Result<Self, ConnectError> {
        let config = Config::infer().await?;
        let client = Client::try_from(config)?;
        Ok(Self { client, namespace: namespace.into(), pod: pod.into() })
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("namespace", &self.namespace)
            .field("pod", &self.pod)
            .finish_non_exhaustive()
    }
}

/// Why a call failed, on one line: what the API server said, where it said something.
fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// Why a watch failed.
fn watch_reason(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => reason(error),
        watcher::Error::WatchError(status) => status.message.clone(),
        watcher::Error::NoResourceVersion => error.to_string(),
    }
}

/// True where the API server says that an object exists already, or changed in the meantime.
fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}
