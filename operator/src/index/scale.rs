//! What one change costs in a mesh of 10,000 Pods and 2,000 policies.

use std::{
    fs,
    time::{Duration, Instant},
};

use super::{tests::apply, *};
use crate::distribution::Distribution;

const NAMESPACES: usize = 20;
const PODS: usize = 10_000;
const POLICIES: usize = 2_000;
const SERVICES: usize = 500;

fn mesh() -> String {
    let mut text = String::new();
    for n in 0..NAMESPACES {
        text += &format!(
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: n{n}, labels: {{weft.mesh/mode: strict}}}}\n"
        );
    }
    for i in 0..PODS {
        let (n, app) = (i % NAMESPACES, i % SERVICES);
        text += &format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{i}, namespace: n{n}, uid: uid-{i}, labels: {{app: a{app}, tier: t{}, v: one}}}}\nspec: {{nodeName: node-{}, serviceAccountName: a{app}, containers: []}}\nstatus: {{podIPs: [{{ip: 10.{}.{}.{}}}]}}\n",
            i % 3,
            i % 1000,
            i >> 16,
            i >> 8 & 255,
            i & 255
        );
    }
    for i in 0..SERVICES {
        text += &format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: a{i}, namespace: n{}}}\nspec: {{clusterIP: 172.20.{}.{}, selector: {{app: a{i}}}, ports: [{{port: 80}}]}}\n",
            i % NAMESPACES,
            i >> 8,
            i & 255
        );
    }
    for i in 0..POLICIES {
        text += &policy(i, 80);
    }
    text
}

fn policy(i: usize, port: usize) -> String {
    format!(
        "---\napiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: r{i}, namespace: n{}}}\nspec: {{targetRefs: [{{kind: Pod, selector: {{matchLabels: {{app: a{}}}}}}}], rules: [{{networkAttributes: {{ports: [{port}]}}}}]}}\n",
        i % NAMESPACES,
        i % SERVICES
    )
}

/// How long this thread ran on a processor: other work on the machine is not this code's.
fn spent() -> Duration {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn one_change_in_a_large_mesh_is_cheap_and_small() {
    let mut index = Index::new(TrustDomain::new("cluster.local").unwrap());
    assert_eq!(apply(&mut index, &mesh()), Vec::<String>::new());
    let distribution = Distribution::new();
    let begin = spent();
    let mut version = distribution.update(index.update().resources, Instant::now());
    println!("everything: {:?}", spent() - begin);
    let mut fastest = Duration::MAX;
    for port in 1000..1005 {
        apply(&mut index, &policy(7, port));
        let begin = spent();
        let next = distribution.update(index.update().resources, Instant::now());
        fastest = fastest.min(spent() - begin);
        let snapshot = distribution.current().unwrap();
        assert_eq!(snapshot.since(version).upserted.len(), 1, "only the policy is sent");
        version = next;
    }
    // A Pod that gets a label comes under other policies.
    apply(
        &mut index,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p0, namespace: n0, uid: uid-0, labels: {app: a20}}\nspec: {nodeName: node-0, containers: []}\nstatus: {podIPs: [{ip: 10.0.0.0}]}\n",
    );
    let begin = spent();
    distribution.update(index.update().resources, Instant::now());
    let pod = spent() - begin;
    let changed = distribution.current().unwrap().since(version).upserted.len();
    assert_eq!(changed, 3, "the Pod and two Services");
    println!("{PODS} Pods, {POLICIES} policies: a policy {fastest:?}, a Pod {pod:?}");
    let limit = if cfg!(debug_assertions) { 1000 } else { 50 };
    assert!(fastest < Duration::from_millis(limit), "{fastest:?}");
    assert!(pod < Duration::from_millis(2 * limit), "{pod:?}");
}
