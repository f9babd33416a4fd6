//! The reference interpreter.

use std::net::IpAddr;

use crate::{
    flow::Reason,
    http::HttpRequest,
    id::{NamespacedName, SpiffeId},
    state::MeshState,
    workload::Workload,
};

/// Who is asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller<'a> {
    /// Proven by mTLS, or by the kernel on the same node.
    Authenticated(&'a SpiffeId),
    /// Not proven: only its address is known.
    Unauthenticated(IpAddr),
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
    /// Whether a matching rule says `plaintext: Allowed`.
    pub plaintext: bool,
}

/// The answer of the interpreter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It may pass.
    Allow,
    /// It may not.
    Deny,
    /// The port is HTTP by a rule: each request is to be judged with [`judge_http`].
    JudgeHttp,
}

/// Judges a connection (or a packet without one) by its L3/L4 part.
pub fn judge(state: &MeshState, access: &Access<'_>) -> Decision {
    let _ = (state, access);
    Decision { outcome: Outcome::Deny, reason: Reason::PolicyDenied, policy: None, audited: vec![], plaintext: false }
}

/// Judges one HTTP request on a port for which [`judge`] said [`Outcome::JudgeHttp`]. Never answers `JudgeHttp`.
pub fn judge_http(state: &MeshState, access: &Access<'_>, request: &HttpRequest<'_>) -> Decision {
    let _ = request;
    judge(state, access)
}
