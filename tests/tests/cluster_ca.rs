//! A CA of one's own on a real cluster: an intermediate in a Secret of cert-manager's form, which the MeshConfig names,
//! is replaced by one below another root while Pods of two nodes call each other. Nothing fails, although ends that the
//! one has signed meet ends that the other has; in the end the new one has signed them all.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use weft_cluster::Options;
use weft_tests::{
    failure::{
        Fate,
        ca::Company,
        cluster,
        watch::{Seen, Watched as _},
    },
    lab::Process,
    manifest::{Pod, account, namespace},
    mesh::Mesh,
    metrics,
};

const SHOP: &str = "shop";
const DAY: u64 = 24 * 3600;
/// A new root signs 150 s after it is first trusted; what was signed lives 8 minutes and is renewed after 216 s to
/// 264 s. So for the better part of a minute, ends of both are beside each other.
const CONFIG: &str = "---
apiVersion: weft.mesh/v1alpha1
kind: MeshConfig
metadata: {name: default}
spec: {issuer: {embedded: {svidLifetime: 8m, secretRef: {namespace: pki, name: mesh-ca}}}}
";
/// As docs/rbac.md has it.
const RIGHTS: &str = "---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: weft-ca, namespace: pki}
rules:
- {apiGroups: [''], resources: [secrets], resourceNames: [mesh-ca], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: weft-ca, namespace: pki}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: weft-ca}
subjects: [{kind: ServiceAccount, name: weft-operator, namespace: weft-system}]
";

/// Pods with an account each, by which their certificates are told apart; each serves, and calls.
fn enrol(mesh: &Mesh, pods: &[(&str, &str)]) -> Result<()> {
    let document = |(name, node): &(&str, &str)| {
        let pod = Pod::lab(SHOP, name, node, "serve, --tcp, '7000'").account(name);
        format!("{}{pod}", account(SHOP, name))
    };
    mesh.cluster.apply(&pods.iter().map(document).collect::<String>())?;
    let names: Vec<&str> = pods.iter().map(|(name, _)| *name).collect();
    mesh.ready(SHOP, &names)?;
    mesh.enrolled(SHOP, &names, "strict")
}

/// Calls that go on until the test ends.
struct Load {
    what: String,
    calls: Process,
    running: bool,
}

impl Load {
    /// From a Pod of a node to another Pod: new connections, or one that stands.
    fn start(mesh: &Mesh, logs: &Path, from: (&str, u8), to: &str, running: bool) -> Result<Self> {
        let what = format!("{}-{to}{}", from.0, if running { "-running" } else { "" });
        let at = format!("{}:7000", mesh.field(SHOP, &format!("pod/{to}"), ".status.podIP")?);
        let node = mesh.cluster.node(from.1);
        let calls = cluster::watch(&node, (SHOP, from.0), (&what, &at), running, logs, true)?;
        Ok(Self { what, calls, running })
    }

    /// All went well so far, and they go on. How many there were.
    fn unharmed(&self) -> Result<usize> {
        let seen = Seen::of(&self.calls.printed()?, 0);
        ensure!(
            seen.bad.is_empty(),
            "{}: {} failed after {} calls: {:?}",
            self.what,
            seen.bad.len(),
            seen.ok,
            seen.bad
        );
        let fate = match self.running {
            true => self.calls.standing(0, seen.ok + 5)?,
            false => self.calls.after(0, seen.ok + 5)?.fate()?,
        };
        ensure!(fate == Fate::GoOn, "{}: {fate:?}", self.what);
        Ok(seen.ok)
    }
}

/// All of them, in both forms.
struct Loads<'a> {
    mesh: &'a Mesh,
    logs: tempfile::TempDir,
    all: Vec<Load>,
}

impl Loads<'_> {
    fn add(&mut self, from: (&str, u8), to: &str) -> Result<()> {
        for running in [false, true] {
            self.all.push(Load::start(self.mesh, self.logs.path(), from, to, running)?);
        }
        Ok(())
    }

    fn unharmed(&self) -> Result<usize> {
        self.all.iter().map(Load::unharmed).sum()
    }
}

/// Who has signed the certificate of each Pod.
fn signers(mesh: &Mesh) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for node in mesh.cluster.nodes() {
        let report: Value = serde_json::from_str(&mesh.node_status(&node)?)?;
        let agents = report["agents"].as_array().into_iter().flatten();
        for svid in agents.flat_map(|agent| agent["svids"].as_array().into_iter().flatten()) {
            ensure!(svid["problem"] == "", "{svid}");
            let text = |field: &str| svid[field].as_str().unwrap_or_default();
            if let Some((_, pod)) = text("identity").split_once("/ns/shop/sa/") {
                all.insert(pod.to_owned(), text("issued_by").to_owned());
            }
        }
    }
    Ok(all)
}

fn signed_by(mesh: &Mesh, name: &str, pods: &[&str]) -> Result<()> {
    let all = signers(mesh)?;
    for pod in pods {
        let by = all.get(*pod).with_context(|| format!("{pod} has no certificate: {all:?}"))?;
        ensure!(by.contains(&format!("{name} issuing")), "{pod} is signed by {by}, not by {name}; {all:?}");
    }
    Ok(())
}

