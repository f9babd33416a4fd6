//! From what was dialled to where it goes.

use std::net::{IpAddr, SocketAddr};

use rand::Rng;
use weft_core::{
    MeshState, NamespacedName, Service, Workload,
    flow::Reason,
    route,
    service::{AppProtocol, Endpoint},
    workload::Mode,
};

use crate::{connections::TCP, l7::Target};

/// Endpoints of which two are not sought at random.
const FEW: usize = 8;
/// How often one is drawn before all are looked at: most of them may not be ready.
const TRIES: usize = 8;

/// Where a connection goes.
#[derive(Debug)]
pub(super) enum Resolved {
    /// To a Service's port that speaks HTTP: each request finds its own way.
    Http {
        /// The Service.
        service: NamespacedName,
        /// Its port.
        port: u16,
    },
    /// To one of these; see [`ready`].
    Opaque(Vec<Target>),
}

/// Why it goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unresolved {
    /// An address of the mesh's ranges that nobody described, at least not yet.
    Unknown,
    /// It is known, and known to be wrong.
    Refused(Reason),
}

/// Resolves what `source` dialled.
pub(super) fn resolve(
    state: &MeshState,
    source: &Workload,
    address: SocketAddr,
) -> Result<Resolved, Unresolved> {
    if let Some((service, port)) = state.dialled(address, TCP) {
        let port = service.port(port).ok_or(Unresolved::Refused(Reason::NoEndpoint))?;
        let routed = || !route::attached(state, &service.name, port.port, &source.name.namespace).is_empty();
        if port.app_protocol == AppProtocol::Http || routed() {
            return Ok(Resolved::Http { service: service.name.clone(), port: port.port });
        }
        let targets = ready(state, source, service, port.port, address.ip());
        return if targets.is_empty() {
            Err(Unresolved::Refused(Reason::NoEndpoint))
        } else {
            Ok(Resolved::Opaque(targets))
        };
    }
    let workload = state.workload_at(address.ip()).cloned();
    if workload.is_none() && source.mode == Mode::Strict && state.in_ranges(address.ip()) {
        return Err(Unresolved::Unknown);
    }
    Ok(Resolved::Opaque(vec![Target { address, workload, service: None }]))
}

/// Ready endpoints of a Service's port for a balancer to choose from: any two of many, all of few. They are of the family of
/// `like` where there are any: a dual-stack Service has an EndpointSlice per family, and an address stands for the slice of
/// its own. Where the Service asks for it, only those of the node of `source`.
pub(super) fn ready(
    state: &MeshState,
    source: &Workload,
    service: &Service,
    port: u16,
    like: IpAddr,
) -> Vec<Target> {
    let all = &service.endpoints;
    let fitting = |endpoint: &Endpoint, same_family: bool| {
        let v4 = like.to_canonical().is_ipv4() == same_family;
        let fits = endpoint.ready
            && (!service.node_local || endpoint.node.as_ref() == Some(&source.node))
            && endpoint.address.to_canonical().is_ipv4() == v4;
        fits.then(|| target(state, service, port, endpoint)).flatten()
    };
    if all.len() > FEW {
        let mut rng = rand::rng();
        let mut drawn: Vec<Target> = Vec::with_capacity(2);
        for _ in 0..TRIES {
            let found = fitting(&all[rng.random_range(0..all.len())], true);
            drawn.extend(found.filter(|target| !drawn.contains(target)));
            if drawn.len() == 2 {
                return drawn;
            }
        }
    }
    let targets = |same_family| all.iter().filter_map(|e| fitting(e, same_family)).collect::<Vec<_>>();
    let same = targets(true);
    if same.is_empty() { targets(false) } else { same }
}

fn target(state: &MeshState, service: &Service, port: u16, endpoint: &Endpoint) -> Option<Target> {
    let to = *endpoint.ports.get(&port)?;
    let workload = match &endpoint.workload {
        // A Pod that should be known and is not: dialling it could go out in plaintext.
        Some(uid) => Some(state.workload(uid)?.clone()),
        None => state.workload_at(endpoint.address).cloned(),
    };
    Some(Target {
        address: SocketAddr::new(endpoint.address.to_canonical(), to),
        workload,
        service: Some((service.name.clone(), port)),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use weft_core::testing;

    use super::*;

    const PORT: u16 = 80;

    /// A Service with endpoints of both families outside the mesh, of which these are ready.
    fn service(count: u8, ready: impl Fn(u8) -> bool) -> Service {
        let endpoint = |address: IpAddr, n| Endpoint {
            address,
            ports: BTreeMap::from([(PORT, 8_080)]),
            packet_ports: Vec::new(),
            workload: None,
            ready: ready(n),
            node: None,
        };
        let endpoints = (0..count).flat_map(|n| {
            let v4 = IpAddr::from([192, 0, 2, n]);
            let v6 = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()]);
            [endpoint(v4, n), endpoint(v6, n)]
        });
        Service {
            name: NamespacedName::new("shop", "api"),
            addresses: Vec::new(),
            ports: Vec::new(),
            endpoints: endpoints.collect(),
            fronts: Vec::new(),
            node_local: false,
        }
    }

    /// What 500 draws find, and how many each.
    fn drawn(service: &Service) -> (BTreeSet<IpAddr>, BTreeSet<usize>) {
        let source = testing::workload("web", 300, Mode::Strict, &[]);
        let state = testing::state(vec![source.clone()], Vec::new());
        let (mut seen, mut counts) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..500 {
            let found = ready(&state, &source, service, PORT, IpAddr::from([10, 96, 0, 1]));
            let addresses: BTreeSet<_> = found.iter().map(|target| target.address.ip()).collect();
            assert_eq!(addresses.len(), found.len(), "one endpoint twice: {found:?}");
            counts.insert(found.len());
            seen.extend(addresses);
        }
        (seen, counts)
    }

    #[test]
    fn any_two_of_many_that_are_ready_are_found() {
        let (seen, counts) = drawn(&service(20, |n| n % 2 == 0));
        assert_eq!(seen, (0..20).step_by(2).map(|n| IpAddr::from([192, 0, 2, n])).collect());
        assert!(counts.contains(&2), "{counts:?}");
    }

    #[test]
    fn the_only_one_that_is_ready_is_found_among_many() {
        let (seen, counts) = drawn(&service(100, |n| n == 77));
        assert_eq!(seen, BTreeSet::from([IpAddr::from([192, 0, 2, 77])]));
        assert_eq!(counts, BTreeSet::from([1]));
        assert_eq!(drawn(&service(100, |_| false)).1, BTreeSet::from([0]));
    }
}
