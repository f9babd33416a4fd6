//! Two nodes on one machine. See [`Lab::start`].

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Output,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

pub mod apply;
pub mod cluster;
pub mod machine;
pub mod net;
pub mod node;
pub mod objects;
pub mod pod;
pub mod process;
pub mod reach;
pub mod remove;
pub mod serve;

pub use machine::{Bins, workspace};
pub use node::Node;
pub use objects::Directory;
pub use pod::Pod;
pub use process::{Place, Process, run};
pub use remove::Record;

/// Where the operator listens for agents.
const OPERATOR: &str = "172.29.0.1:15012";
/// The operator's admin server, inside the control namespace.
pub const OPERATOR_ADMIN: &str = "127.0.0.1:15014";

static LABS_MADE: AtomicU32 = AtomicU32::new(0);

/// What a lab holds.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// The YAML files whose objects are there from the start; their Pods are raised.
    pub objects: Vec<PathBuf>,
    /// Seconds that an agent which is replaced gives its connections.
    pub drain_seconds: u32,
    /// The log filter of agents and operator.
    pub filter: String,
    /// The CA, key and certificate as PEM; the operator makes one where there is none.
    pub ca: Option<String>,
    /// Further arguments of agents.
    pub agent_args: Vec<String>,
    /// Whether agents run under a clock that [`Lab::set_clock`] moves.
    pub clocks: bool,
    /// Nodes that have no agent.
    pub without_agent: Vec<String>,
    /// Settings of the nodes' and Pods' namespaces, from before anything runs in them: `net/ipv4/tcp_ecn=1`.
    pub sysctls: Vec<String>,
}

impl Default for LabOptions {
    fn default() -> Self {
        let examples = workspace().join("deploy/examples");
        Self {
            objects: vec![examples.join("mesh.yaml"), examples.join("shop.yaml")],
            drain_seconds: 5,
            filter: "info".into(),
            ca: None,
            agent_args: Vec::new(),
            clocks: false,
            without_agent: Vec::new(),
            sysctls: Vec::new(),
        }
    }
}

/// Two nodes, their Pods, an operator and the wire; removed when dropped.
#[derive(Debug)]
pub struct Lab {
    record: Record,
    dir: PathBuf,
    bins: Bins,
    source: Directory,
    control: Place,
    nodes: Vec<Node>,
    operator: Option<Process>,
    pods: BTreeMap<String, Pod>,
    pod_objects: BTreeMap<String, Value>,
    services: BTreeMap<String, Value>,
    servers: Vec<Process>,
    options: LabOptions,
    keep: bool,
}

impl Lab {
    /// Raises namespaces, cgroups and the wire, writes the objects, starts the operator and the agents, and
    /// waits until all are ready.
    ///
    /// # Errors
    /// What could not be made; what was made until then is removed.
    pub fn start(options: LabOptions) -> Result<Self> {
        let mut lab = Self::bare(options)?;
        lab.bins.require(&["weft-agent", "weft-operator", "weft"])?;
        lab.start_operator()?;
        let with: Vec<usize> = (0..lab.nodes.len())
            .filter(|index| !lab.options.without_agent.contains(&lab.nodes[*index].name))
            .collect();
        for index in &with {
            lab.token(*index)?;
            let setup = lab.setup();
            lab.nodes[*index].start_agent(&setup)?;
        }
        for index in with {
            let node = &mut lab.nodes[index];
            node.wait_ready(Duration::from_secs(20))?;
        }
        Ok(lab)
    }

