//! See [`Cluster::up`].

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::json;

use crate::{
    control::{Control, Program},
    dns, net,
    node::{Node, Service},
    options::Options,
    parts::Parts,
    pki::Pki,
    record::Record,
    sh,
};

/// Longer than a machine of two cores under full load needs for any step.
const PATIENCE: Duration = Duration::from_secs(180);
const PAUSE: Duration = Duration::from_millis(100);

/// A running cluster; removed when dropped, unless it was [kept](Self::keep) or [opened](Self::open).
#[derive(Debug)]
pub struct Cluster {
    record: Record,
    parts: Parts,
    removes: bool,
}

impl Cluster {
    /// Raises a cluster and waits until its nodes are Ready and its DNS answers. `say` is told what is being done;
    /// a first call on a machine builds and fetches the parts, which takes minutes.
    ///
    /// # Errors
    /// What could not be made, with the last lines of the logs; what was made until then is removed.
    pub fn up(options: &Options, say: &dyn Fn(&str)) -> Result<Self> {
        if !nix::unistd::Uid::effective().is_root() {
            bail!("a cluster needs root: it makes namespaces, mounts and cgroups");
        }
        Record::sweep(say)?;
        let parts = Parts::ensure(say)?;
        let start = Instant::now();
        let say = |text: &str| say(&format!("{:6.1} s  {text}", start.elapsed().as_secs_f64()));
        let cluster = Self { record: Record::new(options)?, parts, removes: true };
        cluster.raise(&say).map_err(|error| {
            let logs = cluster.diagnose();
            error.context(format!(
                "the cluster {} did not come up; the ends of its logs:\n{logs}",
                cluster.name()
            ))
        })?;
        Ok(cluster)
    }

