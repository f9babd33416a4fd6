//! What fails around a node: the API server, the operators, another node, and what a user writes. Each is provoked on a
//! real cluster, and every word of its row in `docs/failure-modes.md` asserted.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use std::{
    env, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use weft_cluster::{Node, Options, Program, Service};
use weft_tests::{
    failure::{Fate, Row, cluster, row, watch::Watched as _},
    lab::Process,
    mesh::{LAB, Mesh},
    steps::Steps,
};

const SHOP: &str = "shop";
const ENOUGH: usize = 10;
const LIMIT: Duration = Duration::from_secs(90);
/// Restarts of an agent without an API server.
const RESTARTS: usize = 3;
/// Seconds without an API server; 300 are five minutes.
const OUTAGE: (&str, u64) = ("WEFT_TEST_API_OUTAGE_SECONDS", 75);

const NAMESPACE: &str = "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {weft.mesh/mode: strict}}}\n---\n\
    {apiVersion: v1, kind: ServiceAccount, metadata: {name: client, namespace: shop}}\n";

fn pod(name: &str, app: &str, node: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {app}}}}}
spec:
  nodeName: {node}
  serviceAccountName: client
  terminationGracePeriodSeconds: 0
  containers: [{{name: c, image: '{LAB}', args: [serve, --http, '80', --tcp, '7000']}}]
"
    )
}

const WEB: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, appProtocol: http}, {name: line, port: 7000, appProtocol: tcp}]
";

fn policy(name: &str, target: &str, sources: &str) -> String {
    format!(
        "---
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  targetRefs: [{target}]
  action: ALLOW
  rules: [{{{sources}: [{{type: ServiceAccount, serviceAccount: {{name: client}}}}]}}]
"
    )
}

const PODS: &str = "{group: '', kind: Pod, selector: {matchLabels: {app: web}}}";

/// What stands while things fail, and where it is watched from: `client` on node 1.
struct Shop {
    mesh: Mesh,
    logs: tempfile::TempDir,
}

/// New connections to Service `web` and one that stands, to the Pod on node 2.
struct Both {
    new: Process,
    running: Process,
}

impl Shop {
    fn open() -> Result<Self> {
        let mesh = Mesh::up(Options::default())?;
        let pods =
            [pod("client", "client", "node1"), pod("web-1", "web", "node1"), pod("web-2", "web", "node2")];
        mesh.cluster.apply(&format!("{NAMESPACE}{}{WEB}", pods.concat()))?;
        mesh.ready(SHOP, &["client", "web-1", "web-2"])?;
        mesh.enrolled(SHOP, &["client", "web-1", "web-2"], "strict")?;
        Ok(Self { mesh, logs: tempfile::tempdir()? })
    }

    fn watch(&self, pod: &str, name: &str, running: bool, works: bool) -> Result<Process> {
        let to = match running {
            true => self.mesh.field(SHOP, "pod/web-2", ".status.podIP")?,
            false => self.mesh.field(SHOP, "service/web", ".spec.clusterIP")?,
        };
        let to = format!("{to}:7000");
        let from = self.mesh.cluster.node(1);
        cluster::watch(&from, (SHOP, pod), (name, &to), running, self.logs.path(), works)
    }

    fn both(&self, name: &str) -> Result<Both> {
        let new = self.watch("client", &format!("new-{name}"), false, true)?;
        Ok(Both { new, running: self.watch("client", &format!("running-{name}"), true, true)? })
    }

    fn shown(&self, row: &Row) -> Result<()> {
        let node = self.mesh.cluster.node(1);
        self.mesh.eventually(row.fault, || row.shown(|place| cluster::read(&self.mesh, &node, place)))
    }

    /// Which Pods answer 20 calls to the Service.
    fn answers(&self) -> Result<String> {
        let to = format!("{}:80", self.mesh.field(SHOP, "service/web", ".spec.clusterIP")?);
        let answer = self.mesh.app(SHOP, "client", &["http", "--to", &to, "--count", "20"])?;
        ensure!(answer["statuses"]["200"] == 20, "{answer}");
        Ok(answer["bodies"].to_string())
    }
}

