//! Day two on a real cluster: installed by Helm, upgraded and rolled back under load without a failed connection, and
//! uninstalled so that nothing of Weft is left, also where a node is down at first.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers fail and speak as their test does")]

use std::{env, path::PathBuf, thread};

use anyhow::{Context as _, Result, ensure};
use weft_cluster::{Node, Options, Service, parts::go, product};
use weft_tests::{
    manifest::{Pod, namespace, service},
    mesh::Mesh,
};

const SYSTEM: &str = "weft-system";
const SHOP: &str = "shop";
const CANARY: &str = "weft-canary-d2a7";
const URL: &str = "http://web.shop.svc.cluster.local/";

fn documents() -> String {
    [
        namespace(SHOP, None),
        Pod::nginx(SHOP, "web", "node2").to_string(),
        service(SHOP, "web", "ports: [{port: 80}]"),
        Pod::busybox(SHOP, "client", "node1").to_string(),
    ]
    .concat()
}

fn programs() -> Result<PathBuf> {
    env::var_os("WEFT_BIN_DIR").map(PathBuf::from).context("WEFT_BIN_DIR is not set")
}

/// Exit code, standard output and standard error of `weft`.
fn weft(mesh: &Mesh, words: &[&str]) -> Result<(Option<i32>, String, String)> {
    let output = mesh.cluster.command(&programs()?.join("weft").to_string_lossy())?.args(words).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
}

