use std::time::Duration;

use super::*;
use crate::testing;
use weft_core::{NamespacedName, flow::HttpFlow, workload::Owner};

/// A request of client to web that was answered.
pub(crate) fn request(path: &str, status: u16) -> FlowRecord {
    let state = testing::state();
    let peer = |name: &str, address: &str| {
        let address: SocketAddr = address.parse().unwrap();
        let w = state.workload_at(address.ip()).unwrap();
        Peer {
            address,
            pod: Some(w.name.clone()),
            owner: Some(Owner { kind: "Deployment".into(), name: name.into() }),
            identity: Some(w.identity.clone()),
            subject: w.subject,
        }
    };
    FlowRecord {
        time: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        connection: 42,
        reporter: Reporter::ProxyDestination,
        verdict: if status == 403 { Verdict::Denied } else { Verdict::Forwarded },
        reason: if status == 403 { Reason::PolicyDenied } else { Reason::None },
        source: peer("client", "10.1.1.1:40000"),
        destination: peer("web", "10.1.2.1:8080"),
        protocol: 6,
        service: Some((NamespacedName::new("shop", "web"), 80)),
        policy: Some(NamespacedName::new("shop", "web-callers")),
        tls: Tls::Mutual { key_exchange: "X25519MLKEM768".into(), cipher: "TLS13_AES_128_GCM_SHA256".into() },
        http: Some(HttpFlow {
            method: "GET".into(),
            url: format!("http://web.shop{path}"),
            protocol: "HTTP/1.1",
            status,
            headers: vec![("x-tenant".into(), "blue".into())],
        }),
        sent: 10,
        received: 20,
        duration: Duration::from_millis(5),
        opening: false,
    }
}

pub(crate) fn stored(record: FlowRecord) -> StoredFlow {
    let state = testing::state();
    StoredFlow {
        source: state.workload_at(record.source.address.ip()).cloned(),
        destination: state.workload_at(record.destination.address.ip()).cloned(),
        record,
        redirected: false,
        cgroup: 0,
    }
}

pub(crate) fn message(record: FlowRecord) -> flow::Flow {
    flow(&stored(record), 5, &Context { node: "node-b", store: 1 })
}

#[test]
fn an_answered_request() {
    let m = message(request("/catalog", 200));
    assert_eq!(m.verdict(), flow::Verdict::Forwarded);
    assert_eq!(m.r#type(), flow::FlowType::L7);
    assert_eq!(m.summary, "HTTP/1.1 200 5ms (GET http://web.shop/catalog)");
    assert_eq!(m.event_type, Some(flow::CiliumEventType { r#type: 129, sub_type: 0 }));
    assert_eq!(m.is_reply, Some(false));
    assert_eq!(m.traffic_direction(), flow::TrafficDirection::Ingress);
    assert_eq!(m.ingress_allowed_by.len(), 1);
    assert_eq!(m.ingress_allowed_by[0].name, "web-callers");
    assert!(m.ip.as_ref().unwrap().encrypted);
    let l7 = m.l7.as_ref().unwrap();
    assert_eq!((l7.r#type(), l7.latency_ns), (flow::L7FlowType::Response, 5_000_000));
    let source = m.source.as_ref().unwrap();
    assert_eq!(
        (source.identity, source.pod_name.as_str(), source.namespace.as_str()),
        (300, "client-abc", "shop")
    );
    assert!(source.labels.contains(&"k8s:app=client".to_owned()), "{:?}", source.labels);
    assert_eq!(source.workloads[0].kind, "Deployment");
    let any = m.extensions.unwrap();
    assert_eq!(any.type_url, weft_flow::TYPE_URL);
    let ours = weft_flow::Flow::decode(any.value.as_slice()).unwrap();
    assert_eq!(ours.source_identity, "spiffe://cluster.local/ns/shop/sa/client");
    assert_eq!(ours.tls.unwrap().key_exchange, "X25519MLKEM768");
    assert_eq!(ours.service, "shop/web:80");
    assert_eq!(ours.reporter, "proxy-destination");
}

#[test]
fn a_denied_request_names_its_policy_and_hubbles_number() {
    let m = message(request("/admin", 403));
    assert_eq!(m.verdict(), flow::Verdict::Dropped);
    assert_eq!((m.drop_reason, m.drop_reason_desc()), (133, flow::DropReason::PolicyDenied));
    assert!(m.ingress_allowed_by.is_empty());
    assert_eq!(m.ingress_denied_by[0].kind, "AuthorizationPolicy");
}

#[test]
fn strangers_are_world() {
    let mut record = request("/", 200);
    record.http = None;
    record.source = Peer {
        address: "[2001:db8::1]:5000".parse().unwrap(),
        pod: None,
        owner: None,
        identity: None,
        subject: SubjectId::WORLD,
    };
    let m = message(record);
    assert_eq!(m.source.unwrap().labels, ["reserved:world"]);
    assert_eq!(m.r#type, i32::from(flow::FlowType::L3L4));
    assert!(m.l7.is_none());
}

#[test]
fn uuids_are_stable_and_differ() {
    assert_eq!(uuid(1, 2), uuid(1, 2));
    assert_ne!(uuid(1, 2), uuid(1, 3));
    let id = uuid(u64::MAX, u64::MAX);
    assert_eq!(id.len(), 36);
    assert_eq!((&id[14..15], &id[19..20]), ("8", "b"));
}
