//! HTTPRoutes, resolved against Services and ReferenceGrants.

use std::collections::BTreeMap;

use weft_api::convert::http_route::{self, References};
use weft_core::{HttpRoute, NamespacedName, service::AppProtocol};

use super::{Finding, Good, Index, Report, services::Known};
use crate::objects::ObjectKey;

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
    services: &'a BTreeMap<NamespacedName, Known>,
}

impl References for Resolver<'_> {
    fn service_exists(&self, service: &NamespacedName) -> bool {
        self.services.contains_key(service)
    }

    fn port_exists(&self, service: &NamespacedName, port: u16) -> bool {
        self.services.get(service).is_some_and(|s| s.service.port(port).is_some())
    }

    fn named_port(&self, service: &NamespacedName, name: &str) -> Option<u16> {
        self.services.get(service)?.service.ports.iter().find(|p| *p.name == *name).map(|p| p.port)
    }

    fn granted(&self, namespace: &str, service: &NamespacedName) -> bool {
        self.index.good().any(|(key, good)| match good {
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

/// The routes that have a Service as parent; a port with a route attached speaks HTTP from then on.
pub(super) fn collect(
    index: &Index,
    services: &mut BTreeMap<NamespacedName, Known>,
    reports: &mut BTreeMap<ObjectKey, Report>,
) -> Vec<HttpRoute> {
    let mut routes = Vec::new();
    for (key, good) in index.good() {
        let Good::Route(object) = good else { continue };
        // It was checked when it came; only references may fail to resolve by now.
        let Ok(converted) = http_route::convert(object, &Resolver { index, services }) else { continue };
        if let Some(report) = reports.get_mut(key) {
            judge(key, report, &converted);
        }
        routes.extend(converted.route);
    }
    for parent in routes.iter().flat_map(|r| &r.parents) {
        let ports = services.get_mut(&parent.service).into_iter().flat_map(|s| &mut s.service.ports);
        for port in ports.filter(|p| parent.port.is_none_or(|n| n == p.port)) {
            port.app_protocol = AppProtocol::Http;
        }
    }
    routes
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
