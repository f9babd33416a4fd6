//! `TrafficPolicy`: how calls to a Service are balanced, limited and protected.
#![allow(clippy::duplicated_attributes, reason = "printer columns of one type look alike to the lint")]
#![allow(unreachable_pub, reason = "the KubeSchema derive repeats each struct inside a function")]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::values::Duration;

/// How calls to the Services that it targets are balanced, limited and protected.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "weft.mesh",
    version = "v1alpha1",
    kind = "TrafficPolicy",
    plural = "trafficpolicies",
    namespaced,
    shortname = "wtp",
    category = "weft",
    status = "crate::status::ObjectStatus",
    derive = "PartialEq",
    doc = "How calls to a Service are balanced, limited and protected.",
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
pub struct TrafficPolicySpec {
    /// The Services that it holds for, of its own namespace.
    #[schemars(length(min = 1, max = 16))]
    pub target_refs: Vec<ServiceRef>,
    /// How an endpoint is chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_balancing: Option<LoadBalancing>,
    /// How much may be under way at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
    /// When an endpoint is left out for a while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier_detection: Option<OutlierDetection>,
    /// How many retries there may be (GEP-3388).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_budget: Option<RetryBudget>,
    /// Limits at the destination.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub rate_limits: Vec<RateLimit>,
    /// Faults that are injected, each until it expires.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub faults: Vec<Fault>,
}

/// A Service of the policy's own namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceRef {
    /// The core group: the empty string.
    #[serde(default)]
    #[schemars(length(max = 0))]
    pub group: String,
    /// `Service`.
    pub kind: ServiceKind,
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// The one kind of target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ServiceKind {
    /// A Service.
    Service,
}

/// How an endpoint is chosen.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("(self.algorithm in ['RingHash', 'Maglev']) == has(self.hashOn)")
    .message("hashOn goes with RingHash and Maglev, and they need it; say header, cookie or sourceIP"))]
pub struct LoadBalancing {
    /// The algorithm.
    #[serde(default)]
    pub algorithm: Algorithm,
    /// What RingHash and Maglev hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_on: Option<HashOn>,
    /// Whether near endpoints come first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locality: Option<Locality>,
}

/// A balancing algorithm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Algorithm {
    /// The endpoint with the fewest requests under way, of two picked at random.
    #[default]
    LeastRequest,
    /// In turn.
    RoundRobin,
    /// At random.
    Random,
    /// Consistent hashing on a ring.
    RingHash,
    /// Consistent hashing by Maglev's table.
    Maglev,
}

/// What is hashed: exactly one.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("(has(self.header) ? 1 : 0) + (has(self.cookie) ? 1 : 0) + (has(self.sourceIP) ? 1 : 0) == 1")
    .message("say exactly one of header, cookie and sourceIP"))]
pub struct HashOn {
    /// A header's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub header: Option<String>,
    /// A cookie's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub cookie: Option<String>,
    /// The client's address.
    #[serde(default, rename = "sourceIP", skip_serializing_if = "Option::is_none")]
    pub source_ip: Option<Empty>,
}

/// `{}`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Empty {}

impl JsonSchema for Empty {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Empty".into()
    }
    // Derived, it would say `additionalProperties: false`, which a CRD must not.
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "object"})
    }
}

/// Whether near endpoints come first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Locality {
    /// How near.
    pub prefer: Nearness,
}

/// How near an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Nearness {
    /// The same zone.
    Zone,
}

/// How much may be under way at once, per client node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CircuitBreaker {
    /// Connections.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_connections: u32,
    /// Requests that wait for a connection.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_pending_requests: u32,
    /// Requests.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_requests: u32,
}

impl Default for CircuitBreaker {
    fn default() -> Self {
        Self { max_connections: 1024, max_pending_requests: 256, max_requests: 1024 }
    }
}

/// When an endpoint is left out for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OutlierDetection {
    /// After so many failures in a row.
    #[schemars(range(min = 1, max = 1000))]
    pub consecutive_failures: u32,
    /// For so long, times the number of ejections.
    pub base_ejection: Duration,
    /// Never more than this share of the endpoints, in percent.
    #[schemars(range(min = 1, max = 100))]
    pub max_ejected_percent: u32,
}

impl Default for OutlierDetection {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            base_ejection: Duration(std::time::Duration::from_secs(30)),
            max_ejected_percent: 50,
        }
    }
}

/// How many retries there may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RetryBudget {
    /// Retries in percent of requests.
    #[schemars(range(min = 0, max = 100))]
    pub percent: u32,
    /// Counted over this time.
    pub interval: Duration,
    /// So many are always allowed.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub min_retries_per_second: u32,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self {
            percent: 20,
            interval: Duration(std::time::Duration::from_secs(10)),
            min_retries_per_second: 10,
        }
    }
}

/// A limit, counted at the destination's node: exact per Pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimit {
    /// So many requests.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub requests: u32,
    /// In this time.
    pub per: Duration,
    /// Counted together, or for each caller.
    #[serde(default)]
    pub by: LimitBy,
}

/// What a limit is counted for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LimitBy {
    /// All callers together.
    #[default]
    Pod,
    /// Each source identity.
    SourceIdentity,
}

/// A fault that is injected until it expires.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.abort) || has(self.delay)").message("say abort, delay or both"))]
pub struct Fault {
    /// The share of requests, in percent.
    #[schemars(range(min = 0, max = 100))]
    pub percent: u32,
    /// They are answered at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<Abort>,
    /// They are held back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<Duration>,
    /// When it ends by itself (RFC 3339): a forgotten fault must not outlive its test.
    #[schemars(extend("format" = "date-time"))]
    pub expires_at: String,
}

/// An answer that replaces the application's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Abort {
    /// Its status code.
    #[schemars(range(min = 200, max = 599))]
    pub http_status: u16,
}
