//! `AuthorizationPolicy`: who may call what, L3 to L7, in the shape of GEP-3779.
#![allow(clippy::duplicated_attributes, reason = "printer columns of one type look alike to the lint")]
#![allow(unreachable_pub, reason = "the KubeSchema derive repeats each struct inside a function")]

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::values::Selector;

/// Who may call the Pods that it selects. Enforced where traffic arrives. No policy selects a Pod: every authenticated
/// peer may call it. At least one ALLOW selects it: what no ALLOW matches is denied, on every port and protocol. A
/// matching DENY beats every ALLOW. AUDIT decides nothing and is recorded.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "weft.mesh",
    version = "v1alpha1",
    kind = "AuthorizationPolicy",
    plural = "authorizationpolicies",
    namespaced,
    shortname = "wap",
    category = "weft",
    status = "crate::status::ObjectStatus",
    derive = "PartialEq",
    doc = "Who may call the Pods that it selects, from addresses to HTTP requests.",
    printcolumn(name = "Action", type_ = "string", json_path = ".spec.action"),
    printcolumn(
        name = "Accepted",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Accepted')].status"
    ),
    printcolumn(
        name = "Programmed",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Programmed')].status"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicySpec {
    /// Where it is enforced: always the destination.
    #[schemars(length(min = 1, max = 16))]
    pub target_refs: Vec<TargetRef>,
    /// What a match means.
    #[serde(default)]
    pub action: Action,
    /// Any of these rules; none at all matches nothing.
    #[serde(default)]
    #[schemars(length(max = 32))]
    pub rules: Vec<AuthorizationRule>,
}

/// What a policy is attached to.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("self.kind == 'Pod' ? has(self.selector) && !has(self.name) : has(self.name) && !has(self.selector)")
    .message("kind Pod takes a selector ({} selects every Pod of the namespace), kind Service takes a name"))]
pub struct TargetRef {
    /// The core group: the empty string.
    #[serde(default)]
    #[schemars(length(max = 0))]
    pub group: String,
    /// `Pod` or `Service`.
    pub kind: TargetKind,
    /// For Service: its name, in the policy's own namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub name: Option<String>,
    /// For Pod: which Pods of the policy's own namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Selector>,
}

/// The kind of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TargetKind {
    /// Pods, by a selector.
    Pod,
    /// The Pods behind a Service.
    Service,
}

/// What a matching rule does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// Lets it pass; what no ALLOW matches is denied.
    #[default]
    Allow,
    /// Refuses it, whatever ALLOW says.
    Deny,
    /// Decides nothing and is recorded.
    Audit,
}

/// A rule: any source AND the network attributes AND any HTTP entry.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.http) || size(self.http) == 0 || !has(self.networkAttributes) || self.networkAttributes.protocol == 'TCP'")
    .message("http needs networkAttributes.protocol TCP; move the other protocol into a rule of its own"))]
pub struct AuthorizationRule {
    /// Who calls: any of these. Omitted: any authenticated source. An empty list: nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub sources: Option<Vec<Source>>,
    /// Ports and protocol. Omitted: every TCP port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_attributes: Option<NetworkAttributes>,
    /// Requests: any of these. Makes the port HTTP: bytes that are not HTTP are refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub http: Vec<HttpEntry>,
}

/// Who calls.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("(self.type == 'ServiceAccount') == has(self.serviceAccount)")
    .message("type ServiceAccount needs serviceAccount, and no other type takes it"))]
#[x_kube(validation = Rule::new("(self.type == 'SPIFFE') == has(self.spiffe)")
    .message("type SPIFFE needs spiffe, and no other type takes it"))]
#[x_kube(validation = Rule::new("self.type == 'Unauthenticated' || !has(self.cidrs)")
    .message("cidrs goes with type Unauthenticated only: an address proves no identity"))]
pub struct Source {
    /// Which of the fields below counts.
    pub r#type: SourceType,
    /// A service account of the mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<ServiceAccountRef>,
    /// A SPIFFE id; `*` stands for one path segment, a trailing `/*` for everything below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 10, max = 2048))]
    pub spiffe: Option<String>,
    /// Address ranges; omitted: any address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(length(max = 64)))]
    pub cidrs: Option<Vec<String>>,
}

/// The kind of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SourceType {
    /// A service account of the mesh's own trust domain.
    ServiceAccount,
    /// A SPIFFE id pattern.
    #[serde(rename = "SPIFFE")]
    Spiffe,
    /// A peer without identity: the only way for plaintext from outside to reach a strict Pod.
    Unauthenticated,
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountRef {
    /// Its namespace; omitted: the policy's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub namespace: Option<String>,
    /// Its name; `*` is every account of the namespace.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Ports and protocol.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("self.plaintext == 'Refused' || self.protocol != 'TCP'")
    .message("plaintext: Allowed is for protocol UDP, ICMP or ANY; TCP is carried over mTLS, so take plaintext away"))]
#[x_kube(validation = Rule::new("size(self.ports) == 0 || self.protocol in ['TCP', 'UDP']")
    .message("ports go with protocol TCP or UDP; take ports away or name the protocol"))]
pub struct NetworkAttributes {
    /// The Pod's own ports, by number or by the container port's name; omitted: all.
    #[serde(default)]
    #[schemars(length(max = 32))]
    pub ports: Vec<IntOrString>,
    /// The IP protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Whether it may cross nodes in strict mode without mTLS (never TCP).
    #[serde(default)]
    pub plaintext: Plaintext,
}

/// The IP protocol of a rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
    /// Every protocol.
    Any,
}

/// Whether traffic may go without mTLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Plaintext {
    /// It may not.
    #[default]
    Refused,
    /// It may.
    Allowed,
}

/// An HTTP entry: every part that is given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpEntry {
    /// Any of these methods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(regex(pattern = "^[A-Z-]{1,32}$")))]
    pub methods: Vec<String>,
    /// Any of these paths, compared after normalisation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub paths: Vec<PathMatch>,
    /// Any of these hosts, without port; a leading `*.` stands for one or more labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 253)))]
    pub hosts: Vec<String>,
    /// All of these headers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub headers: Vec<HeaderMatch>,
}

/// A condition on the path.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("self.value.startsWith('/')").message("value must begin with '/'"))]
pub struct PathMatch {
    /// How the path is compared.
    #[serde(default)]
    pub r#type: PathType,
    /// The path.
    #[schemars(length(min = 1, max = 1024))]
    pub value: String,
}

/// How a path is compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PathType {
    /// By whole segments from the start.
    #[default]
    PathPrefix,
    /// The whole path.
    Exact,
}

/// A condition on a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HeaderMatch {
    /// How the value is compared.
    #[serde(default)]
    pub r#type: HeaderType,
    /// The header's name, in any case.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// The value.
    #[schemars(length(max = 4096))]
    pub value: String,
}

/// How a header's value is compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HeaderType {
    /// The whole value.
    #[default]
    Exact,
}
