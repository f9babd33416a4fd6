//! What the agent is told at its start.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use weft_ebpf_common::codes::map;

use crate::{discovery::Settings, guard};

/// The agent of one node.
#[derive(Debug, Parser)]
#[command(name = "weft-agent", version, about, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// Something else than running.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to run.
    #[command(flatten)]
    pub run: Option<Config>,
}

/// What the agent does besides running.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Removes everything that agents pinned: afterwards every Pod passes untouched
    Uninstall {
        /// The folder of the pins
        #[arg(long, value_name = "DIR")]
        bpffs: PathBuf,
        /// The cgroup the programs were attached to; accepted for symmetry, the pins know it
        #[arg(long, value_name = "DIR")]
        cgroup_root: Option<PathBuf>,
        /// The folder of the node's CNI configuration, to take the guard out of it
        #[arg(long, value_name = "DIR")]
        cni_conf_dir: Option<PathBuf>,
        /// The folder of the node's CNI plugins, to remove the guard's program
        #[arg(long, value_name = "DIR")]
        cni_bin_dir: Option<PathBuf>,
        /// The folder of what the agent kept on the node's disk, to remove it
        #[arg(long, value_name = "DIR")]
        state_dir: Option<PathBuf>,
        /// The run folder, to remove it
        #[arg(long, value_name = "DIR")]
        run_dir: Option<PathBuf>,
    },
    /// Loads every BPF program once, attaches none, and says as JSON what this node lacks: `weft check --pre --trial`
    Trial {
        /// Where to
        #[arg(long, value_name = "FILE", default_value = "/dev/termination-log")]
        report: PathBuf,
    },
    /// Ends with success if the agent that writes the file (--ready-file) is ready: for a readiness probe
    Ready {
        /// The file
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },
}

/// Settings of a running agent.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// This node's name
    #[arg(long, env = "WEFT_NODE")]
    pub node: String,
    /// The operator: https://HOST:PORT
    #[arg(long, value_name = "URL", value_parser = https)]
    pub operator: String,
    /// The container runtime's CRI socket: the node's Pods and their network namespaces come from it. Without it
    /// they come from the Pods' annotations (directory mode)
    #[arg(long, value_name = "SOCKET")]
    pub cri: Option<PathBuf>,
    /// The container runtime's NRI socket [default: beside the CRI socket's folder, or the host's]
    #[arg(long, value_name = "SOCKET", requires = "cri")]
    pub nri: Option<PathBuf>,
    /// The folder of the node's CNI configuration: the agent adds a plugin to its chain that holds Pods of the mesh which
    /// start while no agent runs. Without it they start, and what comes in to them is not judged until the agent is back
    #[arg(long, value_name = "DIR", requires_all = ["cri", "cni_bin_dir", "state_dir"])]
    pub cni_conf_dir: Option<PathBuf>,
    /// The folder of the node's CNI plugins, where that plugin's program is put
    #[arg(long, value_name = "DIR", requires = "cni_conf_dir")]
    pub cni_bin_dir: Option<PathBuf>,
    /// The folder, on the node's disk and by the same path, where the agent writes down for that plugin which namespaces
    /// are in the mesh
    #[arg(long, value_name = "DIR", requires = "cni_conf_dir")]
    pub state_dir: Option<PathBuf>,
    /// The node's root folder as the agent sees it (with hostPID: PID 1's)
    #[arg(long, value_name = "DIR", default_value = "/proc/1/root")]
    pub host_root: PathBuf,
    /// The name in the operator's certificate
    #[arg(long, value_name = "NAME", default_value = "weft-operator")]
    pub operator_name: String,
    /// The file with the token that proves this node; read again for every call
    #[arg(long, value_name = "FILE")]
    pub token_file: PathBuf,
    /// The file with the certificates (PEM) that the operator's certificate must lead to
    #[arg(long, value_name = "FILE")]
    pub bundle_file: PathBuf,
    /// The folder for sockets and the snapshot, on tmpfs [default: /run/weft/NODE]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// The observer's socket [default: observer.sock in the run folder]
    #[arg(long, value_name = "SOCKET")]
    pub observer: Option<PathBuf>,
    /// The folder for BPF pins, one per node [default: /sys/fs/bpf/weft-NODE]
    #[arg(long, value_name = "DIR")]
    pub bpffs: Option<PathBuf>,
    /// The cgroup2 folder whose processes are steered [default: the node's cgroup2 root]
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// Where /metrics, /healthz and /readyz are served
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15020")]
    pub admin: SocketAddr,
    /// A file that is there while this agent is ready, in a folder of the Pod's own (an emptyDir): /readyz of two agents
    /// of one node, during an update, has one address
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
    /// How long connections may go on after a stop or a replacement, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_seconds: u64,
    /// Entries of a BPF map, where the usual number is not enough; a map that is pinned already keeps its size until
    /// the node restarts or is drained and `weft-agent uninstall` has run
    #[arg(long = "map-size", env = "WEFT_MAP_SIZES", value_name = "NAME=ENTRIES", value_delimiter = ',',
        value_parser = map_size)]
    pub map_sizes: Vec<(String, u32)>,
    /// Debug lines of the BPF programs (slow; shown with WEFT_LOG=weft::bpf=debug)
    #[arg(long)]
    pub bpf_log: bool,
    /// Log lines as JSON
    #[arg(long)]
    pub log_json: bool,
}

