//! The parts of an operator in a cluster.

use std::{fs, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use kube::Api;
use tokio::time::{Instant, sleep};
use weft_api::MeshConfig;
use weft_core::TrustDomain;
use weft_runtime::Backoff;

use super::{Own, Parts};
use crate::{
    authority::{Authority, PROPAGATION},
    cli::RunArgs,
    kubernetes::{
        Cluster,
        bundle::BundleWriter,
        ca::{CaSource, CaWatch},
        lease::Lease,
        review::Reviewer,
        secret::{CaSecret, Place, SecretError},
        status::KubernetesStatus,
        viewers::Reviews,
    },
    last_good::LastGood,
    source::kubernetes::{KubernetesSource, Observed},
};

/// How long the API server may be away at the start before the process gives up and the kubelet starts it anew.
const START: Duration = Duration::from_secs(120);

/// Reads what the operator needs from the cluster before anything can run: settings, CA and old roots.
pub(super) async fn parts(args: &RunArgs) -> Result<Parts> {
    let pod = match &args.pod_name {
        Some(name) => name.clone(),
        None => fs::read_to_string("/proc/sys/kernel/hostname")
            .context("the Pod's name is not known; give --pod-name")?
            .trim()
            .to_owned(),
    };
    let cluster = Cluster::connect(&args.namespace, &pod).await?;
    let mesh = patiently("the MeshConfig", async || mesh_config(&cluster).await).await?;
    let trust_domain = trust_domain(args, mesh.as_ref())?;
    let (last_good, kept) = match &args.state_dir {
        Some(folder) => {
            let (store, kept) = LastGood::open(&folder.join("last-good"))?;
            (Some(store), kept)
        }
        None => (None, Vec::new()),
    };
    let place = match mesh.as_ref().and_then(|m| m.spec.issuer.embedded.secret_ref.as_ref()) {
        Some(given) => Place { namespace: given.namespace.clone(), name: given.name.clone(), own: false },
        None => Place::own(&cluster),
    };
    let secret = CaSecret::new(&cluster, place.clone(), trust_domain.clone());
    // An unusable CA ends no process: it is told where people look, and mended without a restart.
    let opened = patiently("the CA", async || match secret.open().await {
        Err(error) if error.may_pass() => Err(error),
        other => Ok(other),
    });
    let (authority, problem) = match opened.await? {
        Ok(ca) => (Authority::new(ca, PROPAGATION), None),
        Err(error) => {
            tracing::error!("there is no usable CA, nothing is signed until there is: {error}");
            (Authority::vacant(PROPAGATION), Some(error.to_string()))
        }
    };
    let authority = Arc::new(authority);
    let bundle = BundleWriter::new(&cluster);
    patiently("the trust bundle", async || bundle.adopt(&authority).await).await?;

    let (lease, leadership) = Lease::new(&cluster);
    let observed = Arc::new(Observed::default());
    let source = KubernetesSource::new(cluster.client.clone(), Arc::clone(&observed), kept);
    let callers = Arc::new(Reviewer::new(&cluster));
    let viewers = Arc::new(Reviews::new(&cluster));
    let secret = CaSource::new(&cluster, place, trust_domain.clone()).troubled(problem);
    let status = KubernetesStatus::new(cluster, observed, leadership.clone())
        .with_ca(CaWatch::new(secret.health(), authority.subscribe()));
    let ca = authority.subscribe();
    let (signer, writer) = (Arc::clone(&authority), leadership.clone());
    let own: Vec<(&'static str, Own)> = vec![
        ("lease", Box::new(move |drain| Box::pin(lease.run(drain)))),
        ("CA secret", Box::new(move |drain| Box::pin(secret.run(signer, writer, drain)))),
        ("trust bundle", Box::new(move |drain| Box::pin(bundle.run(authority, leadership, drain)))),
    ];
    let (source, status) = (Box::new(source), Box::new(status));
    Ok(Parts { source, callers, viewers, ca, trust_domain, last_good, status, own })
}

/// Asks again while the API server does not answer, for a while.
async fn patiently<T, E: Retry>(what: &str, ask: impl AsyncFn() -> Result<T, E>) -> Result<T> {
    let end = Instant::now() + START;
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    loop {
        match ask().await {
            Ok(found) => return Ok(found),
            Err(error) if error.may_pass() && Instant::now() < end => {
                let why = anyhow::Error::new(error);
                tracing::warn!("{what} cannot be read yet, trying again: {why:#}");
                sleep(backoff.next()).await;
            }
            Err(error) => return Err(error).with_context(|| format!("{what} cannot be read")),
        }
    }
}

/// An error that may go away by waiting.
trait Retry: std::error::Error + Send + Sync + 'static {
    fn may_pass(&self) -> bool;
}

impl Retry for kube::Error {
    fn may_pass(&self) -> bool {
        match self {
            // What RBAC forbids may be allowed a moment later, while an installation is applied.
            Self::Api(status) => status.code >= 500 || status.code == 429 || status.code == 403,
            _ => true,
        }
    }
}

impl Retry for SecretError {
    fn may_pass(&self) -> bool {
        match self {
            // What the API server itself refuses is for people to mend: as with a Role that is missing.
            Self::Api { error, .. } => {
                error.may_pass() && !matches!(&**error, kube::Error::Api(s) if s.code == 403)
            }
            Self::Missing(_) | Self::Part { .. } | Self::Ca { .. } => false,
        }
    }
}

async fn mesh_config(cluster: &Cluster) -> Result<Option<MeshConfig>, kube::Error> {
    let api: Api<MeshConfig> = Api::all(cluster.client.clone());
    match api.get_opt("default").await {
        // One that does not parse is told of by the source; here its defaults do.
        Err(kube::Error::SerdeError(_)) => Ok(None),
        // Its CRD is not there.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        other => other,
    }
}

/// The flag, or the MeshConfig's, or the default. The CA is made for it, so it must be known first.
fn trust_domain(args: &RunArgs, mesh: Option<&MeshConfig>) -> Result<TrustDomain> {
    let written = mesh.map(|m| m.spec.trust_domain.as_str());
    let name = args.trust_domain.as_deref().or(written).unwrap_or("cluster.local");
    TrustDomain::new(name).with_context(|| {
        format!("{name:?} is no trust domain; correct --trust-domain or MeshConfig spec.trustDomain")
    })
}
