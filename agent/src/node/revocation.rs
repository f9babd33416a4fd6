//! Which of what passes beside the proxy must end.

use weft_core::{
    MeshState, Service, Workload,
    policy::eval::{Access, Caller, Outcome, UDP, judge},
    service::Endpoint,
    workload::Mode,
};

use crate::datapath::KernelConnection;

/// TCP's protocol number.
const TCP: u8 = 6;

/// Whether something that passes beside the proxy must end: policy refuses it, wants to see its requests, or the
/// two Pods may no longer use the shortcut. What leads out of the mesh never must.
pub fn denied(state: &MeshState, connection: &KernelConnection<'_>) -> bool {
    let client = connection.client.ip().to_canonical();
    let server = connection.server.ip().to_canonical();
    let source = state.workload_at(client).filter(|w| w.mode.enrolled());
    let destination = match connection.pod {
        Some(pod) => state.workload(pod),
        None => state.workload_at(server),
    };
    let Some(destination) = destination else {
        let service = state.service_at(server).filter(|_| connection.pod.is_none());
        return source
            .zip(service)
            .is_some_and(|(source, service)| denied_behind(state, connection, source, service));
    };
    if !destination.mode.enrolled() {
        return false;
    }
    let caller = source.map_or(Caller::Unauthenticated(client), |w| Caller::Authenticated(&w.identity));
    let access =
        Access { caller, destination, port: connection.server.port(), protocol: connection.protocol };
    let decision = judge(state, &access);
    if decision.outcome != Outcome::Allow {
        return true;
    }
    let Some(source) = source else { return false };
    if connection.protocol == TCP {
        return !state.shortcut(source, destination);
    }
    let strict = source.mode == Mode::Strict || destination.mode == Mode::Strict;
    source.node != destination.node && strict && !decision.plaintext
}

/// Whether a Service's address must not be spoken to, as the kernel's rows say it: where one side is strict, each
/// enrolled Pod of another node that may get the packet has to allow it in plaintext.
fn denied_behind(
    state: &MeshState,
    connection: &KernelConnection<'_>,
    source: &Workload,
    service: &Service,
) -> bool {
    let behind: Vec<(&Endpoint, Option<&Workload>)> =
        service.endpoints.iter().filter_map(|e| Some((e, elsewhere(state, source, e)?))).collect();
    let guarded = |pod: &Option<&Workload>| {
        source.mode == Mode::Strict || pod.is_none_or(|pod| pod.mode == Mode::Strict)
    };
    if !behind.iter().any(|(_, pod)| guarded(pod)) {
        return false;
    }
    let dialled = (connection.protocol, connection.server.port());
    let target = |endpoint: &Endpoint| {
        let mut ports = endpoint.packet_ports.iter();
        ports.find(|port| (port.protocol, port.port) == dialled).map(|port| port.target)
    };
    if !service.endpoints.iter().any(|endpoint| target(endpoint).is_some()) {
        return true;
    }
    let caller = Caller::Authenticated(&source.identity);
    behind.iter().filter(|(_, pod)| guarded(pod)).any(|(endpoint, pod)| {
        let Some(target) = target(endpoint) else { return false };
        let Some(destination) = pod else { return true };
        // Ports are part of a policy for TCP and UDP only.
        let port = if connection.protocol == UDP { target } else { 0 };
        let decision = judge(state, &Access { caller, destination, port, protocol: connection.protocol });
        decision.outcome != Outcome::Allow || !decision.plaintext
    })
}

/// The enrolled Pod of another node that the endpoint is, `Some(None)` for one that nobody described.
fn elsewhere<'a>(
    state: &'a MeshState,
    source: &Workload,
    endpoint: &Endpoint,
) -> Option<Option<&'a Workload>> {
    let named = endpoint.workload.as_ref();
    match state.workload_at(endpoint.address).or_else(|| state.workload(named?)) {
        Some(pod) => (pod.mode.enrolled() && pod.node != source.node).then_some(Some(pod)),
        None => named.map(|_| None),
    }
}
