//! However objects come and go, what is built step by step is what is built from scratch.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::objects;

/// A change of one object; small numbers, so that objects meet.
#[derive(Debug, Clone)]
struct Step {
    kind: usize,
    namespace: usize,
    number: usize,
    /// What of it is different.
    form: usize,
    remove: bool,
}

const KINDS: [&str; 12] = [
    "Namespace",
    "Node",
    "Pod",
    "Pod",
    "Pod",
    "Service",
    "EndpointSlice",
    "NetworkPolicy",
    "HTTPRoute",
    "ReferenceGrant",
    "AuthorizationPolicy",
    "AuthorizationPolicy",
];

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let step = (0..KINDS.len(), 0..3usize, 0..3usize, 0..8usize, proptest::bool::weighted(0.2))
        .prop_map(|(kind, namespace, number, form, remove)| Step { kind, namespace, number, form, remove });
    // Several changes may come between two builds.
    proptest::collection::vec(proptest::collection::vec(step, 1..4), 1..40)
}

/// The object's manifest; every form of a kind is one that another object's fate hangs on.
fn manifest(step: &Step) -> String {
    let Step { namespace: n, number: i, form: f, .. } = step;
    let pick = |all: &[&str]| all[f % all.len()].to_owned();
    match KINDS[step.kind] {
        "Namespace" => {
            let mode = pick(&["disabled", "permissive", "strict", "strct"]);
            format!(
                "apiVersion: v1\nkind: Namespace\nmetadata: {{name: n{n}, labels: {{weft.mesh/mode: {mode}}}}}\n"
            )
        }
        "Node" => format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: node-{i}, labels: {{topology.kubernetes.io/zone: z{f}}}}}\nspec: {{podCIDR: 10.{f}.0.0/24}}\n"
        ),
        "Pod" => {
            let meta = pick(&[
                "",
                ", deletionTimestamp: 2026-01-01T00:00:00Z",
                ", creationTimestamp: 2026-01-02T00:00:00Z",
            ]);
            let uid = if *f == 7 { "same".to_owned() } else { format!("uid-{n}-{i}") };
            let node = if *f == 6 { String::new() } else { format!("nodeName: node-{}, ", f % 3) };
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{i}, namespace: n{n}, uid: {uid}, labels: {{app: a{}, tier: t{}}}{meta}}}\nspec: {{{node}serviceAccountName: s{}, containers: [{{name: c, image: c, ports: [{{name: main, containerPort: {}}}]}}]}}\nstatus: {{podIPs: [{{ip: 10.1.0.{}}}, {{ip: 10.1.0.{}}}]}}\n",
                f % 3,
                i % 2,
                f % 2,
                8080 + f,
                (f * 3 + i) % 5,
                i + 5
            )
        }
        "Service" => {
            let kind = pick(&["ClusterIP", "ClusterIP", "ClusterIP", "ExternalName"]);
            let name = if f % 2 == 0 { "http" } else { "web" };
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: v{i}, namespace: n{n}}}\nspec: {{type: {kind}, clusterIP: 10.96.{n}.{i}, selector: {{app: a{}}}, ports: [{{name: {name}, port: {}, targetPort: main}}]}}\n",
                f % 3,
                80 + f % 2
            )
        }
        "EndpointSlice" => format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {{name: e{i}, namespace: n{n}, labels: {{kubernetes.io/service-name: v{i}}}}}\nendpoints: [{{addresses: [10.1.0.{}], conditions: {{ready: {}}}}}, {{addresses: [10.1.0.{}]}}]\nports: [{{name: http, port: 8080}}]\n",
            f % 5,
            f % 2 == 0,
            (f + 2) % 5
        ),
        "NetworkPolicy" => format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: k{i}, namespace: n{n}}}\nspec: {{podSelector: {{matchLabels: {{app: a{}}}}}}}\n",
            f % 3
        ),
        "HTTPRoute" => format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r{i}, namespace: n{n}}}\nspec:\n  parentRefs: [{{group: \"\", kind: Service, name: v{}, namespace: n{}}}]\n  rules: [{{backendRefs: [{{name: v{}, namespace: n{}, port: {}}}]}}]\n",
            f % 3,
            (n + f / 4) % 3,
            f % 2,
            (n + f / 2) % 3,
            80 + f % 2
        ),
        "ReferenceGrant" => format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {{name: g{i}, namespace: n{n}}}\nspec: {{from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: n{}}}], to: [{{group: \"\", kind: Service}}]}}\n",
            f % 3
        ),
        _ => {
            let target = if f % 3 == 2 {
                format!("{{group: \"\", kind: Service, name: v{i}}}")
            } else {
                format!("{{group: \"\", kind: Pod, selector: {{matchLabels: {{app: a{}}}}}}}", f % 2)
            };
            let action = pick(&["ALLOW", "DENY", "ALLOW", "ALOW"]);
            let port = if *f == 5 { "main".to_owned() } else { (80 + f).to_string() };
            format!(
                "apiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: a{i}, namespace: n{n}}}\nspec: {{targetRefs: [{target}], action: {action}, rules: [{{networkAttributes: {{ports: [{port}]}}}}]}}\n"
            )
        }
    }
}

fn take(index: &mut Index, step: &Step) {
    let change = match objects::parse(&manifest(step)).pop() {
        Some(Ok(document)) if step.remove => Change::Remove(document.key),
        Some(Ok(document)) => Change::Apply(document),
        Some(Err(bad)) => {
            let key = bad.key.unwrap();
            if step.remove {
                Change::Remove(key)
            } else {
                let (generation, message, target_refs) = (bad.generation, bad.message, bad.target_refs);
                Change::Bad { key, generation, message, target_refs }
            }
        }
        None => panic!("no document: {step:?}"),
    };
    index.apply(&"x".into(), change);
}

/// What a reader holds that takes every change.
#[derive(Default)]
struct Held {
    resources: BTreeMap<ResourceKey, Resource>,
    reports: BTreeMap<ObjectKey, Report>,
    nodes: BTreeSet<String>,
}

fn merge<K: Ord, V>(held: &mut BTreeMap<K, V>, changes: BTreeMap<K, Option<V>>) {
    for (key, value) in changes {
        match value {
            Some(value) => drop(held.insert(key, value)),
            None => drop(held.remove(&key)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn step_by_step_is_from_scratch(steps in steps()) {
        let mut index = Index::new(TrustDomain::new("cluster.local").unwrap());
        let mut held = Held::default();
        for changes in steps {
            for step in &changes {
                take(&mut index, step);
            }
            let changes = index.update();
            merge(&mut held.resources, changes.resources);
            merge(&mut held.reports, changes.reports);
            held.nodes = changes.nodes.unwrap_or(held.nodes);
            let whole = index.build();
            prop_assert_eq!(&held.resources, &whole.resources);
            prop_assert_eq!(&held.reports, &whole.reports);
            prop_assert_eq!(&held.nodes, &whole.nodes);
        }
    }
}
