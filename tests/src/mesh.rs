//! Weft on a real cluster: the manifests of `deploy/` as they are, with the images that were built here.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use weft_cluster::{Cluster, Node, Options, image::Image, parts::debian};

use crate::{capture::Capture, wait};

mod names;

/// How long anything on a cluster may take.
pub const PATIENCE: Duration = Duration::from_secs(240);
/// The web server's image; see [`Mesh::up`].
pub const NGINX: &str = "registry.test/nginx:1";
/// The image of `weft-lab-app`, a server and client of many kinds; see [`crate::app`].
pub const LAB: &str = "registry.test/lab:1";
const SYSTEM: &str = "weft-system";

/// A cluster with Weft installed.
#[derive(Debug)]
pub struct Mesh {
    /// The cluster.
    pub cluster: Cluster,
    folder: tempfile::TempDir,
}

fn say(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{line}");
}

impl Mesh {
    /// Raises a cluster, gives its nodes the images of `WEFT_IMAGES`, nginx and [`LAB`], installs Weft and waits until it serves.
    ///
    /// # Errors
    /// When a part is missing or does not become ready; the message holds what the logs say.
    pub fn up(options: Options) -> Result<Self> {
        let mesh = Self::bare(options)?;
        mesh.install()?;
        Ok(mesh)
    }

    /// As [`Self::up`], without Weft on it.
    ///
    /// # Errors
    /// When a part is missing.
    pub fn bare(options: Options) -> Result<Self> {
        let images = env::var_os("WEFT_IMAGES")
            .map(PathBuf::from)
            .context("WEFT_IMAGES names no folder with images; run this by `cargo xtask test --tier 7`")?;
        let folder = tempfile::tempdir()?;
        let nginx = folder.path().join("nginx.tar");
        write_nginx(&nginx)?;
        let lab = folder.path().join("lab.tar");
        Image::new(LAB)
            .file(program("weft-lab-app")?, "/app", 0o755)
            .entrypoint(&["/app"])
            .user("65532:65532")
            .write_archive(&lab)?;
        let mut archives = vec![nginx, lab];
        archives.extend(["weft-agent.tar", "weft-operator.tar"].map(|name| images.join(name)));
        let cluster = Cluster::up(&Options { images: archives, ..options }, &say)?;
        Ok(Self { cluster, folder })
    }

    /// Applies `deploy/` and waits for the roll-out.
    ///
    /// # Errors
    /// When it does not come; the message holds what the logs say.
    pub fn install(&self) -> Result<()> {
        self.cluster.apply(&self.manifests()?)?;
        self.rolled_out().with_context(|| self.diagnose())
    }

    /// What `kubectl apply -k deploy/` would apply, with the images that were built here.
    ///
    /// # Errors
    /// When kubectl cannot render it.
    pub fn manifests(&self) -> Result<String> {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
        let text = self.cluster.kubectl(&["kustomize", &deploy.to_string_lossy()])?;
        let version = format!(":v{}", env!("CARGO_PKG_VERSION"));
        Ok(text.replace("ghcr.io/weft-mesh/", "registry.test/weft/").replace(&version, ":test"))
    }

    /// Waits until operator and agents are rolled out.
    ///
    /// # Errors
    /// When they are not in time.
    pub fn rolled_out(&self) -> Result<()> {
        for what in ["deployment/weft-operator", "daemonset/weft-agent"] {
            self.cluster.kubectl(&["-n", SYSTEM, "rollout", "status", what, "--timeout=240s"])?;
        }
        Ok(())
    }

