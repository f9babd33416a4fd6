//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

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

/// Which agents are asked.
#[derive(Debug, Args, Clone, Default)]
pub(crate) struct ServerArgs {
    /// An agent: unix:PATH, a socket, a directory with agents' sockets, or http://HOST:PORT; may be repeated
    /// [default: every /run/weft/*/observer.sock]
    #[arg(long = "server", value_name = "ADDRESS")]
    pub(crate) servers: Vec<String>,
}

/// Arguments of `weft status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) server: ServerArgs,
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
    #[arg(long, value_name = "N")]
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
