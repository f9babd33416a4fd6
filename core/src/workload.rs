//! A Pod as the mesh sees it.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::id::{NamespacedName, SpiffeId, SubjectId, WorkloadUid};

/// What the label `weft.mesh/mode` says of a Pod, its own label and its namespace's taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Untouched: nothing is judged, nothing is proxied.
    #[default]
    Disabled,
    /// mTLS between enrolled Pods; plaintext from outside is accepted, marked unauthenticated and policed.
    Permissive,
    /// mTLS or nothing.
    Strict,
}

impl Mode {
    /// True where the mesh handles the Pod's traffic at all.
    pub fn enrolled(self) -> bool {
        self != Self::Disabled
    }
}

/// What happens when Weft itself cannot decide (label `weft.mesh/fail-mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// Refuse.
    #[default]
    Closed,
    /// Let pass; never together with [`Mode::Strict`].
    Open,
}

/// The object that made a Pod (`Deployment/web`), for names in flows and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Owner {
    /// Its kind; `Pod` where nothing else owns the Pod.
    pub kind: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// A Pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// The Pod's UID.
    pub uid: WorkloadUid,
    /// Namespace and name of the Pod.
    pub name: NamespacedName,
    /// The service account's name.
    pub service_account: Arc<str>,
    /// Its identity.
    pub identity: SpiffeId,
    /// Its policy subject.
    pub subject: SubjectId,
    /// What owns it.
    pub owner: Owner,
    /// The node it runs on.
    pub node: Arc<str>,
    /// The node's zone, empty where unknown.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub zone: Arc<str>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Container ports by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub named_ports: BTreeMap<String, u16>,
    /// How the mesh treats it.
    pub mode: Mode,
    /// What happens to it when Weft cannot decide.
    #[serde(default)]
    pub fail_mode: FailMode,
    /// The policies that select it, sorted by name. Always written: earlier readers have no default for it.
    #[serde(default)]
    pub policies: Vec<NamespacedName>,
    /// True where a NetworkPolicy selects it: the same-node shortcut then steps aside.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub network_policy: bool,
    /// The path of its network namespace; set only by the directory source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// Of a node ([`Self::is_node`]): its addresses, which others share and nobody is reached at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_addresses: Vec<IpAddr>,
}

impl Workload {
    /// The node's own network, in the name of which its Pods there speak: any of them could be any other. It calls, and
    /// is never called; its mode is [`Mode::Disabled`].
    pub fn is_node(&self) -> bool {
        self.identity.as_node().is_some()
    }
}