    /// Objects and logs of Weft, for an error.
    pub fn diagnose(&self) -> String {
        let ask = |words: &[&str]| self.cluster.kubectl(words).unwrap_or_else(|error| format!("{error:#}"));
        let logs = |name: &str| {
            let label = format!("app.kubernetes.io/name={name}");
            ask(&["-n", SYSTEM, "logs", "-l", &label, "--tail=25", "--prefix", "--ignore-errors"])
        };
        [
            ask(&["get", "nodes,pods,endpointslices", "-A", "-o", "wide"]),
            ask(&["-n", SYSTEM, "get", "events", "--sort-by=.lastTimestamp"]),
            logs("weft-operator"),
            logs("weft-agent"),
        ]
        .join("\n")
    }

    /// Puts the mode on a namespace.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn mode(&self, namespace: &str, mode: &str) -> Result<()> {
        let label = format!("weft.mesh/mode={mode}");
        self.cluster.kubectl(&["label", "--overwrite", "namespace", namespace, &label]).map(drop)
    }

    /// Waits until those Pods are Ready.
    ///
    /// # Errors
    /// When they are not in time; the message holds their states.
    pub fn ready(&self, namespace: &str, pods: &[&str]) -> Result<()> {
        let mut words = vec!["-n", namespace, "wait", "--for=condition=Ready", "--timeout=240s", "pod"];
        words.extend(pods);
        self.cluster.kubectl(&words).map(drop).with_context(|| self.diagnose())
    }

    /// Runs a command in a Pod.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn exec(&self, namespace: &str, pod: &str, words: &[&str]) -> Result<String> {
        let mut all = vec!["-n", namespace, "exec", pod, "--"];
        all.extend(words);
        self.cluster.kubectl(&all)
    }

    /// Runs `weft-lab-app` in a Pod whose image is [`LAB`], and gives the object that it prints.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn app(&self, namespace: &str, pod: &str, words: &[&str]) -> Result<serde_json::Value> {
        let mut all = vec!["/app"];
        all.extend(words);
        answer(&self.exec(namespace, pod, &all)?)
    }

    /// Runs `weft-lab-app` on a machine that is beside the nodes and outside the cluster (it has the control plane's
    /// address), and gives the object that it prints.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn app_outside(&self, words: &[&str]) -> Result<serde_json::Value> {
        let output = self.outside()?.args(words).output()?;
        ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        answer(&String::from_utf8_lossy(&output.stdout))
    }

    /// `weft-lab-app` on the machine of [`Self::app_outside`], to be started.
    ///
    /// # Errors
    /// When it cannot be prepared.
    pub fn outside(&self) -> Result<Command> {
        self.cluster.command(&program("weft-lab-app")?.to_string_lossy())
    }

    /// A field of an object, by its JSONPath without braces, such as `.status.podIP`.
    ///
    /// # Errors
    /// When there is no such object.
    pub fn field(&self, namespace: &str, object: &str, path: &str) -> Result<String> {
        self.cluster.kubectl(&["-n", namespace, "get", object, "-o", &format!("jsonpath={{{path}}}")])
    }

    /// Fetches a page from inside a Pod, once.
    ///
    /// # Errors
    /// When there is no answer within 3 s, or an error answer.
    pub fn fetch(&self, namespace: &str, pod: &str, url: &str, headers: &[&str]) -> Result<String> {
        let mut words = vec!["wget", "-T", "3", "-qO-"];
        for header in headers {
            words.extend(["--header", header]);
        }
        words.push(url);
        self.exec(namespace, pod, &words)
    }

    /// Waits until `step` succeeds.
    ///
    /// # Errors
    /// With what it said last.
    pub fn eventually<T>(&self, what: &str, step: impl FnMut() -> Result<T>) -> Result<T> {
        let found = wait::until_every(Duration::from_millis(100), PATIENCE, what, step);
        found.map(|(value, _)| value).with_context(|| self.diagnose())
    }

    /// Waits until the agents say that these Pods are enrolled: their problems are empty and their mode is `mode`.
    ///
    /// # Errors
    /// With what the agents say last.
    pub fn enrolled(&self, namespace: &str, pods: &[&str], mode: &str) -> Result<()> {
        self.eventually("the enrolment", || {
            let mut missing: Vec<&str> = pods.to_vec();
            let mut said = String::new();
            for node in self.cluster.nodes() {
                let out = self.node_status(&node)?;
                let report: serde_json::Value = serde_json::from_str(&out)?;
                let agents = report["agents"].as_array().into_iter().flatten();
                for pod in agents.flat_map(|agent| agent["pods"].as_array().into_iter().flatten()) {
                    let fine = pod["mode"] == mode && pod["problem"].as_str().is_none_or(str::is_empty);
                    if fine {
                        missing.retain(|name| pod["name"] != format!("{namespace}/{name}"));
                    }
                }
                said += &out;
            }
            ensure!(missing.is_empty(), "{missing:?} are not {mode}; {said}");
            Ok(())
        })
    }

    /// Waits until an AuthorizationPolicy is enforced on every node.
    ///
    /// # Errors
    /// With what its status says last.
    pub fn programmed(&self, namespace: &str, policy: &str) -> Result<()> {
        let nodes = self.cluster.options().nodes;
        let condition = ".status.conditions[?(@.type==\"Programmed\")]";
        let path = format!("{condition}.observedGeneration}} {{{condition}.status}} {{{condition}.message");
        self.eventually("a policy on every node", || {
            let wanted = self.field(namespace, &format!("wap/{policy}"), ".metadata.generation")?;
            let said = self.field(namespace, &format!("wap/{policy}"), &path)?;
            let done =
                said.starts_with(&format!("{wanted} True ")) && said.contains(&format!("{nodes}/{nodes}"));
            ensure!(done, "generation {wanted}: {said}");
            Ok(())
        })
    }

    /// That nothing of Weft ended by itself: a container that did is started again after a pause that doubles, which
    /// makes everything slow and little fail.
    ///
    /// # Errors
    /// Names each that did, with the end of what it logged.
    pub fn never_crashed(&self) -> Result<()> {
        let path =
            "jsonpath={range .items[*]}{.metadata.name}={.status.containerStatuses[*].restartCount} {end}";
        let counts = self.cluster.kubectl(&["-n", SYSTEM, "get", "pods", "-o", path])?;
        let broken =
            counts.split_whitespace().filter_map(|pod| pod.split_once('=')).filter(|(_, n)| *n != "0");
        let logs = |pod: &str| {
            let words = ["-n", SYSTEM, "logs", "--previous", "--tail=25", pod];
            let said = self.cluster.kubectl(&words).unwrap_or_else(|error| format!("{error:#}"));
            format!("{pod} ended by itself:\n{said}")
        };
        let told: Vec<String> = broken.map(|(pod, _)| logs(pod)).collect();
        ensure!(told.is_empty(), "{}", told.join("\n"));
        Ok(())
    }

    /// The names of the agents' Pods.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn agents(&self) -> Result<Vec<String>> {
        let path = "jsonpath={.items[*].metadata.name}";
        let label = "app.kubernetes.io/name=weft-agent";
        let names = self.cluster.kubectl(&["-n", SYSTEM, "get", "pods", "-l", label, "-o", path])?;
        Ok(names.split_whitespace().map(str::to_owned).collect())
    }

    /// Lets the agents run on no node, or on every node again, and waits for it.
    ///
    /// # Errors
    /// When it does not come.
    pub fn run_agents(&self, run: bool) -> Result<()> {
        self.place_agents(if run { "null" } else { "{\"weft.mesh/nowhere\":\"true\"}" })?;
        if run {
            return self.rolled_out().with_context(|| self.diagnose());
        }
        self.eventually("the end of the agents", || {
            let left = self.agents()?;
            ensure!(left.is_empty(), "{left:?} run");
            Ok(())
        })
    }

    /// Sets on which nodes the agents run; `selector` is a node selector in JSON, `null` is every node.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn place_agents(&self, selector: &str) -> Result<()> {
        let patch = format!("{{\"spec\":{{\"template\":{{\"spec\":{{\"nodeSelector\":{selector}}}}}}}}}");
        let words = ["-n", SYSTEM, "patch", "daemonset", "weft-agent", "--type=merge", "-p", &patch];
        self.cluster.kubectl(&words).map(drop)
    }

    /// What a node's agent says of itself, asked at its socket.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn node_status(&self, node: &Node<'_>) -> Result<String> {
        let socket = observer(node)?;
        let output =
            Command::new(program("weft")?).args(["status", "--server", &socket, "-o", "json"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // 1 says that it found something: that is in the text.
        ensure!(
            matches!(output.status.code(), Some(0 | 1)),
            "weft status: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text)
    }

    /// Attaches somebody else's programs to the root cgroup of a node, which turn addresses that Pods dial into
    /// others; `pairs` have the form `10.96.0.9:80=10.244.1.2:80`. They stay as long as the node is on.
    ///
    /// # Errors
    /// When the kernel refuses them.
    pub fn foreign_load_balancer(&self, node: u8, pairs: &[String]) -> Result<()> {
        let output = Command::new(program("weft-foreign-lb")?)
            .arg(self.cluster.node(node).cgroup2()?)
            .args(pairs)
            .output()?;
        ensure!(output.status.success(), "weft-foreign-lb: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Records what passes between the nodes, at `node`.
    ///
    /// # Errors
    /// When the capture cannot start.
    pub fn capture(&self, node: u8) -> Result<Capture> {
        let path = self.folder.path().join(format!("wire-{node}-{}.pcap", serial()));
        Capture::start(&self.cluster.node(node).netns(), "eth0", &path)
    }

    /// What the `weft` program that is built here says, where the cluster can be reached.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn weft(&self, words: &[&str]) -> Result<String> {
        self.weft_by(words, &[0])
    }

    /// As [`Self::weft`], also where the answer is that something was found (exit code 1).
    ///
    /// # Errors
    /// When it cannot say.
    pub fn weft_said(&self, words: &[&str]) -> Result<String> {
        self.weft_by(words, &[0, 1])
    }

    fn weft_by(&self, words: &[&str], fine: &[i32]) -> Result<String> {
        let output = self.cluster.command(&program("weft")?.to_string_lossy())?.args(words).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.code().is_some_and(|code| fine.contains(&code)) {
            bail!("weft {}: {}{text}", words.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(text)
    }
}

/// The last line, which is the answer.
fn answer(printed: &str) -> Result<serde_json::Value> {
    let line = printed.lines().last().context("it printed nothing")?;
    serde_json::from_str(line).with_context(|| printed.to_owned())
}

/// The socket of a node's agent, as `weft --server` takes it: by the node's own mounts.
///
/// # Errors
/// When the node is off.
pub fn observer(node: &Node<'_>) -> Result<String> {
    let pid = node.pid1().with_context(|| format!("{} is off", node.name()))?;
    Ok(format!("unix:/proc/{pid}/root/run/weft/observer.sock"))
}

/// A program that was built for the tests.
///
/// # Errors
/// When `WEFT_BIN_DIR` does not say where.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    Ok(env::var_os("WEFT_BIN_DIR").map(PathBuf::from).context("WEFT_BIN_DIR is not set")?.join(name))
}

fn serial() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn write_nginx(archive: &Path) -> Result<()> {
    let root = debian::tree("nginx-light", "bookworm", &["nginx-light"], &say)?;
    let site = "server { listen 80; listen [::]:80; location / { default_type text/plain; \
        return 200 \"$hostname saw $remote_addr $request_method $request_uri\\n\"; } }\n";
    Image::new(NGINX)
        .tree(&root, "/")?
        .text(site, "/etc/nginx/sites-enabled/default", 0o644)
        .entrypoint(&["/usr/sbin/nginx", "-g", "daemon off;"])
        .write_archive(archive)
}
