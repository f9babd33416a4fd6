//! Two nodes, an operator's state and Pods, all in one process on loopback addresses.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixListener},
    },
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use rand::Rng;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Notify, watch},
};
use weft_core::{
    Delta, MeshConfig, MeshState, NamespacedName, Policy, Resource, Service, SpiffeId, SubjectId,
    TrustDomain, Version, Workload, WorkloadUid,
    config::{SameNode, Telemetry, UnknownPods},
    flow::{FlowRecord, FlowSink},
    policy::{Action, Protocol, Rule, Source},
    service::{AppProtocol, Endpoint, ServicePort},
    workload::{FailMode, Mode, Owner},
};
use weft_identity::{CredentialPublisher, Credentials, SvidKey, ca::EmbeddedCa, credentials};
use weft_runtime::{Tasks, Workers, drain};

use crate::{Family, OriginalDst, PodHandle, PodListeners, PodNet, Proxy, ProxyConfig};

/// Longer than anything here may take; a test that waits this long failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: not in time"))
}

/// A loopback address that no other test uses, be it of this process or of another one.
pub(super) fn address() -> IpAddr {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static BLOCK: LazyLock<(u8, UnixListener)> = LazyLock::new(block);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let octet = |v: u64| u8::try_from(v % 250).expect("below 250") + 1;
    IpAddr::V4(Ipv4Addr::new(127, BLOCK.0, octet(n / 250), octet(n)))
}

/// A port that is free at every address. The kernel hands none out below its ephemeral range, so it stays free.
fn port() -> u16 {
    let mut candidates = std::iter::repeat_with(|| rand::rng().random_range(10_000..30_000));
    let free = |port: &u16| std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok();
    candidates.find(free).expect("a free port")
}

/// A /16 of loopback addresses for this process alone: whoever holds the abstract socket of that name
/// has them. Like the addresses such a name belongs to the network namespace, and it goes with the process.
fn block() -> (u8, UnixListener) {
    let claim = |n: u8| {
        let name = UnixAddr::from_abstract_name(format!("weft-proxy-tests-{n}")).expect("a name");
        Some((n, UnixListener::bind_addr(&name).ok()?))
    };
    (100..=250).find_map(claim).expect("more test processes than blocks of addresses")
}

pub(super) struct Mesh {
    pub(super) ca: EmbeddedCa,
    state: watch::Sender<Arc<MeshState>>,
    port: u16,
    sequence: AtomicU64,
}

pub(super) struct Node {
    pub(super) name: &'static str,
    pub(super) proxy: Proxy,
    pub(super) records: Arc<Records>,
    pub(super) publisher: CredentialPublisher,
    pub(super) drain: drain::DrainTrigger,
    pub(super) registry: Registry,
    pub(super) tasks: Tasks,
}

#[derive(Debug)]
pub(super) struct TestNet {
    ip: IpAddr,
    dialled: Mutex<HashMap<SocketAddr, OriginalDst>>,
    pub(super) shown: Mutex<Vec<SocketAddr>>,
}

impl PodNet for TestNet {
    fn socket(&self, family: Family, shown: Option<SocketAddr>) -> io::Result<TcpSocket> {
        assert_eq!(family == Family::V4, self.ip.is_ipv4());
        let socket = new_socket(self.ip)?;
        match shown {
            Some(client) => self.shown.lock().push(client),
            None => socket.bind(SocketAddr::new(self.ip, 0))?,
        }
        Ok(socket)
    }

    fn original_dst(&self, accepted: &TcpStream) -> io::Result<Option<OriginalDst>> {
        Ok(self.dialled.lock().remove(&accepted.peer_addr()?))
    }
}

/// A socket of the address's family.
pub(super) fn new_socket(ip: IpAddr) -> io::Result<TcpSocket> {
    if ip.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
}

pub(super) struct Pod {
    pub(super) uid: WorkloadUid,
    pub(super) ip: IpAddr,
    pub(super) net: Arc<TestNet>,
    pub(super) workload: Workload,
    outbound: SocketAddr,
    /// Where the proxy takes plain connections.
    pub(super) inbound: SocketAddr,
}

#[derive(Default)]
pub(super) struct Records {
    all: Mutex<Vec<FlowRecord>>,
    more: Notify,
}

impl FlowSink for Records {
    fn record(&self, record: FlowRecord) {
        self.all.lock().push(record);
        self.more.notify_waiters();
    }
}

