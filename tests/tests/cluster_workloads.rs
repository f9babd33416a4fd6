//! Every kind of workload in a strict namespace of a real cluster, written as one would without a mesh: they come up,
//! talk, are probed, are looked into, and end. What passes between the nodes meanwhile is never readable.

#![forbid(unsafe_code)]

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use weft_cluster::Options;
use weft_tests::{mesh::Mesh, steps::Steps};

const OBJECTS: &str = include_str!("workloads/objects.yaml");
const JOBS: &str = include_str!("workloads/jobs.yaml");
/// Carried by requests; never to be seen on the wire.
const CANARY: &str = "weft-canary-55c1";
const SHOP: &str = "shop";

/// Calls from a Pod that has the lab's program; the answer's tally.
fn calls(mesh: &Mesh, from: (&str, &str), to: &str, count: u32) -> Result<Value> {
    let (count, header) = (count.to_string(), format!("x-canary: {CANARY}"));
    let host = to.split(':').next().unwrap_or(to);
    let words =
        ["http", "--to", to, "--host", host, "--count", &count, "--timeout-ms", "5000", "--header", &header];
    mesh.app(from.0, from.1, &words)
}

/// All calls from the strict client get an answer of 200; the names of those who answered.
fn answered(mesh: &Mesh, to: &str, count: u32) -> Result<Vec<String>> {
    let tally = calls(mesh, (SHOP, "client"), to, count)?;
    ensure!(tally["statuses"]["200"] == count, "{to}: {tally}");
    let bodies = tally["bodies"].as_object().context("no bodies")?;
    Ok(bodies.keys().filter_map(|body| body.split(' ').next()).map(str::to_owned).collect())
}

/// No call from outside the mesh gets an answer.
fn closed_for_outside(mesh: &Mesh, to: &str) -> Result<()> {
    let tally = calls(mesh, ("outside", "client"), to, 2)?;
    ensure!(tally["failed"] == 2, "{to} answers a caller outside the mesh: {tally}");
    Ok(())
}

/// The first words of a server that speaks first, and the echo.
fn banner(mesh: &Mesh, to: &str) -> Result<()> {
    let said = mesh.app(SHOP, "client", &["dial", "--to", to, "--send", CANARY, "--timeout-ms", "5000"])?;
    let heard = said["heard"].as_str().unwrap_or_default();
    ensure!(heard.starts_with("220 "), "{to}: {said}");
    Ok(())
}

fn address(mesh: &Mesh, pod: &str) -> Result<String> {
    mesh.field(SHOP, &format!("pod/{pod}"), ".status.podIP")
}

/// The Pods that a selector finds.
fn pods(mesh: &Mesh, selector: &str) -> Result<Vec<String>> {
    let path = "jsonpath={.items[*].metadata.name}";
    let names = mesh.cluster.kubectl(&["-n", SHOP, "get", "pods", "-l", selector, "-o", path])?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}

fn deployments(mesh: &Mesh) -> Result<()> {
    let names = answered(mesh, "web.shop.svc.cluster.local:80", 30)?;
    ensure!(names.len() == 2, "30 calls reached only {names:?}");
    banner(mesh, "web.shop.svc.cluster.local:90")?;
    closed_for_outside(mesh, "web.shop.svc.cluster.local:80")
}

fn stateful_sets(mesh: &Mesh) -> Result<()> {
    for name in ["db-0", "db-1"] {
        let host = format!("{name}.db.shop.svc.cluster.local");
        banner(mesh, &format!("{host}:5432"))?;
        let names = answered(mesh, &format!("{host}:8008"), 2)?;
        ensure!(names == [name], "{host} is answered by {names:?}");
        closed_for_outside(mesh, &format!("{host}:8008"))?;
    }
    Ok(())
}

fn named_ports(mesh: &Mesh) -> Result<()> {
    mesh.eventually("both versions of the API to answer", || {
        let names = answered(mesh, "api.shop.svc.cluster.local:80", 20)?;
        ensure!(names.len() == 2, "20 calls reached only {names:?}");
        Ok(())
    })?;
    // A rule that names a port means each Pod's own number.
    let policy = "
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {name: api, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Pod, selector: {matchLabels: {app: api}}}]
  action: ALLOW
  rules: [{networkAttributes: {ports: [api]}}]
