//! `weft check` finds what is wrong: faults are made on a real cluster one after the other, each is found with its
//! remedy and exit code 1, and where the remedy is a command of Weft it is what ends the fault. In the end all is green.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::Value;
use weft_cluster::Options;
use weft_tests::{
    manifest::{Pod, namespace, service},
    mesh::Mesh,
};

const SYSTEM: &str = "weft-system";
const SHOP: &str = "shop";

fn documents() -> String {
    [
        namespace(SHOP, Some("permissive")),
        namespace("outside", None),
        namespace("other", None),
        "---\n{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: gvisor}, handler: runsc}\n"
            .to_owned(),
        Pod::nginx(SHOP, "web", "node2").to_string(),
        Pod::busybox(SHOP, "client", "node1").to_string(),
        Pod::busybox("outside", "client", "node1").to_string(),
        service(SHOP, "web", "ports: [{port: 80}]"),
    ]
    .concat()
}

/// What `weft check` shall say.
struct Finding<'a> {
    level: &'a str,
    says: &'a str,
    /// In one of the lines below it; empty where there need be none.
    detail: &'a str,
    remedy: &'a str,
}

/// Exit code and output of `weft`.
fn weft(mesh: &Mesh, words: &[&str]) -> Result<(Option<i32>, String)> {
    let folder = env::var_os("WEFT_BIN_DIR").map(PathBuf::from).context("WEFT_BIN_DIR is not set")?;
    let output = mesh.cluster.command(&folder.join("weft").to_string_lossy())?.args(words).output()?;
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.code(), said))
}

/// Waits until the finding is there, with exit code 1, as JSON and as a table.
fn found(mesh: &Mesh, words: &[&str], wanted: &Finding<'_>) -> Result<()> {
    let words = [&["check"], words].concat();
    mesh.eventually(wanted.says, || {
        let (code, said) = weft(mesh, &[&words[..], &["-o", "json"]].concat())?;
        let report: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let fits = |f: &&Value| {
            let lines = f["details"].as_array().cloned().unwrap_or_default();
            text(&f["message"]).contains(wanted.says)
                && (wanted.detail.is_empty() || lines.iter().any(|l| text(l).contains(wanted.detail)))
        };
        let finding =
            report["findings"].as_array().into_iter().flatten().find(fits).with_context(|| said.clone())?;
        ensure!(finding["level"] == wanted.level, "{finding:#}");
        ensure!(text(&finding["remedy"]).contains(wanted.remedy), "{finding:#}");
        ensure!(code == Some(1), "exit code {code:?} with {finding:#}");
        Ok(())
    })?;
    let (code, table) = weft(mesh, &words)?;
    let heading = if wanted.level == "error" { "ERROR" } else { "WARN " };
    ensure!(code == Some(1) && table.contains("fix: "), "{table}");
    let line = table.lines().find(|line| line.contains(wanted.says)).with_context(|| table.clone())?;
    ensure!(line.trim_start().starts_with(heading), "{table}");
    Ok(())
}

/// Waits until nothing is wrong any more.
fn green(mesh: &Mesh, words: &[&str]) -> Result<String> {
    mesh.eventually("a check without findings", || {
        let (code, said) = weft(mesh, &[&["check"], words].concat())?;
        ensure!(code == Some(0) && said.contains("Everything is fine."), "{code:?}: {said}");
        Ok(said)
    })
}

/// Applies what `weft WORDS` prints: the remedy that several findings name.
fn apply_printed(mesh: &Mesh, words: &[&str]) -> Result<()> {
    let printed = mesh.weft(&[words, &["--registry", "registry.test/weft", "--tag", "test"]].concat())?;
    mesh.cluster.kubectl_with(&["apply", "--server-side", "--force-conflicts", "-f", "-"], &printed).map(drop)
}

fn patch(mesh: &Mesh, object: &[&str], json: &str) -> Result<()> {
    let words = [&["patch"], object, &["--type=json", "-p", json]].concat();
    mesh.cluster.kubectl(&words).map(drop)
}

