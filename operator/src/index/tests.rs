use weft_core::NamespacedName;

use super::*;
use crate::objects;

fn index(text: &str) -> Index {
    let mut index = Index::new(TrustDomain::new("cluster.local").unwrap());
    let problems = apply(&mut index, text);
    assert!(problems.is_empty(), "{problems:?}");
    index
}

pub(super) fn apply(index: &mut Index, text: &str) -> Vec<String> {
    let change = |d| match d {
        Ok(document) => Change::Apply(document),
        Err(objects::BadDocument { key: Some(key), generation, message, target_refs, .. }) => {
            Change::Bad { key, generation, message, target_refs }
        }
        Err(bad) => panic!("{bad:?}"),
    };
    objects::parse(text).into_iter().filter_map(|d| index.apply(&"f.yaml".into(), change(d))).collect()
}

fn workload<'a>(output: &'a Output, name: &str) -> &'a weft_core::Workload {
    let found = output.resources.values().find_map(|r| match r {
        Resource::Workload(w) if &*w.name.name == name => Some(&**w),
        _ => None,
    });
    found.unwrap_or_else(|| panic!("no workload {name}"))
}

fn service<'a>(output: &'a Output, name: &str) -> &'a weft_core::Service {
    match &output.resources[&ResourceKey::Service(NamespacedName::new("shop", name))] {
        Resource::Service(s) => s,
        other => panic!("{other:?}"),
    }
}

fn report<'a>(output: &'a Output, kind: Kind, name: &str) -> &'a Report {
    let found = output.reports.iter().find(|(k, _)| k.kind == kind && k.name == name);
    found.unwrap_or_else(|| panic!("no report of {name}")).1
}

fn pod(name: &str, labels: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {name}-uid, labels: {{{labels}}}, annotations: {{weft.mesh/netns: /run/netns/{name}}}}}\nspec:\n  nodeName: node-a\n  serviceAccountName: web\n  containers: [{{name: c, ports: [{{name: main, containerPort: 8080}}]}}]\nstatus: {{podIPs: [{{ip: {ip}}}]}}\n"
    )
}

fn namespace(labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n")
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"
    )
}

