//! The reference interpreter.

use std::net::IpAddr;

use super::{Action, Cidr, Policy, PortRef, Protocol, Rule, Source};
use crate::{
    flow::Reason,
    http::HttpRequest,
    id::{NamespacedName, SpiffeId},
    state::MeshState,
    workload::{Mode, Workload},
};

/// Who is asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller<'a> {
    /// Proven by mTLS, or by the kernel on the same node.
    Authenticated(&'a SpiffeId),
    /// Not proven: only its address is known.
    Unauthenticated(IpAddr),
    /// Not proven, anywhere in a range; used to compile kernel rows.
    Range(Cidr),
    /// Not proven, in none of the ranges that policies name; used to compile kernel rows.
    Elsewhere,
}

/// An attempt to reach a Pod.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    /// Who.
    pub caller: Caller<'a>,
    /// The Pod that is reached.
    pub destination: &'a Workload,
    /// Its port (0 for protocols without ports).
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// What the interpreter says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The answer.
    pub outcome: Outcome,
    /// The reason where it is refused.
    pub reason: Reason,
    /// The policy that decided, if one did.
    pub policy: Option<NamespacedName>,
    /// AUDIT policies that matched.
    pub audited: Vec<NamespacedName>,
    /// Whether a matching ALLOW rule says `plaintext: Allowed`.
    pub plaintext: bool,
}

/// The answer of the interpreter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It may pass.
    Allow,
    /// It may not.
    Deny,
    /// The port is HTTP by a rule: each request is to be judged with [`judge_http`]. Only ever said of TCP.
    JudgeHttp,
}

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// Judges a connection (or a packet without one) by its L3/L4 part.
///
/// `Deny` is final for everything that could follow; `JudgeHttp` means that each request decides.
pub fn judge(state: &MeshState, access: &Access<'_>) -> Decision {
    decide(state, access, None)
}

/// Judges one HTTP request on a port for which [`judge`] said [`Outcome::JudgeHttp`]. Never answers `JudgeHttp`.
pub fn judge_http(state: &MeshState, access: &Access<'_>, request: &HttpRequest<'_>) -> Decision {
    decide(state, access, Some(request))
}

fn decide(state: &MeshState, access: &Access<'_>, request: Option<&HttpRequest<'_>>) -> Decision {
    let destination = access.destination;
    let mut decision = Decision {
        outcome: Outcome::Allow,
        reason: Reason::None,
        policy: None,
        audited: Vec::new(),
        plaintext: false,
    };
    if !destination.mode.enrolled() {
        return decision;
    }
    let authenticated = matches!(access.caller, Caller::Authenticated(_));
    let mut restricted = false;
    let mut allowed_by: Option<NamespacedName> = None;
    let mut http_port = false;
    for name in &destination.policies {
        let Some(policy) = state.policy(name) else {
            // It is known to select the Pod, but what it says is not: nothing may pass on a guess.
            return decision.deny(Reason::PolicyDenied, Some(name));
        };
        restricted |= policy.action == Action::Allow;
        http_port |= policy.rules.iter().any(|r| !r.http.is_empty() && covers(r, access));
        let mut matching =
            policy.rules.iter().filter(|rule| matches(state, policy, rule, access, request)).peekable();
        if matching.peek().is_none() {
            continue;
        }
        match policy.action {
            Action::Deny => {
                return decision.deny(Reason::PolicyDenyRule, Some(name));
            }
            Action::Audit => decision.audited.push(name.clone()),
            Action::Allow => {
                decision.plaintext |= matching.any(|rule| rule.plaintext);
                allowed_by.get_or_insert_with(|| name.clone());
            }
        }
    }
    let refused = if authenticated || destination.mode != Mode::Strict {
        Reason::PolicyDenied
    } else {
        Reason::PlaintextRefused
    };
    if restricted && allowed_by.is_none() || !restricted && !authenticated && destination.mode == Mode::Strict
    {
        return decision.deny(refused, None);
    }
    decision.policy = allowed_by;
    if http_port && request.is_none() {
        decision.outcome = Outcome::JudgeHttp;
    }
    decision
}