impl Config {
    /// The run folder.
    pub fn run_dir(&self) -> PathBuf {
        self.run_dir.clone().unwrap_or_else(|| Path::new("/run/weft").join(&self.node))
    }

    /// The observer's socket.
    pub fn observer(&self) -> PathBuf {
        self.observer.clone().unwrap_or_else(|| self.run_dir().join("observer.sock"))
    }

    /// The folder for pins.
    pub fn bpffs(&self) -> PathBuf {
        self.bpffs.clone().unwrap_or_else(|| Path::new("/sys/fs/bpf").join(format!("weft-{}", self.node)))
    }

    /// How long connections may go on.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }

    /// Where Pods are discovered; `None` in directory mode.
    pub fn discovery(&self) -> Option<Settings> {
        let (nri, host_root) = (self.nri.clone(), self.host_root.clone());
        Some(Settings { cri: self.cri.clone()?, nri, host_root })
    }

    /// Where the node's CNI plugin asks.
    pub fn cni_socket(&self) -> PathBuf {
        self.run_dir().join("cni.sock")
    }

    /// The guard that is to be installed. Its program lies beside the agent's own.
    pub fn guard(&self) -> Option<guard::Settings> {
        let beside = std::env::current_exe().ok()?;
        Some(guard::Settings {
            conf_dir: self.cni_conf_dir.clone()?,
            bin_dir: self.cni_bin_dir.clone()?,
            state_dir: self.state_dir.clone()?,
            socket: self.cni_socket(),
            program: beside.with_file_name("weft-cni"),
        })
    }

    /// Checks what the parser cannot.
    ///
    /// # Errors
    /// When the node's name could leave the folders that are named after it.
    pub fn check(&self) -> Result<(), String> {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        let name = &self.node;
        if name.is_empty() || name.len() > 253 || !name.chars().all(fine) || name.starts_with('.') {
            return Err(format!(
                "--node {name:?} is no node's name: it may hold letters, digits, '-', '.' and '_'"
            ));
        }
        Ok(())
    }
}

fn map_size(text: &str) -> Result<(String, u32), String> {
    let (name, entries) = text.split_once('=').ok_or("write NAME=ENTRIES, such as PODS=16384")?;
    if !map::ALL.contains(&name) {
        return Err(format!("there is no map {name:?}; the maps are {}", map::ALL.join(", ")));
    }
    match entries.parse() {
        Ok(entries) if entries > 0 => Ok((name.into(), entries)),
        _ => Err(format!("{entries:?} is no number of entries")),
    }
}

