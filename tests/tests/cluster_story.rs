//! Weft on a real two-node Kubernetes, as its quick start tells it: installed from `deploy/`, a namespace taken in where
//! it stands, strict, policed, and the agents replaced under load. Needs root and the parts of a cluster.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use anyhow::{Context as _, Result, ensure};
use weft_cluster::Options;
use weft_tests::{
    manifest::{Pod, account, catalog, namespace, service},
    mesh::{Mesh, NGINX},
};

/// Carried by requests; never to be seen on the wire.
const CANARY: &str = "weft-canary-7f3a";
const SHOP: &str = "shop";
const URL: &str = "http://web.shop.svc.cluster.local/";

fn shop() -> String {
    let deployment = format!(
        "---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, namespace: {SHOP}}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      nodeName: node2
      containers:
      - name: nginx
        image: {NGINX}
        imagePullPolicy: IfNotPresent
        ports: [{{name: http, containerPort: 80}}]
        readinessProbe: {{httpGet: {{path: /healthz, port: http}}, periodSeconds: 1}}
"
    );
    let client = |name: &str| {
        let pod = Pod::busybox(name, "client", "node1").account("client");
        format!("{}{}{pod}", namespace(name, None), account(name, "client"))
    };
    let web = service(SHOP, "web", "ports: [{name: http, port: 80, targetPort: http, appProtocol: http}]");
    [client(SHOP), client("outside"), deployment, web].concat()
}

fn call(mesh: &Mesh, namespace: &str, path: &str) -> Result<String> {
    let header = format!("x-canary: {CANARY}");
    mesh.fetch(namespace, "client", &format!("{URL}{path}"), &[&header])
}

/// How often the canary passes node 1's wire in plaintext during 20 calls.
fn readable(mesh: &Mesh) -> Result<(usize, usize)> {
    let capture = mesh.capture(1)?;
    for _ in 0..20 {
        call(mesh, SHOP, "")?;
    }
    let trace = capture.finish()?;
    Ok((trace.find(CANARY.as_bytes()), trace.len()))
}

/// The commands of the quick start, through the API server: what they say of a call of each kind.
fn tools_see_it(mesh: &Mesh) -> Result<()> {
    let check = mesh.weft_said(&["check"])?;
    ensure!(!check.contains("error"), "{check}");
    let callers = mesh.weft_said(&["check", "-n", SHOP])?;
    ensure!(callers.contains("outside/client"), "strict would break a caller that is not named: {callers}");
    let status = mesh.weft_said(&["status", "-n", SHOP])?;
    ensure!(status.contains("node1") && status.contains("node2"), "{status}");
    mesh.eventually("the flows of both nodes", || {
        let flows = mesh.weft(&["observe", "-n", SHOP, "--last", "200", "-o", "compact"])?;
        for part in ["shop/client", "mtls(", "proxy-source", "proxy-destination", "outside/client"] {
            ensure!(flows.contains(part), "no {part} in {flows}");
        }
        Ok(())
    })
}

#[test]
fn the_quick_start_is_true() -> Result<()> {
    let mesh = Mesh::up(Options::default())?;
    mesh.cluster.apply(&shop())?;
    mesh.cluster.kubectl(&["-n", SHOP, "rollout", "status", "deployment/web", "--timeout=240s"])?;
    mesh.ready(SHOP, &["client"])?;
    mesh.ready("outside", &["client"])?;
    mesh.named(SHOP, &["web"])?;
    let web = mesh.cluster.kubectl(&[
        "-n",
        SHOP,
        "get",
        "pods",
        "-l",
        "app=web",
        "-o",
        "jsonpath={.items[0].metadata.name}",
    ])?;

    // Outside the mesh: everything as without Weft, and the capture can see it.
    mesh.eventually("a call outside the mesh", || call(&mesh, SHOP, ""))?;
    let (found, packets) = readable(&mesh)?;
    ensure!(found >= 20, "the canary was seen {found} times in {packets} packets without the mesh");

    // Taken in where it stands, without a restart.
    mesh.mode(SHOP, "permissive")?;
    mesh.enrolled(SHOP, &["client", &web], "permissive")?;
    let answer = mesh.eventually("a call through the mesh", || call(&mesh, SHOP, ""))?;
    let address =
        mesh.cluster.kubectl(&["-n", SHOP, "get", "pod", "client", "-o", "jsonpath={.status.podIP}"])?;
    ensure!(answer.contains(&format!("saw {address} GET /")), "the server saw somebody else: {answer}");
    let (found, packets) = readable(&mesh)?;
    ensure!(found == 0 && packets > 20, "the canary was seen {found} times in {packets} packets");
    call(&mesh, "outside", "").context("permissive takes plaintext from outside")?;
    tools_see_it(&mesh)?;

    // Strict: nothing from outside, probes go on, logs and exec work.
    mesh.mode(SHOP, "strict")?;
    mesh.enrolled(SHOP, &["client", &web], "strict")?;
    mesh.eventually("the end of plaintext from outside", || {
        ensure!(call(&mesh, "outside", "").is_err(), "a caller outside the mesh was answered");
        Ok(())
    })?;
    call(&mesh, SHOP, "")?;
    mesh.ready(SHOP, &[&web]).context("the kubelet's probes reach a strict Pod")?;
    ensure!(!mesh.cluster.kubectl(&["-n", SHOP, "logs", &web])?.contains("panic"));

    // Policy, live, per request.
    mesh.cluster.apply(&catalog("client"))?;
    mesh.programmed(SHOP, "web-callers")?;
    call(&mesh, SHOP, "catalog/shoes")?;
    let denied = call(&mesh, SHOP, "admin").unwrap_err();
    ensure!(format!("{denied:#}").contains("403"), "{denied:#}");

    // The agents are replaced while calls go on.
    mesh.cluster.kubectl(&["-n", "weft-system", "rollout", "restart", "daemonset/weft-agent"])?;
    let script = format!(
        "n=0; bad=0; while [ $n -lt 400 ]; do n=$((n+1)); wget -T 5 -qO /dev/null {URL}catalog/$n || bad=$((bad+1)); done; echo $bad"
    );
    let bad = mesh.exec(SHOP, "client", &["sh", "-c", &script])?;
    mesh.rolled_out().with_context(|| mesh.diagnose())?;
    ensure!(
        bad.trim() == "0",
        "{} of 400 calls failed while the agents were replaced\n{}",
        bad.trim(),
        mesh.diagnose()
    );

    let (found, _) = {
        let capture = mesh.capture(1)?;
        call(&mesh, SHOP, "catalog/last")?;
        let trace = capture.finish()?;
        (trace.find(CANARY.as_bytes()), trace.len())
    };
    ensure!(found == 0, "plaintext after the replacement");
    Ok(())
}
