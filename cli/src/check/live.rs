//! The live probe: a real connection out of one Pod, made by its agent as a program of the Pod would make it, and the
//! agent's record of that very connection. Nothing is sent over it.

use std::net::SocketAddr;

use k8s_openapi::api::core::v1::Pod;
use tonic::{Code, Status};
use weft_proto::{
    observer::get_flows_response::ResponseTypes,
    weft_relay::{Probe, ProbeRequest, ProbeResult},
};

use super::{
    Finding,
    facts::Facts,
    namespaces::{candidates, captured, meshed},
};
use crate::{
    cluster::{Cluster, SYSTEM},
    format::View,
    mesh::{Mesh, is_ready},
};

const SECTION: &str = "Live probe";

/// Where a probe goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// For people.
    pub(super) name: String,
    pub(super) address: SocketAddr,
}

/// Probes from one Pod, to `to` or to a Pod that is found.
pub(super) async fn run(
    cluster: &Cluster,
    facts: &Facts,
    namespace: &str,
    pod: &str,
    to: Option<SocketAddr>,
) -> Vec<Finding> {
    // That it is missing or not captured is said elsewhere.
    let Some(node) = node_of(facts, namespace, pod) else { return Vec::new() };
    let target = match to {
        Some(address) => Some(Target { name: address.to_string(), address }),
        None => target(facts, namespace, pod, &node),
    };
    let Some(target) = target else {
        let remedy = "say where to: --to ADDRESS:PORT of a Pod of the mesh";
        let message = "no other captured Pod declares a TCP port that could be dialled";
        return vec![Finding { remedy: remedy.into(), ..Finding::info(SECTION, message) }];
    };
    let outcome = ask(cluster, facts, &node, namespace, pod, target.address).await;
    vec![judged(&format!("{namespace}/{pod}"), &target, outcome)]
}

async fn ask(
    cluster: &Cluster,
    facts: &Facts,
    node: &str,
    namespace: &str,
    pod: &str,
    to: SocketAddr,
) -> Result<ProbeResult, Status> {
    let mesh = Mesh::open(cluster).await.map_err(|e| Status::unavailable(e.to_string()))?;
    // The replica that spoke for the node a moment ago comes first.
    let near = facts.states.iter().find_map(|s| s.nodes.get(node)).map(|(replica, _)| replica.clone());
    let mut replicas = mesh.replicas;
    replicas.sort_by_key(|replica| Some(&replica.name) != near.as_ref());
    let probe = Probe {
        namespace: namespace.into(),
        pod: pod.into(),
        address: to.ip().to_string(),
        port: to.port().into(),
    };
    let mut last = Status::not_found("no replica of the operator speaks for its node");
    for replica in replicas {
        let request = ProbeRequest { node: node.into(), probe: Some(probe.clone()) };
        match replica.probe(request).await {
            Err(status) if status.code() == Code::NotFound => last = status,
            other => return other,
        }
    }
    Err(last)
}

/// The node of a captured Pod.
fn node_of(facts: &Facts, namespace: &str, name: &str) -> Option<String> {
    let meshed = meshed(facts);
    let pod = candidates(facts, &meshed).find(|p| {
        p.metadata.namespace.as_deref() == Some(namespace) && p.metadata.name.as_deref() == Some(name)
    })?;
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    (captured(facts).get(uid) == Some(&"")).then(|| pod.spec.as_ref()?.node_name.clone()).flatten()
}

/// A captured Pod that is ready and declares a TCP port: on another node if there is one, of the same namespace if
/// there is one.
pub(super) fn target(facts: &Facts, namespace: &str, name: &str, node: &str) -> Option<Target> {
    let (meshed, captured) = (meshed(facts), captured(facts));
    let found = candidates(facts, &meshed).filter_map(|pod| {
        let own = pod.metadata.namespace.as_deref().unwrap_or_default();
        let called = pod.metadata.name.as_deref().unwrap_or_default();
        let here = pod.spec.as_ref()?.node_name.as_deref() == Some(node);
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        if (own == namespace && called == name) || captured.get(uid) != Some(&"") || !is_ready(pod) {
            return None;
        }
        let address = SocketAddr::new(pod.status.as_ref()?.pod_ip.as_deref()?.parse().ok()?, port(pod)?);
        let target = Target { name: format!("{own}/{called} ({address})"), address };
        Some(((here, own != namespace, own.to_owned(), called.to_owned()), target))
    });
    found.min_by(|(a, _), (b, _)| a.cmp(b)).map(|(_, target)| target)
}

fn port(pod: &Pod) -> Option<u16> {
    let containers = pod.spec.iter().flat_map(|s| &s.containers);
    let mut ports = containers.flat_map(|c| c.ports.iter().flatten());
    let tcp = ports.find(|p| p.protocol.as_deref().unwrap_or("TCP") == "TCP")?;
    u16::try_from(tcp.container_port).ok()
}

pub(super) fn judged(who: &str, target: &Target, outcome: Result<ProbeResult, Status>) -> Finding {
    let to = &target.name;
    let result = match outcome {
        Ok(result) => result,
        Err(status) => {
            let remedy = match status.code() {
                Code::Unimplemented => "upgrade operator and agents: weft upgrade | kubectl apply -f -",
                Code::InvalidArgument => "dial a Pod of the mesh: --to ADDRESS:PORT",
                _ => "run this again; `weft status` tells how its agent is",
            };
            let message = format!("{who} -> {to}: the probe could not be made: {}", status.message());
            return Finding::warning(SECTION, message, remedy);
        }
    };
    let flow = result.flow.and_then(|f| match f.response_types {
        Some(ResponseTypes::Flow(flow)) => Some(View::of(&flow)),
        _ => None,
    });
    let logs = format!("kubectl -n {SYSTEM} logs -l app.kubernetes.io/name=weft-agent --prefix; weft status");
    let Some(view) = flow else {
        return if result.error.is_empty() {
            let message =
                format!("{who} -> {to}: it connected, and its agent saw nothing of it: it is not captured");
            Finding::error(SECTION, message, logs)
        } else {
            let message = format!("{who} -> {to}: {}, and its agent has no record of it", result.error);
            Finding::warning(SECTION, message, logs)
        };
    };
    let reason = |view: &View| match (view.reason.as_str(), view.policy.as_str()) {
        (reason, "") => reason.to_owned(),
        (reason, policy) => format!("{reason} by {policy}"),
    };
    match (view.verdict, view.tls.mode) {
        ("FORWARDED" | "AUDITED", "mutual") => {
            let peer = &view.destination.identity;
            let by = format!("{}, {}", view.tls.key_exchange, view.tls.cipher);
            Finding::ok(SECTION, format!("{who} -> {to}: captured and encrypted, peer {peer}, mTLS ({by})"))
        }
        ("FORWARDED" | "AUDITED", "local") => {
            Finding::ok(SECTION, format!("{who} -> {to}: captured, and it never left the node"))
        }
        ("FORWARDED" | "AUDITED", _) => {
            Finding::error(SECTION, format!("{who} -> {to}: captured, and it went in plaintext"), logs)
        }
        ("DENIED", _) => {
            let message = format!("{who} -> {to}: captured; the probe was refused ({})", reason(&view));
            let remedy = "name one that it may call with --to ADDRESS:PORT, to see that it is encrypted";
            Finding { remedy: remedy.into(), ..Finding::info(SECTION, message) }
        }
        _ => {
            let message = format!("{who} -> {to}: captured, and it failed ({})", reason(&view));
            Finding::warning(SECTION, message, format!("does the destination run, with that port? {logs}"))
        }
    }
}

#[cfg(test)]
mod tests;