impl Both {
    fn marks(&self) -> Result<(usize, usize)> {
        Ok((self.new.mark()?, self.running.mark()?))
    }

    fn fates(&self, (new, running): (usize, usize)) -> Result<(Fate, Fate)> {
        Ok((self.new.after(new, ENOUGH)?.fate()?, self.running.standing(running, ENOUGH)?))
    }
}

fn operators_gone(shop: &Shop) -> Result<()> {
    let told = row("operator")?;
    let both = shop.both("operator")?;
    let marks = both.marks()?;
    let kubectl = |words: &[&str]| shop.mesh.cluster.kubectl(words);
    // Where no node takes Pods, those that end do not come back.
    kubectl(&["cordon", "node1", "node2"])?;
    let label = "app.kubernetes.io/name=weft-operator";
    kubectl(&["-n", "weft-system", "delete", "pods", "-l", label, "--grace-period=0", "--force"])?;
    shop.shown(told)?;
    let (new, running) = both.fates(marks)?;
    told.observed(new, running)?;
    // A Pod that comes now is held, and says so.
    shop.mesh.cluster.apply(&pod("late", "client", "node1"))?;
    shop.mesh.ready(SHOP, &["late"])?;
    let late = shop.watch("late", "late", false, false)?;
    ensure!(late.after(0, 3)?.fate()? == Fate::Refused, "a Pod that nobody described reached the mesh");
    let node = shop.mesh.cluster.node(1);
    let status = cluster::read(&shop.mesh, &node, weft_tests::failure::Place::Status)?;
    ensure!(status.contains("the operator has not described it"), "{status}");
    kubectl(&["uncordon", "node1", "node2"])?;
    shop.mesh.rolled_out()?;
    late.settled(Fate::GoOn, 3, LIMIT).context("the held Pod, with operators again")
}

fn api_server_gone(shop: &Shop) -> Result<()> {
    let told = row("api-server")?;
    let seconds = env::var(OUTAGE.0).ok().map(|text| text.parse()).transpose()?.unwrap_or(OUTAGE.1);
    let both = shop.both("api")?;
    let client = shop.mesh.cluster.node(1);
    let marks = both.marks()?;
    shop.mesh.cluster.stop(Program::ApiServer)?;
    let begin = Instant::now();
    shop.shown(told)?;
    while begin.elapsed() < Duration::from_secs(seconds) {
        thread::sleep(Duration::from_millis(200));
        weft_tests::interrupt::check()?;
    }
    let (new, running) = both.fates(marks)?;
    told.observed(new, running)?;
    for _ in 0..RESTARTS {
        restarted_agent_is_linked(shop, &client)?;
    }
    both.new.settled(Fate::GoOn, ENOUGH, LIMIT).context("after the agent's restart")?;
    shop.mesh.cluster.start(Program::ApiServer)?;
    shop.mesh.cluster.wait_api()?;
    shop.mesh.cluster.wait_nodes()?;
    // What changes now arrives.
    shop.mesh.cluster.apply(&policy("after", PODS, "sources"))?;
    programmed(shop, "after")?;
    shop.mesh.cluster.kubectl(&["-n", SHOP, "delete", "wap", "after"]).map(drop)
}

/// An agent that restarts: from its snapshot, with the certificates that it keeps in memory. Its token was checked by
/// one of the operator's replicas; the other, which it may come to first, cannot ask the API server about it.
fn restarted_agent_is_linked(shop: &Shop, node: &Node<'_>) -> Result<()> {
    let agent = || -> Result<Value> {
        let status: Value = serde_json::from_str(&shop.mesh.node_status(node)?)?;
        Ok(status["agents"][0].clone())
    };
    let before = agent()?["started"].clone();
    cluster::kill(node, "weft-system", "weft-agent")?;
    shop.mesh.eventually("the agent's restart without an API server, with a link to the operator", || {
        let now = agent()?;
        let linked = now["config"]["operator_connected"] == true;
        ensure!(now["started"] != before && now["ready"] == true && linked, "{now}");
        Ok(())
    })
}

