//! Policy as the kernel holds it: rows by (source subject, destination subject, port, protocol).

use serde::{Deserialize, Serialize};

use super::Cidr;
use crate::{id::SubjectId, state::MeshState};

/// What a row says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RowVerdict {
    /// May pass.
    Allow,
    /// May pass between nodes without mTLS too (`plaintext: Allowed`).
    AllowPlaintext,
    /// Refused.
    Deny,
    /// The proxy judges each HTTP request.
    Proxy,
}

/// One row. `port` 0 stands for every port that no other row of the same (source, destination, protocol) names;
/// `protocol` 0 (with `port` 0) for every protocol that has no row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Row {
    /// Who calls.
    pub source: SubjectId,
    /// Who is called.
    pub destination: SubjectId,
    /// The port at the destination.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// What is decided.
    pub verdict: RowVerdict,
    /// Index into [`KernelPolicy::policies`] of the policy that decided, plus one; 0 where none did.
    pub policy: u32,
}

/// A range of addresses outside the mesh, and the subject that stands for the set of policy CIDRs around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CidrSubject {
    /// The range; the longest match counts.
    pub cidr: Cidr,
    /// The subject.
    pub subject: SubjectId,
}

/// Everything a node's kernel needs to judge.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelPolicy {
    /// The rows. A destination that some policy selects (or that is strict) has rows for every subject of the
    /// state, for [`SubjectId::WORLD`] and for every [`CidrSubject`]; a missing row means Deny.
    pub rows: Vec<Row>,
    /// The ranges.
    pub cidrs: Vec<CidrSubject>,
    /// Names for [`Row::policy`].
    pub policies: Vec<crate::id::NamespacedName>,
}

/// Compiles the rows that node `node` needs: every destination of the state for local sources, every source for
/// local destinations.
pub fn compile(state: &MeshState, node: &str) -> KernelPolicy {
    let _ = (state, node);
    KernelPolicy::default()
}
