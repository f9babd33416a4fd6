//! A node: its own net, mount, uts, pid and cgroup namespaces with containerd, kubelet and kube-proxy.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cgroup::Hierarchies,
    control::ENTER,
    net,
    parts::Parts,
    record::{Record, began},
    sh,
};

mod config;

const INIT: &str = include_str!("node/init.sh");

/// Folders of the machine that a node replaces by its own.
pub(crate) const COVERED: [&str; 4] = ["/var/lib", "/var/log", "/opt", "/run"];

/// A service of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// The container runtime; its containers live on without it.
    Containerd,
    /// The kubelet.
    Kubelet,
    /// kube-proxy.
    KubeProxy,
}

impl Service {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Containerd, Self::Kubelet, Self::KubeProxy];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
            Self::KubeProxy => "kube-proxy",
        }
    }
}

/// A node of a cluster.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    pub(crate) record: &'a Record,
    pub(crate) parts: &'a Parts,
    pub(crate) index: u8,
}

impl Node<'_> {
    /// Its name in the cluster.
    pub fn name(&self) -> String {
        format!("node{}", self.index)
    }

    /// What it keeps: its `/var/lib`, `/var/log` and `/opt` are `lib`, `log` and `opt` in it; `run` has what this machine
    /// looks at of its `/run`, which is in memory.
    pub fn folder(&self) -> PathBuf {
        self.record.folder().join(self.name())
    }

    /// Its network namespace.
    pub fn netns(&self) -> PathBuf {
        net::path(&self.record.node_netns(self.index))
    }

    /// Its addresses: IPv4, and IPv6 in a cluster of both.
    pub fn addresses(&self) -> Vec<String> {
        let list = net::node_addresses(self.record.options.dual_stack, self.index);
        list.split(',').map(str::to_owned).collect()
    }

    /// The container runtime's socket (CRI), as this machine sees it.
    pub fn cri_socket(&self) -> PathBuf {
        self.folder().join("run/containerd/containerd.sock")
    }

    /// The socket for NRI plugins, as this machine sees it; the node's own path is `/run/nri/nri.sock`.
    pub fn nri_socket(&self) -> PathBuf {
        self.folder().join("run/nri/nri.sock")
    }

    /// Where a service writes.
    pub fn log(&self, service: Service) -> PathBuf {
        self.folder().join(format!("log/{}.log", service.name()))
    }

    /// Its first process, as this machine sees it; none while it is off.
    pub fn pid1(&self) -> Option<u32> {
        let text = fs::read_to_string(self.folder().join("pid1")).ok()?;
        let (pid, start) = text.split_once(' ')?;
        let pid = pid.parse().ok()?;
        (began(pid)? == start.parse::<u64>().ok()?).then_some(pid)
    }

    fn group(&self) -> String {
        format!("{}/{}", self.record.group(), self.name())
    }

    /// The folder that it sees as the root of cgroup2, as this machine sees it.
    ///
    /// # Errors
    /// When this machine has no cgroup2.
    pub fn cgroup2(&self) -> Result<PathBuf> {
        Ok(Hierarchies::find()?.unified().join(self.group()))
    }

    /// Writes its configuration.
    pub(crate) fn prepare(&self) -> Result<()> {
        config::write(self.record, self.parts, self.index, &self.folder())
    }

    /// Switches it on: wire, cgroups, first process, and waits until its services have been started.
    ///
    /// # Errors
    /// When it is on, or does not come.
    pub fn start(&self) -> Result<()> {
        if self.pid1().is_some() {
            bail!("{} is on", self.name());
        }
        let folder = self.folder();
        let netns = self.record.node_netns(self.index);
        net::raise_node(&self.record.control_netns(), &netns, self.index, self.record.options.nodes)?;
        let hierarchies = Hierarchies::find()?;
        let groups = hierarchies.make(&self.group())?;
        let init = folder.join("etc/init");
        fs::write(&init, INIT)?;
        let log = File::options().create(true).append(true).open(folder.join("init.log"))?;
        let mut child = Command::new("setsid")
            .args(["sh", "-c", ENTER, "sh"])
            .arg(self.netns())
            .args(groups)
            .args([
                "--",
                "unshare",
                "--mount",
                "--uts",
                "--ipc",
                "--pid",
                "--cgroup",
                "--fork",
                "--kill-child",
            ])
            .args(["--mount-proc", "sh"])
            .arg(&init)
            .env_clear()
            .env("PATH", self.parts.path())
            .env("HOME", "/root")
            .env("NODE", self.name())
            .env("FOLDER", &folder)
            .env("CGROUPS", hierarchies.describe())
            .env("UNIFIED", hierarchies.unified())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start a node; is util-linux there?")?;
        let outer = child.id();
        let pid =
            sh::until(Duration::from_secs(10), Duration::from_millis(5), "a node's first process", || {
                if let Some(status) = child.try_wait()? {
                    bail!("{} ended ({status}): {}", self.name(), self.init_log());
                }
                Ok(child_of(outer))
            })?;
        fs::write(folder.join("pid1"), format!("{pid} {}", began(pid).unwrap_or_default()))?;
        if hierarchies.describe().is_empty() {
            // See node/init.sh: a group with controllers holds no process.
            let own = hierarchies.make(&format!("{}/outer", self.record.group()))?;
            for group in own {
                fs::write(group.join("cgroup.procs"), outer.to_string())?;
            }
        }
        thread::spawn(move || child.wait());
        sh::until(Duration::from_secs(60), Duration::from_millis(20), "a node's services", || {
            if self.pid1().is_none() {
                bail!("{} ended: {}", self.name(), self.init_log());
            }
            Ok(folder.join("run/node/started").exists().then_some(()))
        })
    }

    /// Switches it off, as a power failure does. Disks stay; memory, network, cgroups and pins are gone.
    ///
    /// # Errors
    /// When something stays.
    pub fn stop(&self) -> Result<()> {
        Hierarchies::find()?.remove(&self.group())?;
        net::unplug(&self.record.control_netns(), self.index)?;
        net::remove(&self.record.node_netns(self.index))?;
        let run = self.folder().join("run");
        if run.exists() {
            fs::remove_dir_all(&run).with_context(|| format!("empty {}", run.display()))?;
        }
        Ok(())
    }

    /// A command inside the node, with its programs in `PATH`.
    ///
    /// # Errors
    /// When the node is off.
    pub fn command(&self, words: &[&str]) -> Result<Command> {
        let pid = self.pid1().with_context(|| format!("{} is off", self.name()))?;
        let hierarchies = Hierarchies::find()?;
        let mut groups = hierarchies.make(&self.group())?;
        if hierarchies.describe().is_empty() {
            groups = vec![hierarchies.unified().join(self.group()).join("init")];
        }
        let mut command = Command::new("sh");
        command.args(["-c", ENTER, "sh"]).arg(self.netns()).args(groups).args(["--", "nsenter", "--target"]);
        command
            .arg(pid.to_string())
            .args(["--mount", "--uts", "--ipc", "--pid", "--cgroup", "--"])
            .args(words);
        command.env("PATH", self.parts.path());
        Ok(command)
    }

    /// Runs a command inside the node and gives what it printed.
    ///
    /// # Errors
    /// When it fails; the message holds what it said.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        sh::output(&mut self.command(words)?, None)
    }

    /// Ends a service at once.
    ///
    /// # Errors
    /// When the node is off, or the service does not run.
    pub fn stop_service(&self, service: Service) -> Result<()> {
        let name = service.name();
        let script = format!(
            "pid=$(cat /run/node/{name}.pid) && kill -9 \"$pid\" && rm /run/node/{name}.pid && \
             while kill -0 \"$pid\" 2>/dev/null; do sleep 0.02; done"
        );
        self.exec(&["sh", "-c", &script]).map(drop).with_context(|| format!("stop {name}"))
    }

    /// Starts a service again.
    ///
    /// # Errors
    /// When the node is off, or the service runs.
    pub fn start_service(&self, service: Service) -> Result<()> {
        let name = service.name();
        if self.folder().join(format!("run/node/{name}.pid")).exists() {
            bail!("{name} of {} runs", self.name());
        }
        let script = self.folder().join(format!("etc/start-{name}"));
        self.exec(&["setsid", "--fork", &script.display().to_string()]).map(drop)
    }

    /// Gives the node an image archive.
    ///
    /// # Errors
    /// When the archive cannot be read, or the container runtime refuses it.
    pub fn load(&self, archive: &Path) -> Result<()> {
        let file = File::open(archive).with_context(|| format!("open {}", archive.display()))?;
        let mut command = self.command(&[
            "ctr",
            "-a",
            "/run/containerd/containerd.sock",
            "-n",
            "k8s.io",
            "images",
            "import",
            "-",
        ])?;
        let out = command.stdin(file).output()?;
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            bail!("{} refuses {}: {}", self.name(), archive.display(), sh::tail(&said, 5));
        }
        Ok(())
    }

    fn init_log(&self) -> String {
        sh::tail(&fs::read_to_string(self.folder().join("init.log")).unwrap_or_default(), 10)
    }
}

/// The process whose parent is `parent`.
fn child_of(parent: u32) -> Option<u32> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let found = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok()?;
        (found == parent).then_some(pid)
    })
}
