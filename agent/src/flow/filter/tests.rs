use super::*;
use crate::flow::convert::tests::{message, request};

fn one(f: FlowFilter) -> Filters {
    Filters::new(&[f], &[]).unwrap()
}

#[test]
fn each_field() {
    let m = message(request("/catalog/1?q=2", 503));
    let d = FlowFilter::default;
    let s = |v: &str| vec![v.to_owned()];
    let table: Vec<(FlowFilter, bool)> = vec![
        (FlowFilter { source_ip: s("10.1.1.1"), ..d() }, true),
        (FlowFilter { source_ip: s("10.1.0.0/16"), ..d() }, true),
        (FlowFilter { source_ip: s("10.2.0.0/16"), ..d() }, false),
        (FlowFilter { destination_ip: s("10.1.2.1"), ..d() }, true),
        (FlowFilter { source_pod: s("shop/client"), ..d() }, true),
        (FlowFilter { source_pod: s("shop/"), ..d() }, true),
        (FlowFilter { source_pod: s("client-a"), ..d() }, true),
        (FlowFilter { source_pod: s("shop/web"), ..d() }, false),
        (FlowFilter { source_pod: s("other/"), ..d() }, false),
        (FlowFilter { destination_pod: s("shop/web"), ..d() }, true),
        (FlowFilter { source_pod: vec!["x/".into(), "shop/".into()], ..d() }, true),
        (FlowFilter { destination_service: s("shop/we"), ..d() }, true),
        (FlowFilter { source_label: s("app=client"), ..d() }, true),
        (FlowFilter { destination_label: s("k8s:app in (web,api)"), ..d() }, true),
        (FlowFilter { destination_label: s("app=client"), ..d() }, false),
        (FlowFilter { source_identity: vec![300], ..d() }, true),
        (FlowFilter { destination_identity: vec![300], ..d() }, false),
        (FlowFilter { http_status_code: s("5+"), ..d() }, true),
        (FlowFilter { http_status_code: s("503"), ..d() }, true),
        (FlowFilter { http_status_code: s("50+"), ..d() }, true),
        (FlowFilter { http_status_code: s("4+"), ..d() }, false),
        (FlowFilter { http_method: s("get"), ..d() }, true),
        (FlowFilter { http_method: s("POST"), ..d() }, false),
        (FlowFilter { http_path: s("^/catalog/[0-9]$"), ..d() }, true),
        (FlowFilter { http_url: s("web.shop"), ..d() }, true),
        (FlowFilter { protocol: s("HTTP"), ..d() }, true),
        (FlowFilter { protocol: s("tcp"), ..d() }, true),
        (FlowFilter { protocol: s("udp"), ..d() }, false),
        (FlowFilter { protocol: s("dns"), ..d() }, false),
        (FlowFilter { destination_port: s("8080"), ..d() }, true),
        (FlowFilter { source_port: s("8080"), ..d() }, false),
        (FlowFilter { reply: vec![false], ..d() }, true),
        (FlowFilter { reply: vec![true], ..d() }, false),
        (FlowFilter { verdict: vec![1], ..d() }, true),
        (FlowFilter { verdict: vec![2], ..d() }, false),
        (FlowFilter { encrypted: vec![true], ..d() }, true),
        (FlowFilter { node_name: s("node-*"), ..d() }, true),
        (FlowFilter { node_name: s("node-a"), ..d() }, false),
        (FlowFilter { traffic_direction: vec![1], ..d() }, true),
        (FlowFilter { uuid: vec![m.uuid.clone()], ..d() }, true),
        (
            FlowFilter {
                event_type: vec![flow::EventTypeFilter { r#type: 129, ..Default::default() }],
                ..d()
            },
            true,
        ),
        (
            FlowFilter {
                source_workload: vec![flow::Workload { kind: "Deployment".into(), name: String::new() }],
                ..d()
            },
            true,
        ),
        (FlowFilter { dns_query: s("x"), ..d() }, false),
        (FlowFilter { trace_id: s("x"), ..d() }, false),
        // AND across fields.
        (FlowFilter { source_pod: s("shop/"), destination_port: s("1"), ..d() }, false),
        (d(), true),
    ];
    for (filter, expected) in table {
        assert_eq!(one(filter.clone()).matches(&m), expected, "{filter:?}");
    }
}

#[test]
fn lists_are_or_and_the_blacklist_wins() {
    let m = message(request("/", 200));
    let pod = |p: &str| FlowFilter { source_pod: vec![p.into()], ..Default::default() };
    assert!(Filters::new(&[], &[]).unwrap().matches(&m));
    assert!(Filters::new(&[pod("no/"), pod("shop/")], &[]).unwrap().matches(&m));
    assert!(!Filters::new(&[pod("shop/")], &[pod("shop/client")]).unwrap().matches(&m));
    assert!(!Filters::new(&[], &[pod("shop/")]).unwrap().matches(&m));
}

#[test]
fn an_absent_reply_never_matches() {
    let mut m = message(request("/", 200));
    m.is_reply = None;
    assert!(!one(FlowFilter { reply: vec![false, true], ..Default::default() }).matches(&m));
}

#[test]
fn what_cannot_be_read_is_an_error() {
    let d = FlowFilter::default;
    let s = |v: &str| vec![v.to_owned()];
    for bad in [
        FlowFilter { source_ip: s("10.1"), ..d() },
        FlowFilter { source_pod: s("/"), ..d() },
        FlowFilter { http_status_code: s("5xx"), ..d() },
        FlowFilter { http_status_code: s("+"), ..d() },
        FlowFilter { http_path: s("("), ..d() },
        FlowFilter { http_path: s("(a{1000}){1000}"), ..d() },
        FlowFilter { protocol: s("quic"), ..d() },
        FlowFilter { destination_port: s("99999"), ..d() },
        FlowFilter { source_label: s("a in (b"), ..d() },
        FlowFilter { uuid: vec![String::new(); 65], ..d() },
    ] {
        assert!(Filters::new(std::slice::from_ref(&bad), &[]).is_err(), "{bad:?}");
    }
}
