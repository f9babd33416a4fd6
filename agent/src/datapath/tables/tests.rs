use std::{collections::BTreeMap, sync::Arc, time::Duration};

use weft_core::{
    Delta, MeshConfig, Policy, Resource, Service, SpiffeId, TrustDomain, Workload,
    config::Telemetry,
    policy::{Action, PortRef, Protocol, Rule, Source},
    service::{AppProtocol, Endpoint, PacketPort, ServicePort},
    workload::{FailMode, Owner},
};

use super::*;

fn domain() -> TrustDomain {
    TrustDomain::new("cluster.local").expect("domain")
}

fn config() -> MeshConfig {
    MeshConfig {
        trust_domain: domain(),
        svid_lifetime: Duration::from_secs(3600),
        issuer: Default::default(),
        before_enrolment: Default::default(),
        namespaces: std::collections::BTreeMap::new(),
        same_node: SameNode::Shortcut,
        unknown_pods: UnknownPods::RefuseMesh,
        ranges: vec!["10.0.0.0/8".parse().expect("range")],
        reveal_policy: false,
        telemetry: Telemetry::default(),
    }
}

fn workload(name: &str, subject: u32, node: &str, address: &str) -> Workload {
    Workload {
        uid: name.into(),
        name: NamespacedName::new("shop", name),
        service_account: name.into(),
        identity: SpiffeId::service_account(&domain(), "shop", name),
        subject: SubjectId(subject),
        owner: Owner { kind: "Pod".into(), name: name.into() },
        node: node.into(),
        zone: "".into(),
        labels: BTreeMap::new(),
        addresses: vec![address.parse().expect("address")],
        named_ports: BTreeMap::new(),
        mode: Mode::Strict,
        fail_mode: FailMode::Closed,
        policies: Vec::new(),
        network_policy: false,
        netns: None,
        host_addresses: Vec::new(),
    }
}

fn allow_from(account: &str) -> Policy {
    Policy {
        name: NamespacedName::new("shop", "only"),
        action: Action::Allow,
        rules: vec![Rule {
            sources: Some(vec![Source::ServiceAccount {
                namespace: "shop".into(),
                name: Some(account.into()),
            }]),
            ports: vec![PortRef::Number(8080)],
            protocol: Protocol::Tcp,
            plaintext: false,
            http: Vec::new(),
        }],
    }
}

fn service(endpoints: &[(&str, &str, bool)]) -> Service {
    let endpoint = |(name, address, ready): &(&str, &str, bool)| Endpoint {
        address: address.parse().expect("address"),
        ports: BTreeMap::from([(80, 8080)]),
        packet_ports: Vec::new(),
        workload: Some((*name).into()),
        ready: *ready,
        node: None,
    };
    Service {
        name: NamespacedName::new("shop", "cart"),
        addresses: vec!["10.96.0.1".parse().expect("address")],
        ports: vec![ServicePort { name: "".into(), port: 80, app_protocol: AppProtocol::Tcp }],
        endpoints: endpoints.iter().map(endpoint).collect(),
        fronts: Vec::new(),
        node_local: false,
    }
}

fn state(resources: Vec<Resource>) -> MeshState {
    MeshState::default().apply(&Delta { full: true, upserted: resources, ..Delta::default() })
}

fn pods(workloads: Vec<Workload>) -> Vec<Resource> {
    workloads.into_iter().map(|w| Resource::Workload(Arc::new(w))).collect()
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("address")
}

#[test]
fn addresses_say_who_and_where() {
    let mut outside = workload("outside", 302, "a", "10.1.0.3");
    outside.mode = Mode::Disabled;
    let mut guarded = workload("guarded", 303, "a", "10.1.0.4");
    guarded.network_policy = true;
    let mut all = pods(vec![
        workload("here", 300, "a", "10.1.0.1"),
        workload("there", 301, "b", "10.1.0.2"),
        outside,
        guarded,
    ]);
    all.push(Resource::Service(Arc::new(service(&[]))));
    all.push(Resource::Config(Arc::new(config())));
    let tables = Tables::compile(&state(all), "a");
    let info = |text| tables.addresses[&address(text)];
    let here = AddressInfo {
        subject: SubjectId(300),
        enrolled: true,
        local: true,
        strict: true,
        shortcut: true,
        ..AddressInfo::default()
    };
    assert_eq!(info("10.1.0.1"), here);
    assert_eq!(
        info("10.1.0.2"),
        AddressInfo { subject: SubjectId(301), local: false, shortcut: false, ..here }
    );
    assert_eq!(info("10.1.0.3"), AddressInfo { subject: SubjectId(302), ..AddressInfo::default() });
    assert!(!info("10.1.0.4").shortcut, "a NetworkPolicy is the CNI's to enforce");
    assert_eq!(info("10.96.0.1"), AddressInfo { service: true, ..AddressInfo::default() });
}