const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec:\n  clusterIP: 10.96.0.10\n  selector: {app: web}\n  ports: [{name: http, port: 80, targetPort: main}, {name: dns, port: 53, protocol: UDP}]\n";
const ROUTE: &str = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: shop}\nspec:\n  parentRefs: [{group: \"\", kind: Service, name: web}]\n  rules: [{backendRefs: [{name: web, port: 80}]}]\n";

#[test]
fn the_settings_tell_every_namespace() {
    let mut index = index("---\n{apiVersion: v1, kind: Namespace, metadata: {name: outside}}\n");
    apply(&mut index, &namespace("weft.mesh/mode: permissive, weft.mesh/fail-mode: open"));
    let bad =
        "---\n{apiVersion: v1, kind: Namespace, metadata: {name: typo, labels: {weft.mesh/mode: strct}}}\n";
    assert_eq!(apply(&mut index, bad).len(), 1);
    let output = index.build();
    let Some(Resource::Config(config)) = output.resources.get(&ResourceKey::Config) else {
        panic!("no settings")
    };
    let found: Vec<_> = config.namespaces.iter().map(|(n, m)| (&**n, m.mode, m.fail_mode)).collect();
    let expected = [
        ("outside", Mode::Disabled, FailMode::Closed),
        ("shop", Mode::Permissive, FailMode::Open),
        ("typo", Mode::Strict, FailMode::Closed),
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_route_says_which_of_its_parents_is_missing() {
    let parents =
        "parentRefs: [{group: \"\", kind: Service, name: gone}, {group: \"\", kind: Service, name: web}]";
    let route = ROUTE.replace("parentRefs: [{group: \"\", kind: Service, name: web}]", parents);
    let output = index(&format!("{SERVICE}{route}")).build();
    let report = report(&output, Kind::HttpRoute, "web");
    assert!(report.accepted.ok, "{report:?}");
    assert_eq!(report.parents.keys().collect::<Vec<_>>(), [&0]);
    assert_eq!(report.parents[&0].reason, "NoMatchingParent");
}

#[test]
fn a_pod_becomes_a_workload() {
    let text = namespace("weft.mesh/mode: strict") + &pod("web-1", "app: web", "10.1.0.5");
    let output = index(&text).build();
    let w = workload(&output, "web-1");
    assert_eq!(w.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!((w.mode, w.fail_mode), (Mode::Strict, FailMode::Closed));
    assert_eq!(w.netns.as_deref(), Some("/run/netns/web-1"));
    assert_eq!(w.named_ports["main"], 8080);
    assert_eq!((&*w.owner.kind, &*w.owner.name), ("Pod", "web"));
    assert!(w.subject.0 >= weft_core::SubjectId::FIRST);
}

#[test]
fn a_label_may_only_tighten() {
    let text = namespace("weft.mesh/mode: permissive, weft.mesh/fail-mode: open")
        + &pod("looser", "weft.mesh/mode: disabled", "10.1.0.5")
        + &pod("tighter", "weft.mesh/mode: strict", "10.1.0.6");
    let output = index(&text).build();
    assert_eq!(workload(&output, "looser").mode, Mode::Permissive);
    let accepted = &report(&output, Kind::Pod, "looser").accepted;
    assert!(!accepted.ok && accepted.message.contains("may only tighten"), "{accepted:?}");
    let tighter = workload(&output, "tighter");
    assert_eq!((tighter.mode, tighter.fail_mode), (Mode::Strict, FailMode::Closed), "strict is never open");
}

#[test]
fn open_with_strict_is_refused_and_fails_closed() {
    let mut index = Index::new(TrustDomain::new("cluster.local").unwrap());
    let problems = apply(&mut index, &namespace("weft.mesh/mode: strict, weft.mesh/fail-mode: open"));
    assert!(
        problems[0].starts_with("Namespace shop: metadata.labels[weft.mesh/fail-mode]: open and"),
        "{problems:?}"
    );
    assert_eq!(index.namespace("shop"), (Mode::Strict, FailMode::Closed));
    // A form that was good before goes on instead.
    apply(&mut index, &namespace("weft.mesh/mode: permissive"));
    apply(&mut index, &namespace("weft.mesh/mode: stric"));
    assert_eq!(index.namespace("shop"), (Mode::Permissive, FailMode::Closed));
}

#[test]
fn endpoints_come_from_the_selector_or_from_slices() {
    let pods = pod("web-1", "app: web", "10.1.0.5") + &pod("other", "app: other", "10.1.0.6");
    let mut index = index(&(pods + SERVICE));
    let output = index.build();
    let s = service(&output, "web");
    assert_eq!(s.ports.len(), 1, "only TCP ports are listed");
    assert_eq!(s.endpoints.len(), 1);
    assert_eq!(s.endpoints[0].ports, BTreeMap::from([(80, 8080)]));
    let packets = |target| vec![weft_core::service::PacketPort { protocol: 17, port: 53, target }];
    assert_eq!(s.endpoints[0].packet_ports, packets(53));
    assert!(s.endpoints[0].ready);
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}\nendpoints: [{addresses: [10.1.0.6], conditions: {ready: false}}]\nports: [{name: http, port: 9090}, {name: dns, port: 5353, protocol: UDP}]\n";
    assert!(apply(&mut index, slice).is_empty());
    let output = index.build();
    let e = &service(&output, "web").endpoints;
    assert_eq!((e.len(), e[0].ready, e[0].ports[&80]), (1, false, 9090));
    assert_eq!(e[0].packet_ports, packets(5353));
    assert_eq!(e[0].workload.as_ref().map(ToString::to_string).as_deref(), Some("other-uid"));
}

#[test]
fn endpoints_that_terminate_serve_where_there_are_no_others() {
    let slice = |second: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {{name: web-x, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\nports: [{{name: http, port: 9090}}]\nendpoints: [{{addresses: [10.1.0.6], conditions: {{ready: false, serving: true, terminating: true}}}}, {{addresses: [10.1.0.7], conditions: {second}}}]\n"
        )
    };
    let ready = |second: &str| -> Vec<bool> {
        let mut index = index(SERVICE);
        assert!(apply(&mut index, &slice(second)).is_empty());
        service(&index.build(), "web").endpoints.iter().map(|e| e.ready).collect()
    };
    assert_eq!(ready("{ready: true}"), [false, true]);
    assert_eq!(ready("{ready: false, serving: false, terminating: true}"), [true, false]);
    assert_eq!(ready("{ready: false, serving: false}"), [true, false]);
}

#[test]
fn a_route_makes_its_port_http() {
    let mut index = index(SERVICE);
    assert_eq!(service(&index.build(), "web").ports[0].app_protocol, weft_core::service::AppProtocol::Tcp);
    assert!(apply(&mut index, ROUTE).is_empty());
    let output = index.build();
    assert_eq!(service(&output, "web").ports[0].app_protocol, weft_core::service::AppProtocol::Http);
    assert!(report(&output, Kind::HttpRoute, "web").accepted.ok);
    assert!(report(&output, Kind::HttpRoute, "web").resolved.as_ref().unwrap().ok);
}

#[test]
fn references_are_judged_anew_when_services_change() {
    let index = index(
        &(SERVICE.to_owned() + &ROUTE.replace("backendRefs: [{name: web", "backendRefs: [{name: gone")),
    );
    let resolved = report(&index.build(), Kind::HttpRoute, "web").resolved.clone().unwrap();
    assert_eq!((resolved.ok, resolved.reason), (false, "BackendNotFound"));
    assert!(
        resolved.message.starts_with("HTTPRoute shop/web: spec.rules[0].backendRefs[0]: there is no Service")
    );
}

#[test]
fn policies_select_by_labels_and_by_service() {
    let text = pod("web-1", "app: web", "10.1.0.5")
        + &pod("other", "app: other", "10.1.0.6")
        + SERVICE
        + &policy("all", "targetRefs: [{kind: Pod, selector: {}}]")
        + &policy("by-service", "targetRefs: [{kind: Service, name: web}]")
        + &policy("lost", "targetRefs: [{kind: Service, name: gone}]");
    let output = index(&text).build();
    let names = |pod| workload(&output, pod).policies.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(names("web-1"), ["shop/all", "shop/by-service"]);
    assert_eq!(names("other"), ["shop/all"]);
    assert_eq!(
        report(&output, Kind::AuthorizationPolicy, "lost").resolved.as_ref().unwrap().reason,
        "TargetNotFound"
    );
}

#[test]
fn subjects_differ_where_verdicts_can() {
    let text = pod("a", "app: web", "10.1.0.5")
        + &pod("b", "app: web", "10.1.0.6")
        + &pod("c", "app: x", "10.1.0.7");
    let mut index = index(&text);
    let output = index.build();
    let subject = |o: &Output, n| workload(o, n).subject;
    assert_eq!(subject(&output, "a"), subject(&output, "c"), "one account, no policy: one subject");
    apply(&mut index, &policy("p", "targetRefs: [{kind: Pod, selector: {matchLabels: {app: web}}}]"));
    let output = index.build();
    assert_eq!(subject(&output, "a"), subject(&output, "b"));
    assert_ne!(subject(&output, "a"), subject(&output, "c"));
    // The same for an operator that read the same in another order.
    let other = self::index(
        &(policy("p", "targetRefs: [{kind: Pod, selector: {matchLabels: {app: web}}}]")
            + &pod("c", "app: x", "10.1.0.7")
            + &pod("a", "app: web", "10.1.0.5")),
    );
    assert_eq!(subject(&other.build(), "a"), subject(&output, "a"));
    // A port by name that means another number in one of the Pods tells them apart too.
    apply(
        &mut index,
        &policy(
            "p",
            "targetRefs: [{kind: Pod, selector: {}}], rules: [{networkAttributes: {ports: [main]}}]",
        ),
    );
    apply(&mut index, &pod("b", "app: web", "10.1.0.6").replace("8080", "9090"));
    let output = index.build();
    assert_ne!(subject(&output, "a"), subject(&output, "b"));
}

#[test]
fn a_bad_policy_keeps_its_last_good_form() {
    let good = policy("p", "targetRefs: [{kind: Pod, selector: {}}], action: DENY");
    let mut index = index(&good);
    let problems = apply(&mut index, &policy("p", "targetRefs: [{kind: Pod, selector: {}}], action: MAYBE"));
    assert!(
        problems[0].starts_with("AuthorizationPolicy shop/p: spec.action: unknown variant"),
        "{problems:?}"
    );
    let output = index.build();
    assert!(matches!(
        &output.resources[&ResourceKey::Policy(NamespacedName::new("shop", "p"))],
        Resource::Policy(p) if p.action == weft_core::policy::Action::Deny
    ));
    let r = report(&output, Kind::AuthorizationPolicy, "p");
    assert!(!r.accepted.ok && r.accepted.message.contains("the last good form goes on"));
    assert!(matches!(r.programmable, Some(Err(_))));
}

#[test]
fn an_address_belongs_to_the_pod_that_stays() {
    let old = pod("old", "app: web", "10.1.0.5")
        .replace("namespace: shop", "namespace: shop, deletionTimestamp: 2026-01-01T00:00:00Z");
    let output = index(&(old + &pod("new", "app: x", "10.1.0.5"))).build();
    assert_eq!(workload(&output, "new").addresses.len(), 1);
    assert!(workload(&output, "old").addresses.is_empty());
}

#[test]
fn ranges_and_trust_domain() {
    let text = "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, \"fd00:1::/64\"]}\n---\napiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [10.96.0.0/16]}\n";
    let mut index = index(text);
    let output = index.build();
    let Resource::Config(config) = &output.resources[&ResourceKey::Config] else { panic!("no config") };
    assert_eq!(
        config.ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.1.0.0/24", "10.96.0.0/16", "fd00:1::/64"]
    );
    assert_eq!(output.nodes, BTreeSet::from(["node-a".to_owned()]));
    let mesh = "apiVersion: weft.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: {trustDomain: other}";
    assert!(
        apply(&mut index, mesh)[0]
            .contains("spec.trustDomain: other is not this mesh's trust domain cluster.local")
    );
}

#[test]
fn a_mesh_config_says_what_has_no_effect_yet() {
    let mesh = "apiVersion: weft.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: {telemetry: {accessLog: All, metricsCompat: [Istio]}}";
    let output = index(mesh).build();
    let accepted = &report(&output, Kind::MeshConfig, "default").accepted;
    assert!(accepted.ok && accepted.message.contains("have no effect in this version"), "{accepted:?}");
    assert!(accepted.message.ends_with("this object sets spec.telemetry.metricsCompat"), "{accepted:?}");
}

#[test]
fn a_node_calls_in_its_own_name_and_services_have_ports_elsewhere() {
    let node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-a, labels: {topology.kubernetes.io/zone: z1}}\nstatus:\n  addresses: [{type: InternalIP, address: 10.0.0.1}, {type: Hostname, address: node-a}, {type: InternalIP, address: \"fd00::1\"}]\n";
    let balanced = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec:\n  type: LoadBalancer\n  clusterIP: 10.96.0.10\n  internalTrafficPolicy: Local\n  externalIPs: [198.51.100.7]\n  selector: {app: web}\n  ports: [{name: http, port: 80, targetPort: main, nodePort: 30080}]\nstatus: {loadBalancer: {ingress: [{ip: 203.0.113.9}, {ip: 203.0.113.10, ipMode: Proxy}]}}\n";
    let text = namespace("weft.mesh/mode: strict") + &pod("web", "app: web", "10.1.0.5") + node;
    let mut index = index(&(text.clone() + balanced));
    let output = index.build();
    let host = workload(&output, "node-a");
    assert!(host.is_node() && host.addresses.is_empty() && host.subject.0 >= weft_core::SubjectId::FIRST);
    assert_eq!(host.identity.as_str(), "spiffe://cluster.local/node/node-a");
    assert_eq!((host.mode, &*host.zone, host.host_addresses.len()), (Mode::Disabled, "z1", 2));

    let web = service(&output, "web");
    let front = |address: Option<&str>, port| weft_core::service::Front {
        address: address.map(|a| a.parse().unwrap()),
        protocol: 6,
        port,
        service_port: 80,
    };
    let wanted = [front(None, 30_080), front(Some("198.51.100.7"), 80), front(Some("203.0.113.9"), 80)];
    assert_eq!(web.fronts, wanted);
    assert!(web.node_local && web.endpoints[0].node.as_deref() == Some("node-a"));

    // A change of the node alone reaches the agents, and its end too.
    index.update();
    assert!(apply(&mut index, &node.replace("10.0.0.1", "10.0.0.2")).is_empty());
    let key = ResourceKey::Workload(weft_core::WorkloadUid::node("node-a"));
    assert!(matches!(index.update().resources.get(&key), Some(Some(_))));
    let gone = ObjectKey { kind: Kind::Node, namespace: String::new(), name: "node-a".into() };
    index.apply(&"f.yaml".into(), Change::Remove(gone));
    assert_eq!(index.update().resources.get(&key), Some(&None));
}
