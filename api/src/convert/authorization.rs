//! [`AuthorizationPolicy`] to [`Policy`]: checks everything that the CRD's CEL rules check, for sources without an API
//! server, and what CEL cannot.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use weft_core::{
    NamespacedName, Policy, SpiffeId, TrustDomain,
    policy::{self, Cidr, PortRef},
    route::{PathMatch, ValueMatch},
};

use crate::{
    authorization::{
        Action, AuthorizationPolicy, AuthorizationRule, HttpEntry, NetworkAttributes, PathType, Plaintext,
        Protocol, Source, SourceType, TargetKind,
    },
    error::{ObjectError, Problems, namespace, object_name},
    values::Selector,
};

/// Which Pods a policy selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Pods of the policy's namespace.
    Pods(Selector),
    /// The Pods behind this Service of the policy's namespace.
    Service(String),
}

/// A policy, ready to be attached to the Pods that it selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// The policy.
    pub policy: Policy,
    /// Any of these.
    pub targets: Vec<Target>,
}

/// Checks and converts.
///
/// # Errors
/// With every field that is wrong, and what to write instead.
pub fn convert(object: &AuthorizationPolicy) -> Result<Converted, ObjectError> {
    let mut problems = Problems::default();
    let name =
        NamespacedName::new(namespace(&object.metadata), object.metadata.name.as_deref().unwrap_or_default());
    let targets = targets(object, &mut problems);
    let rules = (object.spec.rules.iter().enumerate())
        .map(|(i, r)| rule(&name.namespace, r, &format!("spec.rules[{i}]"), &mut problems))
        .collect();
    let action = match object.spec.action {
        Action::Allow => policy::Action::Allow,
        Action::Deny => policy::Action::Deny,
        Action::Audit => policy::Action::Audit,
    };
    let converted = Converted { policy: Policy { name, action, rules }, targets };
    problems.finish("AuthorizationPolicy", object_name(&object.metadata), converted)
}

fn targets(object: &AuthorizationPolicy, problems: &mut Problems) -> Vec<Target> {
    if object.spec.target_refs.is_empty() {
        problems.push(
            "spec.targetRefs",
            "it names no target; for every Pod of the namespace write [{group: \"\", kind: Pod, selector: {}}]",
        );
    }
    let mut targets = Vec::new();
    for (i, target) in object.spec.target_refs.iter().enumerate() {
        let field = format!("spec.targetRefs[{i}]");
        if !target.group.is_empty() {
            problems.push(
                format!("{field}.group"),
                format_args!("{:?} is no group with targets; write \"\"", target.group),
            );
        }
        match (target.kind, &target.selector, &target.name) {
            (TargetKind::Pod, Some(selector), None) => {
                check_selector(selector, &format!("{field}.selector"), problems);
                targets.push(Target::Pods(selector.clone()));
            }
            (TargetKind::Service, None, Some(name)) => targets.push(Target::Service(name.clone())),
            (TargetKind::Pod, ..) => problems.push(
                field,
                "kind Pod takes a selector and no name; selector: {} selects every Pod of the namespace",
            ),
            (TargetKind::Service, ..) => problems.push(field, "kind Service takes a name and no selector"),
        }
    }
    targets
}

fn check_selector(selector: &Selector, field: &str, problems: &mut Problems) {
    use crate::values::Operator;
    for (i, r) in selector.match_expressions.iter().enumerate() {
        if matches!(r.operator, Operator::In | Operator::NotIn) == r.values.is_empty() {
            problems.push(
                format!("{field}.matchExpressions[{i}].values"),
                "In and NotIn need at least one value, Exists and DoesNotExist take none",
            );
        }
    }
}

