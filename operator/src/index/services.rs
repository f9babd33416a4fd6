//! Services and their endpoints: from EndpointSlices, or from the selector where there are none.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::{
    api::{
        core::v1::{Service as Object, ServicePort as ObjectPort},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use weft_core::{
    NamespacedName, Service, Workload, WorkloadUid,
    service::{AppProtocol, Endpoint, Front, PacketPort, ServicePort},
};

use super::{Good, build::Scope, lookup::Lookup, pods::Draft};

/// A Service and the Pods behind it, ready or not.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) service: Service,
    pub(super) pods: BTreeSet<WorkloadUid>,
}

/// The Services of a namespace that are of the mesh's kind (none of type ExternalName).
pub(super) fn collect(
    scope: Scope<'_>,
    pods: &[Draft],
    lookup: &Lookup<'_>,
) -> BTreeMap<NamespacedName, Known> {
    let mut slices: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
    for (key, good) in scope.good() {
        if let Good::Slice(slice) = good
            && let Some(service) =
                slice.metadata.labels.as_ref().and_then(|l| l.get("kubernetes.io/service-name"))
        {
            slices.entry((&key.namespace, service)).or_default().push(slice);
        }
    }
    let mut services = BTreeMap::new();
    for (key, good) in scope.good() {
        let Good::Service(object) = good else { continue };
        let spec = object.spec.clone().unwrap_or_default();
        if spec.type_.as_deref() == Some("ExternalName") {
            continue;
        }
        let name = NamespacedName::new(&key.namespace, &key.name);
        let ports: Vec<ObjectPort> =
            spec.ports.clone().unwrap_or_default().into_iter().filter(|p| port(p.port).is_some()).collect();
        let (mut endpoints, behind) = match slices.get(&(key.namespace.as_str(), key.name.as_str())) {
            Some(slices) => from_slices(slices, &ports, pods, lookup, &key.namespace),
            None => from_selector(object, &ports, pods, lookup),
        };
        let node_local = spec.internal_traffic_policy.as_deref() == Some("Local");
        if !node_local {
            endpoints.iter_mut().for_each(|endpoint| endpoint.node = None);
        }
        let service = Service {
            name: name.clone(),
            addresses: cluster_addresses(object),
            fronts: fronts(object, &ports),
            ports: ports.iter().filter(|p| protocol(p) == Some(TCP)).filter_map(service_port).collect(),
            endpoints,
            node_local,
        };
        services.insert(name, Known { service, pods: behind });
    }
    services
}

const TCP: u8 = 6;

fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|p| *p > 0)
}

/// The IP protocol of a port; `None` for one that Kubernetes does not know.
fn protocol(port: &ObjectPort) -> Option<u8> {
    match port.protocol.as_deref() {
        None | Some("TCP") => Some(TCP),
        Some("UDP") => Some(17),
        Some("SCTP") => Some(132),
        Some(_) => None,
    }
}

/// Where the ports of a Service lead at an endpoint: those of TCP, and the others.
fn at_endpoint(
    ports: &[ObjectPort],
    target: impl Fn(&ObjectPort) -> Option<u16>,
) -> (BTreeMap<u16, u16>, Vec<PacketPort>) {
    let (mut tcp, mut packets) = (BTreeMap::new(), Vec::new());
    for p in ports {
        let (Some(protocol), Some(port), Some(target)) = (protocol(p), port(p.port), target(p)) else {
            continue;
        };
        if protocol == TCP {
            tcp.insert(port, target);
        } else {
            packets.push(PacketPort { protocol, port, target });
        }
    }
    (tcp, packets)
}

fn target_port(p: &ObjectPort, pod: &Workload) -> Option<u16> {
    match &p.target_port {
        None => port(p.port),
        Some(IntOrString::Int(number)) => port(*number),
        Some(IntOrString::String(name)) => pod.named_ports.get(name).copied(),
    }
}

fn service_port(p: &ObjectPort) -> Option<ServicePort> {
    let http =
        matches!(p.app_protocol.as_deref(), Some("http" | "kubernetes.io/h2c" | "grpc" | "kubernetes.io/ws"));
    Some(ServicePort {
        name: p.name.as_deref().unwrap_or_default().into(),
        port: port(p.port)?,
        app_protocol: if http { AppProtocol::Http } else { AppProtocol::Tcp },
    })
}

fn cluster_addresses(object: &Object) -> Vec<IpAddr> {
    let Some(spec) = &object.spec else { return Vec::new() };
    let listed: Vec<&String> = match &spec.cluster_ips {
        Some(all) if !all.is_empty() => all.iter().collect(),
        _ => spec.cluster_ip.iter().collect(),
    };
    // "None" (headless) is no address.
    listed.into_iter().filter_map(|text| super::address(text)).collect()
}

