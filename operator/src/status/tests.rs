use std::{collections::BTreeMap, time::Instant};

use super::*;
use crate::{
    controller::Controller,
    distribution::nodes::Stream,
    index::Index,
    last_good::LastGood,
    metrics::Metrics,
    objects,
    source::{Batch, Change},
};

fn batch(text: &str) -> Batch {
    let changes = objects::parse(text).into_iter().map(|d| match d {
        Ok(document) => ("f.yaml".into(), Change::Apply(document)),
        Err(bad) => {
            let key = bad.key.unwrap();
            let (generation, message, target_refs) = (bad.generation, bad.message, bad.target_refs);
            ("f.yaml".into(), Change::Bad { key, generation, message, target_refs })
        }
    });
    Batch { noticed: Instant::now(), changes: changes.collect(), unreadable: BTreeMap::new() }
}

const NODES: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: node-b}\n---\n";
const POLICY: &str = "apiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {targetRefs: [{kind: Pod, selector: {}}], action: DENY}\n";

#[test]
fn conditions_follow_acks() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("stale.yaml"), "left by an earlier process").unwrap();
    let distribution = Arc::new(Distribution::new());
    let (overview, _) = watch::channel(Arc::new(Overview::default()));
    let mut controller = Controller {
        index: Index::new(weft_core::TrustDomain::new("cluster.local").unwrap()),
        last_good: Some(LastGood::open(&dir.path().join("last-good")).unwrap().0),
        distribution: Arc::clone(&distribution),
        metrics: Metrics::new(&mut prometheus_client::registry::Registry::default()),
        overview,
    };
    let mut writer = StatusWriter::new(dir.path().into()).unwrap();
    assert!(!dir.path().join("stale.yaml").exists());
    let mut write = |c: &Controller| {
        writer.write(&c.overview.borrow().clone(), &distribution.nodes.states());
        fs::read_to_string(dir.path().join("AuthorizationPolicy-shop-p.yaml")).unwrap_or_default()
    };

    controller.take(batch(&format!("{NODES}{POLICY}")));
    let text = write(&controller);
    assert!(text.contains("0/2 nodes; waiting for node-a (not connected), node-b (not connected)"), "{text}");
    assert!(text.contains("reason: Pending"), "{text}");

    let version = controller.overview.borrow().version;
    let a = Stream::open(&distribution, "node-a", "1").unwrap();
    let _b = Stream::open(&distribution, "node-b", "1").unwrap();
    distribution.nodes.ack("node-a", version, vec![]);
    let text = write(&controller);
    assert!(text.contains("message: 1/2 nodes; waiting for node-b\n"), "{text}");
    distribution.nodes.ack("node-b", version, vec![]);
    let text = write(&controller);
    assert!(text.contains("reason: Programmed\n    message: 2/2 nodes\n"), "{text}");

    // A bad form: not accepted, the old one goes on, and the file says so.
    controller.take(batch(&POLICY.replace("DENY", "NEVER")));
    let text = write(&controller);
    assert!(text.contains("AuthorizationPolicy shop/p: spec.action: unknown variant `NEVER`"), "{text}");
    assert!(text.contains("the last good form goes on"), "{text}");

    // A rejection by a node is named.
    controller.take(batch(&POLICY.replace("DENY", "AUDIT")));
    let version = controller.overview.borrow().version;
    let key = serde_json::to_string(&ResourceKey::Policy(NamespacedName::new("shop", "p"))).unwrap();
    distribution.nodes.ack("node-a", version, vec![(key, "the map is full".into())]);
    let text = write(&controller);
    assert!(text.contains("reason: Rejected"), "{text}");
    assert!(text.contains("node-a: the map is full"), "{text}");
    drop(a);
    write(&controller);

    let summary = fs::read_to_string(dir.path().join("summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["nodes"][0]["node"], "node-a");
    assert_eq!(summary["nodes"][0]["connected"], false);
    assert_eq!(summary["sequence"], version.sequence);

    let key = ObjectKey { kind: Kind::AuthorizationPolicy, namespace: "shop".into(), name: "p".into() };
    let removed = vec![("f.yaml".into(), Change::Remove(key))];
    controller.take(Batch { noticed: Instant::now(), changes: removed, unreadable: BTreeMap::new() });
    assert_eq!(write(&controller), "");
    assert!(!dir.path().join("AuthorizationPolicy-shop-p.yaml").exists());
}
