use super::*;
use weft_core::NamespacedName;
use weft_proto::control::Resource as WireResource;

fn wire(resource: &Resource) -> WireResource {
    WireResource { json: serde_json::to_vec(resource).unwrap().into() }
}

#[test]
fn one_bad_resource_does_not_hold_up_the_others() {
    let delta = crate::testing::delta([crate::testing::workload("web", "node-a", "10.1.1.1", 300)]);
    let mut upserted: Vec<_> = delta.upserted.iter().map(wire).collect();
    let bad =
        br#"{"kind":"Policy","spec":{"name":{"namespace":"shop","name":"p"},"action":"MAYBE","rules":[]}}"#;
    upserted.push(WireResource { json: bad.to_vec().into() });
    upserted.push(WireResource { json: b"{".to_vec().into() });
    let gone = ResourceKey::Service(NamespacedName::new("shop", "old"));
    let answer = SubscribeResponse {
        version: Some(wire::Version { epoch: 1, sequence: 2 }),
        full: true,
        upserted,
        removed: vec![serde_json::to_string(&gone).unwrap(), "nonsense".into()],
    };
    let decoded = decode(&answer);
    assert_eq!(decoded.delta.upserted, delta.upserted);
    assert_eq!(decoded.delta.removed, [gone]);
    assert_eq!(decoded.delta.version, Version { epoch: 1, sequence: 2 });
    let policy = ResourceKey::Policy(NamespacedName::new("shop", "p"));
    assert_eq!(decoded.keep, std::slice::from_ref(&policy));
    let keys: Vec<_> = decoded.rejected.iter().map(|(k, _)| k.as_str()).collect();
    assert_eq!(
        keys,
        [serde_json::to_string(&policy).unwrap().as_str(), "#3 of version 00000001.2", "nonsense"]
    );
    assert!(decoded.rejected[0].1.contains("MAYBE"), "{:?}", decoded.rejected[0]);
}

