//! Every way in which traffic reaches Pods of a real cluster: from outside through the nodes' ports, through an ingress
//! and a load balancer, through Services of every form, to Pods that go away, and to addresses that are used again.

#![forbid(unsafe_code)]

use std::{
    process::{Child, Stdio},
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;
use weft_cluster::Options;
use weft_tests::{manifest::Pod, mesh::Mesh, steps::Steps};

const OBJECTS: &str = include_str!("workloads/traffic.yaml");
const SHOP: &str = "shop";
/// Services that are called by name.
const NAMES: [&str; 11] = [
    "web",
    "cart",
    "legacy",
    "door",
    "sticky",
    "slow",
    "never",
    "never-published",
    "never-peers",
    "alias",
    "alias-outside",
];
/// The nodes' addresses, from a machine beside them.
const NODES: [&str; 2] = ["10.200.0.11", "10.200.0.12"];
/// What the load balancer of a cloud would assign.
const BALANCER: &str = "10.250.0.7";

fn words<'a>(to: &'a str, count: &'a str) -> Vec<&'a str> {
    let host = to.split(':').next().unwrap_or(to);
    vec!["http", "--to", to, "--host", host, "--count", count, "--timeout-ms", "4000"]
}

/// Calls from the strict client; all must be answered.
fn answered(mesh: &Mesh, to: &str, count: u32) -> Result<Value> {
    let tally = mesh.app(SHOP, "client", &words(to, &count.to_string()))?;
    ensure!(tally["statuses"]["200"] == count, "{to}: {tally}");
    Ok(tally)
}

fn from_outside(mesh: &Mesh, to: &str) -> Result<Value> {
    mesh.app_outside(&words(to, "2"))
}

/// Waits until calls from outside the cluster are answered: kube-proxy needs its time.
fn open(mesh: &Mesh, to: &str) -> Result<Value> {
    mesh.eventually(&format!("{to} to answer"), || {
        let tally = from_outside(mesh, to)?;
        ensure!(tally["statuses"]["200"] == 2, "{tally}");
        Ok(tally)
    })
}

/// No call from outside the cluster is answered.
fn closed(mesh: &Mesh, to: &str) -> Result<()> {
    let tally = from_outside(mesh, to)?;
    ensure!(tally["failed"] == 2, "{to} is open to outside: {tally}");
    Ok(())
}

fn address(mesh: &Mesh, pod: &str) -> Result<String> {
    mesh.field(SHOP, &format!("pod/{pod}"), ".status.podIP")
}

fn node_ports(mesh: &Mesh) -> Result<()> {
    // These answer, so kube-proxy knows of all: a refusal is the mesh's.
    for node in NODES {
        open(mesh, &format!("{node}:30090")).context("permissive, from outside")?;
        open(mesh, &format!("{node}:30180")).context("strict, a port with a rule for Unauthenticated")?;
    }
    open(mesh, &format!("{}:30280", NODES[1])).context("the same with externalTrafficPolicy Local")?;
    for node in NODES {
        for port in [30_080, 30_081, 30_181] {
            closed(mesh, &format!("{node}:{port}"))?;
        }
    }
    closed(mesh, &format!("{}:30281", NODES[1]))?;
    // A rule with cidrs sees the caller's own address only where the node does not hide it.
    open(mesh, &format!("{}:30282", NODES[1])).context("a rule with cidrs")?;
    closed(mesh, &format!("{}:30182", NODES[0])).context("a caller that the node hides, a rule with cidrs")
}

fn host_ports(mesh: &Mesh) -> Result<()> {
    open(mesh, &format!("{}:31090", NODES[0])).context("permissive")?;
    open(mesh, &format!("{}:31080", NODES[1])).context("strict, with a rule")?;
    closed(mesh, &format!("{}:31081", NODES[1])).context("strict, without a rule")
}

/// As webhooks and aggregated APIs are called: by the API server, which is outside the mesh.
fn by_the_api_server(mesh: &Mesh) -> Result<()> {
    let get = |port: &str| {
        let path = format!("/api/v1/namespaces/{SHOP}/services/door:{port}/proxy/");
        mesh.cluster.kubectl(&["get", "--raw", &path, "--request-timeout=10s"])
    };
    ensure!(get("open")?.contains("saw 10.200.0.1 GET /"), "a port with a rule for Unauthenticated");
    ensure!(get("closed").is_err(), "a port without a rule answers");
    Ok(())
}

fn load_balancer(mesh: &Mesh) -> Result<()> {
    let patch = format!("{{\"status\":{{\"loadBalancer\":{{\"ingress\":[{{\"ip\":\"{BALANCER}\"}}]}}}}}}");
    let patch = ["patch", "service", "balanced", "--subresource=status", "--type=merge", "-p", &patch];
    mesh.cluster.kubectl(&[&["-n", SHOP][..], &patch].concat())?;
    let route = ["route", "replace", BALANCER, "via", NODES[1]];
    let routed = mesh.cluster.command("ip")?.args(route).status()?;
    ensure!(routed.success(), "ip {}", route.join(" "));
    open(mesh, &format!("{BALANCER}:80"))?;
    closed(mesh, &format!("{BALANCER}:81"))?;
    // From inside it is the Service: by mTLS, to every port that policy allows.
    mesh.eventually("the load balancer's address from inside", || {
        answered(mesh, &format!("{BALANCER}:80"), 4)?;
        answered(mesh, &format!("{BALANCER}:81"), 4)
    })
    .map(drop)
}

fn ingress(mesh: &Mesh) -> Result<()> {
    mesh.ready("edge", &["ingress"])?;
    let own = mesh.field("edge", "pod/ingress", ".status.podIP")?;
    for node in NODES {
        let at = format!("{node}:30443");
        let tally = open(mesh, &at).context("through nginx to a strict backend")?;
        let seen = tally["bodies"].to_string();
        ensure!(seen.contains(&format!("saw {own} ")), "the backend saw somebody else than nginx: {seen}");
        let cart = mesh.app_outside(&["http", "--to", &at, "--path", "/cart"])?;
        ensure!(cart["statuses"]["200"] == 1, "a backend that only the ingress may call: {cart}");
    }
    let tally = mesh.app(SHOP, "client", &words("cart.shop.svc.cluster.local:80", "1"))?;
    ensure!(tally["statuses"]["200"].is_null(), "others may call it too: {tally}");
    Ok(())
}

/// A server beside the cluster, ended when dropped.
struct Beside(Child);

impl Beside {
    fn start(mesh: &Mesh, port: u16) -> Result<Self> {
        let mut command = mesh.outside()?;
        let port = port.to_string();
        Ok(Self(command.args(["serve", "--http", &port]).stdout(Stdio::null()).spawn()?))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn without_selector(mesh: &Mesh) -> Result<()> {
    let _server = Beside::start(mesh, 7000)?;
    mesh.eventually("a Service of an address outside the cluster", || {
        answered(mesh, "legacy.shop.svc.cluster.local:80", 2)
    })?;
    answered(mesh, "10.200.0.1:7000", 1).context("the address itself")?;
    answered(mesh, "alias-outside.shop.svc.cluster.local:7000", 2).context("by an ExternalName")?;
    let door = address(mesh, "door")?;
    let slice = format!(
        "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: by-hand-1, namespace: edge, labels: {{kubernetes.io/service-name: by-hand}}}}
addressType: IPv4
ports: [{{name: http, port: 8081}}]
endpoints: [{{addresses: [{door}]}}]
"
    );
    mesh.cluster.apply(&slice)?;
    mesh.eventually("a Service of a strict Pod's address, of another namespace", || {
        answered(mesh, "by-hand.edge.svc.cluster.local:80", 2)
    })
    .map(drop)
}

fn external_name(mesh: &Mesh) -> Result<()> {
    answered(mesh, "alias.shop.svc.cluster.local:81", 2).map(drop)
}

fn not_ready(mesh: &Mesh) -> Result<()> {
    for to in ["never-published.shop.svc.cluster.local:80", "never-peers.shop.svc.cluster.local:8080"] {
        mesh.eventually("a Pod that is not ready and published", || answered(mesh, to, 2))?;
    }
    let to = "never.shop.svc.cluster.local:80";
    let tally = mesh.app(SHOP, "client", &words(to, "2"))?;
    ensure!(tally["failed"] == 2, "a Pod that is not ready is called: {tally}");
    let said = mesh.app(SHOP, "client", &["dial", "--to", to])?;
    ensure!(said["connected"] == false, "who waits for it by connecting would not wait: {said}");
    Ok(())
}

fn affinity(mesh: &Mesh) -> Result<()> {
    answered(mesh, "sticky.shop.svc.cluster.local:80", 20).map(drop)
}

/// Long calls that run when their Pod is deleted come to their end.
fn termination(mesh: &Mesh) -> Result<()> {
    let call = |to: &str| {
        mesh.app(SHOP, "client", &["http", "--to", to, "--path", "/slow/4000", "--timeout-ms", "15000"])
    };
    answered(mesh, "slow.shop.svc.cluster.local:80", 1)?;
    thread::scope(|scope| {
        let ways = ["slow.shop.svc.cluster.local:80", "slow.shop.svc.cluster.local:90"];
        let running: Vec<_> = ways.map(|to| (to, scope.spawn(move || call(to)))).into();
        mesh.eventually("the calls' begin", || {
            let seen = mesh.cluster.kubectl(&["-n", SHOP, "logs", "slow"])?;
            ensure!(seen.matches("/slow/4000").count() == ways.len(), "{seen}");
            Ok(())
        })?;
        mesh.cluster.kubectl(&["-n", SHOP, "delete", "pod", "slow", "--wait=false"])?;
        for (to, call) in running {
            let tally = call.join().map_err(|_| anyhow!("a caller panicked"))??;
            ensure!(tally["statuses"]["200"] == 1, "{to}: {tally}");
        }
        Ok(())
    })
}

/// Calls go on while every Pod of the Deployment is replaced.
fn rolling_restart(mesh: &Mesh) -> Result<()> {
    let load = |to: &'static str, more: &'static [&'static str]| {
        let mut words = words(to, "700");
        words.extend(["--concurrency", "3", "--pace-ms", "75"]);
        words.extend(more);
        mesh.app(SHOP, "client", &words)
    };
    thread::scope(|scope| {
        let ways: [(&str, &[&str]); 4] = [
            ("web.shop.svc.cluster.local:80", &[]),
            ("web.shop.svc.cluster.local:80", &["--keep-alive"]),
            ("web.shop.svc.cluster.local:90", &[]),
            ("web.shop.svc.cluster.local:90", &["--keep-alive"]),
        ];
        let running = ways.map(|(to, more)| (to, scope.spawn(move || load(to, more))));
        mesh.cluster.kubectl(&["-n", SHOP, "rollout", "restart", "deployment/web"])?;
        mesh.cluster.kubectl(&["-n", SHOP, "rollout", "status", "deployment/web", "--timeout=120s"])?;
        mesh.eventually("the end of the earlier Pods", || {
            let path = "jsonpath={.items[*].metadata.name}";
            let left = mesh.cluster.kubectl(&["-n", SHOP, "get", "pods", "-l", "app=web", "-o", path])?;
            ensure!(left.split(' ').count() == 2, "{left}");
            Ok(())
        })?;
        let whole = running.iter().all(|(_, load)| !load.is_finished());
        for (to, load) in running {
            let tally = load.join().map_err(|_| anyhow!("a caller panicked"))??;
            ensure!(tally["statuses"]["200"] == 700, "{to}: {} {}", tally["statuses"], tally["errors"]);
            let names = tally["bodies"].as_object().map_or(0, serde_json::Map::len);
            ensure!(names >= 3, "{to}: only {names} Pods answered");
        }
        ensure!(whole, "the calls ended before the roll-out");
        Ok(())
    })
}

fn pod(namespace: &str, name: &str, account: &str) -> String {
    Pod::lab(namespace, name, "node1", "serve, --http, '8080'").account(account).to_string()
}

/// Neighbours of a bridge remember for a while whose an address was, with a mesh and without one; here they forget.
const FORGET: &str =
    "ip neigh flush all; for n in $(ls /run/netns); do ip netns exec $n ip neigh flush all || true; done";

/// A Pod that gets the address which another one had.
fn at_address(mesh: &Mesh, document: &str, namespace: &str, name: &str, wanted: &str) -> Result<()> {
    let (net, last) = wanted.rsplit_once('.').context("no IPv4 address")?;
    let before = format!("{net}.{}", last.parse::<u8>()? - 1);
    let file = "/var/lib/cni/networks/weft/last_reserved_ip.0";
    let node = mesh.cluster.node(1);
    mesh.eventually("the address to be given again", || {
        node.exec(&["sh", "-c", &format!("printf {before} > {file}")])?;
        mesh.cluster.apply(document)?;
        mesh.ready(namespace, &[name])?;
        let got = mesh.field(namespace, &format!("pod/{name}"), ".status.podIP")?;
        if got != wanted {
            mesh.cluster.kubectl(&["-n", namespace, "delete", "pod", name, "--now"])?;
        }
        ensure!(got == wanted, "it got {got}, not {wanted}");
        Ok(())
    })?;
    node.exec(&["sh", "-c", FORGET]).map(drop)
}

fn address_twice(mesh: &Mesh) -> Result<()> {
    let vaults = [address(mesh, "vault")?, address(mesh, "vault-near")?];
    let tally = |namespace: &str, from: &str, vault: &str| {
        mesh.app(namespace, from, &words(&format!("{vault}:8080"), "3"))
    };
    mesh.cluster.apply(&pod(SHOP, "first", "trusted"))?;
    mesh.ready(SHOP, &["first"])?;
    let wanted = address(mesh, "first")?;
    for vault in &vaults {
        mesh.eventually("a trusted Pod's calls", || {
            let tally = tally(SHOP, "first", vault)?;
            ensure!(tally["statuses"]["200"] == 3, "{tally}");
            Ok(())
        })?;
    }
    answered(mesh, &format!("{wanted}:8080"), 2)?;
    // The next one of the address: another account, then a Pod outside the mesh, then a trusted one again.
    mesh.cluster.kubectl(&["-n", SHOP, "delete", "pod", "first", "--now"])?;
    at_address(mesh, &pod(SHOP, "second", "default"), SHOP, "second", &wanted)?;
    for vault in &vaults {
        let tally = tally(SHOP, "second", vault)?;
        ensure!(
            tally["errors"]["ConnectionRefused"] == 3,
            "it is taken for the Pod that had its address: {tally}"
        );
    }
    mesh.eventually("calls to the address's new Pod", || answered(mesh, &format!("{wanted}:8080"), 2))?;
    mesh.cluster.kubectl(&["-n", SHOP, "delete", "pod", "second", "--now"])?;
    at_address(mesh, &pod("outside", "third", "default"), "outside", "third", &wanted)?;
    for vault in &vaults {
        let tally = tally("outside", "third", vault)?;
        ensure!(
            tally["errors"]["ConnectionRefused"] == 3,
            "a Pod outside the mesh is taken for one in it: {tally}"
        );
    }
    mesh.eventually("calls to an address that has left the mesh", || {
        answered(mesh, &format!("{wanted}:8080"), 2)
    })?;
    mesh.cluster.kubectl(&["-n", "outside", "delete", "pod", "third", "--now"])?;
    at_address(mesh, &pod(SHOP, "fourth", "trusted"), SHOP, "fourth", &wanted)?;
    mesh.eventually("calls to the address back in the mesh", || {
        answered(mesh, &format!("{wanted}:8080"), 2)
    })?;
    for vault in &vaults {
        mesh.eventually("a trusted Pod's calls again", || {
            let tally = tally(SHOP, "fourth", vault)?;
            ensure!(tally["statuses"]["200"] == 3, "{tally}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn traffic_of_every_kind_arrives_or_is_refused_as_it_should() -> Result<()> {
    let mesh = Mesh::up(Options::default())?;
    mesh.cluster.apply(OBJECTS)?;
    mesh.cluster
        .kubectl(&["-n", SHOP, "rollout", "status", "deployment/web", "--timeout=240s"])
        .with_context(|| mesh.diagnose())?;
    mesh.ready(SHOP, &["client", "door", "cart", "slow", "vault", "vault-near"])?;
    mesh.ready("soft", &["soft"])?;
    mesh.ready("edge", &["client", "ingress"])?;
    for (namespace, policy) in [(SHOP, "door"), (SHOP, "cart"), (SHOP, "vault"), ("edge", "ingress")] {
        mesh.programmed(namespace, policy)?;
    }
    mesh.named(SHOP, &NAMES)?;
    mesh.named("edge", &["by-hand"])?;
    let mut steps = Steps::default();
    let mut step = |name: &str, check: fn(&Mesh) -> Result<()>| steps.step(name, || check(&mesh));
    step("NodePort: closed for strict, open where a rule says so, and for permissive", node_ports);
    step("hostPort: likewise", host_ports);
    step("the API server, as it calls webhooks: likewise", by_the_api_server);
    step("LoadBalancer: likewise, and mTLS from inside", load_balancer);
    step("nginx as an ingress, in the mesh", ingress);
    step("Services without a selector, to outside and to a strict Pod", without_selector);
    step("ExternalName", external_name);
    step("publishNotReadyAddresses", not_ready);
    step("session affinity breaks nothing", affinity);
    step("a Pod that terminates ends its calls first", termination);
    step("a rolling restart under load: no failed call", rolling_restart);
    step("an address that is used again is its new Pod's", address_twice);
    step("nothing of the mesh ended meanwhile", Mesh::never_crashed);
    steps.finish().with_context(|| mesh.diagnose())
}
