use super::*;

fn seen(status: Value, parent_refs: Value) -> Seen {
    Seen { uid: "u".into(), resource_version: "5".into(), generation: 3, status, parent_refs }
}

fn key(kind: Kind) -> ObjectKey {
    ObjectKey { kind, namespace: "shop".into(), name: "x".into() }
}

fn finding(ok: bool) -> Finding {
    Finding { ok, reason: "Reason", message: "why".into() }
}

fn wanted(findings: Vec<(&'static str, Finding)>) -> Wanted<'static> {
    static NONE: BTreeMap<usize, Finding> = BTreeMap::new();
    Wanted { findings, parents: &NONE, generation: 3, time: "2026-01-02T00:00:00Z" }
}

#[test]
fn only_differences_are_written_and_transitions_keep_their_time() {
    let key = key(Kind::AuthorizationPolicy);
    let first = wanted(vec![("Accepted", finding(true))]).status(&key, &seen(Value::Null, Value::Null));
    let mut status = first.expect("a first status");
    assert_eq!(status["conditions"][0]["observedGeneration"], 3);
    status["conditions"][0]["lastTransitionTime"] = "2025-01-01T00:00:00Z".into();
    let again = wanted(vec![("Accepted", finding(true))]);
    assert_eq!(again.status(&key, &seen(status.clone(), Value::Null)), None);
    // A new generation is a difference, but no transition.
    let newer = Wanted { generation: 4, ..wanted(vec![("Accepted", finding(true))]) };
    let newer = newer.status(&key, &seen(status.clone(), Value::Null)).expect("a difference");
    assert_eq!(newer["conditions"][0]["lastTransitionTime"], "2025-01-01T00:00:00Z");
    let bad = wanted(vec![("Accepted", finding(false))]).status(&key, &seen(status, Value::Null));
    assert_eq!(bad.expect("a difference")["conditions"][0]["lastTransitionTime"], "2026-01-02T00:00:00Z");
}

#[test]
fn entries_of_other_controllers_stay() {
    let key = key(Kind::HttpRoute);
    let service = json!({"group": "", "kind": "Service", "name": "web"});
    let gateway = json!({"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "g"});
    let foreign = json!({"parentRef": gateway, "controllerName": "other/x", "conditions": []});
    let before = seen(json!({"parents": [foreign]}), json!([gateway, service]));
    let wanted = wanted(vec![("Accepted", finding(true)), ("ResolvedRefs", finding(false))]);
    let status = wanted.status(&key, &before).expect("a difference");
    assert_eq!(status["parents"][0], foreign);
    assert_eq!(status["parents"][1]["parentRef"], service);
    assert_eq!(status["parents"][1]["conditions"][1]["status"], "False");
    assert_eq!(status["parents"].as_array().map(Vec::len), Some(2));
    assert_eq!(wanted.status(&key, &seen(status.clone(), before.parent_refs)), None);
    // A parent that was taken out of the route loses its entry.
    let without = wanted.status(&key, &seen(status, json!([gateway]))).expect("a difference");
    assert_eq!(without["parents"], json!([foreign]));
}

#[test]
fn a_patch_is_for_one_object_only() {
    let patch = patch(&key(Kind::HttpRoute), &seen(Value::Null, Value::Null), &json!({}));
    assert_eq!(patch["metadata"], json!({"uid": "u", "resourceVersion": "5"}));
}
