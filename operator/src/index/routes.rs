//! HTTPRoutes, resolved against Services and ReferenceGrants.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use weft_api::convert::http_route::{self, References};
use weft_core::{HttpRoute, NamespacedName, Resource, ResourceKey, Service, service::AppProtocol};

use super::{
    Finding, Good, Index, Report,
    build::{Resources, Services},
    report,
};
use crate::objects::{Kind, ObjectKey};

/// Resolves everything: for checking a route by itself.
pub(super) struct Anything;

impl References for Anything {
    fn service_exists(&self, _: &NamespacedName) -> bool {
        true
    }
    fn port_exists(&self, _: &NamespacedName, _: u16) -> bool {
        true
    }
    fn named_port(&self, _: &NamespacedName, _: &str) -> Option<u16> {
        Some(1)
    }
    fn granted(&self, _: &str, _: &NamespacedName) -> bool {
        true
    }
}

struct Resolver<'a> {
    index: &'a Index,
    services: &'a Services<'a>,
}

impl References for Resolver<'_> {
    fn service_exists(&self, service: &NamespacedName) -> bool {
        self.services.get(service).is_some()
    }

    fn port_exists(&self, service: &NamespacedName, port: u16) -> bool {
        self.services.get(service).is_some_and(|s| s.service.port(port).is_some())
    }

    fn named_port(&self, service: &NamespacedName, name: &str) -> Option<u16> {
        self.services.get(service)?.service.ports.iter().find(|p| *p.name == *name).map(|p| p.port)
    }

    fn granted(&self, namespace: &str, service: &NamespacedName) -> bool {
        self.index.good(Kind::ReferenceGrant).any(|(key, good)| match good {
            Good::Grant(grant) if *key.namespace == *service.namespace => {
                grant.spec.from.iter().any(|f| {
                    f.group == "gateway.networking.k8s.io"
                        && f.kind == "HTTPRoute"
                        && f.namespace == namespace
                }) && grant.spec.to.iter().any(|t| {
                    matches!(t.group.as_str(), "" | "core")
                        && t.kind == "Service"
                        && t.name.as_deref().is_none_or(|n| *n == *service.name)
                })
            }
            _ => false,
        })
    }
}

/// The routes that have a Service as parent.
pub(super) fn collect(
    index: &Index,
    services: &Services<'_>,
    reports: &mut BTreeMap<ObjectKey, Option<Report>>,
) -> Vec<HttpRoute> {
    let mut routes = Vec::new();
    for (key, entry) in index.of(Kind::HttpRoute) {
        let mut report = report::of(key, entry);
        if let Some(Good::Route(object)) = &entry.good
            // It was checked when it came; only references may fail to resolve by now.
            && let Ok(converted) = http_route::convert(object, &Resolver { index, services })
        {
            judge(key, &mut report, &converted);
            routes.extend(converted.route);
        }
        reports.insert(key.clone(), Some(report));
    }
    routes
}

/// The routes, and the Service ports that they make HTTP.
#[derive(Debug, Default)]
pub(super) struct Routes {
    routes: BTreeMap<NamespacedName, Arc<HttpRoute>>,
    /// By Service, the ports; `None` is all of them.
    ports: BTreeMap<NamespacedName, BTreeSet<Option<u16>>>,
}

impl Routes {
    /// Takes the routes that there are now and notes those that differ. Returns the Services of which they speak
    /// otherwise than before.
    pub(super) fn replace(
        &mut self,
        routes: Vec<HttpRoute>,
        resources: &mut Resources,
    ) -> BTreeSet<NamespacedName> {
        let mut before = std::mem::take(&mut self.routes);
        let mut ports: BTreeMap<NamespacedName, BTreeSet<Option<u16>>> = BTreeMap::new();
        for route in routes {
            for parent in &route.parents {
                ports.entry(parent.service.clone()).or_default().insert(parent.port);
            }
            let name = route.name.clone();
            let route = match before.remove(&name) {
                Some(old) if *old == route => old,
                _ => {
                    let route = Arc::new(route);
                    let resource = Resource::Route(Arc::clone(&route));
                    resources.insert(resource.key(), Some(resource));
                    route
                }
            };
            self.routes.insert(name, route);
        }
        resources.extend(before.into_keys().map(|name| (ResourceKey::Route(name), None)));
        let before = std::mem::replace(&mut self.ports, ports);
        let all = before.keys().chain(self.ports.keys());
        all.filter(|name| before.get(*name) != self.ports.get(*name)).cloned().collect()
    }

    /// A Service of which the ports that have a route speak HTTP.
    pub(super) fn applied(&self, service: &Service) -> Service {
        let mut service = service.clone();
        if let Some(routed) = self.ports.get(&service.name) {
            for port in &mut service.ports {
                if routed.contains(&None) || routed.contains(&Some(port.port)) {
                    port.app_protocol = AppProtocol::Http;
                }
            }
        }
        service
    }
}

fn judge(key: &ObjectKey, report: &mut Report, converted: &http_route::Converted) {
    let join = |messages: Vec<String>| format!("{key}: {}", messages.join("; "));
    let (parents, backends): (Vec<_>, Vec<_>) =
        converted.unresolved.iter().partition(|u| u.reason == "NoMatchingParent");
    report.resolved = Some(match backends.first() {
        None => Finding::ok("ResolvedRefs", ""),
        Some(first) => {
            Finding::bad(first.reason, join(backends.iter().map(|b| b.error.to_string()).collect()))
        }
    });
    if !report.accepted.ok {
        return;
    }
    for missing in &parents {
        let place = missing.error.field.strip_prefix("spec.parentRefs[").and_then(|f| f.split(']').next());
        if let Some(place) = place.and_then(|p| p.parse().ok()) {
            report.parents.insert(place, Finding::bad("NoMatchingParent", missing.error.to_string()));
        }
    }
    let parents: Vec<String> = parents.iter().map(|p| p.error.to_string()).collect();
    let unsupported: Vec<String> = converted.unsupported.iter().map(ToString::to_string).collect();
    match &converted.route {
        None => {
            report.accepted = Finding::bad("NoMatchingParent", join(parents));
            report.programmable = Some(Err(Finding::bad("NoMatchingParent", "no Service uses this route")));
        }
        Some(_) if !unsupported.is_empty() => {
            report.accepted = Finding::bad("UnsupportedValue", join(unsupported));
        }
        Some(_) if !parents.is_empty() => {
            report.accepted = Finding::ok("Accepted", join(parents));
        }
        Some(_) => {}
    }
}
