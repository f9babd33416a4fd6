//! `MeshConfig`: the settings of the whole mesh; one object, `default`.
#![allow(unreachable_pub, reason = "the KubeSchema derive repeats each struct inside a function")]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::values::{Duration, Percentage};

/// Settings of the whole mesh.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "weft.mesh",
    version = "v1alpha1",
    kind = "MeshConfig",
    plural = "meshconfigs",
    category = "weft",
    status = "crate::status::ObjectStatus",
    derive = "PartialEq",
    doc = "Settings of the whole mesh; the one object is called default.",
    validation = Rule::new("self.metadata.name == 'default'").message("there is one MeshConfig; call it default"),
    printcolumn(name = "Trust domain", type_ = "string", json_path = ".spec.trustDomain"),
    printcolumn(name = "Issuer", type_ = "string", json_path = ".spec.issuer.type"),
    printcolumn(name = "Accepted", type_ = "string", json_path = ".status.conditions[?(@.type=='Accepted')].status"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshConfigSpec {
    /// The trust domain; it cannot change while the mesh runs.
    #[schemars(regex(pattern = "^[a-z0-9._-]{1,255}$"))]
    #[x_kube(validation = Rule::new("self == oldSelf")
        .message("trustDomain cannot change while the mesh runs: every identity would; install a new mesh instead"))]
    #[serde(default = "default_trust_domain")]
    pub trust_domain: String,
    /// Who signs identities.
    #[serde(default)]
    pub issuer: Issuer,
    /// How two Pods of one node talk.
    #[serde(default)]
    pub same_node: SameNode,
    /// What a Pod that the agent has not classified yet may reach.
    #[serde(default)]
    pub unknown_pods: UnknownPods,
    /// What becomes of connections that a Pod opened before it was enrolled.
    #[serde(default)]
    pub connections_before_enrolment: ConnectionsBeforeEnrolment,
    /// What a refused caller is told.
    #[serde(default)]
    pub denials: Denials,
    /// What is recorded.
    #[serde(default)]
    pub telemetry: Telemetry,
}

impl Default for MeshConfigSpec {
    fn default() -> Self {
        Self {
            trust_domain: default_trust_domain(),
            issuer: Issuer::default(),
            same_node: SameNode::default(),
            unknown_pods: UnknownPods::default(),
            connections_before_enrolment: ConnectionsBeforeEnrolment::default(),
            denials: Denials::default(),
            telemetry: Telemetry::default(),
        }
    }
}

fn default_trust_domain() -> String {
    "cluster.local".into()
}

/// Who signs identities.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("(self.type == 'Spire') == has(self.spire)")
    .message("type Spire needs spire.socketPath, and no other type takes spire"))]
pub struct Issuer {
    /// Which of the fields below counts.
    #[serde(default)]
    pub r#type: IssuerType,
    /// The operator's own CA.
    #[serde(default)]
    pub embedded: EmbeddedIssuer,
    /// A SPIRE agent on every node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spire: Option<SpireIssuer>,
}

/// The kind of issuer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum IssuerType {
    /// The operator's own CA.
    #[default]
    Embedded,
    /// SPIRE, through its Delegated Identity API.
    Spire,
}

/// The operator's own CA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EmbeddedIssuer {
    /// Life of an identity's certificate, from 5m to 24h.
    pub svid_lifetime: Duration,
    /// A CA of your own: a Secret in cert-manager's form (`tls.crt`, `tls.key`, `ca.crt`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

impl Default for EmbeddedIssuer {
    fn default() -> Self {
        Self { svid_lifetime: Duration(std::time::Duration::from_secs(3600)), secret_ref: None }
    }
}

/// A Secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecretRef {
    /// Its namespace.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// A SPIRE agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SpireIssuer {
    /// The path of its admin socket on each node.
    #[schemars(length(min = 1, max = 107))]
    pub socket_path: String,
}

/// How two Pods of one node talk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SameNode {
    /// Without crypto, still authorised.
    #[default]
    Shortcut,
    /// As across nodes.
    #[serde(rename = "MTLS")]
    Mtls,
}

/// What a Pod that the agent has not classified yet may reach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UnknownPods {
    /// Everything but enrolled Pods and Services.
    #[default]
    RefuseMesh,
    /// Nothing.
    RefuseAll,
}

/// What becomes of connections that a Pod opened before it was enrolled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConnectionsBeforeEnrolment {
    /// They are reset in strict mode.
    #[default]
    Reset,
    /// They go on as they are.
    Keep,
}

/// What a refused caller is told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Denials {
    /// Whether the answer names the policy.
    pub reveal_policy: bool,
}

/// What is recorded.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Telemetry {
    /// Flow records.
    pub flows: Flows,
    /// Which requests are logged as lines.
    pub access_log: AccessLog,
    /// Further metric names that are offered.
    #[schemars(length(max = 3))]
    pub metrics_compat: Vec<MetricsCompat>,
    /// Traces.
    pub tracing: Tracing,
}

/// Flow records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Flows {
    /// Records kept per node: a power of two, 256 to 1048576.
    #[schemars(range(min = 256, max = 1_048_576))]
    pub capacity: u32,
    /// Whether query strings are recorded.
    pub query_strings: bool,
    /// Request headers that are recorded.
    #[schemars(length(max = 16), inner(length(min = 1, max = 256)))]
    pub headers: Vec<String>,
}

impl Default for Flows {
    fn default() -> Self {
        Self { capacity: 8192, query_strings: false, headers: Vec::new() }
    }
}

/// Which requests are logged as lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AccessLog {
    /// None.
    #[default]
    Off,
    /// Refused and failed ones.
    Errors,
    /// All.
    All,
}

/// Further metric names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MetricsCompat {
    /// Istio's.
    Istio,
    /// Linkerd's.
    Linkerd,
    /// Hubble's.
    Hubble,
}

/// Traces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Tracing {
    /// Where spans go.
    pub otlp: Otlp,
    /// The share of requests that begin a trace here.
    pub sampling: Percentage,
}

impl Default for Tracing {
    fn default() -> Self {
        Self { otlp: Otlp::default(), sampling: Percentage(1.0) }
    }
}

/// An OTLP receiver.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Otlp {
    /// Its address, `http://host:4317`; empty: no traces are sent.
    #[schemars(length(max = 2048))]
    pub endpoint: String,
}
