//! What is not TCP towards a Service's address.
//!
//! The address becomes an endpoint's only after the packet has left its Pod, where nobody judges it again before the
//! wire. So the Pod's own node decides for all endpoints at once: what may reach an enrolled Pod of another node must
//! be allowed in plaintext by every such Pod, where the caller or that Pod is strict.

use std::collections::{BTreeMap, BTreeSet};

use super::{Access, Caller, Compiler, Numbers, Row, RowVerdict, SERVICE_SUBJECT, eval};
use crate::{
    id::{NamespacedName, SubjectId},
    service::{Endpoint, PacketPort, Service},
    state::MeshState,
    workload::{Mode, Workload},
};

/// A Service with enrolled Pods of other nodes behind it.
///
/// Where the caller is strict or [`Self::strict`] is set, rows with this destination decide, by the Service's own
/// port: only `AllowPlaintext` lets pass, and a missing row refuses. Otherwise everything passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceSubject {
    /// The number that stands for the Service in rows.
    pub subject: SubjectId,
    /// True where one of those Pods is strict.
    pub strict: bool,
}

/// What a Service's packets may meet on another node.
#[derive(Clone, Copy)]
enum Behind<'a> {
    Pod(&'a Workload),
    /// A Pod that the state names and does not describe: taken for a strict one that allows nothing.
    Undescribed,
}

impl Behind<'_> {
    fn strict(self) -> bool {
        match self {
            Self::Pod(workload) => workload.mode == Mode::Strict,
            Self::Undescribed => true,
        }
    }
}

/// Numbers the guarded Services and adds their rows for the sources of this node.
pub(super) fn guard(
    out: &mut Compiler<'_>,
    node: &str,
    sources: &[&Workload],
) -> BTreeMap<NamespacedName, ServiceSubject> {
    let state = out.state;
    let mut numbers = Numbers::from(SERVICE_SUBJECT);
    let mut guarded = BTreeMap::new();
    for service in state.services().filter(|s| !s.addresses.is_empty() || !s.fronts.is_empty()) {
        let behind: Vec<(&Endpoint, Behind<'_>)> = (service.endpoints.iter())
            .filter_map(|endpoint| Some((endpoint, elsewhere(state, node, endpoint)?)))
            .collect();
        if behind.is_empty() {
            continue;
        }
        let subject = numbers.next(&service.name.to_string());
        let strict = behind.iter().any(|(_, behind)| behind.strict());
        guarded.insert(service.name.clone(), ServiceSubject { subject, strict });
        for (protocol, port) in packet_ports(service) {
            let targets: Vec<(Behind<'_>, u16)> = (behind.iter())
                .flat_map(|(endpoint, behind)| endpoint.packet_ports.iter().map(move |port| (*behind, port)))
                .filter(|(_, at)| (at.protocol, at.port) == (protocol, port))
                .map(|(behind, at)| (behind, at.target))
                .collect();
            for source in sources.iter().filter(|source| strict || source.mode == Mode::Strict) {
                let (verdict, policy) = worst(out, source, protocol, &targets);
                out.rows.push(Row {
                    source: source.subject,
                    destination: subject,
                    port,
                    protocol,
                    verdict,
                    policy,
                });
            }
        }
    }
    guarded
}

/// The enrolled Pod of another node that the endpoint is; ready or not, because those that are not are used where no
/// other one is left.
fn elsewhere<'a>(state: &'a MeshState, node: &str, endpoint: &Endpoint) -> Option<Behind<'a>> {
    let named = endpoint.workload.as_ref();
    match state.workload_at(endpoint.address).or_else(|| state.workload(named?)) {
        Some(w) => (w.mode.enrolled() && w.node.as_ref() != node).then_some(Behind::Pod(w)),
        None => named.map(|_| Behind::Undescribed),
    }
}

/// (protocol, port) at the Service's address.
fn packet_ports(service: &Service) -> BTreeSet<(u8, u16)> {
    let ports = service.endpoints.iter().flat_map(|endpoint| &endpoint.packet_ports);
    ports.map(|PacketPort { protocol, port, .. }| (*protocol, *port)).collect()
}

/// The answer of the endpoint that allows least.
fn worst(
    out: &mut Compiler<'_>,
    source: &Workload,
    protocol: u8,
    targets: &[(Behind<'_>, u16)],
) -> (RowVerdict, u32) {
    let mut worst = (RowVerdict::AllowPlaintext, 0);
    let mut asked = BTreeSet::new();
    let caller = Caller::Authenticated(&source.identity);
    let crossing = targets.iter().filter(|(behind, _)| source.mode == Mode::Strict || behind.strict());
    for &(behind, target) in crossing {
        let Behind::Pod(destination) = behind else { return (RowVerdict::Deny, 0) };
        // Ports are part of a policy for TCP and UDP only.
        let port = if protocol == eval::UDP { target } else { 0 };
        if asked.insert((destination.subject, port)) {
            let judged = out.judge(&Access { caller, destination, port, protocol });
            if rank(judged.0) >= rank(worst.0) {
                worst = judged;
            }
        }
    }
    worst
}

fn rank(verdict: RowVerdict) -> u8 {
    match verdict {
        RowVerdict::AllowPlaintext => 0,
        RowVerdict::Allow | RowVerdict::Proxy => 1,
        RowVerdict::Deny => 2,
    }
}

#[cfg(test)]
mod tests;
