//! HTTPRoute with Services as parents (GAMMA, GEP-1426) to [`weft_core::HttpRoute`].
//!
//! `hostnames` play no part where the parent is a Service: the Service's address has chosen the route already.

use std::{collections::BTreeSet, str::FromStr, sync::Arc, time::Duration};

use gateway_api::httproutes::{
    HttpRoute as Object, HttpRouteRules, HttpRouteRulesBackendRefs, HttpRouteRulesFilters,
    HttpRouteRulesFiltersType, HttpRouteRulesMatches, HttpRouteRulesMatchesHeadersType,
    HttpRouteRulesMatchesPathType, HttpRouteRulesMatchesQueryParamsType,
};
use weft_core::{
    HttpRoute, NamespacedName,
    route::{Backend, HeaderChanges, HttpMatch, PathMatch, RouteRule, ServiceParent, ValueMatch},
};

use super::authorization::{check_header_name, checked_path};
use crate::error::{FieldError, ObjectError, Problems, namespace, object_name};

/// What a route's references are looked up in.
pub trait References {
    /// Whether this Service exists.
    fn service_exists(&self, service: &NamespacedName) -> bool;
    /// Whether it has this TCP port.
    fn port_exists(&self, service: &NamespacedName, port: u16) -> bool;
    /// The number of the port with this name.
    fn named_port(&self, service: &NamespacedName, name: &str) -> Option<u16>;
    /// Whether a ReferenceGrant lets HTTPRoutes of `namespace` refer to `service`.
    fn granted(&self, namespace: &str, service: &NamespacedName) -> bool;
}

/// A reference that does not resolve, with the reason of the condition `ResolvedRefs` (Gateway API).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unresolved {
    /// `RefNotPermitted`, `BackendNotFound`, `InvalidKind` or `NoMatchingParent`.
    pub reason: &'static str,
    /// Where, and what to do.
    pub error: FieldError,
}

/// A route as far as it can be honoured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// The route; `None` where no Service is its parent.
    pub route: Option<HttpRoute>,
    /// What this version does not do (reason `UnsupportedValue`): a rule with such a filter answers 500, a rule whose
    /// every match is unsupported is dropped.
    pub unsupported: Vec<FieldError>,
    /// References that do not resolve: their share is answered 500.
    pub unresolved: Vec<Unresolved>,
}

/// Converts.
///
/// # Errors
/// When a value is wrong in itself, as the API server would refuse it; nothing of the route is then taken.
pub fn convert(object: &Object, references: &dyn References) -> Result<Converted, ObjectError> {
    let own = namespace(&object.metadata);
    let mut c = Conversion {
        own,
        references,
        problems: Problems::default(),
        unsupported: vec![],
        unresolved: vec![],
    };
    let parents = c.parents(object);
    let rules = (object.spec.rules.iter().flatten().enumerate())
        .filter_map(|(i, rule)| c.rule(rule, &format!("spec.rules[{i}]")))
        .collect();
    let route = (!parents.is_empty()).then(|| HttpRoute {
        name: NamespacedName::new(own, object.metadata.name.as_deref().unwrap_or_default()),
        created: object.metadata.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second()),
        parents,
        rules,
    });
    let converted = Converted { route, unsupported: c.unsupported, unresolved: c.unresolved };
    c.problems.finish("HTTPRoute", object_name(&object.metadata), converted)
}

struct Conversion<'a> {
    own: &'a str,
    references: &'a dyn References,
    problems: Problems,
    unsupported: Vec<FieldError>,
    unresolved: Vec<Unresolved>,
}

