//! A stored flow as Hubble's message, with Weft's own part in `extensions`.

use std::{net::SocketAddr, time::SystemTime};

use prost::Message as _;
use weft_core::{
    SubjectId, Workload,
    flow::{FlowRecord, Peer, Reason, Reporter, Tls, Verdict},
};
use weft_proto::{flow, observer, weft_flow};

use super::store::{LossSource, StoredFlow};

/// Monitor codes of Hubble's `event_type`.
mod code {
    pub(super) const DROP: i32 = 1;
    pub(super) const POLICY_VERDICT: i32 = 5;
    pub(super) const L7: i32 = 129;
}

/// The name of the kind that [`FlowRecord::policy`] speaks of.
const POLICY_KIND: &str = "AuthorizationPolicy";

/// What a conversion needs besides the flow.
#[derive(Debug, Clone)]
pub struct Context<'a> {
    /// The node's name.
    pub node: &'a str,
    /// The store's random number.
    pub store: u64,
}

/// The message for a flow at `position` of the store.
pub fn flow(stored: &StoredFlow, position: u64, context: &Context<'_>) -> flow::Flow {
    let record = &stored.record;
    let verdict = verdict(record.verdict, stored.redirected);
    let drop = if record.verdict == Verdict::Denied {
        drop_reason(record.reason)
    } else {
        flow::DropReason::Unknown
    };
    let ingress = matches!(record.reporter, Reporter::KernelDestination | Reporter::ProxyDestination);
    let policies: Vec<flow::Policy> = record
        .policy
        .iter()
        .map(|p| flow::Policy {
            name: p.name.to_string(),
            namespace: p.namespace.to_string(),
            kind: POLICY_KIND.into(),
            ..Default::default()
        })
        .collect();
    // The kind speaks of inbound traffic only, so the policy is an ingress policy whoever reports.
    let (allowed_by, denied_by) =
        if record.verdict == Verdict::Denied { (Vec::new(), policies) } else { (policies, Vec::new()) };
    flow::Flow {
        time: Some(record.time.into()),
        verdict: verdict.into(),
        drop_reason: drop.into_number(),
        ip: Some(ip(record)),
        l4: layer4(record),
        source: Some(endpoint(&record.source, stored.source.as_deref())),
        destination: Some(endpoint(&record.destination, stored.destination.as_deref())),
        r#type: if record.http.is_some() { flow::FlowType::L7 } else { flow::FlowType::L3L4 }.into(),
        node_name: context.node.into(),
        l7: layer7(record),
        event_type: Some(event_type(record, drop)),
        destination_service: record.service.as_ref().map(|(name, _)| flow::Service {
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
        }),
        traffic_direction: if ingress {
            flow::TrafficDirection::Ingress
        } else {
            flow::TrafficDirection::Egress
        }
        .into(),
        drop_reason_desc: drop.into(),
        is_reply: Some(false),
        socket_cookie: record.connection,
        cgroup_id: stored.cgroup,
        uuid: uuid(context.store, position),
        auth_type: if matches!(record.tls, Tls::Mutual { .. }) {
            flow::AuthType::Spire
        } else {
            flow::AuthType::Disabled
        }
        .into(),
        emitter: Some(flow::Emitter { name: "weft-agent".into(), version: env!("CARGO_PKG_VERSION").into() }),
        ingress_allowed_by: allowed_by,
        ingress_denied_by: denied_by,
        summary: summary(record),
        extensions: Some(prost_types::Any {
            type_url: weft_flow::TYPE_URL.into(),
            value: extension(record).encode_to_vec(),
        }),
        ..Default::default()
    }
}

/// The answer that carries a flow.
pub fn response(message: flow::Flow) -> observer::GetFlowsResponse {
    observer::GetFlowsResponse {
        node_name: message.node_name.clone(),
        time: message.time,
        response_types: Some(observer::get_flows_response::ResponseTypes::Flow(message)),
    }
}

/// The answer that says how much is missing.
pub fn lost(source: LossSource, count: u64, time: SystemTime, node: &str) -> observer::GetFlowsResponse {
    let source = match source {
        LossSource::Kernel => flow::LostEventSource::PerfEventRingBuffer,
        LossSource::Ring => flow::LostEventSource::HubbleRingBuffer,
    };
    observer::GetFlowsResponse {
        node_name: node.into(),
        time: Some(time.into()),
        response_types: Some(observer::get_flows_response::ResponseTypes::LostEvents(flow::LostEvent {
            source: source.into(),
            num_events_lost: count,
            cpu: None,
        })),
    }
}

/// A stable name for a reporter, as it appears in records and filters.
pub fn reporter_name(reporter: Reporter) -> &'static str {
    match reporter {
        Reporter::KernelSource => "kernel-source",
        Reporter::KernelDestination => "kernel-destination",
        Reporter::ProxySource => "proxy-source",
        Reporter::ProxyDestination => "proxy-destination",
    }
}

