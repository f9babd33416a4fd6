//! HTTPRoute, resolved: what a port of a Service does with an HTTP request (Gateway API, GEP-1426).

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use crate::id::NamespacedName;

/// A route attached to Services.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpRoute {
    /// Namespace and name of the HTTPRoute.
    pub name: NamespacedName,
    /// Seconds since the epoch when it was made: of two equally specific matches the older route wins.
    pub created: i64,
    /// The Services (and ports) it is attached to.
    pub parents: Vec<ServiceParent>,
    /// Its rules in order.
    pub rules: Vec<RouteRule>,
}

/// A Service that a route is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceParent {
    /// The Service.
    pub service: NamespacedName,
    /// One port, or all of them.
    pub port: Option<u16>,
    /// False for a consumer route (its namespace is not the Service's): it then holds for clients of its own
    /// namespace only, and overrides producer routes.
    pub producer: bool,
}

/// A rule of a route.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RouteRule {
    /// Any of these; empty matches everything.
    pub matches: Vec<HttpMatch>,
    /// Changes to the request.
    #[serde(default)]
    pub request_headers: HeaderChanges,
    /// Changes to the response.
    #[serde(default)]
    pub response_headers: HeaderChanges,
    /// Where it goes; empty answers 500 (Gateway API: no valid backend).
    pub backends: Vec<Backend>,
    /// The time a whole request may take (GEP-1742 `timeouts.request`).
    #[serde(default)]
    pub timeout: Option<Duration>,
}

/// A weighted destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// The Service.
    pub service: NamespacedName,
    /// Its port.
    pub port: u16,
    /// Its share; 0 gets nothing.
    pub weight: u32,
    /// False where the reference does not resolve: its share is answered 500.
    pub valid: bool,
}

/// Header modifications, applied in the order remove, set, add.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HeaderChanges {
    /// Names to take away, lower case.
    pub remove: Vec<String>,
    /// Replaces all values of a name.
    pub set: Vec<(String, String)>,
    /// Adds a value.
    pub add: Vec<(String, String)>,
}

/// A condition on a request: all parts must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HttpMatch {
    /// On the path.
    #[serde(default)]
    pub path: Option<PathMatch>,
    /// The method, upper case.
    #[serde(default)]
    pub method: Option<Arc<str>>,
    /// On headers.
    #[serde(default)]
    pub headers: Vec<ValueMatch>,
    /// On query parameters.
    #[serde(default)]
    pub query: Vec<ValueMatch>,
}

/// A condition on a path. `PathPrefix` goes by whole segments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "value")]
pub enum PathMatch {
    /// The whole path.
    Exact(Arc<str>),
    /// Its first segments.
    PathPrefix(Arc<str>),
}

/// A condition on a named value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValueMatch {
    /// The name; lower case for headers.
    pub name: Arc<str>,
    /// The exact value.
    pub value: Arc<str>,
}
