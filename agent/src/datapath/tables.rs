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
    service::{AppProtocol, Endpoint},
    workload::Mode,
};
use weft_ebpf_common::codes::{VIP_NO_ENDPOINT, proto};

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
    /// Some of its ports are a Service's: [`Tables::fronts`].
    pub front: bool,
    /// An address of a node, where the ports of every node are.
    pub node: bool,
}

/// A Service's port at an address that is not the Service's alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrontInfo {
    /// What is known of the Service's own address.
    pub service: AddressInfo,
    /// The Service's own port.
    pub port: u16,
}

/// Ports of Services elsewhere, by address (`None`: every node's), protocol and port.
pub type Fronts = BTreeMap<(Option<IpAddr>, u8, u16), FrontInfo>;

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
    /// Ports of Services at addresses that are not theirs alone.
    pub fronts: Fronts,
    /// Ranges; the longest match counts.
    pub ranges: BTreeMap<Cidr, RangeInfo>,
    /// Service ports of which every ready endpoint refuses a local subject, and the policy that does; or
    /// [`VIP_NO_ENDPOINT`] where there is none.
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
        let (addresses, fronts) = addresses(state, node, &policy.services);
        let vip_denied = vip_denied(state, node, &policy.rows);
        let mesh = state.config().map(|c| c.ranges.as_slice()).unwrap_or_default();
        Self {
            addresses,
            fronts,
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
) -> (BTreeMap<IpAddr, AddressInfo>, Fronts) {
    let shortcut = state.config().is_some_and(|c| c.same_node == SameNode::Shortcut);
    let mut addresses: BTreeMap<IpAddr, AddressInfo> = BTreeMap::new();
    let mut fronts = BTreeMap::new();
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
        for front in &service.fronts {
            let key = (front.address.map(|a| a.to_canonical()), front.protocol, front.port);
            // Of two Services that want the same, the first by name has it, as in the proxy.
            fronts.entry(key).or_insert(FrontInfo { service: info, port: front.service_port });
        }
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
            ..AddressInfo::default()
        };
        addresses.extend(workload.addresses.iter().map(|a| (a.to_canonical(), info)));
    }
    // What is a Pod's or a Service's own is nobody else's, whatever somebody writes into a Service.
    fronts.retain(|(address, ..), _| address.is_none_or(|a| !addresses.contains_key(&a)));
    let own: Vec<IpAddr> = fronts.keys().filter_map(|(address, ..)| *address).collect();
    for address in own {
        addresses.entry(address).or_default().front = true;
    }
    if fronts.keys().any(|(address, ..)| address.is_none()) {
        let nodes = state.workloads().filter(|w| w.is_node()).flat_map(|w| &w.host_addresses);
        for address in nodes.map(IpAddr::to_canonical) {
            let info = addresses.entry(address).or_default();
            let described = info.service || state.workload_at(address).is_some();
            (info.front, info.node) = if described { (info.front, false) } else { (true, true) };
        }
    }
    (addresses, fronts)
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
    let enrolled_here = |w: &&std::sync::Arc<weft_core::Workload>| {
        (w.mode.enrolled() || w.is_node()) && w.node.as_ref() == node
    };
    let subjects: HashSet<SubjectId> = state.workloads().filter(enrolled_here).map(|w| w.subject).collect();
    let rows = Rows::new(rows);
    let mut denied = BTreeMap::new();
    for service in state.services() {
        for port in &service.ports {
            let near = |e: &Endpoint| !service.node_local || e.node.as_deref() == Some(node);
            let takes = |e: &&Endpoint| e.ready && near(e) && e.ports.contains_key(&port.port);
            let keys =
                |subject| service.addresses.iter().map(move |a| (subject, a.to_canonical(), port.port));
            // As without a mesh, where programs wait for each other by connecting. HTTP is answered instead.
            let opaque =
                port.app_protocol == AppProtocol::Tcp && state.routes_of(&service.name).next().is_none();
            if opaque && !service.endpoints.iter().any(|e| takes(&e)) {
                let all = subjects.iter().copied().flat_map(&keys);
                denied.extend(all.map(|key| (key, VIP_NO_ENDPOINT)));
                continue;
            }
            // Where each ready endpoint's connection would arrive; an endpoint without policy refuses nobody.
            let ready = service.endpoints.iter().filter(takes);
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
                denied.extend(keys(subject).map(|key| (key, policy)));
            }
        }
    }
    denied
}
