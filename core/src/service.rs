//! A Service and its endpoints.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::id::{NamespacedName, WorkloadUid};

/// What a Service port speaks, from `appProtocol` (KEP-1422) or because a route is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AppProtocol {
    /// Bytes: nothing is waited for, nothing is parsed.
    #[default]
    Tcp,
    /// HTTP/1.1 or HTTP/2 with prior knowledge, told apart by the first bytes.
    Http,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Its name, empty where it has none.
    pub name: Arc<str>,
    /// The port at the Service's address.
    pub port: u16,
    /// What it speaks. Only TCP ports are listed.
    pub app_protocol: AppProtocol,
}

/// A port of a Service that is not TCP, at one endpoint. The mesh judges what is sent there and carries none of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PacketPort {
    /// IP protocol number (17 UDP, 132 SCTP).
    pub protocol: u8,
    /// The port at the Service's address.
    pub port: u16,
    /// The port at the endpoint.
    pub target: u16,
}

/// One endpoint of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Service port number -> port at the endpoint; TCP.
    pub ports: BTreeMap<u16, u16>,
    /// The ports that are not TCP.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packet_ports: Vec<PacketPort>,
    /// The Pod behind it, where it is one that the mesh knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<WorkloadUid>,
    /// False while it should get no new connections.
    pub ready: bool,
    /// The node it is on; told only where that matters ([`Service::node_local`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<str>>,
}

/// A port of a Service at an address that is not the Service's alone: of a node, of a load balancer, or one of
/// `externalIPs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Front {
    /// The address; `None` for the addresses of every node.
    pub address: Option<IpAddr>,
    /// IP protocol number.
    pub protocol: u8,
    /// The port there.
    pub port: u16,
    /// The Service's own port behind it.
    pub service_port: u16,
}

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Namespace and name.
    pub name: NamespacedName,
    /// Its cluster addresses; empty for a headless Service.
    pub addresses: Vec<IpAddr>,
    /// Its TCP ports.
    pub ports: Vec<ServicePort>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Its ports elsewhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fronts: Vec<Front>,
    /// Only endpoints of the caller's own node are used (`internalTrafficPolicy: Local`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub node_local: bool,
}

impl Service {
    /// The port with this number.
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.port == number)
    }
}
