//! Wiring: everything is bound before anything runs, so that a taken port fails the start.

use std::{fs, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use futures_util::{Stream, future::BoxFuture};
use prometheus_client::registry::Registry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tonic::transport::Server;
use weft_core::TrustDomain;
use weft_identity::ca::EmbeddedCa;
use weft_proto::{
    control::{control_server::ControlServer, identity_server::IdentityServer},
    observer::observer_server::ObserverServer,
    weft_relay::{mesh_server::MeshServer, relay_server::RelayServer},
};
use weft_runtime::{
    Admin, DrainTrigger, DrainWatcher, Readiness, Tasks, admin, drain, durable, signal, telemetry,
};

use crate::{
    auth::{Authenticator, Tokens},
    authority::{Expiry, Signing},
    cli::{Cli, Command, RunArgs, SourceArg},
    controller::{Controller, Overview},
    distribution::Distribution,
    grpc::{control::ControlService, identity::IdentityService, pieces::InPieces, turns::Turns},
    index::Index,
    last_good::{Kept, LastGood},
    metrics::{Behind, Metrics},
    objects::{self, Object},
    relay::{
        Relay,
        agents::RelayService,
        people::People,
        viewers::{Nobody, Viewers},
    },
    serve::{self, Certificate, Connection, Limits},
    source::{Source, dir::DirSource},
    status::{StatusWriter, WriteStatus},
};

mod kubernetes;

/// The name in the certificate that agents connect to.
pub const SERVER_NAME: &str = "weft-operator";
/// Requests are small: acks, and certificate requests.
const MAX_REQUEST: usize = 1 << 20;
/// An agent's state is larger: a line for each of its Pods and programs.
const MAX_ANSWER: usize = 4 << 20;
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
    let Some(args) = cli.run else { bail!("say --source; see --help") };
    // What the API client has to say is said by those who use it.
    telemetry::init("info,kube_client=error,kube_runtime=error", args.log_json);
    open_files();
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

/// Allows as many open files as the system does: each agent is one, and runtimes start containers with room for 1024.
fn open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("the limit of open files stays at {:?}: {error}", limit.current);
    }
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
    let Parts { source, callers, viewers, ca, trust_domain, last_good, status, own } = match &args.source {
        SourceArg::Dir(dir) => of_folder(args, dir)?,
        SourceArg::Kubernetes => kubernetes::parts(args).await?,
    };
    let service = format!("{SERVER_NAME}.{}.svc", args.namespace);
    let certificate = Certificate::new(&[SERVER_NAME, &service], ca.clone())?;
    let bind = |address: SocketAddr, flag: &'static str| async move {
        TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}; choose another {flag}"))
    };
    let listener = bind(args.listen, "--listen").await?;
    let admin_listener = bind(args.admin, "--admin").await?;

    let tasks = Tasks::new();
    let (trigger, drain) = drain::channel();
    let readiness = Readiness::new();
    let mut registry = Registry::default();
    tasks.register(&mut registry);
    let metrics = Metrics::new(&mut registry);
    registry.register_collector(Box::new(Expiry(ca.clone())));
    let distribution = Arc::new(Distribution::new());
    registry.register_collector(Box::new(Behind(Arc::clone(&distribution))));
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
    if ca.borrow().is_none() {
        let (mut ca, ready) = (ca.clone(), readiness.guard("usable CA"));
        tasks.spawn("first CA", async move {
            // Dropped without one: the process ends.
            if ca.wait_for(Option::is_some).await.is_ok() {
                ready.ready();
            }
        });
    }
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

    for (name, run) in own {
        let run = run(drain.clone());
        tasks.vital(name, async move {
            run.await;
            Ok(())
        });
    }

    let control = ControlService {
        distribution: Arc::clone(&distribution),
        callers: Arc::clone(&callers),
        metrics: metrics.clone(),
        turns: Turns::default(),
        tasks: tasks.clone(),
        drain: drain.clone(),
    };
    let relay = Relay::default();
    let people = People::new(relay.clone(), viewers, tasks.clone(), drain.clone());
    let relay = RelayService {
        relay,
        callers: Arc::clone(&callers),
        metrics: metrics.clone(),
        tasks: tasks.clone(),
        drain: drain.clone(),
    };
    let identities = IdentityService { distribution, callers, ca, metrics, drain: drain.clone() };
    let router = Server::builder()
        .max_concurrent_streams(32)
        .concurrency_limit_per_connection(32)
        .http2_max_pending_accept_reset_streams(Some(64))
        .http2_max_header_list_size(16 << 10)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(InPieces(ControlServer::new(control).max_decoding_message_size(MAX_REQUEST)))
        .add_service(IdentityServer::new(identities).max_decoding_message_size(MAX_REQUEST))
        .add_service(RelayServer::new(relay).max_decoding_message_size(MAX_ANSWER))
        .add_service(ObserverServer::new(people.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(MeshServer::new(people).max_decoding_message_size(MAX_REQUEST));
    let incoming = serve::incoming(listener, certificate.config()?, Limits::default());
    tasks.spawn("certificate", certificate.renew(drain.clone()));
    tasks.vital("gRPC", run(router, incoming, drain));
    Ok((operator, trigger))
}

/// What differs between a folder and a cluster.
struct Parts {
    source: Box<dyn Source>,
    callers: Arc<dyn Authenticator>,
    viewers: Arc<dyn Viewers>,
    ca: Signing,
    trust_domain: TrustDomain,
    last_good: Option<LastGood>,
    status: Box<dyn WriteStatus>,
    /// Tasks of their own, vital ones.
    own: Vec<(&'static str, Own)>,
}

type Own = Box<dyn FnOnce(DrainWatcher) -> BoxFuture<'static, ()> + Send>;

fn of_folder(args: &RunArgs, dir: &Path) -> Result<Parts> {
    let state =
        args.state_dir.as_deref().context("--source dir:PATH needs --state-dir, a folder of its own")?;
    fs::create_dir_all(state)
        .with_context(|| format!("cannot make {}; --state-dir must be writable", state.display()))?;
    let (last_good, kept) = LastGood::open(&state.join("last-good"))?;
    let trust_domain = trust_domain(args, dir, &kept)?;
    let source = Box::new(DirSource::new(dir, kept)?);
    let callers = Arc::new(Tokens::open_or_create(state)?);
    let ca = EmbeddedCa::open_or_create(&state.join("ca.pem"), trust_domain.clone())?;
    let bundle = state.join("bundle.pem");
    durable::replace(&bundle, ca.roots_pem().as_bytes(), 0o644)
        .with_context(|| format!("cannot write {}", bundle.display()))?;
    let (_, ca) = watch::channel(Some(Arc::new(ca)));
    let status = StatusWriter::new(dir.join("status"))
        .with_context(|| format!("cannot use {}; make it writable", dir.join("status").display()))?;
    let (status, last_good) = (Box::new(status), Some(last_good));
    Ok(Parts {
        source,
        callers,
        viewers: Arc::new(Nobody),
        ca,
        trust_domain,
        last_good,
        status,
        own: Vec::new(),
    })
}

async fn run(
    router: tonic::transport::server::Router,
    incoming: impl Stream<Item = io::Result<Connection>>,
    drain: DrainWatcher,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let _hold = drain.hold();
    Ok(router.serve_with_incoming_shutdown(incoming, drain.draining()).await?)
}

/// The flag, or the folder's MeshConfig, or its last good form, or the default. The CA is made for it, so it must be known
/// first; a MeshConfig that asks for a CA of its own ends the start.
fn trust_domain(args: &RunArgs, dir: &Path, kept: &[Kept]) -> Result<TrustDomain> {
    let written = || -> Result<Option<String>> {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
            let Some(text) = yaml.then(|| fs::read_to_string(&path).ok()).flatten() else { continue };
            for document in objects::parse(&text).into_iter().flatten() {
                // Another root than the one that is asked for would sign everything.
                if let Some(problem) = objects::without_secrets(&document.object) {
                    bail!("{}: {}: {problem}", path.display(), document.key);
                }
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
    let written = written()?;
    let name = args.trust_domain.clone().or(written).unwrap_or_else(|| "cluster.local".into());
    TrustDomain::new(&name).with_context(|| {
        format!("{name:?} is no trust domain; correct --trust-domain or MeshConfig spec.trustDomain")
    })
}