impl Records {
    /// The first record of that kind, waited for.
    pub(super) async fn find(&self, what: &str, wanted: impl Fn(&FlowRecord) -> bool) -> FlowRecord {
        soon(what, async {
            loop {
                let mut more = std::pin::pin!(self.more.notified());
                more.as_mut().enable();
                if let Some(found) = self.all.lock().iter().find(|r| wanted(r)) {
                    return found.clone();
                }
                more.await;
            }
        })
        .await
    }
}

impl Mesh {
    pub(super) fn new() -> Self {
        let domain = TrustDomain::new("mesh.test").expect("a domain");
        let mesh = Self {
            ca: EmbeddedCa::generate(domain.clone()).expect("a CA"),
            state: watch::Sender::new(Arc::default()),
            port: port(),
            sequence: AtomicU64::new(1),
        };
        mesh.apply(vec![Resource::Config(Arc::new(config(domain)))], vec![]);
        mesh
    }

    pub(super) fn tunnel_port(&self) -> u16 {
        self.port
    }

    pub(super) fn apply(&self, upserted: Vec<Resource>, removed: Vec<weft_core::ResourceKey>) {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let delta = Delta { version: Version { epoch: 1, sequence }, full: false, upserted, removed };
        self.state.send_modify(|state| *state = Arc::new(state.apply(&delta)));
    }

    pub(super) fn node(&self, name: &'static str) -> Node {
        self.node_with(name, |_| {})
    }

    pub(super) fn node_with(&self, name: &'static str, change: impl FnOnce(&mut ProxyConfig)) -> Node {
        self.node_of(name, Workers::none(), change)
    }

    pub(super) fn node_of(
        &self,
        name: &'static str,
        workers: Workers,
        change: impl FnOnce(&mut ProxyConfig),
    ) -> Node {
        let (publisher, reader) = credentials();
        let (drain, watcher) = drain::channel();
        let (tasks, records, mut registry) =
            (Tasks::new(), Arc::new(Records::default()), Registry::default());
        let mut config = ProxyConfig { tunnel_port: self.port, node: name.into(), ..ProxyConfig::default() };
        change(&mut config);
        let state = self.state.subscribe();
        let proxy = Proxy::new(
            config,
            state,
            reader,
            records.clone(),
            &mut registry,
            tasks.clone(),
            workers,
            watcher,
        );
        Node { name, proxy, records, publisher, drain, registry, tasks }
    }

    /// Credentials of an id, signed by `ca`.
    pub(super) fn credentials(ca: &EmbeddedCa, id: &SpiffeId) -> Credentials {
        Self::credentials_for(ca, id, Duration::from_secs(3600))
    }

    /// [`Mesh::credentials`] that end after `life`.
    pub(super) fn credentials_for(ca: &EmbeddedCa, id: &SpiffeId, life: Duration) -> Credentials {
        let key = SvidKey::generate().expect("a key");
        let request = key.request(id).expect("a request");
        let signed = ca.sign(id, &request, life).expect("a signature");
        Credentials::new(id, key, signed, SystemTime::now()).expect("credentials")
    }

    /// A Pod of that service account, enrolled on `node`, with credentials.
    pub(super) fn pod(&self, node: &Node, account: &str) -> Pod {
        let pod = self.describe(node, account);
        node.publisher.publish(Self::credentials(&self.ca, &pod.workload.identity));
        pod
    }

    /// [`Mesh::pod`] without credentials.
    pub(super) fn describe(&self, node: &Node, account: &str) -> Pod {
        let ip = address();
        self.enrol(node, account, ip, vec![ip], true)
    }

    /// Two Pods with IPv6 addresses. There is one such loopback address: both proxies use it, so the Pods have one
    /// identity and only the second one has a tunnel listener.
    pub(super) fn v6_pods(&self, a: &Node, b: &Node) -> (Pod, Pod) {
        let ip = IpAddr::V6(Ipv6Addr::LOCALHOST);
        let other = "fd00::c".parse().expect("an address");
        let pods = (self.enrol(a, "web", ip, vec![other], false), self.enrol(b, "web", ip, vec![ip], true));
        for (node, pod) in [(a, &pods.0), (b, &pods.1)] {
            node.publisher.publish(Self::credentials(&self.ca, &pod.workload.identity));
        }
        pods
    }

    /// A Pod that the mesh knows and no proxy serves: a test answers at its tunnel port.
    pub(super) fn ghost(&self, account: &str) -> (Workload, std::net::TcpListener) {
        let ip = address();
        let workload = self.workload("nowhere", account, vec![ip]);
        self.apply(vec![Resource::Workload(Arc::new(workload.clone()))], vec![]);
        (workload, std::net::TcpListener::bind((ip, self.port)).expect("a listener"))
    }

