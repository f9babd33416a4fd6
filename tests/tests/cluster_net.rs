//! Weft where Pods are routed (ptp), kube-proxy writes iptables rules and everything has two address families: the
//! story's core, connections from before the enrolment, NetworkPolicies, and a container runtime that restarts. Needs
//! root and the parts of a cluster.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_cluster::{Cni, Options, ProxyMode, Service};
use weft_tests::{
    long::Long,
    manifest::{Pod, catalog, namespace, server},
    mesh::Mesh,
};

const CANARY: &str = "weft-canary-52ce";
const NAMESPACES: [&str; 3] = ["shop", "later", "outside"];
/// What "at once" is on a machine that runs two nodes on two cores.
const AT_ONCE: Duration = Duration::from_secs(20);

/// Namespaces `shop` and `later`, which come into the mesh, and `outside`, which does not.
fn everything() -> String {
    let mut documents: Vec<String> = Vec::new();
    for name in NAMESPACES {
        documents.push(namespace(name, None));
        documents.push(server(name, "web", "node2"));
        documents.push(Pod::busybox(name, "client", "node1").to_string());
    }
    documents.push(server("shop", "near", "node1"));
    documents.concat()
}

/// As a CNI would enforce it, were there one that does.
const NETWORK_POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: near-http, namespace: shop}
spec:
  podSelector: {matchLabels: {app: near}}
  ingress: [{ports: [{port: 80}]}]
";

fn config(connections: &str) -> String {
    format!(
        "apiVersion: weft.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\n\
         spec: {{connectionsBeforeEnrolment: {connections}}}\n"
    )
}

/// Addresses of both families of a Pod, as a URL has them.
fn addresses(mesh: &Mesh, namespace: &str, object: &str, path: &str) -> Result<Vec<String>> {
    let found = mesh.field(namespace, object, path)?;
    let found: Vec<String> = found
        .split_whitespace()
        .map(|a| if a.contains(':') { format!("[{a}]") } else { a.to_owned() })
        .collect();
    ensure!(found.len() == 2, "{object} has not one address of each family: {found:?}");
    Ok(found)
}

fn of_pod(mesh: &Mesh, namespace: &str, name: &str) -> Result<Vec<String>> {
    addresses(mesh, namespace, &format!("pod/{name}"), ".status.podIPs[*].ip")
}

fn call(mesh: &Mesh, namespace: &str, pod: &str, host: &str, path: &str) -> Result<String> {
    mesh.fetch(namespace, pod, &format!("http://{host}/{path}"), &[&format!("x-canary: {CANARY}")])
}

/// Every way to two servers of the shop: by name, by Service addresses and by Pod addresses of both families.
fn ways(mesh: &Mesh) -> Result<Vec<String>> {
    let mut hosts = Vec::new();
    for name in ["web", "near"] {
        hosts.push(format!("{name}.shop.svc.cluster.local"));
        hosts.extend(addresses(mesh, "shop", &format!("service/{name}"), ".spec.clusterIPs[*]")?);
        hosts.extend(of_pod(mesh, "shop", name)?);
    }
    Ok(hosts)
}

/// Calls by every way, and looks at the wire between the nodes meanwhile; how often the canary was seen.
fn readable(mesh: &Mesh, path: &str) -> Result<usize> {
    let capture = mesh.capture(1)?;
    for host in ways(mesh)? {
        mesh.eventually(&format!("a call to {host}"), || call(mesh, "shop", "client", &host, path))?;
    }
    let trace = capture.finish()?;
    ensure!(trace.len() > 10, "the capture saw {} packets", trace.len());
    Ok(trace.find(CANARY.as_bytes()))
}

fn refused(mesh: &Mesh, namespace: &str) -> Result<()> {
    for host in of_pod(mesh, "shop", "web")?.iter().chain(&of_pod(mesh, "shop", "near")?) {
        mesh.eventually("the end of plaintext from outside", || {
            let answer = call(mesh, namespace, "client", host, "");
            ensure!(answer.is_err(), "{host} answered a caller outside the mesh");
            Ok(())
        })?;
    }
    Ok(())
}

