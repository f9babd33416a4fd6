//! From what was dialled to where it goes.

use std::net::{IpAddr, SocketAddr};

use weft_core::{
    MeshState, NamespacedName, Service, Workload,
    flow::Reason,
    route,
    service::{AppProtocol, Endpoint},
    workload::Mode,
};

use crate::{connections::TCP, l7::Target};

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
    /// To one of these.
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

/// The ready endpoints of a Service's port, of the family of `like` where there are any: a dual-stack Service has
/// an EndpointSlice per family, and an address stands for the slice of its own. Where the Service asks for it, only
/// those of the node of `source`.
pub(super) fn ready(
    state: &MeshState,
    source: &Workload,
    service: &Service,
    port: u16,
    like: IpAddr,
) -> Vec<Target> {
    let near = |e: &Endpoint| !service.node_local || e.node.as_ref() == Some(&source.node);
    let targets = |same_family: bool| {
        let v4 = like.to_canonical().is_ipv4() == same_family;
        let endpoints = service
            .endpoints
            .iter()
            .filter(move |e| e.ready && near(e) && e.address.to_canonical().is_ipv4() == v4);
        endpoints.filter_map(|endpoint| target(state, service, port, endpoint)).collect::<Vec<_>>()
    };
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