    fn workload(&self, node: &str, account: &str, addresses: Vec<IpAddr>) -> Workload {
        static SUBJECT: AtomicU64 = AtomicU64::new(1000);
        let subject = SubjectId(u32::try_from(SUBJECT.fetch_add(1, Ordering::Relaxed)).expect("small"));
        Workload {
            uid: WorkloadUid::from(format!("uid-{}", subject.0).as_str()),
            name: NamespacedName::new("shop", &format!("{account}-1")),
            service_account: account.into(),
            identity: SpiffeId::service_account(self.ca.trust_domain(), "shop", account),
            subject,
            owner: Owner { kind: "Deployment".into(), name: account.into() },
            node: node.into(),
            zone: "".into(),
            labels: BTreeMap::new(),
            addresses,
            named_ports: BTreeMap::new(),
            mode: Mode::Strict,
            fail_mode: FailMode::Closed,
            policies: Vec::new(),
            network_policy: false,
            netns: None,
            host_addresses: Vec::new(),
        }
    }

    fn enrol(&self, node: &Node, account: &str, ip: IpAddr, addresses: Vec<IpAddr>, served: bool) -> Pod {
        let workload = self.workload(node.name, account, addresses);
        let uid = workload.uid.clone();
        self.apply(vec![Resource::Workload(Arc::new(workload.clone()))], vec![]);
        let net = Arc::new(TestNet { ip, dialled: Mutex::default(), shown: Mutex::default() });
        let bind = |port| std::net::TcpListener::bind((ip, port)).expect("a listener");
        let (outbound, inbound) = (bind(0), bind(0));
        let (inbound_address, tunnel) =
            (inbound.local_addr().expect("an address"), served.then(|| bind(self.port)));
        let outbound_address = outbound.local_addr().expect("an address");
        let listeners = PodListeners {
            outbound: vec![outbound],
            inbound: vec![inbound],
            tunnel: tunnel.into_iter().collect(),
        };
        node.proxy
            .add_pod(PodHandle { uid: uid.clone(), net: net.clone(), listeners })
            .expect("the Pod is taken");
        Pod { uid, ip, net, workload, outbound: outbound_address, inbound: inbound_address }
    }

    /// A policy that selects `pod`; the Pod is described again with it.
    pub(super) fn police(&self, pod: &mut Pod, action: Action, rules: Vec<Rule>) {
        let name = NamespacedName::new("shop", &format!("{action:?}").to_ascii_lowercase());
        if !pod.workload.policies.contains(&name) {
            pod.workload.policies.push(name.clone());
        }
        self.apply(
            vec![
                Resource::Policy(Arc::new(Policy { name, action, rules })),
                Resource::Workload(Arc::new(pod.workload.clone())),
            ],
            vec![],
        );
    }

    /// A Service in front of an address.
    pub(super) fn service(&self, name: &str, protocol: AppProtocol, endpoints: &[(&Pod, u16)]) -> SocketAddr {
        self.service_at(address(), name, protocol, endpoints)
    }

    /// A Service at an address.
    pub(super) fn service_at(
        &self,
        vip: IpAddr,
        name: &str,
        protocol: AppProtocol,
        endpoints: &[(&Pod, u16)],
    ) -> SocketAddr {
        let endpoints = endpoints.iter().map(|(pod, port)| endpoint(pod.ip, &pod.uid, *port)).collect();
        self.service_of(vip, name, protocol, endpoints)
    }

    /// A Service at an address, with these endpoints.
    pub(super) fn service_of(
        &self,
        vip: IpAddr,
        name: &str,
        protocol: AppProtocol,
        endpoints: Vec<Endpoint>,
    ) -> SocketAddr {
        let service = Service {
            name: NamespacedName::new("shop", name),
            addresses: vec![vip],
            ports: vec![ServicePort { name: "".into(), port: 80, app_protocol: protocol }],
            endpoints,
            fronts: Vec::new(),
            node_local: false,
        };
        self.apply(vec![Resource::Service(Arc::new(service))], vec![]);
        SocketAddr::new(vip, 80)
    }
}

/// An endpoint of a Service's port 80.
pub(super) fn endpoint(address: IpAddr, pod: &WorkloadUid, port: u16) -> Endpoint {
    Endpoint {
        address,
        ports: BTreeMap::from([(80, port)]),
        packet_ports: Vec::new(),
        workload: Some(pod.clone()),
        ready: true,
        node: None,
    }
}