fn bare(address: &str) -> &str {
    address.trim_matches(['[', ']'])
}

/// With `Reset`, the default, only what strict would not have let through ends, and only with strict.
fn connections_from_before_end(mesh: &Mesh) -> Result<()> {
    let web = of_pod(mesh, "shop", "web")?;
    let near = of_pod(mesh, "shop", "near")?;
    let out = of_pod(mesh, "outside", "web")?;
    let open = |namespace, name, host: &str| Long::open(mesh, namespace, "client", name, bare(host));
    let doomed = [
        open("shop", "pod4", &web[0])?,
        open("shop", "pod6", &web[1])?,
        open("shop", "service", "web.shop.svc.cluster.local")?,
        open("outside", "in4", &web[0])?,
        open("outside", "in6", &web[1])?,
        open("outside", "near4", &near[0])?,
    ];
    let spared = [open("shop", "same", &near[0])?, open("shop", "out", &out[0])?];
    mesh.mode("shop", "permissive")?;
    mesh.enrolled("shop", &["client", "web", "near"], "permissive")?;
    // One call through the mesh each way: whatever permissive does has been done by now.
    ensure!(readable(mesh, "")? == 0, "plaintext in permissive mode");
    for long in doomed.iter().chain(&spared) {
        long.goes_on().context("in permissive mode")?;
    }
    mesh.mode("shop", "strict")?;
    mesh.enrolled("shop", &["client", "web", "near"], "strict")?;
    for long in &doomed {
        long.ends(AT_ONCE).with_context(|| mesh.diagnose())?;
    }
    for long in &spared {
        long.goes_on().context("it had no reason to end")?;
    }
    Ok(())
}

fn connections_from_before_are_kept(mesh: &Mesh) -> Result<()> {
    mesh.cluster.apply(&config("Keep"))?;
    let path = ".status.conditions[?(@.type==\"Programmed\")].status";
    mesh.eventually("the configuration on every node", || {
        let said =
            mesh.cluster.kubectl(&["get", "meshconfig", "default", "-o", &format!("jsonpath={{{path}}}")])?;
        ensure!(said == "True", "{said}");
        Ok(())
    })?;
    let web = of_pod(mesh, "later", "web")?;
    let kept = [
        Long::open(mesh, "later", "client", "pod4", bare(&web[0]))?,
        Long::open(mesh, "later", "client", "service", "web.later.svc.cluster.local")?,
        Long::open(mesh, "outside", "client", "in", bare(&web[0]))?,
    ];
    mesh.mode("later", "strict")?;
    mesh.enrolled("later", &["client", "web"], "strict")?;
    mesh.eventually("the end of new plaintext", || {
        ensure!(call(mesh, "outside", "client", &web[0], "").is_err(), "a new caller outside was answered");
        Ok(())
    })?;
    call(mesh, "later", "client", "web.later.svc.cluster.local", "")?;
    for long in &kept {
        long.goes_on().context("connectionsBeforeEnrolment is Keep")?;
    }
    mesh.cluster.apply(&config("Reset"))
}

/// How the mesh carried the newest calls to `near`, on whose node the client is.
fn carried(mesh: &Mesh) -> Result<String> {
    call(mesh, "shop", "client", "near.shop.svc.cluster.local", "")?;
    let flows = mesh.weft(&["observe", "-n", "shop", "--last", "200", "-o", "compact"])?;
    let how = |line: &&str| line.contains("tls=local") || line.contains("mtls(");
    let line = flows.lines().rev().filter(|line| line.contains("shop/near")).find(how);
    Ok(line.with_context(|| format!("no call to near in {flows}"))?.to_owned())
}

