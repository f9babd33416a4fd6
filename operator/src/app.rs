//! Wiring: everything is bound before anything runs, so that a taken port fails the start.

use std::{fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tonic::transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming};
use weft_core::TrustDomain;
use weft_identity::ca::EmbeddedCa;
use weft_proto::control::{control_server::ControlServer, identity_server::IdentityServer};
use weft_runtime::{Admin, DrainTrigger, DrainWatcher, Readiness, Tasks, admin, drain, signal, telemetry};

use crate::{
    auth::Tokens,
    cli::{Cli, Command, RunArgs, SourceArg},
    controller::{Controller, Overview},
    distribution::Distribution,
    grpc::{control::ControlService, identity::IdentityService},
    index::Index,
    last_good::{Kept, LastGood},
    metrics::Metrics,
    objects::{self, Object},
    source::{Source, dir::DirSource},
    status::StatusWriter,
};

/// The name in the certificate that agents connect to.
pub const SERVER_NAME: &str = "weft-operator";
/// Requests are small: acks, and certificate requests.
const MAX_REQUEST: usize = 1 << 20;
/// How long streams may take to end.
const DRAIN: Duration = Duration::from_secs(5);

/// The process, from its command line to its end.
///
/// # Errors
/// When it cannot start, or a part of it ends by itself.
pub fn main(cli: Cli) -> Result<()> {
    if let Some(Command::Token { node, state_dir }) = cli.command {
        let path = Tokens::open_or_create(&state_dir)?.issue(&node)?;
        #[expect(clippy::print_stdout, reason = "the command's result")]
        {
            println!("{}", path.display());
        }
        return Ok(());
    }
    let Some(args) = cli.run else { bail!("say --source and --state-dir; see --help") };
    telemetry::init("info", args.log_json);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (operator, trigger) = build(&args).await?;
        tracing::info!(listen = %operator.listen, admin = %operator.admin, "weft-operator runs");
        let tasks = operator.tasks.clone();
        let failed = tokio::select! {
            signal = signal::shutdown() => {
                tracing::info!(signal, "stopping");
                None
            }
            end = tasks.ended() => Some(end),
        };
        trigger.drain(DRAIN).await;
        tasks.join(DRAIN).await;
        match failed {
            Some(end) => bail!("{} ended by itself: {:?}; see the log above", end.name, end.outcome),
            None => Ok(()),
        }
    })
}

/// A running operator.
#[derive(Debug)]
pub struct Operator {
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Where the metrics are.
    pub admin: SocketAddr,
    /// What is sent to nodes.
    pub distribution: Arc<Distribution>,
    /// What is missing until it is ready.
    pub readiness: Readiness,
    /// Everything that runs.
    pub tasks: Tasks,
}