fn https(text: &str) -> Result<String, String> {
    if text.contains("$(") {
        // The kubelet leaves a variable as it is where it has no value for it.
        return Err(
            "a variable in it was not expanded: Kubernetes knows a Service's address only in Pods that start after it, in its namespace; make sure that the Service weft-operator is there (kubectl -n weft-system get service weft-operator), then delete this Pod"
                .into(),
        );
    }
    if text.starts_with("https://") {
        Ok(text.into())
    } else {
        Err("write https://HOST:PORT; the operator is never spoken to without TLS".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARGS: [&str; 9] = [
        "weft-agent",
        "--node",
        "node-a",
        "--operator",
        "https://10.0.0.1:15012",
        "--token-file",
        "/t",
        "--bundle-file",
        "/b",
    ];

    #[test]
    fn defaults_are_named_after_the_node() {
        let cli = Cli::try_parse_from(ARGS).unwrap();
        let config = cli.run.unwrap();
        assert_eq!(config.observer(), Path::new("/run/weft/node-a/observer.sock"));
        assert_eq!(config.bpffs(), Path::new("/sys/fs/bpf/weft-node-a"));
        assert_eq!(config.check(), Ok(()));
        let bad = Config { node: "../x".into(), ..config };
        assert!(bad.check().is_err());
    }

    #[test]
    fn plaintext_operators_are_refused() {
        let mut args = ARGS;
        args[4] = "http://10.0.0.1:15012";
        assert!(Cli::try_parse_from(args).is_err());
    }

    #[test]
    fn sizes_are_of_maps_that_are_there() {
        let with = |size: &'static str| {
            Cli::try_parse_from(ARGS.into_iter().chain(["--map-size", size]))
                .map(|cli| cli.run.unwrap().map_sizes)
        };
        assert_eq!(with("PODS=5,ADDRS=9").unwrap(), [("PODS".to_owned(), 5), ("ADDRS".to_owned(), 9)]);
        for wrong in ["PODS", "PODS=0", "PODS=many", "PILLS=3"] {
            assert!(with(wrong).is_err(), "{wrong}");
        }
        assert!(with("PILLS=3").unwrap_err().to_string().contains("PODS"));
    }

    #[test]
    fn an_operator_that_kubernetes_did_not_fill_in_is_refused_with_what_to_do() {
        let mut args = ARGS;
        args[4] = "https://$(WEFT_OPERATOR_SERVICE_HOST):15012";
        let error = Cli::try_parse_from(args).unwrap_err().to_string();
        assert!(error.contains("get service weft-operator"), "{error}");
    }

    #[test]
    fn pods_are_discovered_only_where_a_runtime_is_named() {
        let config = Cli::try_parse_from(ARGS).unwrap().run.unwrap();
        assert!(config.discovery().is_none());
        let args = ARGS.into_iter().chain(["--cri", "/run/containerd/containerd.sock"]);
        let settings = Cli::try_parse_from(args).unwrap().run.unwrap().discovery().unwrap();
        assert_eq!(settings.host_root, Path::new("/proc/1/root"));
        assert!(Cli::try_parse_from(ARGS.into_iter().chain(["--nri", "/x"])).is_err());
    }

    #[test]
    fn the_guard_needs_all_its_folders() {
        let with = |more: &[&'static str]| Cli::try_parse_from(ARGS.into_iter().chain(more.iter().copied()));
        let folders = ["--cni-conf-dir=/c", "--cni-bin-dir=/b", "--state-dir=/s"];
        let config = with(&[&["--cri=/x"], &folders[..]].concat()).unwrap().run.unwrap();
        let guard = config.guard().unwrap();
        assert_eq!((guard.conf_dir, guard.socket), ("/c".into(), "/run/weft/node-a/cni.sock".into()));
        assert!(with(&folders).is_err(), "directory mode has no CNI");
        assert!(with(&["--cri=/x", folders[0], folders[1]]).is_err());
        assert!(with(&["--cri=/x"]).unwrap().run.unwrap().guard().is_none());
    }

    #[test]
    fn uninstall_needs_no_more_than_the_folder() {
        let cli = Cli::try_parse_from(["weft-agent", "uninstall", "--bpffs", "/x"]).unwrap();
        assert!(matches!(cli.command, Some(Command::Uninstall { .. })));
    }
}
