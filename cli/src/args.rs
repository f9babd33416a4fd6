//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cluster::ClusterArgs;

/// A sidecarless service mesh.
#[derive(Debug, Parser)]
#[command(name = "weft", version, about, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Prints what to install: weft install | kubectl apply -f -
    Install(InstallArgs),
    /// Prints this version's manifests with what the cluster has now: weft upgrade | kubectl apply -f -
    Upgrade(UpgradeArgs),
    /// Stops the agents, cleans every node and removes what was installed
    Uninstall(UninstallArgs),
    /// Looks at everything that Weft stands on, and says what to do (exit code 1: something should be done)
    Check(CheckArgs),
    /// How the agents are: attached programs, Pods, SVIDs, configuration
    Status(StatusArgs),
    /// What flows through the mesh
    Observe(Box<ObserveArgs>),
    /// A completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// What differs between clusters.
#[derive(Debug, Args, Clone, Default)]
pub(crate) struct InstallArgs {
    /// Where the images are: HOST[:PORT]/PATH [default: ghcr.io/weft-mesh]
    #[arg(long, value_name = "REGISTRY")]
    pub(crate) registry: Option<String>,
    /// The images' tag [default: this program's version]
    #[arg(long, value_name = "TAG")]
    pub(crate) tag: Option<String>,
    /// The trust domain; it is part of every identity and cannot be changed later without a break [default: the
    /// MeshConfig's, or cluster.local]
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) trust_domain: Option<String>,
    /// Replicas of the operator [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=5))]
    pub(crate) operator_replicas: Option<u32>,
}

/// Arguments of `weft upgrade`.
#[derive(Debug, Args)]
pub(crate) struct UpgradeArgs {
    #[command(flatten)]
    pub(crate) install: InstallArgs,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

/// Arguments of `weft uninstall`.
#[derive(Debug, Args)]
pub(crate) struct UninstallArgs {
    /// Even where strict namespaces go plaintext, and where a node cannot be cleaned
    #[arg(long)]
    pub(crate) force: bool,
    /// Also the kinds (CRDs), and with them every policy
    #[arg(long)]
    pub(crate) crds: bool,
    /// Also the labels of namespaces
    #[arg(long)]
    pub(crate) labels: bool,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

/// Arguments of `weft check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Before an installation: can Weft run here, and may you install it?
    #[arg(long, conflicts_with_all = ["namespace", "pod"])]
    pub(crate) pre: bool,
    /// Also have each node load every BPF program once, in a Pod of the agent's image (such as REGISTRY/weft-agent:TAG);
    /// nothing is attached, and the Pods go again
    #[arg(long, value_name = "IMAGE", requires = "pre")]
    pub(crate) trial: Option<String>,
    /// Also: is this namespace captured and encrypted, and which callers would strict mode break?
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
    /// Of that namespace only this Pod; and a live probe: a connection out of it, which sends nothing
    #[arg(long, value_name = "NAME", requires = "namespace")]
    pub(crate) pod: Option<String>,
    /// Where the live probe goes [default: a Pod of the mesh that declares a TCP port, on another node if possible]
    #[arg(long, value_name = "ADDRESS:PORT", requires = "pod")]
    pub(crate) to: Option<std::net::SocketAddr>,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t = CheckOutput::Table)]
    pub(crate) output: CheckOutput,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

/// Forms of `weft check`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CheckOutput {
    /// For reading
    Table,
    /// One JSON document
    Json,
}

/// Which agents are asked.
#[derive(Debug, Args, Clone, Default)]
pub(crate) struct ServerArgs {
    /// An agent: unix:PATH, a socket, a directory with agents' sockets, or http://HOST:PORT; may be repeated
    /// [default: every /run/weft/*/observer.sock of this machine; where there is none, all agents of the cluster]
    #[arg(long = "server", value_name = "ADDRESS", conflicts_with_all = ["context", "kubeconfig"])]
    pub(crate) servers: Vec<String>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

/// Arguments of `weft status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    /// Only Pods of this namespace
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
    /// Pods of all namespaces (as without -n)
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub(crate) all_namespaces: bool,
    /// The operator's status folder: shows objects that it could not use
    #[arg(long, value_name = "DIR")]
    pub(crate) operator_status: Option<PathBuf>,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t = StatusOutput::Table)]
    pub(crate) output: StatusOutput,
}

/// Forms of `weft status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StatusOutput {
    /// For reading
    Table,
    /// One JSON document
    Json,
    /// One YAML document
    Yaml,
}

/// Forms of `weft observe`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FlowOutput {
    /// One line a flow
    Compact,
    /// Columns with a header
    Table,
    /// One JSON object a line
    Json,
}

/// Verdicts to filter by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerdictArg {
    /// It went through
    Forwarded,
    /// It was refused
    #[value(alias = "dropped")]
    Denied,
    /// It failed
    Error,
    /// An AUDIT policy matched
    #[value(alias = "audit")]
    Audited,
    /// The kernel handed it to the proxy, which said nothing of it
    Redirected,
}

/// Sides that report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReporterArg {
    /// The client's node
    Source,
    /// The server's node
    Destination,
}

/// Arguments of `weft observe`.
#[derive(Debug, Args)]
pub(crate) struct ObserveArgs {
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    /// Go on showing flows as they come
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// How many of the newest flows [default: 20; all with --since]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) last: Option<u64>,
    /// Only flows since then: 5m, 1h30m, or 2026-01-02T15:04:05Z
    #[arg(long, value_name = "WHEN")]
    pub(crate) since: Option<String>,
    /// Only flows until then
    #[arg(long, value_name = "WHEN")]
    pub(crate) until: Option<String>,
    /// Only flows from or to this namespace; also completes Pod names without one
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
    /// Flows of all namespaces (as without -n)
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub(crate) all_namespaces: bool,
    /// From or to Pods whose name begins so: [NAMESPACE/]NAME
    #[arg(long, value_name = "POD", conflicts_with_all = ["from_pod", "to_pod"])]
    pub(crate) pod: Vec<String>,
    /// From these Pods
    #[arg(long, value_name = "POD")]
    pub(crate) from_pod: Vec<String>,
    /// To these Pods
    #[arg(long, value_name = "POD")]
    pub(crate) to_pod: Vec<String>,
    /// What became of it
    #[arg(long, value_enum)]
    pub(crate) verdict: Vec<VerdictArg>,
    /// tcp, udp, sctp, icmp, icmpv4, icmpv6 or http
    #[arg(long)]
    pub(crate) protocol: Vec<String>,
    /// The server's port
    #[arg(long)]
    pub(crate) port: Vec<u16>,
    /// HTTP status: 404, or 5+ for all that begin so
    #[arg(long, value_name = "CODE")]
    pub(crate) http_status: Vec<String>,
    /// HTTP method
    #[arg(long, value_name = "METHOD")]
    pub(crate) http_method: Vec<String>,
    /// HTTP path, a regular expression
    #[arg(long, value_name = "REGEX")]
    pub(crate) http_path: Vec<String>,
    /// Only what this side reports; a request between two nodes has a record from each
    #[arg(long, value_enum)]
    pub(crate) reporter: Option<ReporterArg>,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t = FlowOutput::Compact)]
    pub(crate) output: FlowOutput,
}