/// Opens, binds and starts everything.
///
/// # Errors
/// With what cannot be opened or bound, and what to do.
pub async fn build(args: &RunArgs) -> Result<(Operator, DrainTrigger)> {
    let SourceArg::Dir(dir) = &args.source;
    fs::create_dir_all(&args.state_dir)
        .with_context(|| format!("cannot make {}; --state-dir must be writable", args.state_dir.display()))?;
    let (last_good, kept) = LastGood::open(&args.state_dir.join("last-good"))?;
    let trust_domain = trust_domain(args, dir, &kept)?;
    let source: Box<dyn Source> = Box::new(DirSource::new(dir, kept)?);
    let tokens = Arc::new(Tokens::open_or_create(&args.state_dir)?);
    let ca = Arc::new(EmbeddedCa::open_or_create(&args.state_dir.join("ca.pem"), trust_domain.clone())?);
    write_bundle(&args.state_dir.join("bundle.pem"), &ca.roots_pem())?;
    let server = ca.server_credentials(&[SERVER_NAME])?;
    let identity = Identity::from_pem(&server.chain_pem, server.key_pem.as_bytes());
    let bind = |address: SocketAddr, flag: &'static str| async move {
        TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}; choose another {flag}"))
    };
    let listener = bind(args.listen, "--listen").await?;
    let admin_listener = bind(args.admin, "--admin").await?;
    let status = StatusWriter::new(dir.join("status"))
        .with_context(|| format!("cannot use {}; make it writable", dir.join("status").display()))?;

    let tasks = Tasks::new();
    let (trigger, drain) = drain::channel();
    let readiness = Readiness::new();
    let mut registry = Registry::default();
    tasks.register(&mut registry);
    let metrics = Metrics::new(&mut registry);
    let distribution = Arc::new(Distribution::new());
    let operator = Operator {
        listen: listener.local_addr()?,
        admin: admin_listener.local_addr()?,
        distribution: Arc::clone(&distribution),
        readiness: readiness.clone(),
        tasks: tasks.clone(),
    };

    let admin = Admin::new(registry, readiness.clone());
    let watcher = drain.clone();
    tasks.vital("admin", async move { Ok(admin::serve(admin_listener, admin, watcher).await?) });

    tracing::info!(source = source.name(), %trust_domain, "objects are read");
    let (sender, batches) = mpsc::channel(16);
    tasks.vital("source", source.run(sender, drain.clone()));
    let (overview, overviews) = watch::channel(Arc::new(Overview::default()));
    let controller = Controller {
        index: Index::new(trust_domain),
        last_good,
        distribution: Arc::clone(&distribution),
        metrics: metrics.clone(),
        overview,
    };
    let ready = readiness.guard("first reading of the source");
    tasks.vital("controller", async move {
        controller.run(batches, ready).await;
        Ok(())
    });
    let (nodes, watcher) = (Arc::clone(&distribution), drain.clone());
    tasks.vital("status", async move {
        status.run(overviews, nodes, watcher).await;
        Ok(())
    });

    let control = ControlService {
        distribution: Arc::clone(&distribution),
        tokens: Arc::clone(&tokens),
        metrics: metrics.clone(),
        tasks: tasks.clone(),
        drain: drain.clone(),
    };
    let identities = IdentityService { distribution, tokens, ca, metrics };
    let router = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity).timeout(Duration::from_secs(5)))?
        .max_concurrent_streams(32)
        .http2_max_header_list_size(16 << 10)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(ControlServer::new(control).max_decoding_message_size(MAX_REQUEST))
        .add_service(IdentityServer::new(identities).max_decoding_message_size(MAX_REQUEST));
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    tasks.vital("gRPC", serve(router, incoming, drain));
    Ok((operator, trigger))
}

async fn serve(
    router: tonic::transport::server::Router,
    incoming: TcpIncoming,
    drain: DrainWatcher,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let _hold = drain.hold();
    Ok(router.serve_with_incoming_shutdown(incoming, drain.draining()).await?)
}

/// The flag, or the folder's MeshConfig, or its last good form, or the default. The CA is made for it, so it must be known first.
fn trust_domain(args: &RunArgs, dir: &Path, kept: &[Kept]) -> Result<TrustDomain> {
    let written = || -> Result<Option<String>> {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
            let Some(text) = yaml.then(|| fs::read_to_string(&path).ok()).flatten() else { continue };
            for document in objects::parse(&text).into_iter().flatten() {
                if let Object::MeshConfig(config) = document.object {
                    return Ok(Some(config.spec.trust_domain));
                }
            }
        }
        Ok(kept.iter().find_map(|k| match &k.document.object {
            Object::MeshConfig(config) => Some(config.spec.trust_domain.clone()),
            _ => None,
        }))
    };
    let name = match &args.trust_domain {
        Some(name) => name.clone(),
        None => written()?.unwrap_or_else(|| "cluster.local".into()),
    };
    TrustDomain::new(&name).with_context(|| {
        format!("{name:?} is no trust domain; correct --trust-domain or MeshConfig spec.trustDomain")
    })
}

fn write_bundle(path: &Path, pem: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let apart = path.with_extension("pem.new");
    let write = || {
        fs::write(&apart, pem)?;
        fs::set_permissions(&apart, fs::Permissions::from_mode(0o644))?;
        fs::rename(&apart, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
