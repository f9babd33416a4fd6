//! Identities from a real SPIRE: taken over live, renewed while traffic goes on, and gone with it: what is held serves
//! until it expires, then nothing passes, visibly, until SPIRE is back.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use weft_cluster::{
    Options,
    spire::{ADMIN_SOCKET, ORGANIZATION, Spire},
};
use weft_tests::{
    manifest::{Pod, account, namespace, service},
    mesh::Mesh,
};

const DOMAIN: &str = "cluster.local";
const CANARY: &str = "weft-canary-5f1e";
/// SPIRE's agents renew at half of it.
const LIFE: Duration = Duration::from_secs(50);

fn id(account: &str) -> String {
    format!("spiffe://{DOMAIN}/ns/shop/sa/{account}")
}

fn call(mesh: &Mesh) -> Result<String> {
    let header = format!("x-canary: {CANARY}");
    mesh.fetch("shop", "client", "http://web.shop.svc.cluster.local/", &[&header])
}

/// The SVIDs that the agents hold or want, by identity.
fn svids(mesh: &Mesh) -> Result<BTreeMap<String, Value>> {
    let mut all = BTreeMap::new();
    for node in mesh.cluster.nodes() {
        let report: Value = serde_json::from_str(&mesh.node_status(&node)?)?;
        let agents = report["agents"].as_array().into_iter().flatten();
        for svid in agents.flat_map(|agent| agent["svids"].as_array().into_iter().flatten()) {
            all.insert(svid["identity"].as_str().unwrap_or_default().to_owned(), svid.clone());
        }
    }
    Ok(all)
}

fn serial(mesh: &Mesh, account: &str) -> Result<String> {
    let all = svids(mesh)?;
    let svid = all.get(&id(account)).context("no SVID")?;
    let by_spire = svid["issued_by"].as_str().is_some_and(|by| by.contains(ORGANIZATION));
    ensure!(by_spire && svid["problem"] == "", "{svid}");
    Ok(svid["serial"].as_str().unwrap_or_default().to_owned())
}

/// What an agent's metrics say of `name`.
fn metric(mesh: &Mesh, node: u8, name: &str) -> Result<f64> {
    let node = mesh.cluster.node(node);
    let text = node.exec(&["busybox", "wget", "-qO-", "http://127.0.0.1:15020/metrics"])?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no {name} in {text}"))?.trim().parse()?)
}

#[test]
fn identities_come_from_spire_and_end_with_it() -> Result<()> {
    let mesh = Mesh::up(Options::default())?;
    let spire = Spire::up(&mesh.cluster, DOMAIN, &|line| eprintln!("{line}"))?;
    story(&mesh, &spire).with_context(|| spire.diagnose())
}

fn story(mesh: &Mesh, spire: &Spire<'_>) -> Result<()> {
    let own = |pod: Pod, name: &str| format!("{}{}", account("shop", name), pod.account(name));
    let objects = [
        namespace("shop", Some("strict")),
        own(Pod::nginx("shop", "web", "node2"), "web"),
        own(Pod::busybox("shop", "client", "node1"), "client"),
        own(Pod::busybox("shop", "odd", "node1"), "odd"),
        service("shop", "web", "ports: [{port: 80, appProtocol: http}]"),
    ];
    mesh.cluster.apply(&objects.concat())?;
    mesh.ready("shop", &["web", "client", "odd"])?;
    mesh.named("shop", &["web"])?;
    mesh.enrolled("shop", &["web", "client", "odd"], "strict")?;
    mesh.eventually("a call with the operator's identities", || call(mesh))?;

    for account in ["web", "client"] {
        spire.entry(&id(account), &["k8s:ns:shop", &format!("k8s:sa:{account}")], LIFE)?;
    }
    let other = format!("spiffe://{DOMAIN}/shop/odd");
    spire.entry(&other, &["k8s:ns:shop", "k8s:sa:odd"], LIFE)?;
    mesh.cluster.apply(&format!(
        "{{apiVersion: weft.mesh/v1alpha1, kind: MeshConfig, metadata: {{name: default}}, \
         spec: {{trustDomain: {DOMAIN}, issuer: {{type: Spire, spire: {{socketPath: {ADMIN_SOCKET}}}}}}}}}"
    ))?;
    mesh.eventually("identities of SPIRE", || Ok((serial(mesh, "client")?, serial(mesh, "web")?)))?;
    mesh.eventually("a call with SPIRE's identities", || call(mesh))?;
    mesh.eventually("what is wrong with an entry", || {
        let problem = svids(mesh)?.remove(&id("odd")).context("no odd")?["problem"].to_string();
        ensure!(
            problem.contains(&other) && problem.contains(&format!("Weft needs {}", id("odd"))),
            "{problem}"
        );
        Ok(())
    })?;

    // Renewed under traffic, without one call lost.
    let (first, begin) = ((serial(mesh, "client")?, serial(mesh, "web")?), Instant::now());
    let mut calls = 0;
    loop {
        call(mesh).with_context(|| format!("call {calls} while identities are renewed"))?;
        calls += 1;
        let now = (serial(mesh, "client")?, serial(mesh, "web")?);
        if now.0 != first.0 && now.1 != first.1 {
            break;
        }
        ensure!(begin.elapsed() < LIFE, "no renewal in {calls} calls: {:?}", svids(mesh)?);
    }
    tell(&format!("{calls} calls over a renewal, none failed"));

    // Without SPIRE's agent: on until the expiry, then closed and said.
    let node = mesh.cluster.node(2);
    ensure!(metric(mesh, 2, "weft_issuer_connected")? > 0.0, "not connected");
    spire.stop_agent(&node)?;
    let stopped = Instant::now();
    for _ in 0..5 {
        call(mesh).context("right after SPIRE's agent went")?;
    }
    mesh.eventually("what is said of SPIRE's agent", || {
        ensure!(metric(mesh, 2, "weft_issuer_connected")? == 0.0, "still connected");
        Ok(())
    })?;
    let capture = mesh.capture(1)?;
    mesh.eventually("the end of the identity", || {
        let svid = svids(mesh)?.remove(&id("web")).context("no web")?;
        let problem = svid["problem"].as_str().unwrap_or_default();
        ensure!(svid["not_after"] == "" && problem.contains("the SPIRE agent does not answer at"), "{svid}");
        Ok(())
    })?;
    tell(&format!("closed {:.0} s after the end of SPIRE's agent", stopped.elapsed().as_secs_f64()));
    for _ in 0..3 {
        let answer = call(mesh);
        ensure!(answer.is_err(), "answered without an identity: {answer:?}");
    }
    let trace = capture.finish()?;
    ensure!(trace.find(CANARY.as_bytes()) == 0, "plaintext without an identity");
    ensure!(metric(mesh, 2, "weft_svid_expired_total")? >= 1.0, "the expiry is not counted");
    let said = mesh.weft_said(&["status"])?;
    ensure!(said.contains("the SPIRE agent does not answer at"), "{said}");

    spire.start_agent(&node)?;
    mesh.eventually("a call after SPIRE's return", || call(mesh))?;
    serial(mesh, "web").map(drop)
}

fn tell(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{line}");
}
