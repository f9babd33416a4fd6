//! The whole operator in process: a real folder, real TLS, real gRPC.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use prometheus_client::registry::Registry;
use tempfile::TempDir;
use tokio::{sync::mpsc, time::timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Streaming,
    transport::{Channel, Server, server::TcpIncoming},
};
use weft_core::{Delta, MeshState, Resource, ResourceKey, SpiffeId, TrustDomain, Version};
use weft_identity::{
    CredentialManager, CredentialReader, Credentials, CsrSigner, IssueError, SvidKey,
    ca::{EmbeddedCa, MAX_SVID_LIFETIME},
    client,
};
use weft_operator::{
    app::{self, Operator, SERVER_NAME},
    auth::Tokens,
    authority::Authority,
    cli::{RunArgs, SourceArg},
    distribution::Distribution,
    grpc::identity::IdentityService,
    index::Index,
    metrics::Metrics,
    objects,
    source::Change,
};
use weft_proto::control::{
    self as proto, SubscribeRequest, SubscribeResponse, identity_server::IdentityServer,
    subscribe_request::Message,
};
use weft_runtime::{DrainTrigger, DrainWatcher, Tasks, drain, durable};

const WAIT: Duration = Duration::from_secs(20);

struct Fixture {
    objects: TempDir,
    state: TempDir,
    operator: Operator,
    trigger: DrainTrigger,
}

struct Agent {
    out: mpsc::Sender<SubscribeRequest>,
    deltas: Streaming<SubscribeResponse>,
    state: MeshState,
}

async fn start(objects: &[(&str, &str)]) -> Fixture {
    let (folder, state) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    for (name, text) in objects {
        fs::write(folder.path().join(name), text).unwrap();
    }
    run(folder, state).await
}

fn args(folder: &TempDir, state: &TempDir) -> RunArgs {
    let any = "127.0.0.1:0".parse().unwrap();
    RunArgs {
        source: SourceArg::Dir(folder.path().into()),
        state_dir: Some(state.path().into()),
        namespace: "weft-system".into(),
        pod_name: None,
        listen: any,
        admin: any,
        trust_domain: None,
        log_json: false,
    }
}

async fn run(folder: TempDir, state: TempDir) -> Fixture {
    let args = args(&folder, &state);
    let (operator, trigger) = app::build(&args).await.unwrap();
    timeout(WAIT, operator.readiness.wait()).await.unwrap();
    Fixture { objects: folder, state, operator, trigger }
}

impl Fixture {
    fn channel(&self) -> Channel {
        let bundle = fs::read(self.state.path().join("bundle.pem")).unwrap();
        client::channel(&format!("https://{}", self.operator.listen), SERVER_NAME, &bundle).unwrap()
    }

    fn token(&self, node: &str) -> std::path::PathBuf {
        Tokens::open_or_create(self.state.path()).unwrap().issue(node).unwrap()
    }

    async fn subscribe(&self, token: &Path, held: Version) -> Result<Agent, tonic::Status> {
        let (out, requests) = mpsc::channel(4);
        let version = Some(proto::Version { epoch: held.epoch, sequence: held.sequence });
        let hello = proto::Hello { version, agent_version: "test".into() };
        out.send(SubscribeRequest { message: Some(Message::Hello(hello)) }).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(requests));
        let header = client::TokenFile::new(token).read().await.unwrap();
        request.metadata_mut().insert("authorization", header);
        let mut control = proto::control_client::ControlClient::new(self.channel());
        let deltas = control.subscribe(request).await?.into_inner();
        Ok(Agent { out, deltas, state: MeshState::default() })
    }

    fn write(&self, name: &str, text: &str) {
        let apart = self.objects.path().join(".apart");
        fs::write(&apart, text).unwrap();
        fs::rename(apart, self.objects.path().join(name)).unwrap();
    }
}

