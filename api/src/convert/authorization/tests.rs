use super::*;

fn parse(spec: &str) -> Result<Converted, String> {
    let text = format!(
        "apiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: web-callers, namespace: shop}}\nspec:\n{spec}"
    );
    let object = serde_yaml_ng::from_str(&text).map_err(|e| e.to_string())?;
    convert(&object).map_err(|e| e.to_string())
}

const TARGET: &str = "  targetRefs: [{group: \"\", kind: Pod, selector: {matchLabels: {app: web}}}]\n";

#[test]
fn the_documented_example_converts() {
    let converted = parse(&format!(
        r#"{TARGET}
  action: ALLOW
  rules:
  - sources:
    - {{type: ServiceAccount, serviceAccount: {{namespace: shop, name: client}}}}
    - {{type: SPIFFE, spiffe: "spiffe://partner.example/ns/*/sa/reader"}}
    networkAttributes: {{ports: [8080, web], protocol: TCP}}
    http:
    - {{methods: [GET, HEAD], paths: [{{type: PathPrefix, value: /catalog}}], hosts: [web.shop.svc.cluster.local], headers: [{{type: Exact, name: X-Tenant, value: blue}}]}}
  - sources: [{{type: Unauthenticated, cidrs: ["10.0.0.0/8"]}}]
    networkAttributes: {{ports: [8443]}}
  - sources: [{{type: ServiceAccount, serviceAccount: {{name: "*"}}}}]
    networkAttributes: {{ports: [8125], protocol: UDP, plaintext: Allowed}}
  - sources: []
  - {{}}"#
    ))
    .unwrap();
    let rules = &converted.policy.rules;
    assert_eq!(rules.len(), 5);
    assert_eq!(rules[0].ports, [PortRef::Number(8080), PortRef::Name("web".into())]);
    assert_eq!(&*rules[0].http[0].headers[0].name, "x-tenant");
    assert_eq!(
        rules[2].sources,
        Some(vec![policy::Source::ServiceAccount { namespace: "shop".into(), name: None }])
    );
    assert!(rules[2].plaintext);
    assert_eq!(rules[3].sources, Some(vec![]), "an empty list is nobody");
    assert_eq!(rules[4].sources, None, "no list is any authenticated source");
    assert!(matches!(&converted.targets[..], [Target::Pods(s)] if s.match_labels["app"] == "web"));
}

#[test]
fn a_misspelt_field_is_an_error_and_never_widens() {
    let error = parse("  targetRefs: [{kind: Pod, selector: {matchLabel: {app: web}}}]").unwrap_err();
    assert!(error.contains("matchLabel"), "{error}");
    let error = parse(&format!("{TARGET}  rules: [{{source: []}}]")).unwrap_err();
    assert!(error.contains("unknown field `source`"), "{error}");
}

#[test]
fn each_error_names_object_field_and_fix() {
    let cases = [
        ("  targetRefs: []", "spec.targetRefs: it names no target; for every Pod"),
        ("  targetRefs: [{kind: Service}]", "spec.targetRefs[0]: kind Service takes a name"),
        ("  targetRefs: [{kind: Pod}]", "spec.targetRefs[0]: kind Pod takes a selector"),
    ];
    for (spec, expected) in cases {
        let error = parse(spec).unwrap_err();
        assert!(error.starts_with("AuthorizationPolicy shop/web-callers: "), "{error}");
        assert!(error.contains(expected), "{error}");
    }
    let cases = [
        ("sources: [{type: ServiceAccount}]", "spec.rules[0].sources[0].serviceAccount: is missing"),
        (
            "sources: [{type: ServiceAccount, serviceAccount: {name: a}, cidrs: [\"10.0.0.0/8\"]}]",
            "spec.rules[0].sources[0].cidrs: goes with type Unauthenticated only",
        ),
        (
            "sources: [{type: Unauthenticated, cidrs: [10.0.0.1]}]",
            "spec.rules[0].sources[0].cidrs[0]: \"10.0.0.1\"",
        ),
        (
            "sources: [{type: SPIFFE, spiffe: \"spiffe://*/ns/a\"}]",
            "spec.rules[0].sources[0].spiffe: the trust domain",
        ),
        ("sources: [{type: SPIFFE, spiffe: \"spiffe://a/ns/b*\"}]", "spec.rules[0].sources[0].spiffe: "),
        ("networkAttributes: {ports: [0]}", "spec.rules[0].networkAttributes.ports[0]: 0 is no port"),
        ("networkAttributes: {ports: [\"80\"]}", "ports[0]: \"80\" is no port name"),
        ("networkAttributes: {plaintext: Allowed}", "networkAttributes.plaintext: Allowed is for"),
        ("networkAttributes: {protocol: ICMP, ports: [1]}", "networkAttributes.ports: ports go with"),
        ("{networkAttributes: {protocol: UDP}, http: [{methods: [GET]}]}", "http needs protocol TCP"),
        (
            "http: [{methods: [get]}]",
            "http[0].methods[0]: \"get\" is no method; methods are case-sensitive, write \"GET\"",
        ),
        (
            "http: [{paths: [{value: admin}]}]",
            "http[0].paths[0].value: \"admin\" does not begin with '/'; write \"/admin\"",
        ),
        ("http: [{hosts: [\"web:80\"]}]", "http[0].hosts[0]: \"web:80\" is no host"),
        (
            "http: [{headers: [{name: \"a b\", value: c}]}]",
            "http[0].headers[0].name: \"a b\" is no header name",
        ),
    ];
    for (rule, expected) in cases {
        let rule = if rule.starts_with('{') { rule.to_owned() } else { format!("{{{rule}}}") };
        let error = parse(&format!("{TARGET}  rules: [{rule}]")).unwrap_err();
        assert!(error.contains(expected), "{error}\nexpected {expected}");
    }
}

#[test]
fn a_wrong_enum_names_its_field() {
    let error = parse(&format!("{TARGET}  rules: [{{http: [{{paths: [{{type: Regex, value: /a}}]}}]}}]"))
        .unwrap_err();
    assert!(error.contains("spec.rules[0].http[0].paths[0].type: unknown variant `Regex`"), "{error}");
}
