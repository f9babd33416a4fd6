use super::*;

/// Services `shop/web`, `shop/web-v1`, `other/api` with port 80 called `http`; `other` grants to `granted`.
struct Known;

impl References for Known {
    fn service_exists(&self, s: &NamespacedName) -> bool {
        matches!((&*s.namespace, &*s.name), ("shop", "web" | "web-v1") | ("other", "api"))
    }
    fn port_exists(&self, s: &NamespacedName, port: u16) -> bool {
        self.service_exists(s) && port == 80
    }
    fn named_port(&self, s: &NamespacedName, name: &str) -> Option<u16> {
        (self.service_exists(s) && name == "http").then_some(80)
    }
    fn granted(&self, namespace: &str, s: &NamespacedName) -> bool {
        namespace == "granted" && &*s.namespace == "other"
    }
}

fn run(namespace: &str, spec: &str) -> Result<Converted, ObjectError> {
    let text = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: {namespace}}}\nspec:\n{spec}"
    );
    convert(&serde_yaml_ng::from_str(&text).unwrap(), &Known)
}

const PARENT: &str = "  parentRefs: [{group: \"\", kind: Service, name: web, namespace: shop, port: 80}]\n";

#[test]
fn a_canary() {
    let c = run(
        "shop",
        &format!(
            "{PARENT}  rules:\n  - matches: [{{path: {{type: PathPrefix, value: /cat}}, method: GET, headers: [{{name: X-A, value: b}}]}}]\n    filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: X-B, value: c}}]}}}}]\n    timeouts: {{request: 10s, backendRequest: 2s}}\n    backendRefs: [{{name: web, port: 80, weight: 90}}, {{name: web-v1, port: 80, weight: 10}}]"
        ),
    )
    .unwrap();
    assert!(c.unsupported.is_empty() && c.unresolved.is_empty(), "{c:?}");
    let route = c.route.unwrap();
    assert!(route.parents[0].producer);
    let rule = &route.rules[0];
    assert_eq!(rule.matches[0].method.as_deref(), Some("GET"));
    assert_eq!(&*rule.matches[0].headers[0].name, "x-a");
    assert_eq!(rule.timeout, Some(Duration::from_secs(2)));
    assert_eq!(rule.request_headers.set, [("x-b".to_owned(), "c".to_owned())]);
    assert_eq!(
        rule.backends.iter().map(|b| (b.weight, b.valid)).collect::<Vec<_>>(),
        [(90, true), (10, true)]
    );
}

#[test]
fn a_consumer_route_is_marked() {
    let c = run(
        "granted",
        &format!("{PARENT}  rules: [{{backendRefs: [{{name: api, namespace: other, port: 80}}]}}]"),
    );
    let route = c.unwrap().route.unwrap();
    assert!(!route.parents[0].producer);
    assert!(route.rules[0].backends[0].valid, "a ReferenceGrant allows it");
}

#[test]
fn an_unsupported_filter_answers_500() {
    let rule = "{filters: [{type: URLRewrite, urlRewrite: {}}], backendRefs: [{name: web, port: 80}]}";
    let c = run("shop", &format!("{PARENT}  rules: [{rule}]")).unwrap();
    assert!(c.route.unwrap().rules[0].backends.is_empty());
    assert_eq!(c.unsupported[0].field, "spec.rules[0].filters[0].type");
}

#[test]
fn an_unsupported_match_never_becomes_a_rule_for_everything() {
    let rule =
        "{matches: [{path: {type: RegularExpression, value: /a.*}}], backendRefs: [{name: web, port: 80}]}";
    let c = run("shop", &format!("{PARENT}  rules: [{rule}]")).unwrap();
    assert!(c.route.unwrap().rules.is_empty());
    assert_eq!(c.unsupported[0].field, "spec.rules[0].matches[0].path.type");
}

#[test]
fn references_that_do_not_resolve() {
    for (backend, reason) in [
        ("{name: api, namespace: other, port: 80}", "RefNotPermitted"),
        ("{name: gone, port: 80}", "BackendNotFound"),
        ("{name: web, port: 81}", "BackendNotFound"),
        ("{name: web, port: 80, kind: Bucket}", "InvalidKind"),
    ] {
        let c = run("shop", &format!("{PARENT}  rules: [{{backendRefs: [{backend}]}}]")).unwrap();
        assert!(!c.route.unwrap().rules[0].backends[0].valid);
        assert_eq!(c.unresolved[0].reason, reason);
    }
    let c = run("shop", "  parentRefs: [{group: \"\", kind: Service, name: gone}]").unwrap();
    assert!(c.route.is_none());
    assert_eq!(c.unresolved[0].error.to_string(), "spec.parentRefs[0]: there is no Service shop/gone");
}

#[test]
fn wrong_values_refuse_the_object() {
    for (rule, expected) in [
        (
            "{backendRefs: [{name: web}]}",
            "HTTPRoute shop/r: spec.rules[0].backendRefs[0].port: a Service needs a port",
        ),
        (
            "{timeouts: {request: soon}}",
            "spec.rules[0].timeouts.request: \"soon\" is no duration; write one like 30s",
        ),
        ("{backendRefs: [{name: web, port: 80, weight: -1}]}", "backendRefs[0].weight: is out of range"),
        ("{matches: [{path: {value: a}}]}", "matches[0].path.value: \"a\" does not begin with '/'"),
    ] {
        let error = run("shop", &format!("{PARENT}  rules: [{rule}]")).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