#[test]
fn keys_of_every_kind_survive_a_broken_body() {
    let cases = [
        (r#"{"kind":"Config","spec":{}}"#, Some(ResourceKey::Config)),
        (r#"{"kind":"Workload","spec":{"uid":"u"}}"#, Some(ResourceKey::Workload("u".into()))),
        (
            r#"{"kind":"Route","spec":{"name":{"namespace":"a","name":"b"}}}"#,
            Some(ResourceKey::Route(NamespacedName::new("a", "b"))),
        ),
        (r#"{"kind":"Route","spec":{"name":"b"}}"#, None),
        (r#"{"kind":"Else","spec":{}}"#, None),
        ("[]", None),
    ];
    for (json, key) in cases {
        assert_eq!(key_of(json.as_bytes()), key, "{json}");
    }
}

/// An operator of the next version may say more: what only adds is passed over, what this agent cannot judge by is
/// rejected by name, and everything else goes on.
#[test]
fn an_operator_of_the_next_version_is_understood() {
    let delta = crate::testing::delta([crate::testing::workload("web", "node-a", "10.1.1.1", 300)]);
    let mut upserted: Vec<_> = Vec::new();
    for resource in &delta.upserted {
        let mut json = serde_json::to_value(resource).unwrap();
        json["spec"]["nextField"] = serde_json::json!({"a": [1]});
        upserted.push(WireResource { json: serde_json::to_vec(&json).unwrap().into() });
    }
    let rule = |more: &str| {
        format!(
            r#"{{"sources":null,"ports":[],"protocol":"TCP","plaintext":false,"http":[{{"methods":[],"paths":[],"hosts":[],"headers":[]}}]{more}}}"#
        )
    };
    let policy = |name: &str, rule: &str, more: &str| {
        let json = format!(
            r#"{{"kind":"Policy","spec":{{"name":{{"namespace":"shop","name":"{name}"}},"action":"ALLOW","rules":[{rule}]{more}}}}}"#
        );
        WireResource { json: json.into_bytes().into() }
    };
    upserted.push(policy("good", &rule(""), ""));
    // Each would narrow the rule: an agent that passes over it would let through too much.
    upserted.push(policy("narrowed", &rule(r#","timeOfDay":"09:00-17:00""#), ""));
    upserted.push(policy("whole", &rule(""), r#","priority":3"#));
    upserted.push(policy(
        "entry",
        &rule("").replace(r#""headers":[]"#, r#""headers":[],"bodies":["x"]"#),
        "",
    ));
    upserted.push(policy("source", &rule("").replace("null", r#"[{"Jwt":{"issuer":"x"}}]"#), ""));
    upserted.push(WireResource { json: br#"{"kind":"Gateway","spec":{"name":"edge"}}"#.to_vec().into() });
    let answer = SubscribeResponse {
        version: Some(wire::Version { epoch: 1, sequence: 2 }),
        full: true,
        upserted,
        removed: vec![r#"{"Gateway":"edge"}"#.into()],
    };
    let decoded = decode(&answer);
    assert_eq!(decoded.delta.upserted[..delta.upserted.len()], delta.upserted[..]);
    assert_eq!(decoded.delta.upserted.len(), delta.upserted.len() + 1, "{:?}", decoded.rejected);
    let names: Vec<_> = ["narrowed", "whole", "entry", "source"]
        .map(|name| ResourceKey::Policy(NamespacedName::new("shop", name)))
        .into();
    assert_eq!(decoded.keep, names);
    let said: Vec<_> = decoded.rejected.iter().map(|(_, why)| why.as_str()).collect();
    for (why, part) in said.iter().zip(["timeOfDay", "priority", "bodies", "Jwt", "Gateway", "Gateway"]) {
        assert!(why.contains(part), "{why}");
    }
    assert_eq!(said.len(), 6);
}

/// What an operator of the version before says, word for word: fields that came later are not in it, and have a meaning
/// without being said. A change that breaks this test breaks every upgrade in which agents are newer than the operator.
#[test]
fn an_operator_of_the_version_before_is_understood() {
    let before = [
        r#"{"kind":"Config","spec":{"trust_domain":"cluster.local","svid_lifetime":{"secs":3600,"nanos":0},"same_node":"Shortcut",
            "unknown_pods":"RefuseMesh","ranges":["10.1.0.0/16"],"reveal_policy":false,
            "telemetry":{"flow_capacity":8192,"query_strings":false,"headers":[]}}}"#,
        r#"{"kind":"Workload","spec":{"uid":"u1","name":{"namespace":"shop","name":"web-1"},"service_account":"web",
            "identity":"spiffe://cluster.local/ns/shop/sa/web","subject":300,"owner":{"kind":"Deployment","name":"web"},
            "node":"node-a","labels":{"app":"web"},"addresses":["10.1.1.1"],"mode":"strict","policies":[]}}"#,
        r#"{"kind":"Service","spec":{"name":{"namespace":"shop","name":"web"},"addresses":["10.96.0.10"],"ports":[],
            "endpoints":[{"address":"10.1.1.1","ports":{"80":8080},"workload":"u1","ready":true}]}}"#,
        r#"{"kind":"Policy","spec":{"name":{"namespace":"shop","name":"p"},"action":"ALLOW","rules":[{"sources":
            [{"ServiceAccount":{"namespace":"shop","name":"client"}}],"ports":[80],"protocol":"TCP","plaintext":false,
            "http":[{"methods":["GET"],"paths":[{"type":"PathPrefix","value":"/a"}],"hosts":[],"headers":[]}]}]}}"#,
    ];
    let answer = SubscribeResponse {
        version: Some(wire::Version { epoch: 1, sequence: 2 }),
        full: true,
        upserted: before.map(|json| WireResource { json: json.as_bytes().to_vec().into() }).into(),
        removed: vec![
            r#"{"Policy":{"namespace":"shop","name":"old"}}"#.into(),
            r#"{"Workload":"u0"}"#.into(),
        ],
    };
    let decoded = decode(&answer);
    assert_eq!(decoded.rejected, []);
    assert_eq!((decoded.delta.upserted.len(), decoded.delta.removed.len()), (before.len(), 2));
}
