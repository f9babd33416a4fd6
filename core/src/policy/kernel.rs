//! Policy as the kernel holds it: rows by (source subject, destination subject, port, protocol).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    Cidr, PortRef, Protocol, Source,
    eval::{self, Access, Caller, Decision, Outcome},
};
use crate::{
    id::{NamespacedName, SubjectId},
    state::MeshState,
    workload::Workload,
};

mod services;

pub use services::ServiceSubject;

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
    /// The rows. A destination that [`policed`] says yes to has rows for every enrolled subject, and if it is of
    /// this node for [`SubjectId::WORLD`] and every [`CidrSubject`]; a missing row means Deny.
    pub rows: Vec<Row>,
    /// The ranges.
    pub cidrs: Vec<CidrSubject>,
    /// The Services with enrolled Pods of other nodes behind them, by name.
    pub services: BTreeMap<NamespacedName, ServiceSubject>,
    /// Names for [`Row::policy`].
    pub policies: Vec<NamespacedName>,
}

/// Subjects of address ranges begin here, those of workloads end below.
pub const CIDR_SUBJECT: u32 = 0x8000_0000;
/// Subjects of Services begin here, those of address ranges end below.
pub const SERVICE_SUBJECT: u32 = 0xc000_0000;

/// Whether some policy selects the Pod, so that its rows decide.
pub fn policed(workload: &Workload) -> bool {
    !workload.policies.is_empty()
}

/// Compiles the rows that node `node` needs: every destination of the state for local sources, every source for
/// local destinations.
pub fn compile(state: &MeshState, node: &str) -> KernelPolicy {
    let cidrs = cidr_subjects(state);
    let mut local_subjects = BTreeSet::new();
    let mut subjects: BTreeMap<SubjectId, &Workload> = BTreeMap::new();
    for workload in state.workloads().filter(|w| w.mode.enrolled()) {
        subjects.insert(workload.subject, workload);
        if workload.node.as_ref() == node {
            local_subjects.insert(workload.subject);
        }
    }
    // In the name of the node, Pods of its own network call.
    let host = state.node(node).map(|w| (w.subject, w.as_ref()));
    let mut out = Compiler { state, rows: Vec::new(), policies: Vec::new(), indexes: BTreeMap::new() };
    for (&subject, destination) in subjects.iter().filter(|(_, w)| policed(w)) {
        let ports = interesting_ports(state, destination);
        let local = local_subjects.contains(&subject);
        for (&source, workload) in &subjects {
            if local || local_subjects.contains(&source) {
                out.pair(source, Caller::Authenticated(&workload.identity), destination, &ports);
            }
        }
        if let Some((source, workload)) = host {
            out.pair(source, Caller::Authenticated(&workload.identity), destination, &ports);
        }
        if local {
            out.pair(SubjectId::WORLD, Caller::Elsewhere, destination, &ports);
            for class in &cidrs {
                out.pair(class.subject, Caller::Range(class.cidr), destination, &ports);
            }
        }
    }
    let sources: Vec<&Workload> = subjects
        .iter()
        .filter(|(subject, _)| local_subjects.contains(subject))
        .map(|(_, workload)| *workload)
        .collect();
    let services = services::guard(&mut out, node, &sources);
    out.rows.sort_unstable();
    out.rows.dedup();
    KernelPolicy { rows: out.rows, cidrs, services, policies: out.policies }
}

struct Compiler<'a> {
    state: &'a MeshState,
    rows: Vec<Row>,
    policies: Vec<NamespacedName>,
    indexes: BTreeMap<NamespacedName, u32>,
}

