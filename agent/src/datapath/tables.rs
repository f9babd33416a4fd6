//! What the kernel should know of the mesh, computed from the state.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use weft_core::{
    MeshState, NamespacedName, SubjectId,
    config::{SameNode, UnknownPods},
    policy::{
        Cidr,
        kernel::{self, Row, RowVerdict},
    },
    workload::Mode,
};
use weft_ebpf_common::codes::proto;

#[cfg(test)]
mod tests;

/// What is known of one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AddressInfo {
    /// The policy subject behind it; for a Service the number of its rows, unknown where it has none.
    pub subject: SubjectId,
    /// A Pod that the mesh handles.
    pub enrolled: bool,
    /// That Pod is on this node.
    pub local: bool,
    /// That Pod takes mTLS or nothing; a Service: one of its enrolled Pods on other nodes does.
    pub strict: bool,
    /// Rows decide about that Pod; a missing row means deny. A Service: enrolled Pods of other nodes are behind it, and
    /// rows decide about what is not TCP.
    pub policed: bool,
    /// A local Pod may reach it in the kernel.
    pub shortcut: bool,
    /// A Service's cluster address.
    pub service: bool,
    /// A Service with an enrolled Pod behind it.
    pub meshed: bool,
}

/// What is known of a range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeInfo {
    /// The class of a policy's CIDRs, where it is one.
    pub class: Option<SubjectId>,
    /// True inside the cluster's Pod and Service ranges.
    pub mesh: bool,
}

/// Everything that the kernel maps should hold, but for the Pods enrolled on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tables {
    /// Addresses of Pods and Services.
    pub addresses: BTreeMap<IpAddr, AddressInfo>,
    /// Ranges; the longest match counts.
    pub ranges: BTreeMap<Cidr, RangeInfo>,
    /// Service ports of which every ready endpoint refuses a local subject, and the policy that does.
    pub vip_denied: BTreeMap<(SubjectId, IpAddr, u16), u32>,
    /// Policy rows.
    pub rows: Vec<Row>,
    /// The policies that rows name by index plus one.
    pub policies: Vec<NamespacedName>,
    /// True where a Pod that is not classified yet may reach nothing.
    pub refuse_unknown: bool,
}

impl Tables {
    /// Computes the tables that `node` needs.
    pub fn compile(state: &MeshState, node: &str) -> Self {
        let policy = kernel::compile(state, node);
        let addresses = addresses(state, node, &policy.services);
        let vip_denied = vip_denied(state, node, &policy.rows);
        let mesh = state.config().map(|c| c.ranges.as_slice()).unwrap_or_default();
        Self {
            addresses,
            ranges: ranges(mesh, &policy.cidrs),
            vip_denied,
            rows: policy.rows,
            policies: policy.policies,
            refuse_unknown: state.config().is_some_and(|c| c.unknown_pods == UnknownPods::RefuseAll),
        }
    }
}

fn addresses(
    state: &MeshState,
    node: &str,
    guarded: &BTreeMap<NamespacedName, kernel::ServiceSubject>,
) -> BTreeMap<IpAddr, AddressInfo> {
    let shortcut = state.config().is_some_and(|c| c.same_node == SameNode::Shortcut);
    let mut addresses = BTreeMap::new();
    for service in state.services() {
        let guard = guarded.get(&service.name);
        let info = AddressInfo {
            subject: guard.map_or(SubjectId::UNKNOWN, |guard| guard.subject),
            strict: guard.is_some_and(|guard| guard.strict),
            policed: guard.is_some(),
            service: true,
            meshed: service.endpoints.iter().any(|e| {
                let pod = e.workload.as_ref().and_then(|uid| state.workload(uid));
                pod.is_some_and(|pod| pod.mode.enrolled())
            }),
            ..AddressInfo::default()
        };
        addresses.extend(service.addresses.iter().map(|a| (a.to_canonical(), info)));
    }
    for workload in state.workloads() {
        let enrolled = workload.mode.enrolled();
        let local = enrolled && workload.node.as_ref() == node;
        let info = AddressInfo {
            subject: workload.subject,
            enrolled,
            local,
            strict: workload.mode == Mode::Strict,
            policed: enrolled && kernel::policed(workload),
            shortcut: local && shortcut && !workload.network_policy,
            service: false,
            meshed: false,
        };
        addresses.extend(workload.addresses.iter().map(|a| (a.to_canonical(), info)));
    }
    addresses
}

