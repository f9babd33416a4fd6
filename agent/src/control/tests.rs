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