impl Compiler<'_> {
    fn pair(
        &mut self,
        source: SubjectId,
        caller: Caller<'_>,
        destination: &Workload,
        ports: &BTreeSet<(u8, u16)>,
    ) {
        let rest = [(6, 0), (17, 0), (1, 0), (58, 0), (0, 0)];
        for &(protocol, port) in ports.iter().chain(&rest) {
            // 255 is reserved (IANA): a rule that speaks of every protocol covers it, no other does.
            let judged = if protocol == 0 { 255 } else { protocol };
            let (verdict, policy) = self.judge(&Access { caller, destination, port, protocol: judged });
            self.rows.push(Row { source, destination: destination.subject, port, protocol, verdict, policy });
        }
    }

    /// What a row says of this, and the policy that decided.
    fn judge(&mut self, access: &Access<'_>) -> (RowVerdict, u32) {
        let decision = eval::judge(self.state, access);
        let policy = decision.policy.as_ref().map_or(0, |name| self.policy_index(name));
        (row_verdict(&decision, access.protocol), policy)
    }

    fn policy_index(&mut self, name: &NamespacedName) -> u32 {
        if let Some(index) = self.indexes.get(name) {
            return *index;
        }
        self.policies.push(name.clone());
        let index = u32::try_from(self.policies.len()).unwrap_or(u32::MAX);
        self.indexes.insert(name.clone(), index);
        index
    }
}

fn row_verdict(decision: &Decision, protocol: u8) -> RowVerdict {
    match decision.outcome {
        Outcome::Deny => RowVerdict::Deny,
        Outcome::JudgeHttp => RowVerdict::Proxy,
        Outcome::Allow if decision.plaintext && protocol != eval::TCP => RowVerdict::AllowPlaintext,
        Outcome::Allow => RowVerdict::Allow,
    }
}

/// The (protocol, port) pairs that the policies of a Pod name.
fn interesting_ports(state: &MeshState, destination: &Workload) -> BTreeSet<(u8, u16)> {
    let rules = destination.policies.iter().filter_map(|name| state.policy(name)).flat_map(|p| &p.rules);
    let mut ports = BTreeSet::new();
    for rule in rules {
        let protocols: &[u8] = match rule.protocol {
            Protocol::Tcp => &[6],
            Protocol::Udp => &[17],
            Protocol::Icmp => &[],
            Protocol::Any => &[6, 17],
        };
        for port in &rule.ports {
            let number = match port {
                PortRef::Number(number) => Some(*number),
                PortRef::Name(name) => destination.named_ports.get(name).copied(),
            };
            ports.extend(number.filter(|n| *n != 0).iter().flat_map(|n| protocols.iter().map(|p| (*p, *n))));
        }
    }
    ports
}

/// Each CIDR that a policy names gets a subject for the set of CIDRs around it, numbered by a hash of that set so
/// that a change elsewhere does not renumber it.
fn cidr_subjects(state: &MeshState) -> Vec<CidrSubject> {
    let all: BTreeSet<Cidr> = state
        .policies()
        .flat_map(|p| &p.rules)
        .flat_map(|r| r.sources.iter().flatten())
        .filter_map(|s| if let Source::Unauthenticated(cidrs) = s { Some(cidrs) } else { None })
        .flatten()
        .copied()
        .collect();
    let mut numbers = Numbers::from(CIDR_SUBJECT);
    all.iter().map(|cidr| CidrSubject { cidr: *cidr, subject: numbers.next(&cidr.to_string()) }).collect()
}

/// Gives out subjects by hashes of names: what else there is seldom changes a number.
struct Numbers {
    first: u32,
    taken: BTreeSet<u32>,
}

impl Numbers {
    /// Numbers from this one on, a power of two of them below the next class.
    fn from(first: u32) -> Self {
        Self { first, taken: BTreeSet::new() }
    }

    fn next(&mut self, name: &str) -> SubjectId {
        let mask = SERVICE_SUBJECT - CIDR_SUBJECT - 1;
        let mut number = hash(name) & mask;
        while !self.taken.insert(number) {
            number = number.wrapping_add(1) & mask;
        }
        SubjectId(self.first | number)
    }
}

/// FNV-1a, 32 bits: stable across processes, which `std`'s hasher is not.
pub fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests;