fn rule(own: &str, rule: &AuthorizationRule, field: &str, problems: &mut Problems) -> policy::Rule {
    let sources = rule.sources.as_ref().map(|sources| {
        (sources.iter().enumerate())
            .filter_map(|(i, s)| source(own, s, &format!("{field}.sources[{i}]"), problems))
            .collect()
    });
    let default = NetworkAttributes::default();
    let network = rule.network_attributes.as_ref().unwrap_or(&default);
    let at = format!("{field}.networkAttributes");
    let protocol = match network.protocol {
        Protocol::Tcp => policy::Protocol::Tcp,
        Protocol::Udp => policy::Protocol::Udp,
        Protocol::Icmp => policy::Protocol::Icmp,
        Protocol::Any => policy::Protocol::Any,
    };
    if !network.ports.is_empty() && !matches!(network.protocol, Protocol::Tcp | Protocol::Udp) {
        problems.push(
            format!("{at}.ports"),
            "ports go with protocol TCP or UDP; take them away or name the protocol",
        );
    }
    if network.plaintext == Plaintext::Allowed && network.protocol == Protocol::Tcp {
        problems.push(
            format!("{at}.plaintext"),
            "Allowed is for protocol UDP, ICMP or ANY: TCP is carried over mTLS; take plaintext away",
        );
    }
    if !rule.http.is_empty() && network.protocol != Protocol::Tcp {
        problems.push(
            format!("{at}.protocol"),
            "http needs protocol TCP; move the other protocol into a rule of its own",
        );
    }
    let ports = (network.ports.iter().enumerate())
        .filter_map(|(i, p)| port(p, &format!("{at}.ports[{i}]"), problems))
        .collect();
    let http = (rule.http.iter().enumerate())
        .map(|(i, h)| http(h, &format!("{field}.http[{i}]"), problems))
        .collect();
    policy::Rule { sources, ports, protocol, plaintext: network.plaintext == Plaintext::Allowed, http }
}

fn port(port: &IntOrString, field: &str, problems: &mut Problems) -> Option<PortRef> {
    match port {
        IntOrString::Int(number) => match u16::try_from(*number) {
            Ok(number) if number > 0 => return Some(PortRef::Number(number)),
            _ => problems.push(field, format_args!("{number} is no port; write 1 to 65535")),
        },
        IntOrString::String(name) => {
            let ok = (1..=15).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && name.bytes().any(|b| b.is_ascii_lowercase());
            if ok {
                return Some(PortRef::Name(name.clone()));
            }
            problems.push(
                field,
                format_args!(
                    "{name:?} is no port name; write a container port's name, or a number without quotes"
                ),
            );
        }
    }
    None
}

fn source(own: &str, source: &Source, field: &str, problems: &mut Problems) -> Option<policy::Source> {
    if source.r#type != SourceType::ServiceAccount && source.service_account.is_some() {
        problems.push(
            format!("{field}.serviceAccount"),
            "goes with type ServiceAccount only; change type or take it away",
        );
    }
    if source.r#type != SourceType::Spiffe && source.spiffe.is_some() {
        problems.push(format!("{field}.spiffe"), "goes with type SPIFFE only; change type or take it away");
    }
    if source.r#type != SourceType::Unauthenticated && source.cidrs.is_some() {
        problems.push(
            format!("{field}.cidrs"),
            "goes with type Unauthenticated only: an address proves no identity; take it away",
        );
    }
    match source.r#type {
        SourceType::ServiceAccount => {
            let Some(account) = &source.service_account else {
                problems.push(
                    format!("{field}.serviceAccount"),
                    "is missing; write {namespace: shop, name: client}",
                );
                return None;
            };
            let namespace = account.namespace.as_deref().unwrap_or(own);
            if !is_dns_name(namespace) {
                problems.push(
                    format!("{field}.serviceAccount.namespace"),
                    format_args!("{namespace:?} is no namespace's name"),
                );
            }
            if account.name != "*" && !is_dns_name(&account.name) {
                problems.push(
                    format!("{field}.serviceAccount.name"),
                    format_args!(
                        "{:?} is no service account's name; write a name, or \"*\" for all",
                        account.name
                    ),
                );
            }
            let name = (account.name != "*").then(|| account.name.as_str().into());
            Some(policy::Source::ServiceAccount { namespace: namespace.into(), name })
        }
        SourceType::Spiffe => {
            let Some(pattern) = &source.spiffe else {
                problems.push(
                    format!("{field}.spiffe"),
                    "is missing; write spiffe://<trust domain>/ns/*/sa/<name>",
                );
                return None;
            };
            // `*` is no character of a SPIFFE id: with a letter in its place the rest must be one.
            let concrete: Vec<&str> = pattern.split('/').map(|s| if s == "*" { "x" } else { s }).collect();
            if let Err(error) = concrete.join("/").parse::<SpiffeId>() {
                problems.push(
                    format!("{field}.spiffe"),
                    format_args!(
                        "{}; * stands for one whole path segment, a trailing /* for all below",
                        error.reason
                    ),
                );
            } else if TrustDomain::new(pattern.split('/').nth(2).unwrap_or_default()).is_err() {
                problems.push(format!("{field}.spiffe"), "the trust domain must be written out");
            }
            Some(policy::Source::Spiffe(pattern.as_str().into()))
        }
        SourceType::Unauthenticated => {
            let mut ranges = Vec::new();
            if source.cidrs.as_ref().is_some_and(Vec::is_empty) {
                problems.push(
                    format!("{field}.cidrs"),
                    "is empty; write at least one range, or take the field away for any address",
                );
            }
            for (i, cidr) in source.cidrs.iter().flatten().enumerate() {
                match cidr.parse::<Cidr>() {
                    Ok(range) => ranges.push(range),
                    Err(error) => problems.push(format!("{field}.cidrs[{i}]"), error),
                }
            }
            Some(policy::Source::Unauthenticated(ranges))
        }
    }
}