#[test]
fn a_service_with_the_mesh_behind_it_elsewhere_has_rows_for_packets() {
    let compile = |name, mode| {
        let mut far = workload("far", 310, "b", "10.1.0.10");
        far.mode = mode;
        let mut service = service(&[(name, "10.1.0.10", true)]);
        service.endpoints[0].packet_ports = vec![PacketPort { protocol: 17, port: 53, target: 53 }];
        let mut all = pods(vec![workload("front", 300, "a", "10.1.0.1"), far]);
        all.push(Resource::Service(Arc::new(service)));
        all.push(Resource::Config(Arc::new(config())));
        Tables::compile(&state(all), "a")
    };
    for (mode, strict) in [(Mode::Strict, true), (Mode::Permissive, false)] {
        let tables = compile("far", mode);
        let vip = tables.addresses[&address("10.96.0.1")];
        assert_eq!((vip.service, vip.policed, vip.strict, vip.enrolled), (true, true, strict, false));
        assert!(vip.meshed);
        let [row] = tables.rows[..] else { panic!("{:?}", tables.rows) };
        assert_eq!((row.source, row.destination), (SubjectId(300), vip.subject));
        assert_eq!((row.port, row.protocol, row.verdict), (53, 17, RowVerdict::Allow), "never in plaintext");
    }
    let tables = compile("far", Mode::Disabled);
    assert_eq!(
        tables.addresses[&address("10.96.0.1")],
        AddressInfo { service: true, ..AddressInfo::default() },
        "name resolution outside the mesh is nobody's business"
    );
    assert!(tables.rows.is_empty());
}

#[test]
fn same_node_mtls_leaves_no_kernel_path() {
    let mut all = pods(vec![workload("here", 300, "a", "10.1.0.1")]);
    all.push(Resource::Config(Arc::new(MeshConfig { same_node: SameNode::Mtls, ..config() })));
    assert!(!Tables::compile(&state(all), "a").addresses[&address("10.1.0.1")].shortcut);
}

#[test]
fn each_prefix_carries_what_the_shorter_ones_say() {
    let range = |text: &str| text.parse::<Cidr>().expect("range");
    let class = |text, subject| kernel::CidrSubject { cidr: range(text), subject: SubjectId(subject) };
    let mesh = [range("10.0.0.0/8")];
    let ranges = ranges(&mesh, &[class("10.9.0.0/16", 900), class("0.0.0.0/0", 901), class("fd00::/8", 902)]);
    let of = |text| ranges[&range(text)];
    assert_eq!(of("10.9.0.0/16"), RangeInfo { class: Some(SubjectId(900)), mesh: true });
    assert_eq!(of("10.0.0.0/8"), RangeInfo { class: Some(SubjectId(901)), mesh: true });
    assert_eq!(of("0.0.0.0/0"), RangeInfo { class: Some(SubjectId(901)), mesh: false });
    assert_eq!(of("fd00::/8"), RangeInfo { class: Some(SubjectId(902)), mesh: false });
}

/// `front` may call `cart`, `other` may not; `cart` runs on another node.
fn denied(endpoints: &[(&str, &str, bool)], extra: Vec<Workload>) -> BTreeMap<(SubjectId, IpAddr, u16), u32> {
    let mut cart = workload("cart", 310, "b", "10.1.0.10");
    cart.policies = vec![NamespacedName::new("shop", "only")];
    let mut all = vec![
        workload("front", 300, "a", "10.1.0.1"),
        workload("other", 301, "a", "10.1.0.2"),
        workload("far", 302, "b", "10.1.0.3"),
        cart,
    ];
    all.extend(extra);
    let mut all = pods(all);
    all.push(Resource::Policy(Arc::new(allow_from("front"))));
    all.push(Resource::Service(Arc::new(service(endpoints))));
    all.push(Resource::Config(Arc::new(config())));
    Tables::compile(&state(all), "a").vip_denied
}

#[test]
fn a_service_is_denied_where_every_ready_endpoint_refuses() {
    let denied = denied(&[("cart", "10.1.0.10", true)], Vec::new());
    let keys: Vec<_> = denied.into_keys().collect();
    assert_eq!(
        keys,
        [(SubjectId(301), address("10.96.0.1"), 80)],
        "only local subjects, only the refused one"
    );
}

#[test]
fn one_endpoint_that_may_take_it_is_enough() {
    let open = workload("open", 311, "b", "10.1.0.11");
    let both = [("cart", "10.1.0.10", true), ("open", "10.1.0.11", true)];
    assert!(denied(&both, vec![open.clone()]).is_empty());
    let unready = [("cart", "10.1.0.10", true), ("open", "10.1.0.11", false)];
    assert_eq!(denied(&unready, vec![open]).len(), 1, "an endpoint that is not ready does not count");
    let unknown = [("cart", "10.1.0.10", true), ("ghost", "10.1.0.12", true)];
    assert!(denied(&unknown, Vec::new()).is_empty(), "an endpoint outside the mesh refuses nobody");
}