    /// Everything but operator and agents: nodes, wire and Pods as a cluster without a mesh has them.
    ///
    /// # Errors
    /// What could not be made; what was made until then is removed.
    pub fn bare(options: LabOptions) -> Result<Self> {
        let bins = Bins::find()?;
        let serial = LABS_MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("w{:x}{}", std::process::id(), char::from(b'a' + (serial % 26) as u8));
        let mut record = Record::own(&name);
        let dir = record.dir();
        ensure!(!dir.exists(), "{} is there already; `cargo xtask demo --down` removes it", dir.display());
        fs::create_dir_all(dir.join("log"))
            .with_context(|| format!("make {}; is this root?", dir.display()))?;
        let cgroup2 = match machine::cgroup2_mount()? {
            Some(mount) => mount,
            None => {
                let at = dir.join("cgroup2");
                record.mounts.push(at.clone());
                record.save()?;
                machine::mount_at("cgroup2", &at)?;
                at
            }
        };
        record.cgroup = cgroup2.join(format!("weft-lab-{name}"));
        let bpf = dir.join("bpf");
        record.mounts.push(bpf.clone());
        record.netns.push(format!("{name}-ctl"));
        let place =
            |netns: &str, cgroup: PathBuf| Place { netns: Path::new("/run/netns").join(netns), cgroup };
        let control = place(&format!("{name}-ctl"), record.cgroup.join("control"));
        let nodes: Vec<Node> = [(1, "node-a"), (2, "node-b")]
            .map(|(index, node)| {
                let netns_name = format!("{name}-{node}");
                let cgroup = record.cgroup.join(node);
                Node {
                    name: node.into(),
                    index,
                    place: place(&netns_name, cgroup.join("agent")),
                    netns_name,
                    cgroup,
                    run_dir: dir.join(node),
                    bpffs: bpf.join(node),
                    agent: None,
                    starts: 0,
                }
            })
            .into();
        // As on a real node, where /run is a tmpfs: keys are kept nowhere else.
        record.mounts.extend(nodes.iter().map(|node| node.run_dir.clone()));
        record.mounts.push(dir.join("operator"));
        record.netns.extend(nodes.iter().map(|node| node.netns_name.clone()));
        record.save()?;
        let source = Directory::make(&dir.join("objects"))?;
        let mut lab = Self {
            record,
            dir,
            bins,
            source,
            control,
            nodes,
            operator: None,
            pods: BTreeMap::new(),
            pod_objects: BTreeMap::new(),
            services: BTreeMap::new(),
            servers: Vec::new(),
            options,
            keep: false,
        };
        machine::mount_at("bpf", &bpf)?;
        // A file system of its own, which a test can fill.
        machine::mount_at("tmpfs", &lab.state_dir())?;
        if let Some(ca) = lab.options.ca.clone() {
            lab.set_ca(&ca)?;
        }
        for node in &lab.nodes {
            machine::mount_at("tmpfs", &node.run_dir)?;
        }
        lab.raise_links()?;
        for file in lab.options.objects.clone() {
            let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
            let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            lab.add_objects(&stem, &objects::documents(&text).with_context(|| file.display().to_string())?)?;
        }
        Ok(lab)
    }

    fn raise_links(&mut self) -> Result<()> {
        fs::create_dir_all(&self.control.cgroup)
            .with_context(|| format!("make {}", self.control.cgroup.display()))?;
        let control = format!("{}-ctl", self.record.name);
        net::ip_batch(None, &format!("netns add {control}\n"))?;
        net::ip_batch(
            Some(&control),
            "link set lo up\nlink add br0 type bridge\naddr add 172.29.0.1/24 dev br0\nlink set br0 up\n",
        )?;
        for node in &self.nodes {
            node.raise(&control)?;
            net::sysctls(&node.place.netns, &self.options.sysctls)?;
        }
        let [a, b] = [&self.nodes[0], &self.nodes[1]];
        net::ip_batch(
            Some(&a.netns_name),
            &format!("link add wire0 type veth peer name wire0 netns {}\n", b.netns_name),
        )?;
        a.join_wire(b.index)?;
        b.join_wire(a.index)
    }