impl Agent {
    async fn next(&mut self) -> Delta {
        let message = timeout(WAIT, self.deltas.message()).await.unwrap().unwrap().unwrap();
        let version = message.version.unwrap();
        let delta = Delta {
            version: Version { epoch: version.epoch, sequence: version.sequence },
            full: message.full,
            upserted: message.upserted.iter().map(|r| serde_json::from_slice(&r.json).unwrap()).collect(),
            removed: message.removed.iter().map(|k| serde_json::from_str(k).unwrap()).collect(),
        };
        self.state = self.state.apply(&delta);
        delta
    }

    async fn ack(&self, version: Version) {
        let version = Some(proto::Version { epoch: version.epoch, sequence: version.sequence });
        let ack = proto::Ack { version, rejected: vec![] };
        self.out.send(SubscribeRequest { message: Some(Message::Ack(ack)) }).await.unwrap();
    }
}

fn pod(name: &str, node: &str, account: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, annotations: {{weft.mesh/netns: /run/netns/{name}}}}}\nspec: {{nodeName: {node}, serviceAccountName: {account}, containers: []}}\n---\n"
    )
}

fn policy(port: u32) -> String {
    format!(
        "apiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {{targetRefs: [{{kind: Pod, selector: {{}}}}], rules: [{{networkAttributes: {{ports: [{port}]}}}}]}}\n"
    )
}

