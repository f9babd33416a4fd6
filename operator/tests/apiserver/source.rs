//! The watches: every kind, kinds that appear later, malformed objects, and a break that outlasts the server's memory.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::json;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use weft_operator::{
    objects::Kind,
    source::{
        Batch, Change, Source,
        kubernetes::{KubernetesSource, Observed},
    },
};
use weft_runtime::{Tasks, drain};

use crate::{
    objects::{api, apply, gateway_crd, try_apply, weft_crds},
    proxy::Wire,
    server::ApiServer,
};

const WAIT: Duration = Duration::from_secs(60);

const OBJECTS: &str = r#"
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {weft.mesh/mode: strict}}}
---
{apiVersion: v1, kind: Node, metadata: {name: node-a}, spec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24]}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  nodeName: node-a
  containers: [{name: app, image: web, ports: [{name: http, containerPort: 8080}]}]
status: {phase: Running, podIP: 10.1.0.5, podIPs: [{ip: 10.1.0.5}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.1.0.5], conditions: {ready: true}}]
ports: [{name: http, port: 8080, protocol: TCP}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}}
---
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Pod, selector: {matchLabels: {app: web}}}]
  action: ALLOW
  rules: [{sources: [{type: ServiceAccount, serviceAccount: {namespace: shop, name: client}}]}]
---
{apiVersion: weft.mesh/v1alpha1, kind: MeshConfig, metadata: {name: default}, spec: {trustDomain: cluster.local}}
"#;

struct Feed {
    batches: mpsc::Receiver<Batch>,
    /// Changes that came and were not looked at.
    waiting: Vec<Change>,
}

impl Feed {
    async fn all(&mut self) -> Vec<Change> {
        let batch = timeout(WAIT, self.batches.recv()).await.unwrap().unwrap();
        batch.changes.into_iter().map(|(_, change)| change).collect()
    }

    /// The next change that matches; others are dropped.
    async fn until(&mut self, what: &str, test: impl Fn(&Change) -> bool) -> Change {
        let search = async {
            loop {
                if let Some(at) = self.waiting.iter().position(&test) {
                    return self.waiting.remove(at);
                }
                let batch = self.batches.recv().await.unwrap();
                self.waiting.extend(batch.changes.into_iter().map(|(_, change)| change));
            }
        };
        timeout(WAIT, search).await.unwrap_or_else(|_| panic!("{what} did not come"))
    }
}

fn is(change: &Change, kind: Kind, name: &str) -> bool {
    change.key().kind == kind && change.key().name == name
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches() {
    let Some(mut server) = ApiServer::start().await else { return };
    let client = server.client();
    weft_crds(&client).await;
    apply(&client, OBJECTS).await;
    let wire = Wire::to(server.port()).await;
    let observed = Arc::new(Observed::default());
    let source = KubernetesSource::new(server.client_by(wire.port).await, Arc::clone(&observed), Vec::new());
    let (sender, batches) = mpsc::channel(64);
    let (trigger, watcher) = drain::channel();
    let (ended, end) = oneshot::channel();
    let running = Box::new(source).run(sender, watcher);
    let tasks = Tasks::new();
    tasks.spawn("source", async move {
        let _ = ended.send(running.await);
    });
    let mut feed = Feed { batches, waiting: Vec::new() };

    every_kind_is_in_the_first_batch(&mut feed).await;
    malformed_objects_harm_no_other(&client, &mut feed).await;
    kinds_may_appear_later(&client, &mut feed).await;
    status_alone_is_no_change(&client, &mut feed, &observed).await;

    // A break that outlasts what the API server remembers: 410 Gone, a new list, and only differences come of it.
    wire.cut();
    server.stop_apiserver();
    server.start_apiserver();
    server.ready().await;
    let policy = json!({"apiVersion": "weft.mesh/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop"}});
    api(&client, &policy).delete("web", &Default::default()).await.unwrap();
    apply(&client, "{apiVersion: v1, kind: Namespace, metadata: {name: later}}").await;
    server.compact().await;
    server.stop_apiserver();
    server.start_apiserver();
    server.ready().await;
    wire.mend();
    feed.waiting.clear();
    feed.until("the removal", |c| is(c, Kind::AuthorizationPolicy, "web") && matches!(c, Change::Remove(_)))
        .await;
    feed.until("the new namespace", |c| is(c, Kind::Namespace, "later")).await;
    assert!(!feed.waiting.iter().any(|c| is(c, Kind::Pod, "web")), "what did not change came again");

    // A CRD that goes away takes its objects with it.
    let crd = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"});
    api(&client, &crd).delete("httproutes.gateway.networking.k8s.io", &Default::default()).await.unwrap();
    feed.until("the route's removal", |c| is(c, Kind::HttpRoute, "good") && matches!(c, Change::Remove(_)))
        .await;

    trigger.drain(Duration::from_secs(5)).await;
    timeout(WAIT, end).await.unwrap().unwrap().unwrap();
}