    /// Starts the operator and waits until it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time.
    pub fn start_operator(&mut self) -> Result<()> {
        self.forget_summary()?;
        let mut command = self.control.command(&self.bins, self.bins.path("weft-operator"));
        command.arg("--source").arg(format!("dir:{}", self.source.path().display()));
        command.arg("--state-dir").arg(self.state_dir());
        command.args(["--listen", OPERATOR, "--admin", OPERATOR_ADMIN]).env("WEFT_LOG", &self.options.filter);
        let mut operator = Process::spawn(command, "the operator", &self.dir.join("log/operator.log"))?;
        let bundle = self.state_dir().join("bundle.pem");
        crate::wait::until(Duration::from_secs(15), "the operator to be ready", || {
            if let Err(error) = operator.check() {
                return Ok(Err(error));
            }
            ensure!(bundle.is_file(), "it has not written {}", bundle.display());
            self.operator_admin("/readyz")?;
            self.summary().map(|_| Ok(()))
        })?
        .0?;
        self.operator = Some(operator);
        Ok(())
    }

    /// Ends the operator.
    pub fn stop_operator(&mut self) {
        if let Some(mut operator) = self.operator.take() {
            operator.stop(Duration::from_secs(5));
        }
    }

    /// The body of a page of the operator's admin server.
    ///
    /// # Errors
    /// When it does not answer, or not with 200.
    pub fn operator_admin(&self, path: &str) -> Result<String> {
        let path = path.to_owned();
        net::within(&self.control.netns, move || {
            let answer = crate::http::get(OPERATOR_ADMIN, "localhost", &path, Duration::from_secs(2))?;
            ensure!(answer.status == 200, "{path} says {}: {}", answer.status, answer.text().trim());
            Ok(answer.text())
        })
    }

