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

/// What routes say of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteAnswer<'a> {
    /// No route is attached: the Service as it is.
    Unrouted,
    /// Routes are attached, none matches: 404 (Gateway API, HTTPRouteRule).
    NotFound,
    /// This rule holds.
    Rule {
        /// The route.
        route: &'a HttpRoute,
        /// Its rule.
        rule: &'a RouteRule,
    },
}

/// Chooses the rule for a request to a port of a Service, with Gateway API's precedence: exact path, longest
/// prefix, method, most headers, most query parameters, oldest route, name, first rule. Consumer routes of the
/// client's namespace override producer routes (GEP-1426).
pub fn select<'a>(
    state: &'a crate::MeshState,
    service: &NamespacedName,
    port: u16,
    client_namespace: &str,
    request: &crate::http::HttpRequest<'_>,
) -> RouteAnswer<'a> {
    let routes = attached(state, service, port, client_namespace);
    if routes.is_empty() {
        return RouteAnswer::Unrouted;
    }
    let mut best: Option<(Rank<'a>, RouteAnswer<'a>)> = None;
    for route in routes {
        for (index, rule) in route.rules.iter().enumerate() {
            let everything = HttpMatch::default();
            let matches =
                if rule.matches.is_empty() { std::slice::from_ref(&everything) } else { &rule.matches };
            for candidate in matches.iter().filter(|m| m.matches(request)) {
                let rank = Rank::of(route, index, candidate);
                if best.as_ref().is_none_or(|(b, _)| rank > *b) {
                    best = Some((rank, RouteAnswer::Rule { route, rule }));
                }
            }
        }
    }
    best.map_or(RouteAnswer::NotFound, |(_, answer)| answer)
}

/// The routes that hold for a client of `client_namespace` at a port of a Service.
pub fn attached<'a>(
    state: &'a crate::MeshState,
    service: &NamespacedName,
    port: u16,
    client_namespace: &str,
) -> Vec<&'a HttpRoute> {
    let parent = |route: &HttpRoute| {
        route
            .parents
            .iter()
            .filter(|p| p.service == *service && p.port.is_none_or(|n| n == port))
            .map(|p| p.producer)
            .max()
    };
    let (mut producer, mut consumer) = (Vec::new(), Vec::new());
    for route in state.routes_of(service) {
        match parent(route) {
            Some(true) => producer.push(route),
            Some(false) if route.name.namespace.as_ref() == client_namespace => consumer.push(route),
            _ => {}
        }
    }
    if consumer.is_empty() { producer } else { consumer }
}

impl RouteRule {
    /// The backend for a draw in `0..total_weight()`; `None` where every weight is 0.
    pub fn backend(&self, draw: u64) -> Option<&Backend> {
        let mut left = draw.checked_rem(self.total_weight())?;
        self.backends.iter().find(|b| {
            let weight = u64::from(b.weight);
            let hit = left < weight;
            left = left.saturating_sub(weight);
            hit
        })
    }

    /// The sum of the weights.
    pub fn total_weight(&self) -> u64 {
        self.backends.iter().map(|b| u64::from(b.weight)).sum()
    }
}

/// How specific a match is; greater wins.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Rank<'a> {
    exact: bool,
    prefix: usize,
    method: bool,
    headers: usize,
    query: usize,
    age: std::cmp::Reverse<i64>,
    name: std::cmp::Reverse<&'a NamespacedName>,
    rule: std::cmp::Reverse<usize>,
}

impl<'a> Rank<'a> {
    fn of(route: &'a HttpRoute, rule: usize, m: &HttpMatch) -> Self {
        let (exact, prefix) = match &m.path {
            Some(PathMatch::Exact(_)) => (true, 0),
            Some(PathMatch::PathPrefix(p)) => (false, p.trim_end_matches('/').len()),
            None => (false, 0),
        };
        Self {
            exact,
            prefix,
            method: m.method.is_some(),
            headers: m.headers.len(),
            query: m.query.len(),
            age: std::cmp::Reverse(route.created),
            name: std::cmp::Reverse(&route.name),
            rule: std::cmp::Reverse(rule),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Delta, MeshState, Resource, http::HttpRequest};

    fn name(text: &str) -> NamespacedName {
        let (namespace, name) = text.split_once('/').expect("ns/name");
        NamespacedName::new(namespace, name)
    }

    fn rule(path: Option<PathMatch>, service: &str) -> RouteRule {
        RouteRule {
            matches: vec![HttpMatch { path, ..HttpMatch::default() }],
            backends: vec![Backend { service: name(service), port: 80, weight: 1, valid: true }],
            ..RouteRule::default()
        }
    }

    fn state(routes: Vec<HttpRoute>) -> MeshState {
        let upserted = routes.into_iter().map(|r| Resource::Route(r.into())).collect();
        MeshState::default().apply(&Delta { full: true, upserted, ..Delta::default() })
    }

    fn route(at: &str, producer: bool, rules: Vec<RouteRule>) -> HttpRoute {
        let parents = vec![ServiceParent { service: name("shop/web"), port: None, producer }];
        HttpRoute { name: name(at), created: 0, parents, rules }
    }

    fn ask(state: &MeshState, path: &str, client: &str) -> String {
        let header = |_: &str| None;
        let request = HttpRequest { method: "GET", path, query: "", host: "web", header: &header };
        match select(state, &name("shop/web"), 80, client, &request) {
            RouteAnswer::Rule { rule, .. } => rule.backends[0].service.name.to_string(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn precedence_and_consumers() {
        let prefix = |p: &str| Some(PathMatch::PathPrefix(p.into()));
        let exact = Some(PathMatch::Exact("/a/b".into()));
        let rules =
            vec![rule(prefix("/a"), "x/short"), rule(prefix("/a/b"), "x/long"), rule(exact, "x/exact")];
        let consumer = route("buyer/mine", false, vec![rule(None, "x/mine")]);
        let state = state(vec![route("shop/main", true, rules), consumer]);
        assert_eq!(ask(&state, "/a/b", "shop"), "exact");
        assert_eq!(ask(&state, "/a/b/c", "shop"), "long");
        assert_eq!(ask(&state, "/a/x", "shop"), "short");
        assert_eq!(ask(&state, "/z", "shop"), "NotFound");
        assert_eq!(ask(&state, "/a/b", "buyer"), "mine");
        assert_eq!(ask(&MeshState::default(), "/", "shop"), "Unrouted");
    }

    #[test]
    fn weights_are_exact_over_all_draws() {
        let backend = |n: &str, weight| Backend { service: name(n), port: 80, weight, valid: true };
        let rule = RouteRule {
            backends: vec![backend("x/a", 9), backend("x/z", 0), backend("x/b", 1)],
            ..RouteRule::default()
        };
        let hits = (0..10).filter(|d| rule.backend(*d).is_some_and(|b| b.service == name("x/a"))).count();
        assert_eq!(hits, 9);
        assert_eq!(RouteRule::default().backend(3), None);
    }
}