";
    mesh.cluster.apply(policy)?;
    mesh.programmed(SHOP, "api")?;
    let new = pods(mesh, "version=new")?;
    let new = address(mesh, new.first().context("no Pod")?)?;
    let names = answered(mesh, "api.shop.svc.cluster.local:80", 20)?;
    ensure!(names.len() == 2, "with a rule for the port api only {names:?} answer");
    answered(mesh, &format!("{new}:9091"), 1)?;
    let other = calls(mesh, (SHOP, "client"), &format!("{new}:9099"), 1)?;
    ensure!(other["failed"] == 1, "a port that no rule names answers: {other}");
    Ok(())
}

fn probes(mesh: &Mesh) -> Result<()> {
    mesh.ready(SHOP, &["probed"])?;
    let at = address(mesh, "probed")?;
    for port in [8080, 9000, 5051] {
        let said =
            mesh.app("outside", "client", &["dial", "--to", &format!("{at}:{port}"), "--send", "x"])?;
        ensure!(said["heard"].as_str().unwrap_or_default().is_empty(), "{port} is open to outside: {said}");
    }
    for to in ["probed.shop.svc.cluster.local:50", "probed.shop.svc.cluster.local:51"] {
        let said = mesh.app(SHOP, "client", &["health", "--to", to, "--count", "5"])?;
        ensure!(said["serving"] == 5, "gRPC calls to {to}: {said}");
    }
    let restarts = mesh.field(SHOP, "pod/probed", ".status.containerStatuses[*].restartCount")?;
    ensure!(restarts.split(' ').all(|count| count == "0"), "probes restarted containers: {restarts}");
    Ok(())
}

fn mesh_ports(mesh: &Mesh) -> Result<()> {
    mesh.ready(SHOP, &["ports"])?;
    let at = address(mesh, "ports")?;
    for port in [15_001, 15_006, 15_020, 15_021, 15_090] {
        answered(mesh, &format!("ports.shop.svc.cluster.local:{port}"), 2)
            .with_context(|| format!("an application on port {port}, by its Service"))?;
        answered(mesh, &format!("{at}:{port}"), 2)
            .with_context(|| format!("an application on port {port}, by its address"))?;
        closed_for_outside(mesh, &format!("{at}:{port}"))?;
    }
    // The port at which the mesh itself is spoken to.
    let said = calls(mesh, (SHOP, "client"), &format!("{at}:15008"), 1)?;
    ensure!(said["failed"] == 1, "15008 is answered: {said}");
    Ok(())
}

fn containers_that_prepare_and_help(mesh: &Mesh) -> Result<()> {
    mesh.ready(SHOP, &["prepared"])?;
    let config = mesh.exec(SHOP, "prepared", &["cat", "/data/config"])?;
    ensure!(config.contains("GET /config"), "the init container got {config:?}");
    let beside = mesh.exec(SHOP, "prepared", &["wget", "-T", "3", "-qO-", "http://127.0.0.1:4000/"])?;
    ensure!(beside.contains("saw 127.0.0.1"), "the sidecar saw somebody else: {beside}");
    let own = address(mesh, "prepared")?;
    let names = answered(mesh, &format!("{own}:4000"), 1)?;
    ensure!(names == ["prepared"], "{names:?}");
    Ok(())
}

/// How a Job stands: its conditions, Pods and what they said.
fn job(mesh: &Mesh, namespace: &str, name: &str) -> Result<()> {
    let words =
        ["-n", namespace, "wait", "--for=condition=Complete", "--timeout=120s", &format!("job/{name}")];
    mesh.cluster.kubectl(&words).map(drop).with_context(|| {
        let ask = |words: &[&str]| mesh.cluster.kubectl(words).unwrap_or_else(|error| format!("{error:#}"));
        let label = format!("batch.kubernetes.io/job-name={name}");
        let logs = ask(&["-n", namespace, "logs", "-l", &label, "--prefix", "--all-containers", "--tail=20"]);
        format!("{logs}\n{}", mesh.diagnose())
    })
}

fn jobs(mesh: &Mesh) -> Result<()> {
    job(mesh, SHOP, "first-call").context("the first connect of a Job")?;
    job(mesh, SHOP, "with-sidecar").context("a Job with a native sidecar")?;
    job(mesh, "fresh", "migrate").context("a Job that was made together with its namespace")?;
    let said = mesh.cluster.kubectl(&["-n", SHOP, "logs", "job/with-sidecar", "-c", "main"])?;
    ensure!(said.contains("/beside") && said.contains("/with-sidecar"), "{said}");
    // Whom the server saw: an address that the API server learned of only after the call, and never loopback.
    for pod in pods(mesh, "batch.kubernetes.io/job-name=first-call")? {
        let said = mesh.cluster.kubectl(&["-n", SHOP, "logs", &pod])?;
        let at = address(mesh, &pod)?;
        ensure!(
            said.contains(&format!("saw {at} GET /job")),
            "the caller at {at} was shown otherwise: {said}"
        );
    }
    // Nothing of the mesh holds them: their sandboxes are gone from the agents' lists.
    mesh.eventually("the agents to forget Pods that are over", || {
        for node in mesh.cluster.nodes() {
            let known = mesh.node_status(&node)?;
            ensure!(!known.contains("shop/first-call") && !known.contains("fresh/migrate"), "{known}");
        }
        Ok(())
    })
}

