use super::*;

/// A request as an agent sends it.
pub(crate) fn message() -> flow::Flow {
    let endpoint = |name: &str, identity: u32| flow::Endpoint {
        identity,
        namespace: "shop".into(),
        pod_name: format!("{name}-abc"),
        workloads: vec![flow::Workload { name: name.into(), kind: "Deployment".into() }],
        ..Default::default()
    };
    let ours = weft_flow::Flow {
        reporter: "proxy-destination".into(),
        reason: "policy-denied".into(),
        source_identity: "spiffe://cluster.local/ns/shop/sa/client".into(),
        destination_identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
        tls: Some(weft_flow::Tls {
            mode: weft_flow::tls::Mode::Mutual.into(),
            key_exchange: "X25519MLKEM768".into(),
            cipher: "TLS13_AES_128_GCM_SHA256".into(),
        }),
        connection: 42,
        duration_ns: 3_214_000,
        service: "shop/web:80".into(),
        ..Default::default()
    };
    flow::Flow {
        time: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 123_000_000 }),
        verdict: flow::Verdict::Dropped.into(),
        ip: Some(flow::Ip {
            source: "10.1.1.1".into(),
            destination: "10.1.2.1".into(),
            encrypted: true,
            ..Default::default()
        }),
        l4: Some(flow::Layer4 {
            protocol: Some(Protocol::Tcp(flow::Tcp {
                source_port: 40000,
                destination_port: 8080,
                flags: None,
            })),
        }),
        source: Some(endpoint("client", 300)),
        destination: Some(endpoint("web", 301)),
        l7: Some(flow::Layer7 {
            record: Some(Record::Http(flow::Http {
                code: 403,
                method: "POST".into(),
                url: "http://web.shop/admin".into(),
                protocol: "HTTP/1.1".into(),
                headers: Vec::new(),
            })),
            ..Default::default()
        }),
        node_name: "node-b".into(),
        uuid: "id".into(),
        ingress_denied_by: vec![flow::Policy {
            name: "web-callers".into(),
            namespace: "shop".into(),
            ..Default::default()
        }],
        extensions: Some(prost_types::Any {
            type_url: weft_flow::TYPE_URL.into(),
            value: ours.encode_to_vec(),
        }),
        ..Default::default()
    }
}

#[test]
fn a_calm_line() {
    assert_eq!(
        View::of(&message()).compact(false),
        "22:13:20.123 shop/client (shop/client) -> shop/web:8080 (shop/web) DENIED policy-denied by shop/web-callers \
         mtls(X25519MLKEM768) POST /admin 403 3.21ms [proxy-destination]"
    );
}

#[test]
fn colours_are_only_paint() {
    let view = View::of(&message());
    let painted = view.compact(true);
    assert!(painted.contains("\x1b[31mDENIED\x1b[0m"));
    let bare = painted.replace("\x1b[31m", "").replace("\x1b[2m", "").replace("\x1b[0m", "");
    assert_eq!(bare, view.compact(false));
}

#[test]
fn hostile_paths_do_not_reach_the_terminal() {
    let mut m = message();
    if let Some(Record::Http(http)) = m.l7.as_mut().and_then(|l| l.record.as_mut()) {
        http.url = "http://web/\x1b]0;x\x07\n".into();
    }
    let line = View::of(&m).compact(false);
    assert!(!line.contains(char::is_control), "{line:?}");
}

#[test]
fn json_has_what_scripts_need() {
    let json = serde_json::to_value(View::of(&message())).unwrap();
    assert_eq!(json["verdict"], "DENIED");
    assert_eq!(json["source"]["identity"], "spiffe://cluster.local/ns/shop/sa/client");
    assert_eq!(json["destination"]["port"], 8080);
    assert_eq!(json["tls"]["cipher"], "TLS13_AES_128_GCM_SHA256");
    assert_eq!(json["http"]["status"], 403);
    assert_eq!(json["time"], "2023-11-14T22:13:20.123Z");
}

#[test]
fn flows_of_other_servers_and_strangers() {
    let mut m = message();
    m.extensions = None;
    m.l7 = None;
    m.source = Some(flow::Endpoint { identity: 2, ..Default::default() });
    m.destination = None;
    if let Some(ip) = &mut m.ip {
        ip.destination = "fd00::1".into();
    }
    let line = View::of(&m).compact(false);
    assert_eq!(
        line,
        "22:13:20.123 10.1.1.1 (world) -> [fd00::1]:8080 DENIED by shop/web-callers plaintext tcp"
    );
    m.extensions = Some(prost_types::Any { type_url: weft_flow::TYPE_URL.into(), value: vec![0xff; 9] });
    assert_eq!(View::of(&m).compact(false), line);
}

#[test]
fn rows_fit_the_header() {
    assert_eq!(View::of(&message()).row().len(), View::HEADER.len());
}

#[test]
fn what_broke_before_a_request_has_none() {
    let mut message = message();
    if let Some(Record::Http(http)) = message.l7.as_mut().and_then(|l7| l7.record.as_mut()) {
        (http.method, http.code, http.protocol) = (String::new(), 0, "HTTP/2".into());
        http.url = "http://".into();
    }
    assert!(View::of(&message).compact(false).contains(" HTTP/2 no request 3.21ms "));
}

#[test]
fn connections_without_bytes_or_endpoint_read_well() {
    let mut view = View::of(&message());
    (view.http, view.sent_bytes, view.received_bytes, view.connection) = (None, 0, 0, 7);
    (view.verdict, view.opening) = ("FORWARDED", false);
    assert!(view.compact(false).contains(" tcp closed 3.21ms "), "{}", view.compact(false));
    view.opening = true;
    assert!(view.compact(false).contains(" tcp open "));
    // A connection to a Service whose requests each go their own way.
    view.destination = Side { address: "10.96.0.10".into(), port: 80, ..Side::default() };
    (view.service, view.tls.mode) = ("shop/web:80".into(), "none");
    let line = view.compact(false);
    assert!(line.contains("-> shop/web:80 (service) FORWARDED") && !line.contains("plaintext"), "{line}");
    assert_eq!(view.row()[2], "shop/web:80 (service)");
}