fn network_policies_are_minded(mesh: &Mesh) -> Result<()> {
    mesh.eventually("the shortcut", || {
        let line = carried(mesh)?;
        ensure!(line.contains("tls=local"), "{line}");
        Ok(())
    })?;
    mesh.cluster.apply(NETWORK_POLICY)?;
    mesh.eventually("the tunnel in place of the shortcut", || {
        let line = carried(mesh)?;
        ensure!(line.contains("mtls("), "{line}");
        Ok(())
    })?;
    let said = mesh.weft_said(&["check", "-n", "shop"])?;
    let line = said.lines().find(|line| line.contains("NetworkPolicy shop/near-http"));
    let line = line.with_context(|| format!("the policy that blocks the tunnel is not named: {said}"))?;
    ensure!(line.contains("15008"), "{line}");
    mesh.cluster.kubectl(&["-n", "shop", "delete", "networkpolicy", "near-http"])?;
    mesh.eventually("the shortcut again", || {
        let line = carried(mesh)?;
        ensure!(line.contains("tls=local"), "{line}");
        Ok(())
    })
}

/// The agent's connections to the runtime come back with it.
fn the_runtime_restarts(mesh: &Mesh) -> Result<()> {
    let node = mesh.cluster.node(1);
    let near = Long::open(mesh, "shop", "client", "near", "near.shop.svc.cluster.local")?;
    node.stop_service(Service::Containerd)?;
    node.start_service(Service::Containerd)?;
    mesh.eventually("the runtime's answers", || near.goes_on())?;
    mesh.cluster.apply(&Pod::busybox("shop", "late", "node1").to_string())?;
    mesh.ready("shop", &["late"])?;
    mesh.enrolled("shop", &["late"], "strict")?;
    let capture = mesh.capture(1)?;
    mesh.eventually("a call of a Pod that came after the restart", || {
        call(mesh, "shop", "late", "web.shop.svc.cluster.local", "catalog/late")
    })?;
    ensure!(capture.finish()?.find(CANARY.as_bytes()) == 0, "plaintext after the runtime's restart");
    let agents = mesh.agents()?;
    let logs = agents.iter().map(|agent| mesh.cluster.kubectl(&["-n", "weft-system", "logs", agent]));
    let logs: String = logs.collect::<Result<Vec<_>>>()?.concat();
    ensure!(!logs.contains("panicked"), "{logs}");
    Ok(())
}

#[test]
fn routed_pods_of_two_families_behind_iptables() -> Result<()> {
    let mesh = Mesh::up(Options {
        cni: Cni::Ptp,
        proxy_mode: ProxyMode::Iptables,
        dual_stack: true,
        ..Options::default()
    })?;
    mesh.cluster.apply(&everything())?;
    for name in NAMESPACES {
        mesh.ready(name, &["client", "web"])?;
        mesh.named(name, &["web"])?;
    }
    mesh.ready("shop", &["near"])?;
    mesh.named("shop", &["near"])?;
    ensure!(readable(&mesh, "")? > 0, "without the mesh the capture sees the canary");

    connections_from_before_end(&mesh)?;
    ensure!(readable(&mesh, "")? == 0, "plaintext in strict mode");
    refused(&mesh, "outside")?;
    mesh.ready("shop", &["web", "near"]).context("the kubelet's probes reach strict Pods")?;

    mesh.cluster.apply(&catalog("default"))?;
    mesh.programmed("shop", "web-callers")?;
    for host in ways(&mesh)?.iter().take(5) {
        call(&mesh, "shop", "client", host, "catalog/shoes")?;
        let denied = call(&mesh, "shop", "client", host, "admin").unwrap_err();
        ensure!(format!("{denied:#}").contains("403"), "{host}: {denied:#}");
    }

    connections_from_before_are_kept(&mesh)?;
    network_policies_are_minded(&mesh)?;
    the_runtime_restarts(&mesh)
}