fn http(entry: &HttpEntry, field: &str, problems: &mut Problems) -> policy::HttpRule {
    for (i, method) in entry.methods.iter().enumerate() {
        if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-') {
            problems.push(
                format!("{field}.methods[{i}]"),
                format_args!(
                    "{method:?} is no method; methods are case-sensitive, write {:?}",
                    method.to_uppercase()
                ),
            );
        }
    }
    let paths = (entry.paths.iter().enumerate())
        .map(|(i, path)| {
            let value: Arc<str> = checked_path(&path.value, &format!("{field}.paths[{i}].value"), problems);
            match path.r#type {
                PathType::Exact => PathMatch::Exact(value),
                PathType::PathPrefix => PathMatch::PathPrefix(value),
            }
        })
        .collect();
    let hosts = (entry.hosts.iter().enumerate())
        .map(|(i, host)| {
            let host = host.to_ascii_lowercase();
            if !is_dns_name(host.strip_prefix("*.").unwrap_or(&host)) {
                problems.push(
                    format!("{field}.hosts[{i}]"),
                    format_args!(
                        "{host:?} is no host; write a name without port, like web.shop.svc or *.example.com"
                    ),
                );
            }
            host.as_str().into()
        })
        .collect();
    let headers = (entry.headers.iter().enumerate())
        .map(|(i, h)| {
            check_header_name(&h.name, &format!("{field}.headers[{i}].name"), problems);
            ValueMatch { name: h.name.to_ascii_lowercase().into(), value: h.value.as_str().into() }
        })
        .collect();
    policy::HttpRule {
        methods: entry.methods.iter().map(|m| m.as_str().into()).collect(),
        paths,
        hosts,
        headers,
    }
}

/// Requests are matched in normal form, so a path that is not in it could never match: an error, with the form.
pub(crate) fn checked_path(path: &str, field: &str, problems: &mut Problems) -> Arc<str> {
    if !path.starts_with('/') {
        problems
            .push(field, format_args!("{path:?} does not begin with '/'; write {:?}", format!("/{path}")));
        return path.into();
    }
    match weft_core::http::normalize_path(path) {
        Ok(normal) if normal == path && !path.contains(['?', '#']) => {}
        Ok(normal) => {
            let normal = normal.split(['?', '#']).next().unwrap_or_default().to_owned();
            problems
                .push(field, format_args!("{path:?} never matches: paths are normalised; write {normal:?}"));
        }
        Err(error) => problems.push(field, format_args!("{path:?} never matches: {error}")),
    }
    path.into()
}

pub(crate) fn check_header_name(name: &str, field: &str, problems: &mut Problems) {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || !name.bytes().all(token) {
        problems.push(field, format_args!("{name:?} is no header name (RFC 9110 section 5.1)"));
    }
}

/// A DNS-1123 subdomain, as names of objects and hosts are.
pub(crate) fn is_dns_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        })
}

#[cfg(test)]
mod tests;