    /// The operator's folder, on a tmpfs of its own.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("operator")
    }

    /// Puts a CA where the operator takes it from when it starts.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set_ca(&self, pem: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.state_dir().join("ca.pem");
        fs::write(&path, "")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(fs::write(&path, pem)?)
    }

    /// Moves the clock of a node's agent by seconds; see [`LabOptions::clocks`].
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set_clock(&self, node: &str, seconds: i64) -> Result<()> {
        let path = self.dir.join(format!("clock-{node}"));
        let beside = path.with_extension("new");
        fs::write(&beside, seconds.to_string())?;
        Ok(fs::rename(&beside, &path)?)
    }

    fn token(&self, node: usize) -> Result<()> {
        let mut command = self.control.command(&self.bins, self.bins.path("weft-operator"));
        command.args(["token", "--node", &self.nodes[node].name, "--state-dir"]).arg(self.state_dir());
        let out = run(command, Duration::from_secs(10))?;
        ensure!(out.status.success(), "weft-operator token: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }

    fn setup(&self) -> node::AgentSetup {
        node::AgentSetup {
            bins: self.bins.clone(),
            operator: format!("https://{OPERATOR}"),
            state_dir: self.state_dir(),
            logs: self.dir.join("log"),
            drain_seconds: self.options.drain_seconds,
            filter: self.options.filter.clone(),
            args: self.options.agent_args.clone(),
            clocks: self.options.clocks.then(|| self.dir.clone()),
        }
    }

    /// Starts an agent on a node, beside the one that may run there; gives that one back.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&mut self, node: &str) -> Result<Option<Process>> {
        let setup = self.setup();
        self.node_mut(node)?.start_agent(&setup)
    }

    /// A node by name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name == name).with_context(|| format!("no node {name}"))
    }

    /// A node by name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node_mut(&mut self, name: &str) -> Result<&mut Node> {
        self.nodes.iter_mut().find(|node| node.name == name).with_context(|| format!("no node {name}"))
    }

    /// Both nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A Pod by name (in any namespace).
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.values().find(|pod| pod.name == name).with_context(|| format!("no Pod {name}"))
    }

    /// A Pod's object as written.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod_object(&self, name: &str) -> Result<&Value> {
        self.pod_objects.get(&self.pod(name)?.key()).context("no such Pod")
    }

    /// The cluster IP of a Service of the wanted family, by `namespace/name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn service(&self, key: &str, v6: bool) -> Result<std::net::IpAddr> {
        let service = self.services.get(key).with_context(|| format!("no Service {key}"))?;
        let address = service.pointer(if v6 { "/spec/clusterIPs/1" } else { "/spec/clusterIPs/0" });
        Ok(address.and_then(Value::as_str).context("a Service without addresses")?.parse()?)
    }

    /// The operator's directory.
    pub fn source(&self) -> &Directory {
        &self.source
    }

    /// The lab's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is recorded for its removal.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The built programs.
    pub fn bins(&self) -> &Bins {
        &self.bins
    }

    /// Runs `weft` with both nodes' sockets.
    ///
    /// # Errors
    /// When it fails or gives no answer in time.
    pub fn weft(&self, args: &[&str]) -> Result<String> {
        let mut command = std::process::Command::new(self.bins.path("weft"));
        command.args(args);
        for node in &self.nodes {
            command.arg("--server").arg(node.server());
        }
        let out = run(command, Duration::from_secs(15))?;
        let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        ensure!(out.status.success(), "weft {}: {} {stdout}{stderr}", args.join(" "), out.status);
        Ok(stdout.into_owned())
    }

    /// Runs a program inside a Pod.
    ///
    /// # Errors
    /// When there is no such Pod, or the program does not end in `limit`.
    pub fn run_in(&self, pod: &str, program: &str, args: &[&str], limit: Duration) -> Result<Output> {
        let mut command = self.pod(pod)?.place.command(&self.bins, program);
        command.args(args);
        run(command, limit)
    }

    /// Runs a subcommand of `weft-lab-app` inside a Pod and reads its answer (JSON).
    ///
    /// # Errors
    /// When it fails.
    pub fn app(&self, pod: &str, args: &[&str]) -> Result<Value> {
        let program = self.bins.path("weft-lab-app");
        let mut command = self.pod(pod)?.place.command(&self.bins, program);
        command.args(args);
        let out = run(command, Duration::from_secs(180))?;
        if !out.status.success() {
            bail!("{pod}: {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
        }
        serde_json::from_slice(&out.stdout)
            .with_context(|| format!("{pod}: {}: {}", args.join(" "), String::from_utf8_lossy(&out.stdout)))
    }

    /// Starts a subcommand of `weft-lab-app` inside a Pod.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn_app(&self, pod: &str, name: &str, args: &[&str]) -> Result<Process> {
        let pod = self.pod(pod)?;
        let mut command = pod.place.command(&self.bins, self.bins.path("weft-lab-app"));
        command.args(args);
        let log = pod.folder(&self.dir).join(format!("{name}.log"));
        let _ = fs::remove_file(&log);
        Process::spawn(command, name, &log)
    }

    /// What `weft status -o json` says of both agents.
    ///
    /// # Errors
    /// As [`Lab::weft`].
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.weft(&["status", "-o", "json"])?)?)
    }

    /// Leaves everything standing when dropped; `Record::remove` ends it later.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Ends everything.
    ///
    /// # Errors
    /// Names what stayed.
    pub fn down(mut self) -> Result<()> {
        self.tear_down()
    }

    fn tear_down(&mut self) -> Result<()> {
        self.servers.clear();
        for node in &mut self.nodes {
            node.agent = None;
        }
        self.operator = None;
        self.keep = true;
        self.record.remove()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            for process in self.servers.drain(..).chain(self.operator.take()) {
                std::mem::forget(process);
            }
            for node in &mut self.nodes {
                std::mem::forget(node.agent.take());
            }
        } else if let Err(error) = self.tear_down() {
            eprintln!("the lab {} was not removed whole: {error:#}", self.record.name);
        }
    }
}
