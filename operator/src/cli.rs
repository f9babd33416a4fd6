//! The command line.

use std::{net::SocketAddr, path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand};

/// Compiles policy, streams each node its share, and signs identities.
#[derive(Debug, Parser)]
#[command(
    name = "weft-operator",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    /// What to do instead of running.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to run.
    #[command(flatten)]
    pub run: Option<RunArgs>,
}

/// What to do instead of running.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes the token by which a node's agent proves itself, and prints the path of its file.
    Token {
        /// The node's name.
        #[arg(long)]
        node: String,
        /// The operator's folder.
        #[arg(long)]
        state_dir: PathBuf,
    },
}

/// How to run.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Where objects come from: kubernetes (by KUBECONFIG, or as a Pod), or dir:PATH, a folder of YAML files.
    #[arg(long)]
    pub source: SourceArg,
    /// Where the last good form of every object is kept; with dir:PATH also the CA's root, tokens and the bundle for
    /// agents.
    #[arg(long)]
    pub state_dir: Option<PathBuf>,
    /// With kubernetes: Weft's namespace.
    #[arg(long, env = "WEFT_NAMESPACE", default_value = "weft-system")]
    pub namespace: String,
    /// With kubernetes: this Pod's name, by which it holds the lease. Without it, the host's name.
    #[arg(long, env = "WEFT_POD_NAME")]
    pub pod_name: Option<String>,
    /// Where agents connect (gRPC over TLS).
    #[arg(long, default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// Where /metrics, /healthz and /readyz are.
    #[arg(long, default_value = "127.0.0.1:15014")]
    pub admin: SocketAddr,
    /// The trust domain, where no MeshConfig says it.
    #[arg(long)]
    pub trust_domain: Option<String>,
    /// Log lines as JSON.
    #[arg(long)]
    pub log_json: bool,
}

/// Where objects come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceArg {
    /// A folder.
    Dir(PathBuf),
    /// The API server.
    Kubernetes,
}

impl FromStr for SourceArg {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("dir", path)) if !path.is_empty() => Ok(Self::Dir(path.into())),
            _ if text == "kubernetes" => Ok(Self::Kubernetes),
            _ => Err("write kubernetes, or dir:PATH, a folder of YAML files".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_parse() {
        let cli = Cli::try_parse_from(["weft-operator", "--source", "dir:/a", "--state-dir", "/b"]).unwrap();
        assert_eq!(cli.run.unwrap().source, SourceArg::Dir("/a".into()));
        let cli =
            Cli::try_parse_from(["weft-operator", "token", "--node", "n", "--state-dir", "/b"]).unwrap();
        assert!(cli.command.is_some());
        let cli = Cli::try_parse_from(["weft-operator", "--source", "kubernetes"]).unwrap();
        assert_eq!(cli.run.unwrap().source, SourceArg::Kubernetes);
        let error = Cli::try_parse_from(["weft-operator", "--source", "etcd"]).unwrap_err();
        assert!(error.to_string().contains("write kubernetes, or dir:PATH"), "{error}");
    }
}
