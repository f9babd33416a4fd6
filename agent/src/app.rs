//! The agent put together, in reading order.

use std::{
    future::pending,
    pin::{Pin, pin},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow};
use prometheus_client::registry::Registry;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{mpsc, oneshot, watch},
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use weft_core::MeshState;
use weft_identity::{
    CredentialManager,
    client::{OperatorIssuer, TokenFile},
};
use weft_proto::{
    agent::agent_server::AgentServer, health::health_server::HealthServer,
    observer::observer_server::ObserverServer,
};
use weft_proxy::{Proxy, ProxyConfig};
use weft_runtime::{Admin, DrainWatcher, Readiness, Tasks, Workers, admin, drain, signal};

use crate::{
    bundle::{self, Way},
    config::Config,
    control::{Control, Link},
    datapath::{Datapath, DatapathConfig},
    discovery,
    enrolment::{Enrolment, chain},
    events, files,
    flow::{
        Enricher, FlowStore,
        server::{Health, Observer},
    },
    guard,
    handover::{self, Predecessor},
    hostpods,
    issuers::Issuers,
    kubelet,
    metrics::NodeCollector,
    node::{self, Command, Guards, Node, NodeStatus, Progress, Published},
    probe::Prober,
    ready,
    relay::Relay,
    snapshot,
    status::AgentStatus,
};

/// Changes waiting for the node.
const COMMANDS: usize = 8;
/// Flows kept before the configuration says otherwise.
const FLOWS: usize = 8192;
/// Calls that one client of the observer may have open.
const CALLS: usize = 64;
/// How long the first configuration may take during a takeover.
const FIRST_CONFIG: Duration = Duration::from_secs(60);
/// How long tasks may take to end after the drain.
const END: Duration = Duration::from_secs(2);

/// Why an agent's work is over.
enum End {
    /// It was told to stop.
    Told,
    /// Another agent took over.
    Replaced,
}

/// Runs the agent until it is told to stop, or something vital ends.
///
/// Where another agent takes over, this one drains and then waits to be told: a process that ended by itself would be
/// started again by the kubelet (`restartPolicy: Always`) before its Pod is deleted, and take the node back.
///
/// # Errors
/// When it cannot start, or ends for a reason that it should not have.
pub async fn run(config: Config) -> Result<()> {
    let mut stop = pin!(signal::shutdown());
    match work(config, stop.as_mut()).await? {
        End::Told => {}
        End::Replaced => {
            tracing::info!("replaced and drained: nothing is left to do but to wait for SIGTERM");
            stop.await;
        }
    }
    Ok(())
}