/// Waits until every operator signs with the CA that ends then.
fn operators_sign_until(mesh: &Mesh, end: SystemTime) -> Result<()> {
    let end = end.duration_since(UNIX_EPOCH)?.as_secs_f64();
    mesh.eventually("the operators' signer", || {
        let path = "jsonpath={.items[*].metadata.name}";
        let label = "app.kubernetes.io/name=weft-operator";
        let pods = mesh.cluster.kubectl(&["-n", "weft-system", "get", "pods", "-l", label, "-o", path])?;
        ensure!(pods.split_whitespace().count() == 2, "{pods}");
        for pod in pods.split_whitespace() {
            let path = format!("/api/v1/namespaces/weft-system/pods/{pod}:15014/proxy/metrics");
            let page = metrics::parse(&mesh.cluster.kubectl(&["get", "--raw", &path])?);
            let until = metrics::sum(&page, "weft_operator_ca_expiry_timestamp_seconds", &[]);
            ensure!((until - end).abs() < 3600.0, "{pod} signs until {until}, not {end}");
        }
        Ok(())
    })
}

/// No handshake was refused on any node.
fn no_handshake_failed(mesh: &Mesh) -> Result<()> {
    for node in mesh.cluster.nodes() {
        let page = metrics::parse(&cluster::metrics(&node)?);
        let opened = metrics::sum(&page, "weft_connections_opened_total", &[]);
        ensure!(opened > 100.0, "{} opened only {opened} connections", node.name());
        for name in ["weft_tunnel_handshakes_failed_total", "weft_peer_identity_mismatches_total"] {
            let count = metrics::sum(&page, name, &[]);
            ensure!(page.iter().any(|sample| sample.name == name), "{} has no {name}", node.name());
            ensure!(count == 0.0, "{name} is {count} on {}", node.name());
        }
    }
    Ok(())
}

#[test]
fn a_successor_of_ones_own_ca_takes_over_under_load() -> Result<()> {
    let first = Company::new("first", Duration::from_secs(30 * DAY))?;
    let second = Company::new("second", Duration::from_secs(60 * DAY))?;
    let mesh = Mesh::bare(Options::default())?;
    // All of it stands before the operators start: they never sign with another CA.
    let kinds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    mesh.cluster.kubectl(&["apply", "--server-side", "-k", &kinds.to_string_lossy()])?;
    mesh.cluster.kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd/meshconfigs.weft.mesh",
        "--timeout=60s",
    ])?;
    mesh.cluster
        .apply(&[&namespace("pki", None), RIGHTS, &first.secret("pki", "mesh-ca"), CONFIG].concat())?;
    mesh.install()?;
    mesh.cluster.apply(&namespace(SHOP, Some("strict")))?;
    story(&mesh, &second).with_context(|| mesh.diagnose())
}

fn story(mesh: &Mesh, second: &Company) -> Result<()> {
    let mut loads = Loads { mesh, logs: tempfile::tempdir()?, all: Vec::new() };
    enrol(mesh, &[("one", "node1"), ("two", "node2")])?;
    signed_by(mesh, "first", &["one", "two"])?;
    loads.add(("one", 1), "two")?;
    loads.add(("two", 2), "one")?;

    mesh.cluster.apply(&second.secret("pki", "mesh-ca"))?;
    let replaced = Instant::now();
    // Trusted at once, and not used yet.
    mesh.eventually("the successor's root in the bundle", || {
        let all = mesh.field("weft-system", "configmap/weft-trust-bundle", ".data")?;
        ensure!(all.matches("BEGIN CERTIFICATE").count() == 2, "{all}");
        Ok(())
    })?;
    enrol(mesh, &[("early", "node1")])?;
    signed_by(mesh, "first", &["early"])
        .context("a Pod that comes before the successor is trusted everywhere")?;
    loads.add(("early", 1), "two")?;

    operators_sign_until(mesh, SystemTime::now() + Duration::from_secs(60 * DAY))?;
    tell(&format!("the successor signs {:.0} s after it was put there", replaced.elapsed().as_secs_f64()));
    loads.unharmed().context("when the successor began to sign")?;
    // Each end may be of either CA now.
    enrol(mesh, &[("late1", "node1"), ("late2", "node2")])?;
    signed_by(mesh, "second", &["late1", "late2"])?;
    loads.add(("late1", 1), "two")?;
    loads.add(("one", 1), "late2")?;
    loads.add(("two", 2), "late1")?;
    if signed_by(mesh, "first", &["one", "two"]).is_err() {
        bail!("they were renewed before they met an end of the other CA: {:?}", signers(mesh)?);
    }

    let all = ["one", "two", "early", "late1", "late2"];
    mesh.eventually("certificates of the successor", || signed_by(mesh, "second", &all))?;
    tell(&format!("it has signed all after {:.0} s", replaced.elapsed().as_secs_f64()));
    enrol(mesh, &[("last", "node2")])?;
    loads.add(("last", 2), "one")?;
    let calls = loads.unharmed()?;
    tell(&format!("{calls} calls, none failed"));
    no_handshake_failed(mesh)?;
    let check = mesh.weft_said(&["check"])?;
    ensure!(!check.contains("ERROR"), "{check}");
    mesh.never_crashed()
}

fn tell(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{line}");
}