fn cron_jobs(mesh: &Mesh) -> Result<()> {
    mesh.eventually("a run of the CronJob", || {
        let when = mesh.field(SHOP, "cronjob/every-minute", ".status.lastSuccessfulTime")?;
        ensure!(!when.is_empty(), "no run has succeeded");
        Ok(())
    })
}

fn own_resolver(mesh: &Mesh) -> Result<()> {
    mesh.ready(SHOP, &["resolver"])?;
    let said = mesh.fetch(SHOP, "resolver", "http://web/resolver", &[])?;
    ensure!(said.contains("GET /resolver"), "{said}");
    Ok(())
}

fn restricted(mesh: &Mesh) -> Result<()> {
    mesh.ready("locked", &["restricted"])?;
    let said = mesh.fetch("locked", "restricted", "http://web.shop/restricted", &[])?;
    ensure!(said.contains("GET /restricted"), "{said}");
    Ok(())
}

/// A Pod that calls itself: by loopback, by its address and through its own Service.
fn itself(mesh: &Mesh) -> Result<()> {
    let own = address(mesh, "db-0")?;
    for to in
        ["127.0.0.1:8008", "localhost:8008", &format!("{own}:8008"), "db-0.db.shop.svc.cluster.local:8008"]
    {
        let tally = calls(mesh, (SHOP, "db-0"), to, 2)?;
        ensure!(tally["statuses"]["200"] == 2, "{to}: {tally}");
    }
    let web = pods(mesh, "app=web")?;
    let tally = calls(mesh, (SHOP, web.first().context("no Pod")?), "web.shop.svc.cluster.local:80", 20)?;
    ensure!(tally["statuses"]["200"] == 20, "through its own Service: {tally}");
    Ok(())
}

/// What every operator and controller does.
fn api_server(mesh: &Mesh) -> Result<()> {
    let to = "kubernetes.default.svc.cluster.local:443";
    let said = mesh.app(SHOP, "client", &["dial", "--to", to, "--send", "GET / HTTP/1.0\r\n\r"])?;
    ensure!(said["heard"].as_str().unwrap_or_default().contains("HTTPS"), "{said}");
    Ok(())
}

fn looking_into_a_pod(mesh: &Mesh) -> Result<()> {
    ensure!(mesh.exec(SHOP, "box", &["hostname"])?.trim() == "box");
    let said = mesh.cluster.kubectl_with(&["-n", SHOP, "exec", "-i", "box", "--", "cat"], "through stdin")?;
    ensure!(said == "through stdin", "{said:?}");
    ensure!(mesh.cluster.kubectl(&["-n", SHOP, "logs", "job/first-call"])?.contains("GET /job"));
    let words = [
        "-n",
        SHOP,
        "debug",
        "box",
        "--image=busybox:1",
        "--profile=general",
        "-c",
        "look",
        "--attach=false",
    ];
    let mut words = words.to_vec();
    words.extend(["--", "wget", "-T", "5", "-qO-", "http://web.shop.svc/debug"]);
    mesh.cluster.kubectl(&words)?;
    mesh.eventually("what an ephemeral container fetched", || {
        let said = mesh.cluster.kubectl(&["-n", SHOP, "logs", "box", "-c", "look"])?;
        ensure!(said.contains("GET /debug"), "{said}");
        Ok(())
    })
}

/// `kubectl port-forward`, ended when dropped.
struct Forward {
    kubectl: Child,
    port: String,
    /// It tells of each connection, and ends where nobody listens.
    _said: BufReader<ChildStdout>,
}