#[test]
fn without_a_ready_endpoint_every_local_subject_is_refused() {
    let denied = denied(&[("cart", "10.1.0.10", false)], Vec::new());
    let key = |subject| (SubjectId(subject), address("10.96.0.1"), 80);
    assert_eq!(denied, BTreeMap::from([300, 301].map(|subject| (key(subject), VIP_NO_ENDPOINT))));
}

#[test]
fn unknown_pods_follow_the_configuration() {
    let all =
        vec![Resource::Config(Arc::new(MeshConfig { unknown_pods: UnknownPods::RefuseAll, ..config() }))];
    assert!(Tables::compile(&state(all), "a").refuse_unknown);
    assert!(!Tables::compile(&MeshState::default(), "a").refuse_unknown);
}

fn node(name: &str, subject: u32, address: &str) -> Workload {
    Workload {
        uid: weft_core::WorkloadUid::node(name),
        name: NamespacedName::new("", name),
        identity: SpiffeId::node(&domain(), name),
        mode: Mode::Disabled,
        addresses: Vec::new(),
        host_addresses: vec![address.parse().expect("address")],
        ..workload(name, subject, name, address)
    }
}

#[test]
fn the_nodes_own_network_calls_by_its_rows_and_is_nobody_to_reach() {
    let mut web = workload("web", 300, "a", "10.1.0.1");
    web.policies = vec![NamespacedName::new("shop", "only")];
    let mut resources = pods(vec![web, node("a", 400, "10.0.0.1"), node("b", 401, "10.0.0.2")]);
    resources.push(Resource::Policy(Arc::new(allow_from("x"))));
    resources.push(Resource::Service(Arc::new(service(&[("web", "10.1.0.1", true)]))));
    let tables = Tables::compile(&state(resources), "a");
    let sources: Vec<u32> = tables.rows.iter().map(|row| row.source.0).collect();
    assert!(sources.contains(&400), "the own node is refused at connect");
    assert!(!sources.contains(&401), "other nodes call through tunnels");
    let refused = (SubjectId(400), address("10.96.0.1"), 80);
    assert!(tables.vip_denied.contains_key(&refused));
    assert!(!tables.addresses.contains_key(&address("10.0.0.1")));
}

#[test]
fn ports_of_services_elsewhere() {
    let front = |address: Option<&str>, port| weft_core::service::Front {
        address: address.map(|a| a.parse().expect("address")),
        protocol: proto::TCP,
        port,
        service_port: 80,
    };
    let mut cart = service(&[("there", "10.1.0.2", true)]);
    cart.fronts = vec![
        front(None, 30_080),
        front(Some("203.0.113.9"), 80),
        // Somebody else's, whatever is written.
        front(Some("10.1.0.2"), 80),
        front(Some("10.96.0.1"), 443),
    ];
    let mut resources = pods(vec![
        workload("there", 301, "b", "10.1.0.2"),
        node("a", 400, "10.0.0.1"),
        node("b", 401, "10.1.0.2"),
    ]);
    resources.push(Resource::Service(Arc::new(cart)));
    let state = state(resources);
    let tables = Tables::compile(&state, "a");
    let keys: Vec<_> = tables.fronts.keys().copied().collect();
    assert_eq!(keys, [(None, 6, 30_080), (Some(address("203.0.113.9")), 6, 80)]);
    assert!(tables.fronts.values().all(|f| f.service.service && f.service.meshed && f.port == 80));
    let info = |text| tables.addresses[&address(text)];
    assert_eq!(
        (info("10.0.0.1").front, info("10.0.0.1").node, info("10.0.0.1").enrolled),
        (true, true, false)
    );
    assert_eq!((info("203.0.113.9").front, info("203.0.113.9").node), (true, false));
    assert_eq!(
        (info("10.1.0.2").front, info("10.1.0.2").node, info("10.1.0.2").enrolled),
        (false, false, true)
    );

    // The proxy finds the same.
    let dialled = |text: &str| {
        let found = state.dialled(text.parse().expect("address"), proto::TCP);
        found.map(|(service, port)| (service.name.name.to_string(), port))
    };
    let cart = || Some(("cart".to_owned(), 80));
    for front in ["10.0.0.1:30080", "203.0.113.9:80", "10.96.0.1:80"] {
        assert_eq!(dialled(front), cart(), "{front}");
    }
    for nobody in ["10.0.0.1:80", "203.0.113.9:30080", "10.1.0.2:80", "10.1.0.2:30080", "192.0.2.1:30080"] {
        assert_eq!(dialled(nobody), None, "{nobody}");
    }
}
