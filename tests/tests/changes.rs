//! How long a change takes from the file to both nodes. Alone in its file: nothing else runs meanwhile.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use weft_tests::{Lab, demo::calls, stats};

const CHANGES: usize = 100;

fn route(to: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web-canary, namespace: shop}}\n\
         spec:\n  parentRefs: [{{group: \"\", kind: Service, name: web, port: 80}}]\n  rules:\n  \
         - backendRefs: [{{name: {to}, port: 80, weight: 1}}]\n"
    )
}

fn policy(method: &str) -> String {
    format!(
        "apiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: methods, namespace: shop}}\n\
         spec:\n  targetRefs: [{{group: \"\", kind: Pod, selector: {{matchLabels: {{app: web}}}}}}]\n  \
         action: ALLOW\n  rules: [{{networkAttributes: {{ports: [8080]}}, http: [{{methods: [{method}]}}]}}]\n"
    )
}

/// A route is enforced where the client is, a policy where the server is: every change must reach both nodes, and
/// the first call after both have said so must see it.
#[test]
fn a_hundred_changes_are_enforced_on_both_nodes_in_time() {
    let lab = Lab::shop().unwrap_or_else(|error| panic!("{error:#}"));
    let web = calls::vip(&lab, "shop/web", 80).unwrap();
    lab.apply("route", &route("web-v1")).unwrap();
    lab.apply("policy", &policy("GET")).unwrap();
    let mut took = Vec::new();
    for change in 0..CHANGES {
        // v1, then GET refused; v2, then GET allowed.
        let (refused, to) = match change % 4 {
            0 => (false, "web-v2"),
            1 => (true, "web-v2"),
            2 => (true, "web-v1"),
            _ => (false, "web-v1"),
        };
        let enforced = match change % 2 {
            0 => lab.apply("route", &route(to)),
            _ => lab.apply("policy", &policy(if refused { "PUT" } else { "GET" })),
        };
        took.push(enforced.unwrap_or_else(|error| panic!("change {change}: {error:#}")));
        let args = ["--count", "4", "--method", if refused { "PUT" } else { "GET" }];
        let answer = calls::http(&lab, "client", &web, &args).unwrap();
        // nginx answers a PUT like a GET here: what is allowed comes from that version alone.
        assert_eq!(answer["bodies"][to], 4, "change {change}: {answer}");
        let other = if refused { "GET" } else { "PUT" };
        let answer = calls::http(&lab, "client", &web, &["--method", other]).unwrap();
        assert_eq!(calls::number(&answer, "/statuses/403"), 1, "change {change}, {other}: {answer}");
    }
    let (p50, p99) = (stats::quantile(&mut took, 0.5), stats::quantile(&mut took, 0.99));
    println!("{CHANGES} changes enforced on both nodes: p50 {p50:?}, p99 {p99:?}, longest {:?}", took.last());
    assert!(p99 < Duration::from_millis(200), "p99 {p99:?}");
}
