use serde_json::{Value, json};

use super::*;

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).unwrap()
}

fn read(kind: Kind, value: Value) -> Change {
    let object = object(value);
    let key = read::key(kind, &object).unwrap();
    read::change(key, &trim::trim(kind, object))
}

#[test]
fn a_pod_is_cut_to_what_counts_and_its_annotations_are_not_trusted() {
    let trimmed = trim::trim(
        Kind::Pod,
        object(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "web", "namespace": "shop", "uid": "u", "resourceVersion": "7",
                "annotations": {"weft.mesh/netns": "/run/netns/other"}, "managedFields": [{"manager": "m"}]},
            "spec": {"nodeName": "node-a", "serviceAccountName": "web", "volumes": [{"name": "v"}],
                "containers": [{"name": "app", "image": "i", "env": [{"name": "A"}],
                    "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.5"}], "containerStatuses": [{}],
                "conditions": [{"type": "Ready", "status": "True", "lastProbeTime": null},
                    {"type": "Initialized", "status": "True"}]},
        })),
    );
    let short: Value = serde_json::from_str(&trimmed.json).unwrap();
    assert_eq!(
        short,
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "shop", "uid": "u"},
            "spec": {"nodeName": "node-a", "serviceAccountName": "web",
                "containers": [{"name": "app", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.5"}],
                "conditions": [{"type": "Ready", "status": "True"}]},
        })
    );
}

#[test]
fn status_and_generation_of_our_kinds() {
    let policy = |spec: Value| {
        json!({
            "apiVersion": "weft.mesh/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "shop", "generation": 7, "annotations": {"a": "\u{7f}"}},
            "spec": spec, "status": {"conditions": [], "unknown": 1},
        })
    };
    let good = json!({"targetRefs": [{"group": "", "kind": "Service", "name": "web"}]});
    let change = read(Kind::AuthorizationPolicy, policy(good));
    assert!(matches!(&change, Change::Apply(d) if d.generation == 7), "{change:?}");

    let typo = json!({"targetRefs": [{"group": "", "kind": "Pod", "name": "web"}], "action": "ALOW"});
    let change = read(Kind::AuthorizationPolicy, policy(typo));
    let Change::Bad { key, generation: 7, message, .. } = change else { panic!("{change:?}") };
    assert_eq!(key.to_string(), "AuthorizationPolicy shop/p");
    assert!(message.contains("ALOW") && !message.contains("line"), "{message}");
}

#[test]
fn fields_of_newer_api_servers_are_no_error() {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.1", "fieldOfTomorrow": {"x": 1}},
    });
    assert!(matches!(read(Kind::Service, service), Change::Apply(_)));
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"ports": "none"},
    });
    assert!(matches!(read(Kind::Service, service), Change::Bad { .. }));
}

#[tokio::test]
async fn the_first_batch_waits_for_every_kind() {
    let (sender, news) = mpsc::channel(64);
    let (out, mut batches) = mpsc::channel(4);
    let mut merged = std::pin::pin!(merge(news, out, Vec::new()));
    let key = ObjectKey { kind: Kind::Namespace, namespace: String::new(), name: "shop".into() };
    let remove = |key: &ObjectKey| News::Change(Instant::now(), Change::Remove(key.clone()));
    sender.send(remove(&key)).await.ok().unwrap();
    for watched in WATCHED.iter().skip(1) {
        sender.send(News::Synced(watched.kind)).await.ok().unwrap();
    }
    assert!(futures_util::poll!(merged.as_mut()).is_pending());
    assert!(batches.try_recv().is_err());
    sender.send(News::Synced(Kind::Namespace)).await.ok().unwrap();
    assert!(futures_util::poll!(merged.as_mut()).is_pending());
    assert_eq!(batches.try_recv().unwrap().changes.len(), 1);
}