/// A stable name for a reason, as it appears in records and metrics; empty for [`Reason::None`].
pub fn reason_name(reason: Reason) -> &'static str {
    match reason {
        Reason::None => "",
        Reason::PolicyDenied => "policy-denied",
        Reason::PolicyDenyRule => "policy-deny-rule",
        Reason::PlaintextRefused => "plaintext-refused",
        Reason::InvalidSource => "invalid-source",
        Reason::ProxyBypassed => "proxy-bypassed",
        Reason::TunnelPortDialled => "tunnel-port-dialled",
        Reason::UnknownPeer => "unknown-peer",
        Reason::IdentityMismatch => "identity-mismatch",
        Reason::TlsFailure => "tls-failure",
        Reason::NoEndpoint => "no-endpoint",
        Reason::ConnectFailure => "connect-failure",
        Reason::ProtocolError => "protocol-error",
        Reason::NoCredentials => "no-credentials",
        Reason::LimitReached => "limit-reached",
        Reason::Revoked => "revoked",
        Reason::Unsupported => "unsupported",
        Reason::Draining => "draining",
        Reason::Timeout => "timeout",
        Reason::PeerReset => "peer-reset",
    }
}

fn verdict(verdict: Verdict, redirected: bool) -> flow::Verdict {
    match verdict {
        Verdict::Forwarded if redirected => flow::Verdict::Redirected,
        Verdict::Forwarded => flow::Verdict::Forwarded,
        Verdict::Denied => flow::Verdict::Dropped,
        Verdict::Error => flow::Verdict::Error,
        Verdict::Audited => flow::Verdict::Audit,
    }
}

/// Hubble's numbers only: its clients hold the texts, a number of our own would read as "unknown".
fn drop_reason(reason: Reason) -> flow::DropReason {
    use flow::DropReason as D;
    match reason {
        Reason::PolicyDenied | Reason::Revoked => D::PolicyDenied,
        Reason::PolicyDenyRule => D::PolicyDeny,
        Reason::PlaintextRefused | Reason::ProxyBypassed => D::UnencryptedTraffic,
        Reason::InvalidSource => D::InvalidSourceIp,
        Reason::TunnelPortDialled => D::ProxyRedirectionNotSupportedForProtocol,
        Reason::UnknownPeer => D::UnknownSender,
        Reason::IdentityMismatch => D::InvalidIdentity,
        Reason::TlsFailure | Reason::NoCredentials => D::AuthRequired,
        Reason::NoEndpoint => D::ServiceBackendNotFound,
        Reason::ConnectFailure => D::StaleOrUnroutableIp,
        Reason::ProtocolError => D::InvalidPacketDropped,
        Reason::LimitReached => D::DropRateLimited,
        Reason::Unsupported => D::UnknownL4Protocol,
        Reason::Draining => D::DropEpNotReady,
        Reason::None | Reason::Timeout | Reason::PeerReset => D::Unknown,
    }
}

trait Number {
    fn into_number(self) -> u32;
}

impl Number for flow::DropReason {
    fn into_number(self) -> u32 {
        u32::try_from(i32::from(self)).unwrap_or_default()
    }
}

