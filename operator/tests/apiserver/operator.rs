//! Two whole operators as processes, with no more rights than deploy/ gives them: agents, statuses, Events, and the death
//! of the one that writes.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    coordination::v1::Lease,
    core::v1::{ConfigMap, Pod, ServiceAccount},
    events::v1::Event,
};
use kube::{Api, Client, api::PostParams};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming};
use weft_core::SpiffeId;
use weft_identity::{IssueError, Issuer, client};
use weft_operator::{
    app::SERVER_NAME,
    kubernetes::{BUNDLE, BUNDLE_KEY, LEASE},
};
use weft_proto::control::{self as proto, SubscribeRequest, SubscribeResponse, subscribe_request::Message};
use weft_runtime::Tasks;

use crate::{
    objects::{api, apply, gateway_crd, weft_crds},
    server::{ApiServer, port},
};

const WAIT: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "weft-system";

pub(crate) struct Operator {
    pub(crate) child: Child,
    name: String,
    listen: SocketAddr,
    admin: SocketAddr,
}

impl Operator {
    pub(crate) fn start(kubeconfig: &Path, log: &Path, name: &str) -> Self {
        let at = || SocketAddr::from(([127, 0, 0, 1], port()));
        let (listen, admin) = (at(), at());
        let log = fs::File::create(log.join(format!("{name}.log"))).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_weft-operator"))
            .args(["--source=kubernetes", "--namespace=weft-system"])
            .args([format!("--pod-name={name}"), format!("--listen={listen}"), format!("--admin={admin}")])
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { child, name: name.into(), listen, admin }
    }