fn programmed(shop: &Shop, name: &str) -> Result<()> {
    let path = ".status.conditions[?(@.type==\"Programmed\")].message";
    shop.mesh.eventually("a policy on both nodes", || {
        let said = shop.mesh.field(SHOP, &format!("wap/{name}"), path)?;
        ensure!(said.contains("2/2"), "{said}");
        Ok(())
    })
}

fn wrong_policies(shop: &Shop) -> Result<()> {
    let both = shop.both("policy")?;
    let marks = both.marks()?;
    let told = row("policy-typo")?;
    let refused = shop.mesh.cluster.apply(&policy("typo", PODS, "sorces"));
    let said = format!("{:#}", refused.err().context("a misspelled field was taken")?);
    told.shown(|_| Ok(said.clone()))?;
    let (new, running) = both.fates(marks)?;
    told.observed(new, running)?;

    let told = row("policy-wrong")?;
    let target = "{group: '', kind: Service, name: no-such-service}";
    let two = policy("wrong", target, "sources") + &policy("right", PODS, "sources");
    shop.mesh.cluster.apply(&two)?;
    shop.shown(told)?;
    programmed(shop, "right").context("a policy beside a wrong one")?;
    let marks = both.marks()?;
    let (new, running) = both.fates(marks)?;
    told.observed(new, running)?;
    shop.mesh.cluster.kubectl(&["-n", SHOP, "delete", "wap", "wrong", "right"]).map(drop)
}

/// Its kubelet ends first: Kubernetes takes 50 s to notice, in which the user's mistakes have their turn.
fn node_not_ready(shop: &Shop, steps: &mut Steps) -> Result<()> {
    let told = row("node-not-ready")?;
    let both = shop.both("node")?;
    let both_answer = |all: &str| all.contains("web-1") && all.contains("web-2");
    ensure!(both_answer(&shop.answers()?), "one of the Pods does not answer");
    let node = shop.mesh.cluster.node(2);
    let marks = both.marks()?;
    node.stop_service(Service::Kubelet)?;
    node.stop_service(Service::Containerd)?;
    steps.step("mistakes in policies are named, and harm nothing else", || wrong_policies(shop));
    shop.shown(told)?;
    shop.mesh.eventually("the other Pod alone", || {
        let all = shop.answers()?;
        ensure!(!all.contains("web-2"), "{all}");
        Ok(())
    })?;
    let (new, running) = both.fates(marks)?;
    ensure!(new == Fate::GoOn, "a call failed while its endpoint was taken away");
    told.observed(Fate::Move, running)?;
    node.start_service(Service::Containerd)?;
    // A kubelet that finds no runtime ends.
    let asks = ["ctr", "--address", "/run/containerd/containerd.sock", "version"];
    shop.mesh.eventually("the container runtime", || node.exec(&asks))?;
    node.start_service(Service::Kubelet)?;
    shop.mesh.cluster.wait_nodes()?;
    shop.mesh.eventually("both Pods again", || {
        let all = shop.answers()?;
        ensure!(both_answer(&all), "{all}");
        Ok(())
    })?;
    shop.mesh.rolled_out()
}

#[test]
fn what_fails_around_a_node_is_told_and_leaves_connections_alone() -> Result<()> {
    let shop = Shop::open()?;
    let mut steps = Steps::default();
    steps.step("every operator is gone", || operators_gone(&shop));
    // Before the API server goes: its controllers take every node for lost when it is back, and a kubelet that ends in
    // the middle of that leaves Pods that count as ready for ever.
    let mut inner = Steps::default();
    steps.step("a node is not ready", || node_not_ready(&shop, &mut inner));
    steps.step("the API server is gone", || api_server_gone(&shop));
    inner.finish()?;
    steps.finish()
}