impl Conversion<'_> {
    fn unresolved(&mut self, reason: &'static str, field: String, message: impl std::fmt::Display) {
        self.unresolved.push(Unresolved { reason, error: FieldError::new(field, message) });
    }

    fn parents(&mut self, object: &Object) -> Vec<ServiceParent> {
        let mut parents = Vec::new();
        for (i, parent) in object.spec.parent_refs.iter().flatten().enumerate() {
            let field = format!("spec.parentRefs[{i}]");
            // A Gateway is somebody else's business.
            if !matches!(parent.group.as_deref(), Some("" | "core"))
                || parent.kind.as_deref() != Some("Service")
            {
                continue;
            }
            let service = NamespacedName::new(parent.namespace.as_deref().unwrap_or(self.own), &parent.name);
            if !self.references.service_exists(&service) {
                self.unresolved("NoMatchingParent", field, format_args!("there is no Service {service}"));
                continue;
            }
            let mut port = parent.port.and_then(|p| self.port(p, &format!("{field}.port")));
            if parent.port.is_some() && port.is_none() {
                continue;
            }
            if let Some(name) = &parent.section_name {
                let named = self.references.named_port(&service, name);
                if named.is_none() || port.is_some_and(|p| Some(p) != named) {
                    let message = format!("Service {service} has no such port {name:?}");
                    self.unresolved("NoMatchingParent", format!("{field}.sectionName"), message);
                    continue;
                }
                port = named;
            }
            if let Some(port) = port
                && !self.references.port_exists(&service, port)
            {
                let message = format!("Service {service} has no TCP port {port}");
                self.unresolved("NoMatchingParent", format!("{field}.port"), message);
                continue;
            }
            let producer = &*service.namespace == self.own;
            parents.push(ServiceParent { service, port, producer });
        }
        if parents.is_empty() && self.unresolved.is_empty() {
            self.unresolved(
                "NoMatchingParent",
                "spec.parentRefs".into(),
                "no Service is named, so the mesh does not use this route; write {group: \"\", kind: Service, name: web}",
            );
        }
        parents
    }

    fn rule(&mut self, rule: &HttpRouteRules, field: &str) -> Option<RouteRule> {
        let mut matches = Vec::new();
        let given = rule.matches.as_deref().unwrap_or_default();
        for (i, m) in given.iter().enumerate() {
            matches.extend(self.condition(m, &format!("{field}.matches[{i}]")));
        }
        // A rule without a match holds for everything: one whose matches were all dropped must not become that.
        if matches.is_empty() && !given.is_empty() {
            return None;
        }
        let mut out = RouteRule { matches, timeout: self.timeout(rule, field), ..RouteRule::default() };
        let mut supported = true;
        for (i, filter) in rule.filters.iter().flatten().enumerate() {
            supported &= self.filter(filter, &format!("{field}.filters[{i}]"), &mut out);
        }
        for (i, backend) in rule.backend_refs.iter().flatten().enumerate() {
            out.backends.extend(self.backend(backend, &format!("{field}.backendRefs[{i}]")));
        }
        if !supported {
            out.backends.clear();
        }
        Some(out)
    }

    fn condition(&mut self, m: &HttpRouteRulesMatches, field: &str) -> Option<HttpMatch> {
        let mut supported = true;
        let mut unsupported = |field: String| {
            let message = "RegularExpression is not supported (reason UnsupportedValue), so this match is not used; \
                           write Exact or, for a path, PathPrefix";
            self.unsupported.push(FieldError::new(field, message));
            supported = false;
        };
        let mut out = HttpMatch::default();
        if let Some(path) = &m.path {
            let at = format!("{field}.path");
            let value = path.value.as_deref().unwrap_or("/");
            match &path.r#type {
                Some(HttpRouteRulesMatchesPathType::RegularExpression) => unsupported(format!("{at}.type")),
                Some(HttpRouteRulesMatchesPathType::Exact) => {
                    out.path = Some(PathMatch::Exact(checked_path(
                        value,
                        &format!("{at}.value"),
                        &mut self.problems,
                    )));
                }
                Some(HttpRouteRulesMatchesPathType::PathPrefix) | None => {
                    let value = checked_path(value, &format!("{at}.value"), &mut self.problems);
                    out.path = Some(PathMatch::PathPrefix(value));
                }
            }
        }
        // The generated enum has no text form of its own; its serialised name is the method.
        out.method = (m.method.as_ref())
            .and_then(|method| serde_json::to_value(method).ok())
            .and_then(|v| v.as_str().map(Arc::from));
        // Of two entries for one name the first counts (Gateway API).
        let mut seen = BTreeSet::new();
        for (i, h) in m.headers.iter().flatten().enumerate() {
            let at = format!("{field}.headers[{i}]");
            if h.r#type == Some(HttpRouteRulesMatchesHeadersType::RegularExpression) {
                unsupported(format!("{at}.type"));
                continue;
            }
            check_header_name(&h.name, &format!("{at}.name"), &mut self.problems);
            let name = h.name.to_ascii_lowercase();
            if seen.insert(name.clone()) {
                out.headers.push(ValueMatch { name: name.into(), value: h.value.as_str().into() });
            }
        }
        seen.clear();
        for (i, q) in m.query_params.iter().flatten().enumerate() {
            if q.r#type == Some(HttpRouteRulesMatchesQueryParamsType::RegularExpression) {
                unsupported(format!("{field}.queryParams[{i}].type"));
            } else if seen.insert(q.name.clone()) {
                out.query.push(ValueMatch { name: q.name.as_str().into(), value: q.value.as_str().into() });
            }
        }
        supported.then_some(out)
    }

    /// Applies a filter; false where it is not supported.
    fn filter(&mut self, filter: &HttpRouteRulesFilters, field: &str, out: &mut RouteRule) -> bool {
        match filter.r#type {
            HttpRouteRulesFiltersType::RequestHeaderModifier => {
                let Some(m) = &filter.request_header_modifier else {
                    self.problems.push(format!("{field}.requestHeaderModifier"), "is missing");
                    return true;
                };
                let set = pairs(m.set.iter().flatten().map(|h| (&h.name, &h.value)));
                let add = pairs(m.add.iter().flatten().map(|h| (&h.name, &h.value)));
                let at = format!("{field}.requestHeaderModifier");
                self.headers(&mut out.request_headers, m.remove.as_deref(), set, add, &at);
                true
            }
            HttpRouteRulesFiltersType::ResponseHeaderModifier => {
                let Some(m) = &filter.response_header_modifier else {
                    self.problems.push(format!("{field}.responseHeaderModifier"), "is missing");
                    return true;
                };
                let set = pairs(m.set.iter().flatten().map(|h| (&h.name, &h.value)));
                let add = pairs(m.add.iter().flatten().map(|h| (&h.name, &h.value)));
                let at = format!("{field}.responseHeaderModifier");
                self.headers(&mut out.response_headers, m.remove.as_deref(), set, add, &at);
                true
            }
            _ => {
                self.unsupported.push(FieldError::new(
                    format!("{field}.type"),
                    "this filter is not supported (reason UnsupportedValue), so the rule answers 500; \
                     RequestHeaderModifier and ResponseHeaderModifier are",
                ));
                false
            }
        }
    }

    fn headers(
        &mut self,
        out: &mut HeaderChanges,
        remove: Option<&[String]>,
        set: Vec<(String, String)>,
        add: Vec<(String, String)>,
        field: &str,
    ) {
        for (i, name) in remove.unwrap_or_default().iter().enumerate() {
            check_header_name(name, &format!("{field}.remove[{i}]"), &mut self.problems);
            out.remove.push(name.to_ascii_lowercase());
        }
        for (list, what, to) in [(set, "set", &mut out.set), (add, "add", &mut out.add)] {
            for (i, (name, value)) in list.into_iter().enumerate() {
                check_header_name(&name, &format!("{field}.{what}[{i}].name"), &mut self.problems);
                if value.bytes().any(|b| b < b' ' && b != b'\t' || b == 0x7f) {
                    self.problems
                        .push(format!("{field}.{what}[{i}].value"), "holds a control character; take it out");
                }
                to.push((name, value));
            }
        }
    }

    fn backend(&mut self, backend: &HttpRouteRulesBackendRefs, field: &str) -> Option<Backend> {
        let weight = u32::try_from(backend.weight.unwrap_or(1)).ok().filter(|w| *w <= 1_000_000);
        let Some(weight) = weight else {
            self.problems.push(format!("{field}.weight"), "is out of range; write 0 to 1000000");
            return None;
        };
        let service = NamespacedName::new(backend.namespace.as_deref().unwrap_or(self.own), &backend.name);
        let core = matches!(backend.group.as_deref(), None | Some("" | "core"));
        let mut valid = false;
        let mut number = 0;
        if !core || !matches!(backend.kind.as_deref(), None | Some("Service")) {
            let message = "only Services can be backends, so this share is answered 500; write kind: Service";
            self.unresolved("InvalidKind", format!("{field}.kind"), message);
        } else if *service.namespace != *self.own && !self.references.granted(self.own, &service) {
            let message = format!(
                "Service {service} is in another namespace and no ReferenceGrant there lets HTTPRoutes of {} refer to \
                 it, so this share is answered 500; add the grant",
                self.own
            );
            self.unresolved("RefNotPermitted", format!("{field}.namespace"), message);
        } else if let Some(port) = backend.port {
            if let Some(port) = self.port(port, &format!("{field}.port")) {
                number = port;
                valid = self.references.port_exists(&service, port);
                if !valid {
                    let what = if self.references.service_exists(&service) {
                        format!("Service {service} has no TCP port {port}")
                    } else {
                        format!("there is no Service {service}")
                    };
                    self.unresolved(
                        "BackendNotFound",
                        field.into(),
                        format!("{what}, so this share is answered 500"),
                    );
                }
            }
        } else {
            self.problems
                .push(format!("{field}.port"), "a Service needs a port; write the Service's port number");
        }
        if !backend.filters.iter().flatten().collect::<Vec<_>>().is_empty() {
            self.unsupported.push(FieldError::new(
                format!("{field}.filters"),
                "filters of one backend are not supported (reason UnsupportedValue), so this share is answered 500; \
                 put them on the rule",
            ));
            valid = false;
        }
        Some(Backend { service, port: number, weight, valid })
    }

    fn port(&mut self, port: i32, field: &str) -> Option<u16> {
        let number = u16::try_from(port).ok().filter(|p| *p > 0);
        if number.is_none() {
            self.problems.push(field, format_args!("{port} is no port; write 1 to 65535"));
        }
        number
    }

    /// Without retries a request has one backend request, so the shorter of the two limits holds; `0s` is no limit.
    fn timeout(&mut self, rule: &HttpRouteRules, field: &str) -> Option<Duration> {
        let timeouts = rule.timeouts.as_ref()?;
        [("request", &timeouts.request), ("backendRequest", &timeouts.backend_request)]
            .into_iter()
            .filter_map(|(name, text)| {
                let text = text.as_deref()?;
                match crate::values::Duration::from_str(text) {
                    Ok(duration) => Some(duration.0).filter(|d| !d.is_zero()),
                    Err(error) => {
                        self.problems.push(format!("{field}.timeouts.{name}"), error);
                        None
                    }
                }
            })
            .min()
    }
}

fn pairs<'a>(headers: impl Iterator<Item = (&'a String, &'a String)>) -> Vec<(String, String)> {
    headers.map(|(name, value)| (name.to_ascii_lowercase(), value.clone())).collect()
}

#[cfg(test)]
mod tests;
