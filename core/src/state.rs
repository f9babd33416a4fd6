//! The state one node works with, and the deltas that change it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use foldhash::{HashMap, HashSet};
use serde::{Deserialize, Serialize};

use crate::{
    config::MeshConfig,
    id::{NamespacedName, SubjectId, WorkloadUid},
    policy::Policy,
    route::HttpRoute,
    service::Service,
    workload::Workload,
};

/// IP protocol number of TCP.
const TCP: u8 = 6;

/// A point in an operator's history. Sequences of two epochs do not compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Version {
    /// Random per operator process.
    pub epoch: u64,
    /// Grows with each change.
    pub sequence: u64,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}.{}", self.epoch & 0xffff_ffff, self.sequence)
    }
}

/// The key of a resource on the wire: kind and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ResourceKey {
    /// The settings.
    Config,
    /// A Pod.
    Workload(WorkloadUid),
    /// A Service.
    Service(NamespacedName),
    /// A route.
    Route(NamespacedName),
    /// A policy.
    Policy(NamespacedName),
}

/// A resource on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "spec")]
pub enum Resource {
    /// The settings.
    Config(Arc<MeshConfig>),
    /// A Pod.
    Workload(Arc<Workload>),
    /// A Service.
    Service(Arc<Service>),
    /// A route.
    Route(Arc<HttpRoute>),
    /// A policy.
    Policy(Arc<Policy>),
}

impl Resource {
    /// Its key.
    pub fn key(&self) -> ResourceKey {
        match self {
            Self::Config(_) => ResourceKey::Config,
            Self::Workload(w) => ResourceKey::Workload(w.uid.clone()),
            Self::Service(s) => ResourceKey::Service(s.name.clone()),
            Self::Route(r) => ResourceKey::Route(r.name.clone()),
            Self::Policy(p) => ResourceKey::Policy(p.name.clone()),
        }
    }
}

/// A change from one version to the next; `full` replaces everything.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Delta {
    /// The version after it.
    pub version: Version,
    /// True where what is not listed is gone.
    pub full: bool,
    /// New or changed.
    pub upserted: Vec<Resource>,
    /// Gone.
    pub removed: Vec<ResourceKey>,
}

/// Everything one node knows of the mesh. Immutable; readers hold an `Arc` of it.
#[derive(Debug, Clone, Default)]
pub struct MeshState {
    version: Version,
    config: Option<Arc<MeshConfig>>,
    workloads: BTreeMap<WorkloadUid, Arc<Workload>>,
    services: BTreeMap<NamespacedName, Arc<Service>>,
    routes: BTreeMap<NamespacedName, Arc<HttpRoute>>,
    policies: BTreeMap<NamespacedName, Arc<Policy>>,
    by_address: HashMap<IpAddr, WorkloadUid>,
    by_service_address: HashMap<IpAddr, NamespacedName>,
    /// Addresses of nodes.
    node_addresses: HashSet<IpAddr>,
    /// Ports of Services by address (`None`: every node's), protocol and port, with the Service's own port.
    by_front: HashMap<(Option<IpAddr>, u8, u16), (NamespacedName, u16)>,
    by_subject: HashMap<SubjectId, WorkloadUid>,
    routes_by_service: HashMap<NamespacedName, Vec<NamespacedName>>,
}

impl MeshState {
    /// The state after `delta`.
    #[must_use]
    pub fn apply(&self, delta: &Delta) -> Self {
        let mut next = if delta.full { Self::default() } else { self.clone() };
        next.version = delta.version;
        for key in &delta.removed {
            match key {
                ResourceKey::Config => next.config = None,
                ResourceKey::Workload(uid) => drop(next.workloads.remove(uid)),
                ResourceKey::Service(name) => drop(next.services.remove(name)),
                ResourceKey::Route(name) => drop(next.routes.remove(name)),
                ResourceKey::Policy(name) => drop(next.policies.remove(name)),
            }
        }
        for resource in &delta.upserted {
            match resource.clone() {
                Resource::Config(c) => next.config = Some(c),
                Resource::Workload(w) => drop(next.workloads.insert(w.uid.clone(), w)),
                Resource::Service(s) => drop(next.services.insert(s.name.clone(), s)),
                Resource::Route(r) => drop(next.routes.insert(r.name.clone(), r)),
                Resource::Policy(p) => drop(next.policies.insert(p.name.clone(), p)),
            }
        }
        next.index();
        next
    }

