//! Settings of the whole mesh (kind `MeshConfig`).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::TrustDomain;

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

/// What is recorded of flows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Telemetry {
    /// Flows kept per node, a power of two.
    pub flow_capacity: u32,
    /// Whether query strings are recorded.
    pub query_strings: bool,
    /// Request headers that are recorded, lower case.
    pub headers: Vec<String>,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self { flow_capacity: 8192, query_strings: false, headers: Vec::new() }
    }
}

/// Settings of the whole mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshConfig {
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Life of an SVID from the embedded CA.
    pub svid_lifetime: Duration,
    /// How two Pods of one node talk.
    pub same_node: SameNode,
    /// What unclassified Pods may do.
    pub unknown_pods: UnknownPods,
    /// Address ranges of Pods and Services (`address/prefix`): a strict Pod that dials an address in one of them
    /// which nobody has described is held, then refused.
    pub ranges: Vec<crate::policy::Cidr>,
    /// Whether denials name the policy.
    pub reveal_policy: bool,
    /// What is recorded.
    pub telemetry: Telemetry,
}