fn config(trust_domain: TrustDomain) -> MeshConfig {
    MeshConfig {
        trust_domain,
        svid_lifetime: Duration::from_secs(3600),
        issuer: Default::default(),
        before_enrolment: Default::default(),
        namespaces: std::collections::BTreeMap::new(),
        same_node: SameNode::Shortcut,
        unknown_pods: UnknownPods::RefuseMesh,
        ranges: vec!["10.99.0.0/16".parse().expect("a range")],
        reveal_policy: false,
        telemetry: Telemetry::default(),
    }
}

/// A rule that matches one service account on every port.
pub(super) fn from_account(account: &str) -> Rule {
    Rule {
        sources: Some(vec![Source::ServiceAccount { namespace: "shop".into(), name: Some(account.into()) }]),
        ports: Vec::new(),
        protocol: Protocol::Tcp,
        plaintext: false,
        http: Vec::new(),
    }
}

impl Pod {
    /// Dials as its application would, steered into the proxy.
    pub(super) async fn dial(&self, address: SocketAddr) -> TcpStream {
        self.dial_from(new_socket(self.ip).expect("a socket"), address).await
    }

    /// [`Pod::dial`] with a socket that was made before.
    pub(super) async fn dial_from(&self, socket: TcpSocket, address: SocketAddr) -> TcpStream {
        static CONNECTION: AtomicU64 = AtomicU64::new(1);
        socket.bind(SocketAddr::new(self.ip, 0)).expect("an address");
        let connection = CONNECTION.fetch_add(1, Ordering::Relaxed);
        let original = OriginalDst { address, connection, subject: self.workload.subject };
        self.net.dialled.lock().insert(socket.local_addr().expect("an address"), original);
        socket.connect(self.outbound).await.expect("the proxy accepts")
    }

    /// [`Pod::dial`] that gives the proxy no chance to accept meanwhile: the connection waits in the kernel's queue.
    pub(super) fn dial_unaccepted(&self, address: SocketAddr) -> TcpStream {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::new(self.ip, 0).into()).expect("an address");
        let own = socket.local_addr().expect("an address").as_socket().expect("an IP address");
        let original = OriginalDst { address, connection: 0, subject: self.workload.subject };
        self.net.dialled.lock().insert(own, original);
        socket.connect(&self.outbound.into()).expect("the kernel accepts");
        socket.set_nonblocking(true).expect("a socket");
        TcpStream::from_std(socket.into()).expect("a socket")
    }

    /// Connects to the proxy's outbound port without having been steered there.
    pub(super) async fn intrude(&self) -> TcpStream {
        TcpStream::connect(self.outbound).await.expect("the proxy accepts")
    }

    /// A listener of its application.
    pub(super) async fn listen(&self) -> TcpListener {
        TcpListener::bind((self.ip, 0)).await.expect("a listener")
    }

    /// An application that echoes.
    pub(super) async fn echo(&self) -> SocketAddr {
        let listener = self.listen().await;
        let address = listener.local_addr().expect("an address");
        Tasks::new().spawn("echo", async move {
            let tasks = Tasks::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                tasks.spawn("echo-connection", async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        address
    }
}

/// Sends and expects the same back.
pub(super) async fn ping(stream: &mut TcpStream, data: &[u8]) -> io::Result<()> {
    stream.write_all(data).await?;
    let mut back = vec![0; data.len()];
    stream.read_exact(&mut back).await?;
    assert_eq!(back, data);
    Ok(())
}

/// The connection ends with a reset, not with a clean end.
pub(super) async fn is_reset(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let end = soon("a reset", stream.read_to_end(&mut rest)).await;
    assert_eq!(end.expect_err("an end instead of a reset").kind(), io::ErrorKind::ConnectionReset);
}

/// A plain connection towards a port of `web`: the outer end, the end that the proxy gets, and the application's
/// listener, which takes the port over once the proxy has its connection, as steering does it.
pub(super) async fn plain(web: &Pod) -> (TcpStream, TcpStream, TcpListener) {
    let listener = web.listen().await;
    let address = listener.local_addr().expect("an address");
    let outside = TcpStream::connect(address).await.expect("connected");
    let (accepted, _) = listener.accept().await.expect("accepted");
    drop(listener);
    let socket = new_socket(address.ip()).expect("a socket");
    socket.set_reuseaddr(true).expect("set");
    socket.bind(address).expect("bound");
    (outside, accepted, socket.listen(1).expect("a listener"))
}