impl Forward {
    fn start(mesh: &Mesh, pod: &str, port: u16) -> Result<Self> {
        let mut command = mesh.cluster.command("kubectl")?;
        command.args(["-n", SHOP, "port-forward", pod, &format!(":{port}")]).stdout(Stdio::piped());
        let mut kubectl = command.spawn()?;
        let mut said = BufReader::new(kubectl.stdout.take().context("no output")?);
        let mut line = String::new();
        let read = said.read_line(&mut line);
        let port = line.split_whitespace().nth(2).and_then(|at| at.rsplit(':').next()).unwrap_or_default();
        let forward = Self { kubectl, port: port.to_owned(), _said: said };
        read?;
        ensure!(!forward.port.is_empty(), "kubectl port-forward said {line:?}");
        Ok(forward)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}

fn port_forward(mesh: &Mesh) -> Result<()> {
    let forward = Forward::start(mesh, "pod/db-1", 8008)?;
    let to = format!("127.0.0.1:{}", forward.port);
    let said = mesh.app_outside(&["http", "--to", &to, "--count", "3"])?;
    ensure!(said["statuses"]["200"] == 3, "{said}");
    let web = Forward::start(mesh, "service/web", 80)?;
    let said = mesh.app_outside(&["http", "--to", &format!("127.0.0.1:{}", web.port)])?;
    ensure!(said["statuses"]["200"] == 1, "{said}");
    Ok(())
}

/// The process ends and the kubelet starts it again, in the same sandbox.
fn restarted_container(mesh: &Mesh) -> Result<()> {
    let at = address(mesh, "db-0")?;
    let count = || mesh.field(SHOP, "pod/db-0", ".status.containerStatuses[0].restartCount");
    ensure!(count()? == "0", "it restarted by itself");
    let to = format!("{at}:8008");
    let crashed = mesh.app(SHOP, "client", &["http", "--to", &to, "--path", "/crash"])?;
    ensure!(crashed["failed"] == 1, "{crashed}");
    mesh.eventually("the container's next start", || {
        ensure!(count()? == "1" && address(mesh, "db-0")? == at, "not yet");
        answered(mesh, &to, 1).map(drop)
    })
}

fn udp(mesh: &Mesh) -> Result<()> {
    let web = pods(mesh, "app=web")?;
    for name in web {
        let at = address(mesh, &name)?;
        let said =
            mesh.app("outside", "client", &["udp", "--to", &format!("{at}:5300"), "--timeout-ms", "500"])?;
        ensure!(said["answered"] != true, "UDP from outside the mesh is answered: {said}");
    }
    Ok(())
}

#[test]
fn every_kind_of_workload_works() -> Result<()> {
    let mesh = Mesh::up(Options::default())?;
    mesh.cluster.apply(OBJECTS)?;
    for what in ["deployment/web", "deployment/api-old", "deployment/api-new", "statefulset/db"] {
        mesh.cluster
            .kubectl(&["-n", SHOP, "rollout", "status", what, "--timeout=240s"])
            .with_context(|| mesh.diagnose())?;
    }
    mesh.ready("outside", &["client"])?;
    mesh.ready(SHOP, &["client", "box"])?;
    mesh.enrolled(SHOP, &["client", "box", "db-0", "db-1"], "strict")?;
    // What is called by name, by the steps and by Jobs that do not try twice.
    mesh.named(SHOP, &["web", "db-0.db", "db-1.db", "api", "probed", "ports"])?;
    let capture = mesh.capture(1)?;
    mesh.cluster.apply(JOBS)?;

    let mut steps = Steps::default();
    let mut step = |name: &str, check: fn(&Mesh) -> Result<()>| steps.step(name, || check(&mesh));
    step("Deployments: every replica, HTTP and TCP ports", deployments);
    step("StatefulSets: each Pod by its own name", stateful_sets);
    step("several and named ports, also where a name means another number in each Pod", named_ports);
    step("Jobs: their first connect works, and they end", jobs);
    step("init containers and native sidecars", containers_that_prepare_and_help);
    step("probes: http, tcp, grpc and exec in several containers, closed to everybody else", probes);
    step("applications on 15001, 15006 and other ports of meshes", mesh_ports);
    step("a Pod that calls itself", itself);
    step("the API server from a strict Pod", api_server);
    step("exec, logs and debug containers", looking_into_a_pod);
    step("port-forward to a strict Pod", port_forward);
    step("dnsPolicy None", own_resolver);
    step("Pods under the restricted Pod Security Standard", restricted);
    step("UDP from outside the mesh stays out", udp);
    step("CronJobs", cron_jobs);
    steps.step("nothing readable passed between the nodes", || {
        let trace = capture.finish()?;
        let found = trace.find(CANARY.as_bytes());
        ensure!(
            found == 0 && trace.len() > 500,
            "the canary was seen {found} times in {} packets",
            trace.len()
        );
        Ok(())
    });
    steps.step("a container that restarts", || restarted_container(&mesh));
    steps.step("nothing of the mesh ended meanwhile", || mesh.never_crashed());
    steps.finish().with_context(|| mesh.diagnose())
}
