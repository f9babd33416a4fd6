//! Watching connections on a real cluster, also where the API server is what fails: Pods are entered through their
//! node's container runtime.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use weft_cluster::Node;

use super::{Place, watch::Watched as _};
use crate::{
    http,
    lab::{Process, net},
    mesh::{Mesh, observer},
};

const CTR: [&str; 5] = ["ctr", "--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io"];

/// The container of a Pod whose name begins so.
///
/// # Errors
/// When there is none, or more than one runs.
pub fn container(node: &Node<'_>, namespace: &str, pod: &str) -> Result<String> {
    let filter = format!(
        "labels.\"io.cri-containerd.kind\"==container,labels.\"io.kubernetes.pod.namespace\"=={namespace},\
         labels.\"io.kubernetes.pod.name\"~=\"^{pod}\""
    );
    let listed = node.exec(&[&CTR[..], &["containers", "list", "--quiet", &filter]].concat())?;
    let running = node.exec(&[&CTR[..], &["tasks", "list"]].concat())?;
    let runs = |id: &&str| running.lines().any(|l| l.starts_with(*id) && l.contains("RUNNING"));
    let all: Vec<&str> = listed.split_whitespace().filter(runs).collect();
    ensure!(all.len() == 1, "{}: {} containers of {namespace}/{pod}*: {listed}", node.name(), all.len());
    Ok(all[0].to_owned())
}

/// Ends a container at once, as a crash does; the kubelet starts it again.
///
/// # Errors
/// When there is none.
pub fn kill(node: &Node<'_>, namespace: &str, pod: &str) -> Result<()> {
    let id = container(node, namespace, pod)?;
    node.exec(&[&CTR[..], &["tasks", "kill", "--signal", "SIGKILL", &id]].concat()).map(drop)
}

/// Starts a [`super::watch::Watch`] in a Pod whose image is [`crate::mesh::LAB`], and waits until it works where
/// `works`.
///
/// # Errors
/// When it cannot be started.
pub fn watch(
    node: &Node<'_>,
    (namespace, pod): (&str, &str),
    (name, to): (&str, &str),
    running: bool,
    log: &Path,
    works: bool,
) -> Result<Process> {
    let id = container(node, namespace, pod)?;
    let exec = format!("watch-{name}");
    let mut words = CTR.to_vec();
    words.extend([
        "tasks",
        "exec",
        "--exec-id",
        &exec,
        &id,
        "/app",
        "watch",
        "--to",
        to,
        "--timeout-ms",
        "3000",
    ]);
    words.extend(running.then_some("--running"));
    let log = log.join(format!("{exec}.log"));
    let watch = Process::spawn(node.command(&words)?, &exec, &log)?;
    if works {
        watch.after(0, 3).with_context(|| format!("watch {to} from {pod}"))?;
    }
    Ok(watch)
}

/// What an agent's `/metrics` say.
///
/// # Errors
/// When it does not answer.
pub fn metrics(node: &Node<'_>) -> Result<String> {
    net::within(&node.netns(), || {
        let answer = http::get("127.0.0.1:15020", "localhost", "/metrics", Duration::from_secs(3))?;
        ensure!(answer.status == 200, "{}", answer.status);
        Ok(answer.text())
    })
}

/// The logs of Weft's Pods of that name on all nodes, as the nodes keep them.
///
/// # Errors
/// When a folder cannot be read.
pub fn logs(mesh: &Mesh, name: &str) -> Result<String> {
    let mut all = String::new();
    for node in mesh.cluster.nodes() {
        let folder = node.folder().join("log/pods");
        for pod in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?.flatten() {
            if !pod.file_name().to_string_lossy().starts_with(&format!("weft-system_{name}-")) {
                continue;
            }
            for file in fs::read_dir(pod.path())?.flatten().flat_map(|dir| fs::read_dir(dir.path())).flatten()
            {
                all += &fs::read_to_string(file?.path()).unwrap_or_default();
            }
        }
    }
    Ok(all)
}

/// What is said at a place; `node` is the one whose agent is asked.
///
/// # Errors
/// When nothing is said.
pub fn read(mesh: &Mesh, node: &Node<'_>, place: Place) -> Result<String> {
    match place {
        Place::Metrics => metrics(node),
        Place::AgentLog => logs(mesh, "weft-agent"),
        Place::OperatorLog => logs(mesh, "weft-operator"),
        // An error is what the user reads, too.
        Place::Check => Ok(mesh.weft_said(&["check"]).unwrap_or_else(|error| format!("{error:#}"))),
        Place::Kubectl(command) => mesh.cluster.kubectl(&command.split(' ').collect::<Vec<_>>()),
        Place::Status => {
            let socket = observer(node)?;
            let program = std::env::var_os("WEFT_BIN_DIR").context("WEFT_BIN_DIR is not set")?;
            let output = Command::new(Path::new(&program).join("weft"))
                .args(["status", "--server", &socket])
                .output()?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr))
        }
    }
}