#[test]
fn each_fault_is_found_and_its_remedy_named() -> Result<()> {
    let mesh = Mesh::up(Options { handlers: vec!["runsc".into()], ..Options::default() })?;
    let kubectl = |words: &[&str]| mesh.cluster.kubectl(words).map(drop);
    mesh.cluster.apply(&documents())?;
    mesh.ready(SHOP, &["web", "client"])?;
    mesh.ready("outside", &["client"])?;
    mesh.named(SHOP, &["web"])?;
    mesh.enrolled(SHOP, &["web", "client"], "permissive")?;
    green(&mesh, &[])?;

    captured_and_encrypted(&mesh)?;
    in_namespaces(&mesh, kubectl)?;
    in_the_installation(&mesh, kubectl)?;
    on_nodes(&mesh, kubectl)?;

    let said = green(&mesh, &[])?;
    ensure!(said.contains("2 Pods captured") || said.contains("3 Pods captured"), "{said}");
    green(&mesh, &["-n", SHOP, "--pod", "client"]).map(drop)
}

/// The live probe: a connection of the Pod's own, with its record, between two nodes and where policy refuses it.
fn captured_and_encrypted(mesh: &Mesh) -> Result<()> {
    let said = green(mesh, &["-n", SHOP, "--pod", "client"])?;
    let line = said.lines().find(|l| l.contains("shop/client -> shop/web")).with_context(|| said.clone())?;
    for part in ["captured and encrypted", "spiffe://cluster.local/ns/shop/sa/default", "TLS13"] {
        ensure!(line.contains(part), "{line}");
    }
    // Nothing outside the mesh is dialled.
    let (code, said) = weft(mesh, &["check", "-n", SHOP, "--pod", "client", "--to", "10.96.0.1:443"])?;
    ensure!(code == Some(1) && said.contains("only Pods of the mesh are dialled"), "{said}");
    let deny = format!(
        "{{apiVersion: weft.mesh/v1alpha1, kind: AuthorizationPolicy, metadata: {{name: closed, namespace: {SHOP}}}, \
         spec: {{targetRefs: [{{group: '', kind: Pod, selector: {{matchLabels: {{app: web}}}}}}], action: ALLOW, rules: []}}}}"
    );
    mesh.cluster.apply(&deny)?;
    mesh.eventually("a probe that policy refuses", || {
        let (_, said) = weft(mesh, &["check", "-n", SHOP, "--pod", "client"])?;
        ensure!(said.contains("captured; the probe was refused"), "{said}");
        Ok(())
    })?;
    mesh.cluster.kubectl(&["-n", SHOP, "delete", "wap", "closed"]).map(drop)
}