fn base() -> String {
    "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {weft.mesh/mode: strict}}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: node-a}\n---\n"
        .to_owned()
        + &pod("client", "node-a", "client")
        + &pod("web", "node-b", "web")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_follows_resumes_and_starts_over() {
    let f = start(&[("base.yaml", &base())]).await;
    let token = f.token("node-a");
    let mut agent = f.subscribe(&token, Version::default()).await.unwrap();
    let first = agent.next().await;
    assert!(first.full);
    let netns: Vec<_> =
        agent.state.workloads().map(|w| (w.name.name.to_string(), w.netns.is_some())).collect();
    let own = |name: &str| netns.contains(&(name.to_owned(), true));
    assert!(own("client") && !own("web"), "{netns:?}");
    agent.ack(first.version).await;

    f.write("policy.yaml", &policy(80));
    let second = agent.next().await;
    assert!(!second.full);
    assert!(agent.state.workloads().all(|w| w.is_node() || w.policies.len() == 1));
    assert_eq!(second.version.sequence, first.version.sequence + 1);
    drop(agent);

    // What it missed while it was away.
    fs::remove_file(f.objects.path().join("policy.yaml")).unwrap();
    let mut newest = f.operator.distribution.subscribe();
    let gone = timeout(
        WAIT,
        newest.wait_for(|s| s.as_ref().is_some_and(|s| s.version.sequence > second.version.sequence)),
    );
    drop(gone.await.unwrap().unwrap());
    let mut agent = f.subscribe(&token, second.version).await.unwrap();
    let third = agent.next().await;
    assert!(!third.full);
    assert_eq!(third.removed, [ResourceKey::Policy(weft_core::NamespacedName::new("shop", "p"))]);
    drop(agent);

    // A version of another operator.
    let foreign = Version { epoch: first.version.epoch ^ 1, sequence: third.version.sequence };
    let mut agent = f.subscribe(&token, foreign).await.unwrap();
    assert!(agent.next().await.full);
    assert!(f.trigger.drain(WAIT).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_nodes_own_pods_are_signed_for() {
    let f = start(&[("base.yaml", &base())]).await;
    let issuer = client::OperatorIssuer::new(f.channel(), client::TokenFile::new(f.token("node-a")));
    let domain = TrustDomain::new("cluster.local").unwrap();
    let key = SvidKey::generate().unwrap();
    let own = SpiffeId::service_account(&domain, "shop", "client");
    let signed = issuer.sign(&own, key.request(&own).unwrap()).await.unwrap();
    assert_eq!(weft_identity::peer_identity(&signed.chain).unwrap(), own);
    assert_eq!(signed.roots.len(), 1);

    let other = SpiffeId::service_account(&domain, "shop", "web");
    let refused = issuer.sign(&other, key.request(&other).unwrap()).await.unwrap_err();
    assert!(matches!(&refused, IssueError::Denied(why) if why.contains("node rule")), "{refused}");

    // The node's own identity: to its agent, and to no other's.
    let itself = SpiffeId::node(&domain, "node-a");
    let signed = issuer.sign(&itself, key.request(&itself).unwrap()).await.unwrap();
    assert_eq!(weft_identity::peer_identity(&signed.chain).unwrap(), itself);
    let neighbour = SpiffeId::node(&domain, "node-b");
    let refused = issuer.sign(&neighbour, key.request(&neighbour).unwrap()).await.unwrap_err();
    assert!(matches!(&refused, IssueError::Denied(why) if why.contains("node \"node-b\"")), "{refused}");

    let forged = f.state.path().join("forged");
    durable::replace(&forged, b"eyJ.eyJ.sig", 0o600).unwrap();
    let status = f.subscribe(&forged, Version::default()).await.err().unwrap();
    assert_eq!(status.code(), Code::Unauthenticated);
    let metrics = metrics(f.operator.admin).await;
    assert!(metrics.contains("weft_operator_svids_refused_total{reason=\"node_rule\"} 2"), "{metrics}");
    assert!(metrics.contains("weft_operator_unauthenticated_calls_total{reason=\"invalid\"} 1"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_signed_where_spire_is_the_issuer() {
    let mesh = "{apiVersion: weft.mesh/v1alpha1, kind: MeshConfig, metadata: {name: default},
        spec: {issuer: {type: Spire, spire: {socketPath: /run/spire/admin.sock}}}}";
    let f = start(&[("base.yaml", &base()), ("mesh.yaml", mesh)]).await;
    let issuer = client::OperatorIssuer::new(f.channel(), client::TokenFile::new(f.token("node-a")));
    let domain = TrustDomain::new("cluster.local").unwrap();
    let key = SvidKey::generate().unwrap();
    for id in [SpiffeId::service_account(&domain, "shop", "client"), SpiffeId::node(&domain, "node-a")] {
        let refused = issuer.sign(&id, key.request(&id).unwrap()).await.unwrap_err().to_string();
        assert!(refused.contains("the SPIRE agent at /run/spire/admin.sock does"), "{refused}");
    }
    let metrics = metrics(f.operator.admin).await;
    assert!(metrics.contains("weft_operator_svids_refused_total{reason=\"issuer\"} 2"), "{metrics}");
}

async fn metrics(address: std::net::SocketAddr) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    timeout(WAIT, stream.read_to_string(&mut text)).await.unwrap().unwrap();
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_changes_reach_the_node_and_the_status_in_time() {
    let f = start(&[("base.yaml", &base()), ("policy.yaml", &policy(1))]).await;
    let mut agent = f.subscribe(&f.token("node-a"), Version::default()).await.unwrap();
    let first = agent.next().await;
    agent.ack(first.version).await;
    let mut pushed = Vec::new();
    let mut written = Vec::new();
    for port in 1000..1100 {
        let begin = Instant::now();
        f.write("policy.yaml", &policy(port));
        let delta = agent.next().await;
        pushed.push(begin.elapsed());
        let changed = delta.upserted.iter().any(|r| matches!(r, Resource::Policy(_)));
        assert!(changed, "{delta:?}");
        agent.ack(delta.version).await;
        // The summary is what people and scripts wait for; it is polled here as they would.
        let acked = format!(
            "\"version\":{{\"epoch\":{},\"sequence\":{}}}",
            delta.version.epoch, delta.version.sequence
        );
        let path = f.objects.path().join("status/summary.json");
        let poll = async {
            while !fs::read_to_string(&path).unwrap_or_default().contains(&acked) {
                tokio::task::yield_now().await;
            }
        };
        timeout(WAIT, poll).await.unwrap();
        written.push(begin.elapsed());
    }
    pushed.sort();
    written.sort();
    println!(
        "pushed: median {:?}, p99 {:?}; status: median {:?}, p99 {:?}",
        pushed[50], pushed[98], written[50], written[98]
    );
    assert!(written[98] < Duration::from_millis(200), "p99 {:?}", written[98]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_object_is_named_and_everything_else_goes_on() {
    let f = start(&[("base.yaml", &base()), ("policy.yaml", &policy(80))]).await;
    let mut agent = f.subscribe(&f.token("node-a"), Version::default()).await.unwrap();
    agent.next().await;
    f.write("policy.yaml", &policy(0));
    f.write("more.yaml", &pod("late", "node-a", "late"));
    let delta = agent.next().await;
    assert!(delta.removed.is_empty());
    assert_eq!(agent.state.policies().count(), 1, "the last good form goes on");
    assert!(agent.state.workloads().any(|w| &*w.name.name == "late"));
    let path = f.objects.path().join("status/AuthorizationPolicy-shop-p.yaml");
    let poll = async {
        while !fs::read_to_string(&path)
            .unwrap_or_default()
            .contains("spec.rules[0].networkAttributes.ports[0]: 0 is no port")
        {
            tokio::task::yield_now().await;
        }
    };
    timeout(WAIT, poll).await.unwrap();
}

/// Whether the Pod web of the agent's state takes a call of the Pod client.
fn takes(state: &MeshState) -> bool {
    use weft_core::policy::eval::{Access, Caller, Outcome, TCP, judge};
    let pod = |name: &str| state.workloads().find(|w| &*w.name.name == name).unwrap();
    let caller = Caller::Authenticated(&pod("client").identity);
    let access = Access { caller, destination: pod("web"), port: 80, protocol: TCP };
    judge(state, &access).outcome == Outcome::Allow
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_breaks_before_a_restart_stays_enforced() {
    let deny = policy(80).replace("rules:", "action: DENY, rules:");
    let broken = deny.replace("DENY", "NEVER");
    let mesh = "apiVersion: weft.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: {trustDomain: shop.example}\n";
    let f = start(&[("base.yaml", &base()), ("policy.yaml", &deny), ("mesh.yaml", mesh)]).await;
    let Fixture { objects, state, operator, trigger } = f;
    assert!(trigger.drain(WAIT).await);
    operator.tasks.join(WAIT).await;
    for (name, text) in [("policy.yaml", &*broken), ("base.yaml", ": : [broken"), ("mesh.yaml", "[")] {
        fs::write(objects.path().join(name), text).unwrap();
    }
    let f = run(objects, state).await;
    let mut agent = f.subscribe(&f.token("node-a"), Version::default()).await.unwrap();
    agent.next().await;
    assert_eq!(agent.state.policies().count(), 1);
    assert!(!takes(&agent.state));
    assert_eq!(agent.state.workloads().next().unwrap().identity.trust_domain(), "shop.example");
    assert!(f.trigger.drain(WAIT).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_that_was_never_good_denies_on_the_nodes() {
    let f = start(&[("base.yaml", &base())]).await;
    let mut agent = f.subscribe(&f.token("node-a"), Version::default()).await.unwrap();
    agent.next().await;
    assert!(takes(&agent.state));
    f.write("policy.yaml", &policy(0));
    agent.next().await;
    assert_eq!(agent.state.policies().count(), 0);
    assert!(!takes(&agent.state));
    f.write("policy.yaml", &policy(80));
    agent.next().await;
    assert!(takes(&agent.state));
}

/// A node with credentials from an operator of which the test holds the CA.
struct Node {
    manager: CredentialManager,
    reader: CredentialReader,
}

impl Node {
    fn start(name: &str, address: SocketAddr, state: &Path, tasks: &Tasks, drain: &DrainWatcher) -> Self {
        let token = Tokens::open_or_create(state).unwrap().issue(name).unwrap();
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        let issuer = client::OperatorIssuer::new(channel, client::TokenFile::new(token));
        let (manager, reader) = CredentialManager::new(Arc::new(issuer), None);
        tasks.spawn("credentials", manager.clone().run(drain.clone()));
        Self { manager, reader }
    }

    async fn roots(&self, id: &SpiffeId, roots: usize) -> Arc<Credentials> {
        let mut held = self.reader.subscribe(id);
        let wanted = |c: &Option<Arc<Credentials>>| c.as_ref().is_some_and(|c| c.roots().len() == roots);
        let held = timeout(WAIT, held.wait_for(wanted)).await.unwrap().unwrap().clone();
        held.unwrap()
    }
}

/// Each calls the other.
async fn handshakes(one: &Credentials, two: &Credentials) {
    for (caller, called) in [(one, two), (two, one)] {
        let (near, far) = tokio::io::duplex(64 << 10);
        let name = rustls_pki_types::ServerName::try_from("10.0.0.1").unwrap();
        let connect = TlsConnector::from(caller.client_config(called.id())).connect(name, near);
        let accept = TlsAcceptor::from(called.server_config()).accept(far);
        let (connected, accepted) = tokio::join!(connect, accept);
        connected.unwrap();
        accepted.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_replaced_without_a_refused_handshake() {
    let domain = TrustDomain::new("cluster.local").unwrap();
    let state = TempDir::new().unwrap();
    let (tasks, (trigger, drain)) = (Tasks::new(), drain::channel());
    let mut index = Index::new(domain.clone());
    for document in objects::parse(&base()) {
        index.apply(&"base.yaml".into(), Change::Apply(document.unwrap()));
    }
    let distribution = Arc::new(Distribution::new());
    distribution.publish(index.build().resources, Instant::now());
    let (old, new) =
        (EmbeddedCa::generate(domain.clone()).unwrap(), EmbeddedCa::generate(domain.clone()).unwrap());
    let authority = Authority::new(old, Duration::ZERO);
    let service = IdentityService {
        distribution,
        callers: Arc::new(Tokens::open_or_create(state.path()).unwrap()),
        ca: authority.subscribe(),
        metrics: Metrics::new(&mut Registry::default()),
        drain: drain.clone(),
    };
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let stop = drain.clone();
    tasks.spawn("operator", async move {
        let router = Server::builder().add_service(IdentityServer::new(service));
        router.serve_with_incoming_shutdown(incoming, stop.draining()).await.unwrap();
    });
    let [a, b] = ["node-a", "node-b"].map(|n| Node::start(n, address, state.path(), &tasks, &drain));
    let [client, web] = ["client", "web"].map(|n| SpiffeId::service_account(&domain, "shop", n));
    a.manager.want([client.clone()].into());
    b.manager.want([web.clone()].into());
    let (first, other) = (a.roots(&client, 1).await, b.roots(&web, 1).await);
    handshakes(&first, &other).await;

    // Trusted on both nodes, it signs nothing yet.
    authority.offer(new, SystemTime::now());
    let (second, other) = (a.roots(&client, 2).await, b.roots(&web, 2).await);
    assert_eq!((second.serial(), second.not_after()), (first.serial(), first.not_after()));
    // Nodes do not learn it in the same moment.
    handshakes(&first, &other).await;
    handshakes(&second, &other).await;

    // It signs: what comes now is good on both sides of the change.
    assert!(authority.tick(SystemTime::now()));
    a.manager.want([].into());
    a.manager.want([client.clone()].into());
    let third = a.roots(&client, 2).await;
    assert_ne!(third.serial(), first.serial());
    handshakes(&third, &other).await;

    // The old one goes: what it signed is replaced at once, without waiting for its renewal.
    authority.tick(SystemTime::now() + 2 * MAX_SVID_LIFETIME);
    let (fourth, last) = (a.roots(&client, 1).await, b.roots(&web, 1).await);
    assert_eq!(fourth.serial(), third.serial());
    assert_ne!(last.serial(), other.serial());
    handshakes(&fourth, &last).await;
    assert!(trigger.drain(WAIT).await);
    assert_eq!(tasks.join(WAIT).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_that_asks_for_a_ca_of_a_secret_is_refused_at_the_start() {
    let (folder, state) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let text = "apiVersion: weft.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\n\
                spec: {issuer: {embedded: {secretRef: {namespace: pki, name: mesh}}}}\n";
    fs::write(folder.path().join("mesh.yaml"), text).unwrap();
    for trust_domain in [None, Some("cluster.local".into())] {
        let args = RunArgs { trust_domain, ..args(&folder, &state) };
        let error = app::build(&args).await.err().unwrap().to_string();
        assert!(error.contains("mesh.yaml") && error.contains("there is no Secret pki/mesh"), "{error}");
    }
    assert!(!state.path().join("ca.pem").exists(), "another root was made");
}