fn helm(mesh: &Mesh, words: &[&str]) -> Result<String> {
    let program = go::HELM.ensure(&|line| println!("{line}"))?.join("helm");
    let output = mesh.cluster.command(&program.to_string_lossy())?.args(words).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "helm {}: {}{said}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

/// Gives every node the images under another tag: another version, as far as Kubernetes can tell.
fn another_version(mesh: &Mesh, tag: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (_, archive) in product::save(&programs()?, "registry.test/weft", tag, folder.path())? {
        mesh.cluster.load(&archive)?;
    }
    Ok(())
}

/// The tags of operator and agents.
fn tags(mesh: &Mesh) -> Result<String> {
    let image = |what: &str| mesh.field(SYSTEM, what, ".spec.template.spec.containers[0].image");
    let tag = |image: String| image.rsplit(':').next().unwrap_or_default().to_owned();
    Ok(format!("{} {}", tag(image("deployment/weft-operator")?), tag(image("daemonset/weft-agent")?)))
}

/// `weft upgrade | kubectl apply -f -` while connections are made; none may fail.
fn upgrade_under_load(mesh: &Mesh, tag: &str) -> Result<()> {
    let script = format!(
        "rm -f /tmp/stop; n=0; bad=0; while [ ! -f /tmp/stop ]; do n=$((n+1)); wget -T 5 -qO /dev/null {URL}$n || bad=$((bad+1)); done; echo $n $bad"
    );
    let counted = thread::scope(|scope| -> Result<String> {
        let load = scope.spawn(|| mesh.exec(SHOP, "client", &["sh", "-c", &script]));
        let upgraded = (|| {
            let words = ["upgrade", "--registry", "registry.test/weft", "--tag", tag];
            let (code, manifests, notes) = weft(mesh, &words)?;
            ensure!(code == Some(0) && notes.contains(&format!("-> {tag}")), "{code:?}: {notes}");
            mesh.cluster.kubectl_with(&["apply", "-f", "-"], &manifests)?;
            mesh.rolled_out().with_context(|| mesh.diagnose())
        })();
        mesh.exec(SHOP, "client", &["touch", "/tmp/stop"])?;
        let counted = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        upgraded?;
        counted
    })?;
    let (all, bad) = counted.trim().split_once(' ').with_context(|| counted.clone())?;
    ensure!(bad == "0", "{bad} of {all} connections failed while {tag} was rolled out\n{}", mesh.diagnose());
    ensure!(all.parse::<u32>()? > 100, "only {all} connections were made");
    ensure!(tags(mesh)? == format!("{tag} {tag}"), "{}", tags(mesh)?);
    Ok(())
}

/// What of Weft is on a node.
fn left_on(node: &Node<'_>) -> Result<String> {
    let script = "ls -d /sys/fs/bpf/weft* /run/weft /var/lib/weft /opt/cni/bin/weft-cni /etc/cni/net.d/*weft* 2>/dev/null; true";
    node.exec(&["sh", "-c", script])
}

fn canaries(mesh: &Mesh) -> Result<usize> {
    let capture = mesh.capture(1)?;
    let header = format!("x-canary: {CANARY}");
    mesh.eventually("a call", || mesh.fetch(SHOP, "client", URL, &[&header]))?;
    Ok(capture.finish()?.find(CANARY.as_bytes()))
}

#[test]
fn installed_upgraded_rolled_back_and_removed() -> Result<()> {
    let mesh = Mesh::bare(Options::default())?;
    mesh.cluster.apply(&documents())?;
    another_version(&mesh, "next")?;
    before(&mesh)?;

    let chart = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/weft");
    let chart = chart.to_string_lossy();
    let words = ["install", "weft", &chart, "-n", SYSTEM, "--create-namespace", "--set"];
    helm(&mesh, &[&words[..], &["image.registry=registry.test/weft,image.tag=test"]].concat())?;
    mesh.rolled_out().with_context(|| mesh.diagnose())?;
    mesh.ready(SHOP, &["web", "client"])?;
    mesh.named(SHOP, &["web"])?;
    mesh.mode(SHOP, "strict")?;
    mesh.enrolled(SHOP, &["web", "client"], "strict")?;
    mesh.eventually("a check without findings", || mesh.weft(&["check"]))?;
    ensure!(canaries(&mesh)? == 0, "plaintext with a chart's installation");

    upgrade_under_load(&mesh, "next")?;
    upgrade_under_load(&mesh, "test").context("the roll-back")?;
    mesh.eventually("a check without findings", || mesh.weft(&["check"]))?;

    uninstall(&mesh)
}

/// Each node's kernel takes every program, seen before anything is installed; nothing of that look is left.
fn before(mesh: &Mesh) -> Result<()> {
    let (code, said, why) = weft(mesh, &["check", "--pre", "--trial", "registry.test/weft/weft-agent:test"])?;
    ensure!(
        code == Some(0) && said.contains("2 nodes can run Weft: BTF, cgroup2, bpffs, "),
        "{code:?}: {said}{why}"
    );
    for node in mesh.cluster.nodes() {
        ensure!(left_on(&node)?.is_empty(), "{} has {}", node.name(), left_on(&node)?);
    }
    mesh.eventually("the end of the trial", || {
        let all = mesh.cluster.kubectl(&["get", "namespaces", "-o", "name"])?;
        ensure!(!all.contains("weft-trial"), "{all}");
        Ok(())
    })
}

fn uninstall(mesh: &Mesh) -> Result<()> {
    // Not while a namespace counts on encryption.
    let (code, _, said) = weft(mesh, &["uninstall"])?;
    ensure!(
        code == Some(1) && said.contains("nothing was done: shop would go plaintext"),
        "{code:?}: {said}"
    );
    mesh.rolled_out()?;
    mesh.mode(SHOP, "permissive")?;
    for node in mesh.cluster.nodes() {
        ensure!(left_on(&node)?.contains("/sys/fs/bpf/weft"), "there is nothing to clean on {}", node.name());
    }

    // A node that is down is named, with what to do; the others are clean, and the rest stays.
    let away = mesh.cluster.node(2);
    away.stop_service(Service::Kubelet)?;
    let down =
        r#"{"status":{"conditions":[{"type":"Ready","status":"Unknown","reason":"NodeStatusUnknown"}]}}"#;
    mesh.cluster.kubectl(&["patch", "node", "node2", "--subresource=status", "-p", down])?;
    let (code, _, said) = weft(mesh, &["uninstall", "--crds", "--labels"])?;
    ensure!(code == Some(3), "{code:?}: {said}");
    for part in ["node2: it is down", "rm -rf /sys/fs/bpf/weft", "run this again when they are back"] {
        ensure!(said.contains(part), "no {part:?} in {said}");
    }
    ensure!(left_on(&mesh.cluster.node(1))?.is_empty(), "{}", left_on(&mesh.cluster.node(1))?);
    mesh.cluster.kubectl(&["get", "crd", "meshconfigs.weft.mesh"]).context("the kinds went too early")?;

    away.start_service(Service::Kubelet)?;
    mesh.cluster.wait_nodes()?;
    let (code, _, said) = weft(mesh, &["uninstall", "--crds", "--labels"])?;
    ensure!(code == Some(0) && said.contains("2 nodes are clean"), "{code:?}: {said}");
    nothing_left(mesh)
}

fn nothing_left(mesh: &Mesh) -> Result<()> {
    for node in mesh.cluster.nodes() {
        mesh.eventually("nodes without anything of Weft", || {
            let left = left_on(&node)?;
            ensure!(left.is_empty(), "{} has {left}", node.name());
            Ok(())
        })?;
    }
    mesh.eventually("a cluster without anything of Weft", || {
        let kinds = "crd,clusterrole,clusterrolebinding,namespace";
        let all = mesh.cluster.kubectl(&["get", kinds, "-o", "name"])?;
        let left: Vec<_> = all.lines().filter(|name| name.contains("weft")).collect();
        ensure!(left.is_empty(), "{left:?}");
        let labels =
            mesh.cluster.kubectl(&["get", "namespaces", "-o", "jsonpath={.items[*].metadata.labels}"])?;
        ensure!(!labels.contains("weft.mesh/"), "{labels}");
        Ok(())
    })?;
    // Pods go on as without Weft: nobody is between them any more.
    ensure!(canaries(mesh)? > 0, "a call without Weft was not seen in plaintext");
    // New Pods too.
    mesh.cluster.kubectl(&["-n", SHOP, "delete", "pod", "client"])?;
    mesh.cluster.apply(&documents())?;
    mesh.ready(SHOP, &["client"])?;
    mesh.eventually("a call of a new Pod", || mesh.fetch(SHOP, "client", URL, &[])).map(drop)
}
