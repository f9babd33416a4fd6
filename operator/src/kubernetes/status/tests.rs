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

#[test]
fn counting_goes_on_behind_where_it_stopped() {
    let name = |name: &str| Arc::new(ObjectKey { name: name.into(), ..key(Kind::AuthorizationPolicy) });
    let report = Report {
        origin: "x".into(),
        generation: 3,
        accepted: finding(true),
        resolved: None,
        programmable: None,
        parents: BTreeMap::new(),
    };
    let known = || (Arc::new(report.clone()), Version::default());
    let objects = ["a", "b", "c"].map(|n| (name(n), known())).into();
    let overview = Overview { objects, ..Overview::default() };
    let order = |behind: Option<&str>| {
        let behind = behind.map(name);
        let keys = in_turn(&overview, behind.as_deref()).map(|(key, _)| key.name.clone());
        keys.collect::<String>()
    };
    assert_eq!(order(None), "abc");
    assert_eq!(order(Some("a")), "bca");
    assert_eq!(order(Some("c")), "abc");
    // One that is gone by now.
    assert_eq!(order(Some("bb")), "cab");

    let status =
        |generation: i64| json!({"conditions": [{"type": "Accepted", "observedGeneration": generation}]});
    assert!(seen(status(3), Value::Null).speaks_of(3));
    assert!(!seen(status(2), Value::Null).speaks_of(3));
    assert!(!seen(Value::Null, Value::Null).speaks_of(3));
}