async fn every_kind_is_in_the_first_batch(feed: &mut Feed) {
    let all = feed.all().await;
    let bad: Vec<&Change> = all.iter().filter(|c| !matches!(c, Change::Apply(_))).collect();
    assert!(bad.is_empty(), "{bad:?}");
    let kinds: BTreeSet<Kind> = all.iter().map(|c| c.key().kind).collect();
    let expected = BTreeSet::from([
        Kind::Namespace,
        Kind::Node,
        Kind::ServiceCidr,
        Kind::Pod,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::NetworkPolicy,
        Kind::AuthorizationPolicy,
        Kind::MeshConfig,
    ]);
    assert_eq!(kinds, expected);
}

async fn malformed_objects_harm_no_other(client: &kube::Client, feed: &mut Feed) {
    // The schema would refuse them, so it is loosened, as another version of the CRD might be.
    let crd = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"});
    let crds = api(client, &crd);
    let name = "authorizationpolicies.weft.mesh";
    let whole = crds.get(name).await.unwrap();
    let mut loose = whole.clone();
    loose.data["spec"]["versions"][0]["schema"] = json!({"openAPIV3Schema":
        {"type": "object", "x-kubernetes-preserve-unknown-fields": true}});
    crds.replace(name, &Default::default(), &loose).await.unwrap();
    let bad = "{apiVersion: weft.mesh/v1alpha1, kind: AuthorizationPolicy, metadata: {name: bad, namespace: shop}, \
               spec: {targetRefs: 7, action: ALOW}}";
    // Until the API server works with the loosened schema.
    let deadline = tokio::time::Instant::now() + WAIT;
    while let Err(error) = try_apply(client, bad).await {
        assert!(tokio::time::Instant::now() < deadline, "{error:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let change = feed.until("the malformed policy", |c| is(c, Kind::AuthorizationPolicy, "bad")).await;
    assert!(matches!(&change, Change::Bad { message, .. } if message.contains("spec.")), "{change:?}");
    let good = OBJECTS.split("---").find(|d| d.contains("kind: AuthorizationPolicy")).unwrap();
    apply(client, &good.replace("name: web, namespace", "name: after, namespace")).await;
    let change = feed.until("the policy after it", |c| is(c, Kind::AuthorizationPolicy, "after")).await;
    assert!(matches!(change, Change::Apply(_)));
    let policy = json!({"apiVersion": "weft.mesh/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop"}});
    api(client, &policy).delete("bad", &Default::default()).await.unwrap();
    feed.until("its removal", |c| matches!(c, Change::Remove(k) if k.name == "bad")).await;
    let mut strict = crds.get(name).await.unwrap();
    strict.data["spec"] = whole.data["spec"].clone();
    crds.replace(name, &Default::default(), &strict).await.unwrap();
}

async fn kinds_may_appear_later(client: &kube::Client, feed: &mut Feed) {
    gateway_crd(client, "HTTPRoute", "v1").await;
    // Older releases have only the beta version of this one.
    gateway_crd(client, "ReferenceGrant", "v1beta1").await;
    let objects = r#"
{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: bad, namespace: shop}, spec: {rules: none}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: good, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: grant, namespace: shop}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: other}]
  to: [{group: "", kind: Service}]
"#;
    apply(client, objects).await;
    let change = feed.until("the malformed route", |c| is(c, Kind::HttpRoute, "bad")).await;
    assert!(matches!(change, Change::Bad { .. }), "{change:?}");
    let change = feed.until("the route", |c| is(c, Kind::HttpRoute, "good")).await;
    assert!(matches!(&change, Change::Apply(d) if d.generation == 1), "{change:?}");
    let change = feed.until("the grant", |c| is(c, Kind::ReferenceGrant, "grant")).await;
    assert!(matches!(change, Change::Apply(_)), "{change:?}");
}

async fn status_alone_is_no_change(client: &kube::Client, feed: &mut Feed, observed: &Observed) {
    let route = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"namespace": "shop"}});
    let patch = kube::api::Patch::Merge(json!({"status": {"parents": []}}));
    let mut seen = observed.changed();
    seen.borrow_and_update();
    api(client, &route).patch_status("good", &Default::default(), &patch).await.unwrap();
    timeout(WAIT, seen.changed()).await.unwrap().unwrap();
    apply(client, "{apiVersion: v1, kind: Namespace, metadata: {name: after-status}}").await;
    feed.until("the namespace", |c| is(c, Kind::Namespace, "after-status")).await;
    assert!(!feed.waiting.iter().any(|c| is(c, Kind::HttpRoute, "good")), "a status made a change");
}