fn event_type(record: &FlowRecord, drop: flow::DropReason) -> flow::CiliumEventType {
    let (r#type, sub_type) = if record.http.is_some() {
        (code::L7, 0)
    } else if record.verdict == Verdict::Denied && record.policy.is_none() {
        (code::DROP, i32::from(drop))
    } else {
        (code::POLICY_VERDICT, 0)
    };
    flow::CiliumEventType { r#type, sub_type }
}

fn ip(record: &FlowRecord) -> flow::Ip {
    let source = record.source.address.ip().to_canonical();
    let destination = record.destination.address.ip().to_canonical();
    flow::Ip {
        source: source.to_string(),
        destination: destination.to_string(),
        ip_version: if destination.is_ipv4() { flow::IpVersion::IPv4 } else { flow::IpVersion::IPv6 }.into(),
        encrypted: matches!(record.tls, Tls::Mutual { .. }),
        source_xlated: String::new(),
    }
}

fn layer4(record: &FlowRecord) -> Option<flow::Layer4> {
    use flow::layer4::Protocol as P;
    let source_port = record.source.address.port().into();
    let destination_port = record.destination.address.port().into();
    let protocol = match record.protocol {
        6 => P::Tcp(flow::Tcp { source_port, destination_port, flags: None }),
        17 => P::Udp(flow::Udp { source_port, destination_port }),
        132 => P::Sctp(flow::Sctp { source_port, destination_port }),
        1 => P::IcmPv4(flow::IcmPv4::default()),
        58 => P::IcmPv6(flow::IcmPv6::default()),
        _ => return None,
    };
    Some(flow::Layer4 { protocol: Some(protocol) })
}

fn layer7(record: &FlowRecord) -> Option<flow::Layer7> {
    let http = record.http.as_ref()?;
    let answered = http.status != 0;
    Some(flow::Layer7 {
        r#type: if answered { flow::L7FlowType::Response } else { flow::L7FlowType::Request }.into(),
        latency_ns: if answered { u64::try_from(record.duration.as_nanos()).unwrap_or(u64::MAX) } else { 0 },
        record: Some(flow::layer7::Record::Http(flow::Http {
            code: http.status.into(),
            method: http.method.clone(),
            url: http.url.clone(),
            protocol: http.protocol.into(),
            headers: http
                .headers
                .iter()
                .map(|(key, value)| flow::HttpHeader { key: key.clone(), value: value.clone() })
                .collect(),
        })),
    })
}

fn endpoint(peer: &Peer, workload: Option<&Workload>) -> flow::Endpoint {
    let pod = peer.pod.as_ref().or_else(|| workload.map(|w| &w.name));
    let owner = peer.owner.as_ref().or_else(|| workload.map(|w| &w.owner));
    let mut labels: Vec<String> = Vec::new();
    if let Some(workload) = workload {
        labels.extend(workload.labels.iter().map(|(k, v)| format!("k8s:{k}={v}")));
        labels.push(format!("k8s:io.kubernetes.pod.namespace={}", workload.name.namespace));
        labels.push(format!("k8s:io.cilium.k8s.policy.serviceaccount={}", workload.service_account));
        labels.sort();
    } else {
        match peer.subject {
            SubjectId::HOST => labels.push("reserved:host".into()),
            SubjectId::UNKNOWN => labels.push("reserved:unknown".into()),
            _ if pod.is_none() && peer.identity.is_none() => labels.push("reserved:world".into()),
            _ => {}
        }
    }
    let account =
        || peer.identity.as_ref().and_then(|id| id.as_service_account()).map(|(namespace, _)| namespace);
    flow::Endpoint {
        identity: peer.subject.0,
        namespace: pod.map(|p| p.namespace.as_ref()).or_else(account).unwrap_or_default().to_owned(),
        pod_name: pod.map(|p| p.name.to_string()).unwrap_or_default(),
        workloads: owner
            .map(|o| flow::Workload { name: o.name.to_string(), kind: o.kind.to_string() })
            .into_iter()
            .collect(),
        labels,
        ..Default::default()
    }
}

fn summary(record: &FlowRecord) -> String {
    match &record.http {
        Some(http) if http.status != 0 => format!(
            "{} {} {}ms ({} {})",
            http.protocol,
            http.status,
            record.duration.as_millis(),
            http.method,
            http.url
        ),
        Some(http) => format!("{} {} {}", http.protocol, http.method, http.url),
        None => match record.protocol {
            6 if record.opening => "TCP open".into(),
            6 => "TCP".into(),
            17 => "UDP".into(),
            1 => "ICMPv4".into(),
            58 => "ICMPv6".into(),
            132 => "SCTP".into(),
            other => format!("IP protocol {other}"),
        },
    }
}

fn extension(record: &FlowRecord) -> weft_flow::Flow {
    let tls = match &record.tls {
        Tls::None => weft_flow::Tls::default(),
        Tls::Local => weft_flow::Tls { mode: weft_flow::tls::Mode::Local.into(), ..Default::default() },
        Tls::Mutual { key_exchange, cipher } => weft_flow::Tls {
            mode: weft_flow::tls::Mode::Mutual.into(),
            key_exchange: key_exchange.to_string(),
            cipher: cipher.to_string(),
        },
    };
    let identity = |peer: &Peer| peer.identity.as_ref().map(ToString::to_string).unwrap_or_default();
    let address = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port()).to_string();
    weft_flow::Flow {
        reporter: reporter_name(record.reporter).into(),
        reason: reason_name(record.reason).into(),
        source_identity: identity(&record.source),
        destination_identity: identity(&record.destination),
        tls: Some(tls),
        connection: record.connection,
        sent_bytes: record.sent,
        received_bytes: record.received,
        duration_ns: u64::try_from(record.duration.as_nanos()).unwrap_or(u64::MAX),
        service: record.service.as_ref().map(|(name, port)| format!("{name}:{port}")).unwrap_or_default(),
        policy: record.policy.as_ref().map(ToString::to_string).unwrap_or_default(),
        opening: record.opening,
        source_address: address(record.source.address),
        destination_address: address(record.destination.address),
    }
}

/// A UUID in version 8's form (RFC 9562 section 5.8): the store's number, then the position.
fn uuid(store: u64, position: u64) -> String {
    let bits = (u128::from(store) << 64) | u128::from(position);
    let bits = (bits & !(0xf000 << 64) & !(0b11 << 62)) | (0x8000 << 64) | (0b10 << 62);
    let h = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

#[cfg(test)]
pub(crate) mod tests;