    fn index(&mut self) {
        self.by_address =
            self.workloads.values().flat_map(|w| w.addresses.iter().map(|a| (*a, w.uid.clone()))).collect();
        self.by_service_address =
            self.services.values().flat_map(|s| s.addresses.iter().map(|a| (*a, s.name.clone()))).collect();
        let nodes = self.workloads.values().filter(|w| w.is_node());
        self.node_addresses = nodes.flat_map(|w| w.host_addresses.iter().map(IpAddr::to_canonical)).collect();
        self.by_front.clear();
        for service in self.services.values() {
            for front in &service.fronts {
                let key = (front.address.map(|a| a.to_canonical()), front.protocol, front.port);
                let behind = || (service.name.clone(), front.service_port);
                self.by_front.entry(key).or_insert_with(behind);
            }
        }
        self.by_subject = self.workloads.values().map(|w| (w.subject, w.uid.clone())).collect();
        self.routes_by_service.clear();
        for route in self.routes.values() {
            for parent in &route.parents {
                let names = self.routes_by_service.entry(parent.service.clone()).or_default();
                if names.last() != Some(&route.name) {
                    names.push(route.name.clone());
                }
            }
        }
    }

    /// Everything in it, as a full delta (for the snapshot on disk).
    pub fn to_delta(&self) -> Delta {
        let upserted = (self.config.iter().cloned().map(Resource::Config))
            .chain(self.workloads.values().cloned().map(Resource::Workload))
            .chain(self.services.values().cloned().map(Resource::Service))
            .chain(self.routes.values().cloned().map(Resource::Route))
            .chain(self.policies.values().cloned().map(Resource::Policy))
            .collect();
        Delta { version: self.version, full: true, upserted, removed: Vec::new() }
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The settings; `None` before the first snapshot.
    pub fn config(&self) -> Option<&Arc<MeshConfig>> {
        self.config.as_ref()
    }

    /// All Pods.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// A Pod by UID.
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// A Pod by address.
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.get(self.by_address.get(&address.to_canonical())?)
    }

    /// Some Pod of a subject (all of them share identity and policies).
    pub fn workload_of(&self, subject: SubjectId) -> Option<&Arc<Workload>> {
        self.workloads.get(self.by_subject.get(&subject)?)
    }

    /// All Services.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// A Service by name.
    pub fn service(&self, name: &NamespacedName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// The Service whose cluster address this is.
    pub fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.services.get(self.by_service_address.get(&address.to_canonical())?)
    }

    /// The own network of a node, by the node's name.
    pub fn node(&self, name: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(&WorkloadUid::node(name)).filter(|w| w.is_node())
    }

    /// The Service that takes what is sent to this port, and its own port: by one of its cluster addresses, or by a port
    /// of it elsewhere. Addresses of Pods and of other Services are nobody else's.
    pub fn dialled(&self, address: SocketAddr, protocol: u8) -> Option<(&Arc<Service>, u16)> {
        let ip = address.ip().to_canonical();
        if let Some(service) = self.service_at(ip) {
            return Some((service, address.port()));
        }
        let (name, port) = self.front(ip, protocol, address.port())?;
        Some((self.services.get(name)?, *port))
    }

    fn front(&self, ip: IpAddr, protocol: u8, port: u16) -> Option<&(NamespacedName, u16)> {
        if self.by_address.contains_key(&ip) {
            return None;
        }
        let of_nodes =
            || self.by_front.get(&(None, protocol, port)).filter(|_| self.node_addresses.contains(&ip));
        self.by_front.get(&(Some(ip), protocol, port)).or_else(of_nodes)
    }

    /// All routes.
    pub fn routes(&self) -> impl Iterator<Item = &Arc<HttpRoute>> {
        self.routes.values()
    }

    /// The routes that name a Service as their parent.
    pub fn routes_of(&self, service: &NamespacedName) -> impl Iterator<Item = &HttpRoute> {
        let names = self.routes_by_service.get(service).map_or(&[][..], Vec::as_slice);
        names.iter().filter_map(|name| self.routes.get(name)).map(Arc::as_ref)
    }

    /// All policies.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// A policy by name.
    pub fn policy(&self, name: &NamespacedName) -> Option<&Arc<Policy>> {
        self.policies.get(name)
    }

    /// Whether an address lies in the mesh's Pod or Service ranges.
    pub fn in_ranges(&self, address: IpAddr) -> bool {
        self.config.as_ref().is_some_and(|c| c.ranges.iter().any(|r| r.contains(address)))
    }

    /// Whether two workloads may use the same-node shortcut.
    pub fn shortcut(&self, a: &Workload, b: &Workload) -> bool {
        a.node == b.node
            && !a.network_policy
            && !b.network_policy
            && self.config.as_ref().is_some_and(|c| c.same_node == crate::config::SameNode::Shortcut)
    }

    /// The Service (and its TCP port) that an address and port are the front of.
    pub fn frontend(&self, address: SocketAddr) -> Option<(&Arc<Service>, &crate::service::ServicePort)> {
        let (service, port) = self.dialled(address, TCP)?;
        Some((service, service.port(port)?))
    }
}
