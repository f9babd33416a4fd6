//! Which of what passes beside the proxy must end.

use std::{collections::HashSet, net::IpAddr};

use weft_core::{
    MeshState, Service, Workload,
    config::BeforeEnrolment,
    policy::eval::{Access, Caller, Outcome, UDP, judge},
    service::Endpoint,
    workload::Mode,
};

use super::Node;
use crate::{datapath::KernelConnection, enrolment::chain};

impl Node {
    /// Ends what passes beside the proxy and must not any more; where that fails it is tried again.
    pub(super) fn revoke(&mut self, state: &MeshState) {
        let earlier = self.enrolment.earlier();
        let resets = state.config().is_some_and(|c| c.before_enrolment == BeforeEnrolment::Reset);
        let revoked = self.datapath.revoke(|connection| denied(state, &connection)).and_then(|ended| {
            let tightened = if resets { &earlier } else { &HashSet::new() };
            let more = self.datapath.end_earlier(tightened, |connection| denied(state, &connection))?;
            self.datapath.settled(&earlier)?;
            self.enrolment.settled(&earlier);
            Ok(ended + more)
        });
        self.progress.revoked = revoked.is_ok();
        match revoked {
            Ok(0) => {}
            Ok(ended) => {
                self.metrics.revoked.inc_by(ended as u64);
                tracing::info!(
                    ended,
                    "connections beside the proxy that the mesh no longer allows were ended"
                );
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "connections beside the proxy cannot be looked at");
            }
        }
    }
}

/// TCP's protocol number.
const TCP: u8 = 6;

/// Whether something that passes beside the proxy must end: policy refuses it, wants to see its requests, the two
/// Pods may no longer use the shortcut, or it is plaintext that strict mode would have put into a tunnel. What leads
/// out of the mesh never must. Of connections from before the enrolment none must where the mesh keeps those, and in
/// permissive mode only what policy refuses.
pub fn denied(state: &MeshState, connection: &KernelConnection<'_>) -> bool {
    let client = connection.client.ip().to_canonical();
    let server = connection.server.ip().to_canonical();
    let source = state.workload_at(client).filter(|w| w.mode.enrolled());
    let destination = match connection.pod {
        Some(pod) => state.workload(pod),
        None => state.workload_at(server),
    };
    let keeps = || state.config().is_some_and(|c| c.before_enrolment == BeforeEnrolment::Keep);
    if connection.earlier && keeps() {
        return false;
    }
    let Some(destination) = destination else {
        if connection.protocol == TCP {
            return source.is_some_and(|source| plaintext_abroad(state, source, server));
        }
        let dialled = state.dialled(connection.server, connection.protocol);
        let service = dialled.filter(|_| connection.pod.is_none());
        return source.zip(service).is_some_and(|(source, (service, port))| {
            denied_behind(state, connection.protocol, source, service, port)
        });
    };
    if !destination.mode.enrolled() {
        return false;
    }
    let strict = destination.mode == Mode::Strict || source.is_some_and(|w| w.mode == Mode::Strict);
    if connection.protocol == TCP
        && connection.pod.is_none()
        && let Some(source) = source
    {
        // What is called on this node is looked at where it arrives.
        return source.mode == Mode::Strict && source.node != destination.node;
    }
    let caller = source.map_or(Caller::Unauthenticated(client), |w| Caller::Authenticated(&w.identity));
    let access =
        Access { caller, destination, port: connection.server.port(), protocol: connection.protocol };
    let decision = judge(state, &access);
    if connection.earlier && !strict {
        return decision.outcome == Outcome::Deny;
    }
    if decision.outcome != Outcome::Allow {
        return true;
    }
    let Some(source) = source else { return false };
    if connection.protocol == TCP {
        return !state.shortcut(source, destination);
    }
    source.node != destination.node && strict && !decision.plaintext
}

/// Whether what a strict Pod has open with an address that is no Pod's may lead into the mesh: a Service with a Pod of
/// another node behind it, or an address that nobody has described.
fn plaintext_abroad(state: &MeshState, source: &Workload, server: IpAddr) -> bool {
    let behind = |s: &Service| s.endpoints.iter().any(|e| elsewhere(state, source, e).is_some());
    source.mode == Mode::Strict
        && state.service_at(server).map_or_else(|| state.in_ranges(server), |s| behind(s))
}

/// Whether a Service's address must not be spoken to, as the kernel's rows say it: where one side is strict, each
/// enrolled Pod of another node that may get the packet has to allow it in plaintext.
fn denied_behind(state: &MeshState, protocol: u8, source: &Workload, service: &Service, port: u16) -> bool {
    let behind: Vec<(&Endpoint, Option<&Workload>)> =
        service.endpoints.iter().filter_map(|e| Some((e, elsewhere(state, source, e)?))).collect();
    let guarded = |pod: &Option<&Workload>| {
        source.mode == Mode::Strict || pod.is_none_or(|pod| pod.mode == Mode::Strict)
    };
    if !behind.iter().any(|(_, pod)| guarded(pod)) {
        return false;
    }
    let dialled = (protocol, port);
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
        let port = if protocol == UDP { target } else { 0 };
        let decision = judge(state, &Access { caller, destination, port, protocol });
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