    /// One that another process raised. Dropping it leaves it as it is.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn open(name: &str) -> Result<Self> {
        let record = Record::all().into_iter().find(|record| record.name == name).with_context(|| {
            format!("there is no cluster {name}; `cargo xtask cluster status` lists them")
        })?;
        Ok(Self { record, parts: Parts::ensure(&|_| {})?, removes: false })
    }

    fn raise(&self, say: &dyn Fn(&str)) -> Result<()> {
        let options = &self.record.options;
        say(&format!("the cluster {}: certificates, control plane", self.name()));
        Pki::at(self.record.folder().join("pki")).make(options.nodes)?;
        net::raise_control(&self.record.control_netns())?;
        let control = self.control();
        control.start(Program::Etcd)?;
        control.start(Program::ApiServer)?;
        for node in self.nodes() {
            node.prepare()?;
        }
        thread::scope(|scope| {
            let nodes: Vec<_> = self.nodes().map(|node| scope.spawn(move || node.start())).collect();
            nodes
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
        })?;
        say("the nodes are on; giving them images");
        for image in self.parts.images.iter().chain(&options.images) {
            self.load(image)?;
        }
        self.wait_api()?;
        say("the API server is ready");
        // Not before it: they would pause seconds between their tries.
        control.start(Program::ControllerManager)?;
        control.start(Program::Scheduler)?;
        for node in self.nodes() {
            self.register(&node)?;
        }
        if options.dns {
            self.apply(&dns::objects(options).to_string())?;
        }
        self.wait_nodes()?;
        say(&format!("{} nodes are Ready", options.nodes));
        // Without it no Pod can be made.
        self.until("the default service account", || {
            Ok(self.kubectl(&["get", "serviceaccount", "default"]).is_ok().then_some(()))
        })?;
        if options.dns {
            self.kubectl(&[
                "-n",
                "kube-system",
                "rollout",
                "status",
                "deployment/coredns",
                "--timeout=180s",
            ])?;
            say("DNS is ready");
        }
        Ok(())
    }

    /// Gives the node its Pod range once it has registered.
    fn register(&self, node: &Node<'_>) -> Result<()> {
        let ranges = net::node_pod_ranges(self.record.options.dual_stack, node.index);
        let patch = json!({"spec": {"podCIDR": ranges[0], "podCIDRs": ranges}}).to_string();
        let name = node.name();
        self.until(&format!("the registration of {name}"), || {
            Ok(self.kubectl(&["patch", "node", &name, "--patch", &patch]).is_ok().then_some(()))
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// What it is.
    pub fn options(&self) -> &Options {
        &self.record.options
    }

    /// What is on disk of it.
    pub fn folder(&self) -> PathBuf {
        self.record.folder()
    }

    /// The administrator's kubeconfig. Its server can be reached from the control plane's network namespace and from
    /// the nodes': see [`Self::command`].
    pub fn kubeconfig(&self) -> PathBuf {
        self.record.folder().join("pki/admin.kubeconfig")
    }

    /// The control plane's network namespace, from which the API server, nodes and Pods can be reached.
    pub fn netns(&self) -> PathBuf {
        net::path(&self.record.control_netns())
    }

    /// The nodes, in order.
    pub fn nodes(&self) -> impl Iterator<Item = Node<'_>> {
        (1..=self.record.options.nodes).map(|index| self.node(index))
    }

    /// Node `index`, from 1.
    pub fn node(&self, index: u8) -> Node<'_> {
        Node { record: &self.record, parts: &self.parts, index }
    }

    /// The parts that it runs.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    fn control(&self) -> Control<'_> {
        Control { record: &self.record, parts: &self.parts }
    }

    /// A command in the control plane's network namespace, with `KUBECONFIG` and the cluster's kubectl in `PATH`. It
    /// ends with the cluster.
    ///
    /// # Errors
    /// When it cannot be prepared.
    pub fn command(&self, program: &str) -> Result<Command> {
        self.control().command(program)
    }

    /// Runs kubectl as administrator and gives what it printed.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        sh::output(self.command("kubectl")?.args(arguments), None).with_context(|| told(arguments))
    }

    /// As [`Self::kubectl`], with `input` on its standard input (`-f -`).
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        sh::output(self.command("kubectl")?.args(arguments), Some(input.as_bytes()))
            .with_context(|| told(arguments))
    }

    /// Applies YAML or JSON documents (server-side).
    ///
    /// # Errors
    /// When the API server refuses one.
    pub fn apply(&self, documents: &str) -> Result<()> {
        self.kubectl_with(&["apply", "--server-side", "--force-conflicts", "-f", "-"], documents).map(drop)
    }

    /// Gives every node an image archive (see [`crate::image`]).
    ///
    /// # Errors
    /// When a node refuses it.
    pub fn load(&self, archive: &Path) -> Result<()> {
        thread::scope(|scope| {
            let nodes: Vec<_> = self.nodes().map(|node| scope.spawn(move || node.load(archive))).collect();
            nodes
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
        })
    }

    /// Tries `step` until it gives something; fails when a program of the control plane ends meanwhile.
    fn until<T>(&self, what: &str, mut step: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        sh::until(PATIENCE, PAUSE, what, || {
            if let Some(value) = step()? {
                return Ok(Some(value));
            }
            match Program::ALL.iter().find(|program| self.control().ended(**program)) {
                Some(ended) => bail!("{} ended", ended.name()),
                None => Ok(None),
            }
        })
    }

    /// Waits until the API server says that it is ready.
    ///
    /// # Errors
    /// When that takes minutes.
    pub fn wait_api(&self) -> Result<()> {
        self.until("the API server's readiness", || {
            let answer = self.kubectl(&["get", "--raw", "/readyz"]).unwrap_or_default();
            Ok((answer == "ok").then_some(()))
        })
    }

    /// Waits until every node is Ready.
    ///
    /// # Errors
    /// When that takes minutes.
    pub fn wait_nodes(&self) -> Result<()> {
        let path = r#"jsonpath={range .items[*]}{.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}"#;
        self.until("the readiness of every node", || {
            let states = self.kubectl(&["get", "nodes", "-o", path]).unwrap_or_default();
            let ready = states.lines().filter(|state| *state == "True").count();
            Ok((ready == usize::from(self.record.options.nodes)).then_some(()))
        })
    }

    /// Ends a program of the control plane at once.
    ///
    /// # Errors
    /// When it stays.
    pub fn stop(&self, program: Program) -> Result<()> {
        self.control().stop(program)
    }

    /// Starts a program of the control plane again.
    ///
    /// # Errors
    /// When it runs, or cannot be started.
    pub fn start(&self, program: Program) -> Result<()> {
        self.control().start(program)
    }

    /// Where a program of the control plane writes.
    pub fn log(&self, program: Program) -> PathBuf {
        self.control().log(program)
    }

    /// The ends of all logs, for an error.
    pub fn diagnose(&self) -> String {
        let control = Program::ALL.iter().map(|program| (program.name().to_owned(), self.log(*program)));
        let nodes = self.nodes().flat_map(|node| {
            let services = Service::ALL
                .map(|service| (format!("{} of {}", service.name(), node.name()), node.log(service)));
            services.into_iter().chain([(format!("init of {}", node.name()), node.folder().join("init.log"))])
        });
        let ends = control.chain(nodes).filter_map(|(name, path)| {
            let text = fs::read_to_string(path).ok()?;
            Some(format!("--- {name}\n{}\n", sh::tail(&text, 6)))
        });
        ends.collect()
    }

    /// Leaves it standing when this process ends.
    ///
    /// # Errors
    /// When its record cannot be written.
    pub fn keep(&mut self) -> Result<()> {
        self.record.owner = None;
        self.record.save()?;
        self.removes = false;
        Ok(())
    }

    /// Removes it.
    ///
    /// # Errors
    /// Names what stayed.
    pub fn down(mut self) -> Result<()> {
        self.removes = false;
        self.record.remove()
    }
}

fn told(arguments: &[&str]) -> String {
    format!("kubectl {}", arguments.join(" "))
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.removes
            && let Err(error) = self.record.remove()
        {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "the cluster {} was not removed: {error:#}", self.name());
        }
    }
}