impl Decision {
    fn deny(mut self, reason: Reason, policy: Option<&NamespacedName>) -> Self {
        self.outcome = Outcome::Deny;
        self.reason = reason;
        self.policy = policy.cloned();
        self.plaintext = false;
        self
    }
}

/// Without a request, an HTTP rule matches where it *could* match, but for DENY and AUDIT only a certain match counts.
fn matches(
    state: &MeshState,
    policy: &Policy,
    rule: &Rule,
    access: &Access<'_>,
    request: Option<&HttpRequest<'_>>,
) -> bool {
    let http = match request {
        _ if rule.http.is_empty() => true,
        Some(request) => rule.http.iter().any(|h| h.matches(request)),
        None => policy.action == Action::Allow,
    };
    http && covers(rule, access) && from(state, policy, rule, access.caller)
}

/// Whether a rule speaks of the port and protocol; an HTTP rule only of TCP, whatever its protocol says: nothing else
/// is carried by the proxy, which alone sees requests.
fn covers(rule: &Rule, access: &Access<'_>) -> bool {
    if !rule.http.is_empty() && access.protocol != TCP {
        return false;
    }
    let protocol = match rule.protocol {
        Protocol::Tcp => access.protocol == TCP,
        Protocol::Udp => access.protocol == UDP,
        Protocol::Icmp => matches!(access.protocol, 1 | 58),
        Protocol::Any => true,
    };
    let is_port = |port: &PortRef| match port {
        PortRef::Number(number) => *number == access.port,
        PortRef::Name(name) => access.destination.named_ports.get(name) == Some(&access.port),
    };
    protocol && (rule.ports.is_empty() || rule.ports.iter().any(is_port))
}

fn from(state: &MeshState, policy: &Policy, rule: &Rule, caller: Caller<'_>) -> bool {
    match &rule.sources {
        None => policy.action != Action::Allow || matches!(caller, Caller::Authenticated(_)),
        Some(sources) => sources.iter().any(|source| is_source(state, source, caller)),
    }
}

fn is_source(state: &MeshState, source: &Source, caller: Caller<'_>) -> bool {
    match (source, caller) {
        (Source::ServiceAccount { namespace, name }, Caller::Authenticated(id)) => {
            state.config().is_some_and(|c| c.trust_domain.as_str() == id.trust_domain())
                && id.as_service_account().is_some_and(|(ns, account)| {
                    ns == namespace.as_ref() && name.as_ref().is_none_or(|n| n.as_ref() == account)
                })
        }
        (Source::Spiffe(pattern), Caller::Authenticated(id)) => spiffe_matches(pattern, id.as_str()),
        (Source::Unauthenticated(_), Caller::Authenticated(_)) => false,
        (Source::Unauthenticated(cidrs), caller) => {
            cidrs.is_empty()
                || cidrs.iter().any(|cidr| match caller {
                    Caller::Unauthenticated(address) => cidr.contains(address),
                    Caller::Range(range) => cidr.prefix <= range.prefix && cidr.contains(range.address),
                    Caller::Authenticated(_) | Caller::Elsewhere => false,
                })
        }
        _ => false,
    }
}

/// `*` stands for one path segment, a trailing `/*` for one or more. The trust domain is compared literally.
fn spiffe_matches(pattern: &str, id: &str) -> bool {
    let (pattern, below) = match pattern.strip_suffix("/*") {
        Some(pattern) => (pattern, true),
        None => (pattern, false),
    };
    let (mut want, mut have) = (pattern.split('/'), id.split('/'));
    for index in 0.. {
        match (want.next(), have.next()) {
            (None, None) => return !below,
            (None, Some(_)) => return below,
            (Some("*"), Some(_)) if index > 2 => {}
            (Some(w), Some(h)) if w == h => {}
            _ => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests;
