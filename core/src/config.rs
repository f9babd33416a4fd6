//! Settings of the whole mesh (kind `MeshConfig`).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    id::TrustDomain,
    workload::{FailMode, Mode},
};

/// How two Pods of one node talk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SameNode {
    /// Without crypto, still authorised.
    #[default]
    Shortcut,
    /// As across nodes.
    #[serde(rename = "MTLS")]
    Mtls,
}

/// What a Pod that the agent has not classified yet may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum UnknownPods {
    /// It may not reach enrolled Pods or Services.
    #[default]
    RefuseMesh,
    /// It may reach nothing.
    RefuseAll,
}

/// Which flows a node writes as lines to its standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum AccessLog {
    /// None.
    #[default]
    Off,
    /// Those that were refused or failed.
    Errors,
    /// All.
    All,
}

/// What is recorded of flows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Telemetry {
    /// Flows kept per node, a power of two.
    pub flow_capacity: u32,
    /// Whether query strings are recorded.
    pub query_strings: bool,
    /// Request headers that are recorded, lower case.
    pub headers: Vec<String>,
    /// Which flows are logged as lines.
    #[serde(default)]
    pub access_log: AccessLog,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self { flow_capacity: 8192, query_strings: false, headers: Vec::new(), access_log: AccessLog::Off }
    }
}

/// What the labels of a namespace say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NamespaceMode {
    /// How its Pods are treated, where their own labels do not tighten it.
    pub mode: Mode,
    /// What happens to them when Weft cannot decide.
    #[serde(default)]
    pub fail_mode: FailMode,
}

/// What becomes of TCP connections that a Pod opened before it was enrolled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum BeforeEnrolment {
    /// Those that strict mode would not have let through as they are end.
    #[default]
    Reset,
    /// They go on as they are.
    Keep,
}

/// Who signs the identities of a node's Pods.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Issuer {
    /// The operator's own CA.
    #[default]
    Embedded,
    /// The node's SPIRE agent, through its Delegated Identity API.
    Spire {
        /// The path of its admin socket on each node.
        socket: Arc<str>,
    },
}

/// Settings of the whole mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshConfig {
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Life of an SVID from the embedded CA.
    pub svid_lifetime: Duration,
    /// Who signs.
    #[serde(default)]
    pub issuer: Issuer,
    /// How two Pods of one node talk.
    pub same_node: SameNode,
    /// What unclassified Pods may do.
    pub unknown_pods: UnknownPods,
    /// What becomes of connections from before a Pod's enrolment.
    #[serde(default)]
    pub before_enrolment: BeforeEnrolment,
    /// Address ranges of Pods and Services (`address/prefix`): a strict Pod that dials an address in one of them
    /// which nobody has described is held, then refused.
    pub ranges: Vec<crate::policy::Cidr>,
    /// Whether denials name the policy.
    pub reveal_policy: bool,
    /// What is recorded.
    pub telemetry: Telemetry,
    /// Every namespace that there is: a node classifies its new Pods by it before the operator has described them.
    #[serde(default)]
    pub namespaces: BTreeMap<Arc<str>, NamespaceMode>,
}