    pub(crate) async fn ready(&mut self) {
        let end = Instant::now() + WAIT;
        loop {
            assert!(self.child.try_wait().unwrap().is_none(), "{} ended", self.name);
            if self.get("/readyz").await.starts_with("HTTP/1.1 200") {
                return;
            }
            assert!(Instant::now() < end, "{} is not ready", self.name);
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// The answer of its admin endpoint; empty where it does not answer.
    pub(crate) async fn get(&self, path: &str) -> String {
        let mut answer = String::new();
        if let Ok(mut stream) = TcpStream::connect(self.admin).await {
            let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            if stream.write_all(request.as_bytes()).await.is_ok() {
                let _ = stream.read_to_string(&mut answer).await;
            }
        }
        answer
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An agent that acknowledges whatever it is sent.
pub(crate) struct Agent {
    issuer: client::OperatorIssuer,
    _following: Tasks,
}

impl Agent {
    pub(crate) async fn connect(
        operator: &Operator,
        bundle: &str,
        token: &Path,
    ) -> Result<Self, tonic::Status> {
        let uri = format!("https://{}", operator.listen);
        let channel = client::channel(&uri, SERVER_NAME, bundle.as_bytes()).unwrap();
        let file = client::TokenFile::new(token);
        let (out, requests) = mpsc::channel(4);
        let hello = proto::Hello { version: None, agent_version: "test".into() };
        out.send(SubscribeRequest { message: Some(Message::Hello(hello)) }).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(requests));
        request.metadata_mut().insert("authorization", file.read().await.unwrap());
        let mut control = proto::control_client::ControlClient::new(channel.clone());
        let deltas = control.subscribe(request).await?.into_inner();
        let following = Tasks::new();
        following.spawn("acknowledgements", acknowledge(deltas, out));
        Ok(Self { issuer: client::OperatorIssuer::new(channel, file), _following: following })
    }

    pub(crate) async fn sign(&self, namespace: &str, account: &str) -> Result<(), IssueError> {
        let domain = weft_core::TrustDomain::new("cluster.local").unwrap();
        let id = SpiffeId::service_account(&domain, namespace, account);
        self.issuer.issue(&id).await.map(drop)
    }
}

async fn acknowledge(mut deltas: Streaming<SubscribeResponse>, out: mpsc::Sender<SubscribeRequest>) {
    while let Ok(Some(delta)) = deltas.message().await {
        let ack = proto::Ack { version: delta.version, rejected: vec![] };
        if out.send(SubscribeRequest { message: Some(Message::Ack(ack)) }).await.is_err() {
            return;
        }
    }
}

pub(crate) const OBJECTS: &str = r#"
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {weft.mesh/mode: strict}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: typo, labels: {weft.mesh/mode: strct}}}
---
{apiVersion: v1, kind: Node, metadata: {name: node-a}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: weft-agent, namespace: weft-system}}
---
apiVersion: v1
kind: Pod
metadata: {name: weft-agent-1, namespace: weft-system}
spec: {nodeName: node-a, serviceAccountName: weft-agent, containers: [{name: a, image: a}]}
---
{apiVersion: v1, kind: Node, metadata: {name: node-b}}
---
apiVersion: v1
kind: Pod
metadata: {name: weft-agent-2, namespace: weft-system}
spec: {nodeName: node-b, serviceAccountName: weft-agent, containers: [{name: a, image: a}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node-a, serviceAccountName: web, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.5, podIPs: [{ip: 10.1.0.5}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
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
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules: [{backendRefs: [{name: gone, port: 80}]}]
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client();
    weft_crds(&client).await;
    gateway_crd(&client, "HTTPRoute", "v1").await;
    apply(&client, "{apiVersion: v1, kind: Namespace, metadata: {name: weft-system}}").await;
    let rbac = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize/base/operator-rbac.yaml");
    apply(&client, &fs::read_to_string(rbac).unwrap()).await;
    apply(&client, OBJECTS).await;
    let folder = TempDir::new().unwrap();
    let kubeconfig = server.kubeconfig_as("system:serviceaccount:weft-system:weft-operator");
    let mut operators =
        ["operator-0", "operator-1"].map(|name| Operator::start(&kubeconfig, folder.path(), name));
    for operator in &mut operators {
        operator.ready().await;
    }
    let outcome = std::panic::AssertUnwindSafe(story(&client, &mut operators, folder.path()));
    if let Err(panic) = futures_util::FutureExt::catch_unwind(outcome).await {
        for operator in &operators {
            let log = fs::read_to_string(folder.path().join(format!("{}.log", operator.name)));
            eprintln!("--- {}\n{}", operator.name, log.unwrap_or_default());
        }
        std::panic::resume_unwind(panic);
    }
}

async fn story(client: &Client, operators: &mut [Operator; 2], folder: &Path) {
    let holder = holder(client).await;
    let leader = operators.iter().position(|o| o.name == holder).unwrap();
    let bundle = bundle(client).await;
    let (token, other_token) = (folder.join("token"), folder.join("other-token"));
    private(&token, &agent_token(client, "weft-agent-1").await);
    private(&other_token, &agent_token(client, "weft-agent-2").await);

    // Both serve agents; what is refused says so.
    let agent = Agent::connect(&operators[leader], &bundle, &token).await.unwrap();
    let second = Agent::connect(&operators[1 - leader], &bundle, &other_token).await.unwrap();
    let forged = folder.join("forged");
    private(&forged, &format!("{}x", fs::read_to_string(&token).unwrap()));
    let refused = Agent::connect(&operators[leader], &bundle, &forged).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{refused}");

    // The node rule: a Pod of the account is scheduled on the token's node, or not.
    agent.sign("shop", "web").await.unwrap();
    for (agent, account) in [(&agent, "other"), (&second, "web")] {
        let error = agent.sign("shop", account).await.unwrap_err();
        assert!(matches!(error, IssueError::Denied(_)), "{error}");
    }

    let policy = json!({"apiVersion": "weft.mesh/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop", "name": "web"}});
    let status = condition(client, &policy, "/status/conditions", "Programmed", "True").await;
    // The second node's agent is at the replica that does not write.
    assert_eq!((&status["message"], &status["observedGeneration"]), (&json!("2/2 nodes"), &json!(1)));
    condition(client, &policy, "/status/conditions", "Accepted", "True").await;
    let mesh =
        json!({"apiVersion": "weft.mesh/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "default"}});
    condition(client, &mesh, "/status/conditions", "Accepted", "True").await;
    let route = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "web"}});
    let status = condition(client, &route, "/status/parents/0/conditions", "ResolvedRefs", "False").await;
    assert_eq!(status["reason"], "BackendNotFound");
    let whole = api(client, &route).get("web").await.unwrap();
    let parent = &whole.data["status"]["parents"][0];
    assert_eq!(parent["controllerName"], "weft.mesh/operator");
    assert_eq!(parent["parentRef"]["name"], "web");

    // What is wrong at an object without a status is an Event.
    let events: Api<Event> = Api::namespaced(client.clone(), "default");
    let wait = async {
        loop {
            let all = events.list(&Default::default()).await.unwrap();
            let found = all.items.into_iter().find(|e| {
                e.regarding.as_ref().is_some_and(|r| r.kind.as_deref() == Some("Namespace"))
                    && e.note.as_deref().is_some_and(|n| n.contains("strct"))
            });
            if let Some(event) = found {
                return event;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    let event = timeout(WAIT, wait).await.unwrap();
    assert_eq!(event.regarding.unwrap().name.as_deref(), Some("typo"));
    assert_eq!(event.type_.as_deref(), Some("Warning"));

    // The one that writes is killed; the other does within two seconds.
    operators[leader].kill();
    let killed = Instant::now();
    let next = loop {
        let now = self::holder(client).await;
        if now != holder {
            break now;
        }
        assert!(killed.elapsed() < WAIT, "nobody takes the lease");
        sleep(Duration::from_millis(10)).await;
    };
    let took = killed.elapsed();
    assert_eq!(next, operators[1 - leader].name);
    assert!(took < Duration::from_secs(2), "{took:?}");
    eprintln!("fail-over took {took:?}");
    let other = OBJECTS.split("---").find(|d| d.contains("kind: AuthorizationPolicy")).unwrap();
    apply(client, &other.replace("name: web, namespace", "name: later, namespace")).await;
    let later = json!({"apiVersion": "weft.mesh/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop", "name": "later"}});
    condition(client, &later, "/status/conditions", "Accepted", "True").await;
    let agent = Agent::connect(&operators[1 - leader], &bundle, &token).await.unwrap();
    condition(client, &later, "/status/conditions", "Programmed", "True").await;
    drop((agent, second));

    // The other ends in good order and gives the lease back.
    let last = &mut operators[1 - leader];
    Command::new("kill").arg(last.child.id().to_string()).status().unwrap();
    let wait = async {
        while last.child.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(15), wait).await.unwrap();
    assert!(last.child.try_wait().unwrap().unwrap().success());
    assert_eq!(self::holder(client).await, "");
}

/// Writes a file that only its owner can use, as the kubelet writes tokens.
pub(crate) fn private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

async fn holder(client: &Client) -> String {
    let leases: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let wait = async {
        loop {
            if let Some(lease) = leases.get_opt(LEASE).await.unwrap() {
                return lease.spec.unwrap().holder_identity.unwrap_or_default();
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(WAIT, wait).await.unwrap()
}

pub(crate) async fn bundle(client: &Client) -> String {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
    let wait = async {
        loop {
            if let Some(map) = maps.get_opt(BUNDLE).await.unwrap() {
                return map.data.unwrap().remove(BUNDLE_KEY).unwrap();
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(WAIT, wait).await.unwrap()
}

pub(crate) async fn agent_token(client: &Client, pod: &str) -> String {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let uid = pods.get(pod).await.unwrap().metadata.uid;
    let spec = TokenRequestSpec {
        audiences: vec!["weft-operator".into()],
        bound_object_ref: Some(BoundObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(pod.into()),
            uid,
        }),
        expiration_seconds: Some(3600),
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    let request = TokenRequest { spec, ..TokenRequest::default() };
    let answer = accounts.create_token_request("weft-agent", &PostParams::default(), &request).await.unwrap();
    answer.status.unwrap().token
}

/// Waits for a condition with a status.
async fn condition(client: &Client, object: &Value, place: &str, kind: &str, status: &str) -> Value {
    let (api, name) = (api(client, object), object["metadata"]["name"].as_str().unwrap());
    let mut last = Value::Null;
    let end = Instant::now() + WAIT;
    while Instant::now() < end {
        let found = api.get(name).await.unwrap();
        last = found.data.pointer(place).cloned().unwrap_or_default();
        let condition = last.as_array().into_iter().flatten().find(|c| c["type"] == kind);
        if let Some(condition) = condition.filter(|c| c["status"] == status) {
            return condition.clone();
        }
        sleep(Duration::from_millis(50)).await;
    }
    panic!("{object} has no {kind}={status}: {last}");
}

/// What a large cluster costs: time to the first answer, memory, and one policy's way to its status.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes of making objects; run it by name to measure"]
async fn ten_thousand_pods() {
    const PODS: usize = 10_000;
    const POLICIES: usize = 2_000;
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client();
    weft_crds(&client).await;
    apply(&client, "{apiVersion: v1, kind: Namespace, metadata: {name: weft-system}}").await;
    let namespaces: String = (0..20)
        .map(|n| format!("---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: n{n}}}}}\n"))
        .collect();
    apply(&client, &namespaces).await;
    let env: Vec<Value> =
        (0..20).map(|i| json!({"name": format!("VAR_{i}"), "value": "x".repeat(40)})).collect();
    let pod = |i: usize| {
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("p{i}"), "namespace": format!("n{}", i % 20),
                "labels": {"app": format!("a{}", i % 500), "version": "v1", "pod-template-hash": "abc"}},
            "spec": {"nodeName": format!("node-{}", i % 100), "serviceAccountName": "web",
                "containers": [{"name": "app", "image": "registry.example/app:1", "env": env,
                    "ports": [{"name": "http", "containerPort": 8080}]}]}})
    };
    let policy = |i: usize| {
        json!({"apiVersion": "weft.mesh/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": format!("r{i}"), "namespace": format!("n{}", i % 20)},
            "spec": {"targetRefs": [{"group": "", "kind": "Pod",
                "selector": {"matchLabels": {"app": format!("a{}", i % 500)}}}],
                "rules": [{"networkAttributes": {"ports": [8080]}}]}})
    };
    let objects = (0..PODS).map(pod).chain((0..POLICIES).map(policy));
    let made = objects.map(|object| {
        let client = client.clone();
        async move {
            let typed = serde_json::from_value(object.clone()).unwrap();
            api(&client, &object).create(&PostParams::default(), &typed).await.unwrap();
        }
    });
    futures_util::StreamExt::for_each_concurrent(futures_util::stream::iter(made), 32, |f| f).await;
    let rbac = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize/base/operator-rbac.yaml");
    apply(&client, &fs::read_to_string(rbac).unwrap()).await;
    let folder = TempDir::new().unwrap();
    let kubeconfig = server.kubeconfig_as("system:serviceaccount:weft-system:weft-operator");
    let begun = Instant::now();
    let mut operator = Operator::start(&kubeconfig, folder.path(), "operator-0");
    operator.ready().await;
    let ready = begun.elapsed();
    let memory = |field: &str| {
        let status = fs::read_to_string(format!("/proc/{}/status", operator.child.id())).unwrap();
        status.lines().find(|l| l.starts_with(field)).unwrap_or_default().to_owned()
    };
    eprintln!("ready after {ready:?}; {}; {}", memory("VmRSS"), memory("VmHWM"));
    let last = policy(POLICIES - 1);
    condition(&client, &last, "/status/conditions", "Accepted", "True").await;
    eprintln!("the last status after {:?}; {}; {}", begun.elapsed(), memory("VmRSS"), memory("VmHWM"));
    let other = policy(POLICIES);
    let changed = Instant::now();
    let typed = serde_json::from_value(other.clone()).unwrap();
    api(&client, &other).create(&PostParams::default(), &typed).await.unwrap();
    condition(&client, &other, "/status/conditions", "Accepted", "True").await;
    eprintln!("a new policy's status after {:?}", changed.elapsed());
}