/// The agent's whole work; `stop` ends it.
async fn work(config: Config, stop: Pin<&mut impl Future<Output = &'static str>>) -> Result<End> {
    config.check().map_err(|e| anyhow!(e))?;
    // Keys are in memory: no core file and no ptrace by others.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("the process cannot be made undumpable")?;
    files::raise_limit();
    let started = SystemTime::now();
    let run_dir = config.run_dir();
    files::run_dir(&run_dir)
        .with_context(|| format!("the run folder {} cannot be used", run_dir.display()))?;

    let tasks = Tasks::new();
    let readiness = Readiness::new();
    let (trigger, drain) = drain::channel();
    let mut registry = Registry::default();
    tasks.register(&mut registry);
    let guards = Guards {
        config: Some(readiness.guard("config")),
        datapath: Some(readiness.guard("datapath")),
        credentials: Some(readiness.guard("credentials")),
    };

    if let Some(file) = &config.ready_file {
        ready::remove(file)
            .with_context(|| format!("{} cannot be written; see --ready-file", file.display()))?;
    }
    let published = Published {
        state: watch::Sender::new(Arc::new(MeshState::default())),
        policies: watch::Sender::new(Arc::default()),
        status: watch::Sender::new(Arc::new(NodeStatus::default())),
    };
    // Before anything is taken over: who does not know the node's Pods cannot serve them.
    let mut discovered = None;
    if let Some(settings) = config.discovery() {
        let state = published.state.subscribe();
        let mut found = discovery::start(settings, state, &tasks, &drain, &mut registry)?;
        found.first().await;
        discovered = Some(found);
    }

    // An older agent of this node leaves the kernel alone from here on; it serves until we have taken over.
    let handover_path = run_dir.join("handover.sock");
    let predecessor = Predecessor::prepare(&handover_path)
        .await
        .context("another agent serves this node and does not yield; stop it first (SIGTERM)")?;

    let (datapath, report) = load(&config).await?;
    tracing::info!(kernel = %report.kernel, cgroup = %report.cgroup_root.display(), adopted = report.adopted_links, "datapath loaded");

    let (watch, kubelet) =
        kubelet::Keeper::new(datapath.clone(), config.discovery().is_some(), &mut registry);
    tasks.spawn("kubelet", watch.run(drain.clone()));
    let pods = hostpods::metric(&mut registry);
    let watch = hostpods::run(datapath.clone(), config.discovery().is_some(), pods, drain.clone());
    tasks.spawn("pod-cgroups", watch);

    let (operator, keeper) = bundle::channel(Way {
        uri: config.operator.clone(),
        server_name: config.operator_name.clone(),
        bundle: config.bundle_file.clone(),
    });
    vital_until_drained(&tasks, "trust-bundle", &drain, keeper.run());
    let token = TokenFile::new(&config.token_file);
    let issuer = Arc::new(OperatorIssuer::new(operator.clone(), token.clone()));
    let (credentials, reader) = CredentialManager::new(issuer.clone(), Some(run_dir.join("credentials")));
    credentials.register(&mut registry);
    let issuers = Issuers::new(credentials.clone(), issuer, &config.node, published.state.subscribe());
    vital_until_drained(&tasks, "credentials", &drain, credentials.clone().run(drain.clone()));

    let flows = FlowStore::new(FLOWS);
    let enricher = Arc::new(Enricher::new(flows.clone(), published.state.subscribe(), &mut registry));
    let cores = std::thread::available_parallelism().context("the number of processors")?;
    let proxy = Proxy::new(
        ProxyConfig { node: config.node.clone(), ..ProxyConfig::default() },
        published.state.subscribe(),
        reader,
        enricher.clone(),
        &mut registry,
        tasks.clone(),
        Workers::start(cores).context("no threads for connections")?,
        drain.clone(),
    );
    enricher.close_in(proxy.registry());
    enricher.log_to_stdout(&config.node, config.log_json, &tasks, drain.clone());

    let mut enrolment = Enrolment::new(&config.node, datapath.clone(), proxy, &mut registry);
    let gate = discovered.as_ref().map(|found| found.gate.clone());
    if let Some(discovered) = discovered {
        enrolment = enrolment.with_discovery(discovered);
    }

    let link = Link::default();
    let snapshot_path = run_dir.join("snapshot.json");
    let (commands, queue) = mpsc::channel(COMMANDS);
    let node = Node {
        name: config.node.clone(),
        datapath: datapath.clone(),
        enrolment,
        credentials: credentials.clone(),
        issuers,
        flows: flows.clone(),
        published: published.clone(),
        snapshot: snapshot_path.clone(),
        drain: drain.clone(),
        guards,
        metrics: node::Metrics::new(&mut registry),
        progress: Progress::new(predecessor.is_some()),
    };
    tasks.vital("node", async move { node::run(node, queue).await.map_err(Into::into) });
    match snapshot::load(&snapshot_path) {
        Ok(Some(delta)) => {
            tracing::info!(version = %delta.version, "starting from the last configuration");
            commands.send(Command::Apply { delta, keep: Vec::new(), live: false }).await?;
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(error = %chain(&error), "starting without a configuration"),
    }
    registry.register_collector(Box::new(NodeCollector::new(
        datapath.clone(),
        published.state.subscribe(),
        published.status.subscribe(),
        credentials.clone(),
        link.clone(),
        flows.clone(),
    )));
    let control = Control {
        operator: operator.clone(),
        token: token.clone(),
        state: published.state.subscribe(),
        status: published.status.subscribe(),
        commands: commands.clone(),
        link: link.clone(),
        drain: drain.clone(),
    };
    vital_until_drained(&tasks, "control", &drain, control.run());

    if let Some(predecessor) = predecessor {
        enforced(published.status.subscribe()).await?;
        predecessor.take_over().await.context("the older agent does not drain; stop it (SIGTERM)")?;
        tracing::info!("taken over from the older agent");
    }
    // Not before: until then Pods are the older agent's.
    let guard = match gate {
        Some(gate) => {
            let socket = config.cni_socket();
            let state = published.state.subscribe();
            let started = guard::start(&socket, gate, config.guard(), state, &tasks, &drain, &mut registry);
            Some(started.with_context(|| format!("cannot listen at {}", socket.display()))?)
        }
        None => None,
    };
    start_events(&tasks, &config, &datapath, enricher, published.policies.subscribe(), drain.clone());

    let (end_serving, serving) = drain::channel();
    let observer = Observer::new(&config.node, flows.clone(), published.state.subscribe(), serving.clone());
    let status = AgentStatus {
        node: config.node.clone(),
        kernel: report.kernel,
        started,
        datapath,
        kubelet,
        guard,
        status: published.status.subscribe(),
        credentials,
        link,
        flows,
        readiness: readiness.clone(),
    };
    let prober = Prober {
        node: config.node.as_str().into(),
        datapath: status.datapath.clone(),
        flows: status.flows.clone(),
        state: published.state.subscribe(),
        status: published.status.subscribe(),
        turn: Arc::default(),
    };
    let (observer_of, status_of) = (observer.clone(), status.clone());
    let relay =
        Relay { operator, token, observer: observer_of, status: status_of, prober, drain: serving.clone() };
    vital_until_drained(&tasks, "relay", &drain, async move {
        relay.run().await;
        pending::<()>().await;
    });
    let socket = config.observer();
    let listener =
        files::listen(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
    tasks.vital("observer", serve(listener, observer, status, serving.clone()));
    let listener = listen(&config).await?;
    let told = readiness.clone();
    let endpoint = admin::serve(listener, Admin::new(registry, readiness), serving);
    vital_until_drained(&tasks, "admin", &drain, async move {
        if let Err(error) = endpoint.await {
            tracing::error!(%error, "the admin endpoint ended");
        }
    });
    if let Some(file) = config.ready_file.clone() {
        tasks.spawn("ready-file", ready::tell(file, told, drain.clone()));
    }
    let (replaced, replacement) = oneshot::channel();
    let listener = files::listen(&handover_path).context("cannot listen for a successor")?;
    let successor = handover::serve(listener, commands, drain.clone());
    vital_until_drained(&tasks, "handover", &drain, async move {
        match successor.await {
            Ok(true) => drop(replaced.send(())),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "no successor can take over any more"),
        }
        pending::<()>().await;
    });

    let outcome = tokio::select! {
        signal = stop => {
            tracing::info!(signal, "stopping: pins stay, connections may end by themselves");
            Ok(End::Told)
        }
        Ok(()) = replacement => {
            tracing::info!("replaced: connections may end by themselves");
            Ok(End::Replaced)
        }
        end = tasks.ended() => Err(anyhow!("the task {} ended ({:?})", end.name, end.outcome)),
    };
    // After a replacement the names are the successor's; its clients find it there at once.
    end_serving.drain(Duration::ZERO).await;
    if !trigger.drain(config.drain()).await {
        tracing::warn!(seconds = config.drain_seconds, "connections were left at the end of the drain");
    }
    tasks.join(END).await;
    outcome
}

/// A task whose end before the drain ends the process, and after it does not.
fn vital_until_drained<F>(tasks: &Tasks, name: &'static str, drain: &DrainWatcher, work: F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let drain = drain.clone();
    tasks.vital(name, async move {
        tokio::select! {
            () = work => {}
            () = drain.drained() => {}
        }
        Ok(())
    });
}

async fn load(config: &Config) -> Result<(Datapath, crate::datapath::LoadReport)> {
    let settings = DatapathConfig {
        cgroup_root: config.cgroup_root.clone(),
        bpffs: config.bpffs(),
        bpf_log: config.bpf_log,
        map_sizes: config.map_sizes.iter().cloned().collect(),
        ..DatapathConfig::default()
    };
    let loaded = tokio::task::spawn_blocking(move || Datapath::load(settings)).await?;
    loaded.context("the datapath cannot be loaded")
}

/// Waits until the first configuration is in the kernel and in the proxy.
async fn enforced(mut status: watch::Receiver<Arc<NodeStatus>>) -> Result<()> {
    let first = status.wait_for(|s| s.changed.is_some());
    match tokio::time::timeout(FIRST_CONFIG, first).await {
        Ok(Ok(_)) => Ok(()),
        _ => Err(anyhow!(
            "no configuration was enforced within {FIRST_CONFIG:?}; the older agent goes on, see the log above"
        )),
    }
}

fn start_events(
    tasks: &Tasks,
    config: &Config,
    datapath: &Datapath,
    enricher: Arc<Enricher>,
    policies: watch::Receiver<Arc<Vec<weft_core::NamespacedName>>>,
    drain: DrainWatcher,
) {
    match datapath.events() {
        Ok(stream) => {
            let work = events::run(stream, enricher, policies, drain.clone());
            tasks.spawn("kernel-events", async move {
                if let Err(error) = work.await {
                    tracing::error!(%error, "kernel events cannot be read any more; counters go on");
                }
            });
        }
        Err(error) => tracing::error!(error = %chain(&error), "no kernel events; counters go on"),
    }
    if config.bpf_log
        && let Some(log) = datapath.log()
    {
        tasks.spawn("bpf-log", async move {
            tokio::select! {
                ended = log.run() => {
                    if let Err(error) = ended {
                        tracing::warn!(%error, "the BPF log ended");
                    }
                }
                () = drain.draining() => {}
            }
        });
    }
}

async fn serve(
    listener: UnixListener,
    observer: Observer,
    status: AgentStatus,
    drain: DrainWatcher,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    Server::builder()
        .concurrency_limit_per_connection(CALLS)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(ObserverServer::new(observer))
        .add_service(AgentServer::new(status))
        .add_service(HealthServer::new(Health))
        .serve_with_incoming_shutdown(
            UnixListenerStream::new(listener),
            async move { drain.draining().await },
        )
        .await?;
    Ok(())
}

/// The admin listener. Shared with the agent that this one replaces, which closes its own when it drains.
async fn listen(config: &Config) -> Result<TcpListener> {
    let bind = || -> std::io::Result<TcpListener> {
        let socket = if config.admin.is_ipv4() {
            tokio::net::TcpSocket::new_v4()
        } else {
            tokio::net::TcpSocket::new_v6()
        }?;
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(true)?;
        socket.bind(config.admin)?;
        socket.listen(64)
    };
    bind().with_context(|| format!("cannot listen at {}; see --admin", config.admin))
}