/// The Service's ports at addresses that are not its own: those of every node, of its load balancer and of
/// `externalIPs`. A load balancer that wants to see all traffic itself (`ipMode: Proxy`) is left alone.
fn fronts(object: &Object, ports: &[ObjectPort]) -> Vec<Front> {
    let Some(spec) = &object.spec else { return Vec::new() };
    let balancer = object.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    let ingress = balancer.and_then(|b| b.ingress.as_ref()).into_iter().flatten();
    let balanced = ingress.filter(|i| i.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_ref());
    let external: BTreeSet<IpAddr> = (spec.external_ips.iter().flatten().chain(balanced))
        .filter_map(|text| super::address(text))
        .filter(|a| !a.is_loopback() && !a.is_unspecified() && !a.is_multicast())
        .collect();
    let mut fronts = Vec::new();
    for own in ports {
        let (Some(protocol), Some(service_port)) = (protocol(own), port(own.port)) else { continue };
        let of_nodes = own.node_port.and_then(port).map(|port| (None, port));
        let elsewhere = external.iter().map(|address| (Some(*address), service_port));
        let all = of_nodes.into_iter().chain(elsewhere);
        fronts.extend(all.map(|(address, port)| Front { address, protocol, port, service_port }));
    }
    fronts
}

fn from_selector(
    object: &Object,
    ports: &[ObjectPort],
    pods: &[Draft],
    lookup: &Lookup<'_>,
) -> (Vec<Endpoint>, BTreeSet<WorkloadUid>) {
    let spec = object.spec.clone().unwrap_or_default();
    let selector = spec.selector.unwrap_or_default();
    let mut endpoints = Vec::new();
    let mut behind = BTreeSet::new();
    // A Service without a selector has the endpoints that somebody writes, and none here.
    if selector.is_empty() {
        return (endpoints, behind);
    }
    let families = cluster_addresses(object);
    for pod in lookup.candidates(&selector).iter().filter_map(|number| pods.get(*number)) {
        let w = &pod.template;
        if !selector.iter().all(|(k, v)| w.labels.get(k) == Some(v)) {
            continue;
        }
        behind.insert(w.uid.clone());
        let (at_pod, packet_ports) = at_endpoint(ports, |p| target_port(p, w));
        for address in &pod.addresses {
            // A Service of one family has endpoints of that family.
            if families.is_empty() || families.iter().any(|f| f.is_ipv4() == address.is_ipv4()) {
                endpoints.push(Endpoint {
                    address: *address,
                    ports: at_pod.clone(),
                    packet_ports: packet_ports.clone(),
                    workload: Some(w.uid.clone()),
                    ready: pod.ready || spec.publish_not_ready_addresses == Some(true),
                    node: Some(Arc::clone(&w.node)),
                });
            }
        }
    }
    endpoints.sort_by_key(|e| e.address);
    (endpoints, behind)
}

fn from_slices(
    slices: &[&EndpointSlice],
    ports: &[ObjectPort],
    pods: &[Draft],
    lookup: &Lookup<'_>,
    namespace: &str,
) -> (Vec<Endpoint>, BTreeSet<WorkloadUid>) {
    let mut endpoints: BTreeMap<IpAddr, Endpoint> = BTreeMap::new();
    let mut draining = BTreeSet::new();
    for slice in slices {
        let (at_pod, packet_ports) = at_endpoint(ports, |own| {
            let name = |name: &Option<String>| name.clone().unwrap_or_default();
            let protocol = |protocol: &Option<String>| protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            let sliced = slice.ports.iter().flatten().find(|p| {
                name(&p.name) == name(&own.name) && protocol(&p.protocol) == protocol(&own.protocol)
            })?;
            port(sliced.port?)
        });
        for e in &slice.endpoints {
            let conditions = e.conditions.clone().unwrap_or_default();
            let ready = conditions.ready.unwrap_or(true);
            let drains = conditions.terminating == Some(true) && conditions.serving == Some(true);
            for address in e.addresses.iter().filter_map(|a| super::address(a)) {
                let target = e.target_ref.as_ref().filter(|t| t.kind.as_deref() == Some("Pod"));
                let workload =
                    lookup.at(address).and_then(|n| pods.get(n)).map(|p| &p.template).filter(|w| {
                        *w.name.namespace == *namespace
                            && target.and_then(|t| t.name.as_deref()).is_none_or(|n| *w.name.name == *n)
                    });
                let endpoint = endpoints.entry(address).or_insert_with(|| Endpoint {
                    address,
                    ports: BTreeMap::new(),
                    packet_ports: Vec::new(),
                    workload: workload.map(|w| w.uid.clone()),
                    ready,
                    node: e
                        .node_name
                        .as_deref()
                        .map(Arc::from)
                        .or_else(|| workload.map(|w| Arc::clone(&w.node))),
                });
                endpoint.ready |= ready;
                if drains {
                    draining.insert(address);
                }
                endpoint.ports.extend(&at_pod);
                endpoint.packet_ports.extend(&packet_ports);
                endpoint.packet_ports.sort_unstable();
                endpoint.packet_ports.dedup();
            }
        }
    }
    // Better one that is about to leave and still serves than none, as kube-proxy has it (KEP-1669).
    if endpoints.values().all(|e| !e.ready) {
        endpoints.values_mut().for_each(|e| e.ready = draining.contains(&e.address));
    }
    let behind = endpoints.values().filter_map(|e| e.workload.clone()).collect();
    (endpoints.into_values().collect(), behind)
}