fn in_namespaces(mesh: &Mesh, kubectl: impl Fn(&[&str]) -> Result<()>) -> Result<()> {
    // A caller that strict would break.
    mesh.eventually("a plaintext call", || {
        mesh.fetch("outside", "client", "http://web.shop.svc.cluster.local/", &[])
    })?;
    let caller = Finding {
        level: "warning",
        says: "strict would break 1 callers of shop",
        detail: "outside/client -> web:80",
        remedy: "weft.mesh/mode=permissive",
    };
    found(mesh, &["-n", SHOP], &caller)?;
    mesh.mode("outside", "permissive")?;
    green(mesh, &["-n", SHOP])?;

    // A NetworkPolicy that leaves no way for the tunnel.
    let policy = format!(
        "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: only-http, namespace: {SHOP}}}, \
         spec: {{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{ports: [{{port: 80}}]}}]}}}}"
    );
    mesh.cluster.apply(&policy)?;
    let blocked = Finding {
        level: "error",
        says: "NetworkPolicy shop/only-http lets no Ingress to TCP 15008 pass",
        detail: "",
        remedy: "add TCP 15008",
    };
    found(mesh, &[], &blocked)?;
    kubectl(&["-n", SHOP, "delete", "networkpolicy", "only-http"])?;

    // Labels that contradict each other, that mean nothing, and that would loosen.
    kubectl(&["label", "namespace", "other", "weft.mesh/mode=strict", "weft.mesh/fail-mode=open"])?;
    let both = Finding {
        level: "error",
        says: "other: strict and weft.mesh/fail-mode=open",
        detail: "",
        remedy: "fail-mode-",
    };
    found(mesh, &[], &both)?;
    kubectl(&[
        "label",
        "--overwrite",
        "namespace",
        "other",
        "weft.mesh/mode=stirct",
        "weft.mesh/fail-mode-",
    ])?;
    let typo = Finding {
        level: "error",
        says: "weft.mesh/mode=stirct means nothing",
        detail: "",
        remedy: "weft.mesh/mode=strict",
    };
    found(mesh, &[], &typo)?;
    kubectl(&["label", "namespace", "other", "weft.mesh/mode-"])?;
    kubectl(&["-n", SHOP, "label", "pod", "client", "weft.mesh/mode=disabled"])?;
    let looser = Finding {
        level: "warning",
        says: "labels of Pods are ignored",
        detail: "shop/client: weft.mesh/mode=disabled would loosen",
        remedy: "take the label out",
    };
    found(mesh, &[], &looser)?;
    kubectl(&["-n", SHOP, "label", "pod", "client", "weft.mesh/mode-"])?;

    // A policy that names a Service that is not there.
    let wrong = format!(
        "{{apiVersion: weft.mesh/v1alpha1, kind: AuthorizationPolicy, metadata: {{name: typo, namespace: {SHOP}}}, \
         spec: {{targetRefs: [{{group: '', kind: Service, name: wbe}}], action: ALLOW, rules: []}}}}"
    );
    mesh.cluster.apply(&wrong)?;
    let unresolved = Finding {
        level: "error",
        says: "AuthorizationPolicy shop/typo: not ResolvedRefs: ",
        detail: "",
        remedy: "kubectl -n shop edit authorizationpolicy typo",
    };
    found(mesh, &[], &unresolved)?;
    kubectl(&["-n", SHOP, "delete", "wap", "typo"])?;

    // A Pod whose sandbox cannot be captured.
    let boxed = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: boxed, namespace: {SHOP}}}, spec: {{nodeName: node1, runtimeClassName: gvisor, \
         terminationGracePeriodSeconds: 0, containers: [{{name: c, image: 'busybox:1', command: [sleep, infinity]}}]}}}}"
    );
    mesh.cluster.apply(&boxed)?;
    let refused = Finding {
        level: "error",
        says: "of 4 Pods are not captured",
        detail: "shop/boxed on node1: ",
        remedy: "weft status",
    };
    found(mesh, &[], &refused)?;
    kubectl(&["-n", SHOP, "delete", "pod", "boxed"])?;
    green(mesh, &[]).map(drop)
}

