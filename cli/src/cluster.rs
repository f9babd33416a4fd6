//! The way to the API server.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::{Failure, connect::chain};

/// Weft's namespace.
pub(crate) const SYSTEM: &str = "weft-system";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Which cluster.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ClusterArgs {
    /// The context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME", help_heading = "Cluster")]
    pub(crate) context: Option<String>,
    /// The kubeconfig [default: $KUBECONFIG, ~/.kube/config, or the Pod's own account]
    #[arg(long, value_name = "FILE", help_heading = "Cluster")]
    pub(crate) kubeconfig: Option<PathBuf>,
}

impl ClusterArgs {
    /// Whether a cluster was named.
    pub(crate) fn given(&self) -> bool {
        self.context.is_some() || self.kubeconfig.is_some()
    }
}

/// A cluster.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    /// The API server's address.
    pub(crate) server: String,
}

impl Cluster {
    /// By the arguments. The API server itself is not asked yet.
    pub(crate) async fn connect(args: &ClusterArgs) -> Result<Self, Failure> {
        let mut config = config(args).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(ANSWER_TIMEOUT);
        let server = config.cluster_url.to_string();
        let client = Client::try_from(config).map_err(|e| {
            Failure::Unable(format!(
                "the kubeconfig cannot be used: {}; try `kubectl version` with it",
                chain(&e)
            ))
        })?;
        Ok(Self { client, server })
    }

    /// The API server did not give something.
    pub(crate) fn failed(&self, what: &str, error: &kube::Error) -> Failure {
        Failure::Unable(format!("cannot read {what}: {}", self.why(error)))
    }

    /// Why a call failed, with the next step.
    pub(crate) fn why(&self, error: &kube::Error) -> String {
        match error {
            kube::Error::Api(status) if status.code == 401 => {
                "the API server does not know you; log in again (`kubectl auth whoami`)".into()
            }
            kube::Error::Api(status) => status.message.clone(),
            kube::Error::Auth(e) => {
                format!("no credentials: {}; log in again (`kubectl auth whoami`)", chain(e))
            }
            other => format!(
                "the API server at {} does not answer: {}; see --context and --kubeconfig",
                self.server,
                chain(other)
            ),
        }
    }
}

async fn config(args: &ClusterArgs) -> Result<Config, Failure> {
    let unable = |e: &dyn std::error::Error| {
        Failure::Unable(format!(
            "no cluster: {}; name one with --kubeconfig FILE or --context NAME",
            chain(e)
        ))
    };
    let options = KubeConfigOptions { context: args.context.clone(), ..KubeConfigOptions::default() };
    match &args.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).map_err(|e| unable(&e))?;
            Config::from_custom_kubeconfig(file, &options).await.map_err(|e| unable(&e))
        }
        None if args.context.is_some() => Config::from_kubeconfig(&options).await.map_err(|e| unable(&e)),
        None => Config::infer().await.map_err(|e| {
            let file = std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default();
            Failure::Unable(format!(
                "no cluster: this is no Pod, and there is no kubeconfig ({file}); name one with --kubeconfig FILE or KUBECONFIG"
            ))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_kubeconfig_says_what_to_do() {
        let args = ClusterArgs { context: None, kubeconfig: Some("/nowhere/at/all".into()) };
        let Err(Failure::Unable(message)) = Cluster::connect(&args).await else { panic!("connected") };
        assert!(message.contains("--kubeconfig"), "{message}");
    }

    #[tokio::test]
    async fn an_absent_server_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config");
        let text = "{apiVersion: v1, kind: Config, current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}], \
                    clusters: [{name: a, cluster: {server: 'http://127.0.0.1:1'}}], users: [{name: a, user: {}}]}";
        std::fs::write(&file, text).unwrap();
        let cluster = Cluster::connect(&ClusterArgs { context: None, kubeconfig: Some(file) }).await.unwrap();
        let error = cluster.client.apiserver_version().await.unwrap_err();
        let why = cluster.why(&error);
        assert!(why.contains("127.0.0.1:1") && why.contains("--context"), "{why}");
    }
}