/// Lays the mesh's ranges and the policies' classes over each other: in a trie only the longest match is seen, so
/// each prefix carries what the shorter ones around it say too.
fn ranges(mesh: &[Cidr], classes: &[kernel::CidrSubject]) -> BTreeMap<Cidr, RangeInfo> {
    let covers = |outer: &Cidr, inner: &Cidr| outer.prefix <= inner.prefix && outer.contains(inner.address);
    let prefixes: BTreeSet<Cidr> = mesh.iter().copied().chain(classes.iter().map(|c| c.cidr)).collect();
    let info = |prefix: &Cidr| RangeInfo {
        mesh: mesh.iter().any(|range| covers(range, prefix)),
        class: classes
            .iter()
            .filter(|c| covers(&c.cidr, prefix))
            .max_by_key(|c| c.cidr.prefix)
            .map(|c| c.subject),
    };
    prefixes.into_iter().map(|prefix| (prefix, info(&prefix))).collect()
}

/// The rows, as the kernel looks them up.
struct Rows<'a> {
    by_key: HashMap<(SubjectId, SubjectId, u16, u8), &'a Row>,
}

impl<'a> Rows<'a> {
    fn new(rows: &'a [Row]) -> Self {
        Self { by_key: rows.iter().map(|r| ((r.source, r.destination, r.port, r.protocol), r)).collect() }
    }

    /// The policy (0 where none decided) that refuses TCP to a policed destination; `None` where it is not refused.
    fn refusal(&self, source: SubjectId, destination: SubjectId, port: u16) -> Option<u32> {
        let keys = [(port, proto::TCP), (0, proto::TCP), (0, 0)];
        match keys.iter().find_map(|(port, proto)| self.by_key.get(&(source, destination, *port, *proto))) {
            Some(row) if row.verdict == RowVerdict::Deny => Some(row.policy),
            Some(_) => None,
            None => Some(0),
        }
    }
}

fn vip_denied(state: &MeshState, node: &str, rows: &[Row]) -> BTreeMap<(SubjectId, IpAddr, u16), u32> {
    let enrolled_here =
        |w: &&std::sync::Arc<weft_core::Workload>| w.mode.enrolled() && w.node.as_ref() == node;
    let subjects: HashSet<SubjectId> = state.workloads().filter(enrolled_here).map(|w| w.subject).collect();
    let rows = Rows::new(rows);
    let mut denied = BTreeMap::new();
    for service in state.services() {
        for port in &service.ports {
            // Where each ready endpoint's connection would arrive; an endpoint without policy refuses nobody.
            let ready = service.endpoints.iter().filter(|e| e.ready && e.ports.contains_key(&port.port));
            let targets: Option<BTreeSet<(SubjectId, u16)>> = ready
                .map(|endpoint| {
                    let workload = state.workload(endpoint.workload.as_ref()?)?;
                    let policed = workload.mode.enrolled() && kernel::policed(workload);
                    Some((policed.then_some(workload.subject)?, *endpoint.ports.get(&port.port)?))
                })
                .collect();
            let Some(targets) = targets.filter(|t| !t.is_empty()) else { continue };
            for &subject in &subjects {
                let refusals = targets.iter().map(|(target, port)| rows.refusal(subject, *target, *port));
                let Some(refusals) = refusals.collect::<Option<Vec<u32>>>() else { continue };
                let policy = refusals.into_iter().max().unwrap_or(0);
                let keys = service.addresses.iter().map(|a| (subject, a.to_canonical(), port.port));
                denied.extend(keys.map(|key| (key, policy)));
            }
        }
    }
    denied
}