fn in_the_installation(mesh: &Mesh, kubectl: impl Fn(&[&str]) -> Result<()>) -> Result<()> {
    // A kind that is missing, and one of an older version.
    kubectl(&["delete", "crd", "trafficpolicies.weft.mesh"])?;
    let missing = Finding {
        level: "error",
        says: "kinds (CRDs) are missing: trafficpolicies.weft.mesh",
        detail: "",
        remedy: "weft install | kubectl apply -f -",
    };
    found(mesh, &[], &missing)?;
    apply_printed(mesh, &["install"])?;
    let field = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/unknownPods";
    patch(mesh, &["crd", "meshconfigs.weft.mesh"], &format!("[{{\"op\":\"remove\",\"path\":\"{field}\"}}]"))?;
    let older = Finding {
        level: "error",
        says: "kinds (CRDs) are of an older version",
        detail: "meshconfigs.weft.mesh does not know spec.unknownPods",
        remedy: "weft upgrade | kubectl apply -f -",
    };
    found(mesh, &[], &older)?;
    apply_printed(mesh, &["upgrade"])?;

    // A right of the operator's.
    patch(mesh, &["clusterrole", "weft-operator"], "[{\"op\":\"remove\",\"path\":\"/rules/0\"}]")?;
    let right = Finding {
        level: "error",
        says: "the operator lacks rights",
        detail: "watch pods",
        remedy: "weft upgrade | kubectl apply -f -",
    };
    found(mesh, &[], &right)?;
    apply_printed(mesh, &["upgrade"])?;
    green(mesh, &[])?;

    // A CA that ends soon; then a new one.
    ending_ca(mesh)?;
    let ends = Finding { level: "warning", says: "the CA expires in", detail: "", remedy: "Secret weft-ca" };
    found(mesh, &[], &ends)?;
    kubectl(&["-n", SYSTEM, "delete", "secret", "weft-ca"])?;
    green(mesh, &[])?;

    // No operator.
    kubectl(&["-n", SYSTEM, "scale", "deployment/weft-operator", "--replicas=0"])?;
    let scaled = Finding {
        level: "error",
        says: "the operator is scaled to 0",
        detail: "",
        remedy: "kubectl -n weft-system scale deployment/weft-operator --replicas=2",
    };
    found(mesh, &[], &scaled)?;
    kubectl(&["-n", SYSTEM, "scale", "deployment/weft-operator", "--replicas=2"])?;
    mesh.rolled_out()?;
    green(mesh, &[]).map(drop)
}

fn on_nodes(mesh: &Mesh, kubectl: impl Fn(&[&str]) -> Result<()>) -> Result<()> {
    mesh.cluster.node(2).exec(&["ip", "link", "set", "eth0", "mtu", "1400"])?;
    let mtu = Finding {
        level: "warning",
        says: "the nodes' MTUs differ",
        detail: "by eth0: 1400",
        remedy: "one MTU",
    };
    found(mesh, &[], &mtu)?;
    mesh.cluster.node(2).exec(&["ip", "link", "set", "eth0", "mtu", "1500"])?;

    // Agents of another version, whose image nobody has: the old ones go on.
    let image = "agent=registry.test/weft/weft-agent:v9";
    kubectl(&["-n", SYSTEM, "set", "image", "daemonset/weft-agent", image])?;
    let skew = Finding {
        level: "warning",
        says: "the operator's image is test, the agents' is v9",
        detail: "",
        remedy: "weft upgrade | kubectl apply -f -",
    };
    found(mesh, &[], &skew)?;
    let stuck = Finding {
        level: "warning",
        says: "of the newest version",
        detail: "ImagePull",
        remedy: "rollout undo",
    };
    found(mesh, &[], &stuck)?;
    kubectl(&["-n", SYSTEM, "rollout", "undo", "daemonset/weft-agent"])?;
    mesh.rolled_out()?;

    // A node without an agent.
    mesh.place_agents("{\"kubernetes.io/hostname\":\"node1\"}")?;
    let bare = Finding {
        level: "error",
        says: "no agent on node2",
        detail: "",
        remedy: "edit daemonset weft-agent",
    };
    found(mesh, &[], &bare)?;
    mesh.run_agents(true)
}

/// Puts a CA of ten days into the Secret.
fn ending_ca(mesh: &Mesh) -> Result<()> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Of an order of a clock that both sides share.
    let now: i64 = mesh.cluster.node(1).exec(&["date", "+%s"])?.trim().parse()?;
    let at = |days: i64| {
        let seconds = u64::try_from(now + days * 86_400).unwrap_or_default();
        std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds)
    };
    params.not_before = at(0).into();
    params.not_after = at(10).into();
    let certificate = params.self_signed(&key)?.pem();
    let secret = serde_json::json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": "weft-ca", "namespace": SYSTEM},
        "stringData": {"tls.crt": certificate, "tls.key": key.serialize_pem(), "ca.crt": certificate},
    });
    mesh.cluster.apply(&secret.to_string())
}
