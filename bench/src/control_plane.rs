//! The control plane at scale: a thousand simulated agents against the real operator, API server and etcd.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::{
    objects,
    report::{Report, Sample, say},
    server::ApiServer,
};

mod agents;
mod mesh;
mod process;

use agents::{Fleet, Way};
use mesh::Mesh;
use process::Operator;

/// The longest that anything but a creation of objects may take before the run is given up.
const LIMIT: Duration = Duration::from_secs(300);
/// Requests of the churn to the API server at one time.
const PARALLEL: usize = 64;

/// What is simulated.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Simulated agents, each on a node of its own
    #[arg(long, default_value_t = 1000)]
    pub(crate) nodes: usize,
    /// Pods of the mesh
    #[arg(long, default_value_t = 10_000)]
    pub(crate) pods: usize,
    /// Services, each with an EndpointSlice
    #[arg(long, default_value_t = 500)]
    pub(crate) services: usize,
    /// AuthorizationPolicies
    #[arg(long, default_value_t = 2000)]
    pub(crate) policies: usize,
    /// Changes of a policy that are timed one after the other
    #[arg(long, default_value_t = 120)]
    changes: u16,
    /// How long Pods are replaced, in seconds; 0 leaves it out
    #[arg(long, default_value_t = 30)]
    churn: u64,
    /// Pods replaced in a second
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// The operator's program
    #[arg(long)]
    operator: PathBuf,
    /// Where the result is written as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where the operator's log is kept
    #[arg(long)]
    log: Option<PathBuf>,
}

/// The API server's programs are not on this machine.
#[derive(Debug)]
pub(crate) struct NoParts;

impl std::fmt::Display for NoParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("etcd and kube-apiserver are missing; `cargo xtask cluster parts` fetches them")
    }
}

impl std::error::Error for NoParts {}

/// Runs it; true where every promise is kept.
///
/// # Errors
/// Where a part does not come up or does not answer.
pub(crate) fn run(options: &Options) -> Result<bool> {
    ensure!(
        options.nodes > 0 && options.services > 0 && options.policies > 0 && options.pods >= options.services,
        "at least one node, Service and policy, and as many Pods as Services"
    );
    ensure!(options.nodes <= 40_000 && options.pods <= 1_000_000, "at most 40,000 nodes and 1,000,000 Pods");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut bench = Bench::raise(options).await?;
        bench.first_sync().await?;
        bench.statuses().await?;
        bench.changes().await?;
        if options.churn > 0 {
            bench.churn().await?;
        }
        bench.restart().await?;
        bench.report.finish(options.json.as_deref())
    })
}

struct Bench<'o> {
    options: &'o Options,
    report: Report,
    mesh: Mesh,
    tokens: Vec<String>,
    kubeconfig: PathBuf,
    log: PathBuf,
    operator: Operator,
    fleet: Option<Fleet>,
    /// When the agents were started.
    began: Instant,
    /// The operator's memory without agents, in MiB.
    alone: f64,
    /// The port that the marked policy was given last.
    port: u16,
    _server: ApiServer,
    _folder: TempDir,
}

impl<'o> Bench<'o> {
    async fn raise(options: &'o Options) -> Result<Self> {
        let setting = format!(
            "{} simulated agents (control, trust and relay stream each; acknowledging at once), {} Pods, {} Services \
             with EndpointSlices, {} policies in 20 strict namespaces; one operator ({}), etcd, API server and agents \
             share the machine",
            options.nodes,
            options.pods,
            options.services,
            options.policies,
            options.operator.display()
        );
        let mut report = Report::new("control-plane", setting);
        let server = ApiServer::start().await.ok_or(NoParts)?;
        let client = server.client();
        objects::weft_crds(&client).await;
        objects::apply(&client, "{apiVersion: v1, kind: Namespace, metadata: {name: weft-system}}").await;
        // The operator has no more rights than an installation gives it.
        let rbac = include_str!("../../deploy/kustomize/base/operator-rbac.yaml");
        objects::apply(&client, rbac).await;
        let mesh = Mesh::new(client, options);
        let begin = Instant::now();
        let tokens = mesh.tokens().await.context("the nodes and their tokens")?;
        mesh.create(options).await.context("the mesh's objects")?;
        say(&format!("objects made in {:.1} s", begin.elapsed().as_secs_f64()));

        let folder = TempDir::with_prefix("weft-bench-")?;
        let log = options.log.clone().unwrap_or_else(|| folder.path().join("operator.log"));
        let kubeconfig = server.kubeconfig_as("system:serviceaccount:weft-system:weft-operator");
        let mut operator = Operator::start(&options.operator, &kubeconfig, &log, None)?;
        let ready = operator.ready().await?;
        report.add("operator: start until everything is read", ready.as_secs_f64(), "s");
        report.add("operator: processor time of that", operator.cpu()?, "s");
        let (alone, peak) = operator.memory()?;
        report.add("operator: memory before any agent (peak)", peak, "MiB");
        report.add("operator: memory before any agent (resident)", alone, "MiB");
        Ok(Self {
            options,
            report,
            mesh,
            tokens,
            kubeconfig,
            log,
            operator,
            fleet: None,
            began: Instant::now(),
            alone,
            port: 1000,
            _server: server,
            _folder: folder,
        })
    }

    fn fleet(&self) -> Result<&Fleet> {
        self.fleet.as_ref().context("the agents do not run yet")
    }

    async fn first_sync(&mut self) -> Result<()> {
        let bundle = self.mesh.bundle().await?;
        let way = Way { uri: format!("https://{}", self.operator.listen), bundle };
        self.operator.forget_peak()?;
        let cpu = self.operator.cpu()?;
        self.began = Instant::now();
        let fleet = Fleet::start(&way, &self.tokens)?;
        let done = fleet.synced(self.began, LIMIT).await?;
        self.report.add(
            format!("first sync: {} agents start at once until the last one holds everything", fleet.len()),
            (done - self.began).as_secs_f64(),
            "s",
        );
        self.report.add("first sync: one agent's full state on the wire", fleet.full_mib(), "MiB");
        self.report.add("first sync: operator's processor time", self.operator.cpu()? - cpu, "s");
        let (_, peak) = self.operator.memory()?;
        self.report.must("first sync: operator's memory (peak)", peak, "MiB", (500.0, 300.0));
        self.fleet = Some(fleet);
        Ok(())
    }

    async fn statuses(&mut self) -> Result<()> {
        let cpu = self.operator.cpu()?;
        loop {
            let (done, all) = self.mesh.programmed().await?;
            if done == all {
                break;
            }
            ensure!(self.began.elapsed() < LIMIT, "only {done} of {all} policies say Programmed");
            sleep(Duration::from_secs(1)).await;
        }
        let took = self.began.elapsed().as_secs_f64();
        self.report.add("status: start of the agents until every policy says Programmed", took, "s");
        self.report.add(
            "status: operator's processor time after the first sync",
            self.operator.cpu()? - cpu,
            "s",
        );
        // What follows shall be measured alone.
        sleep(Duration::from_secs(5)).await;
        let (resident, _) = self.operator.memory()?;
        self.report.must(
            "steady: operator's memory with all agents (resident)",
            resident,
            "MiB",
            (500.0, 300.0),
        );
        let each = (resident - self.alone) * 1024.0 / self.fleet()?.len() as f64;
        self.report.add("steady: operator's memory for each agent", each, "KiB");
        let (begin, cpu) = (Instant::now(), self.operator.cpu()?);
        sleep(Duration::from_secs(5)).await;
        let share = (self.operator.cpu()? - cpu) / begin.elapsed().as_secs_f64();
        self.report.add("steady: operator's processor use without any change", share * 100.0, "% of a core");
        Ok(())
    }

    /// One change of the marked policy: from the request to the API server until each agent's acknowledgement.
    async fn change(&mut self) -> Result<(Duration, Duration)> {
        self.port += 1;
        let fleet = self.fleet()?;
        fleet.arm();
        let begin = Instant::now();
        self.mesh.mark(self.port).await?;
        let mut done = fleet.confirmed(self.port, LIMIT).await?;
        done.sort_unstable();
        let at = |place: usize| done.get(place).map_or(LIMIT, |t| *t - begin);
        Ok((at(done.len() / 2), at(done.len().saturating_sub(1))))
    }

    async fn changes(&mut self) -> Result<()> {
        // Not measured: the first of a kind.
        self.change().await?;
        self.operator.forget_peak()?;
        let cpu = self.operator.cpu()?;
        let (mut middle, mut last) = (Sample::default(), Sample::default());
        for _ in 0..self.options.changes {
            let (half, all) = self.change().await?;
            middle.push(half);
            last.push(all);
            // Apart from each other, as people change policies.
            sleep(Duration::from_millis(100)).await;
        }
        let count = last.len();
        say(&format!("apply to last ack over {count} changes: {last}"));
        let cpu = (self.operator.cpu()? - cpu) * 1000.0 / count as f64;
        let what = "one policy: apply to the last agent's ack";
        self.report.add(format!("{what}, p50 of {count}"), last.quantile(0.5), "ms");
        self.report.must(format!("{what}, p99 of {count}"), last.quantile(0.99), "ms", (1000.0, 200.0));
        self.report.add(
            format!("one policy: apply to the median agent's ack, p50 of {count}"),
            middle.quantile(0.5),
            "ms",
        );
        self.report.add("one policy: operator's processor time for each change", cpu, "ms");
        let (_, peak) = self.operator.memory()?;
        self.report.must("one policy: operator's memory (peak)", peak, "MiB", (500.0, 300.0));
        Ok(())
    }

    /// The operator's histogram of the time from noticing a change to sending it: sum in seconds, and count.
    async fn published(&self) -> Result<(f64, f64)> {
        let name = "weft_operator_apply_to_published_seconds";
        let sum = self.operator.metric(&format!("{name}_sum")).await?;
        Ok((sum, self.operator.metric(&format!("{name}_count")).await?))
    }

    async fn churn(&mut self) -> Result<()> {
        self.operator.forget_peak()?;
        let (begin, cpu, before) = (Instant::now(), self.operator.cpu()?, self.fleet()?.received());
        let kib = self.fleet()?.kib();
        let (sum, count) = self.published().await?;
        let (mesh, options) = (self.mesh.clone(), self.options);
        let rollout = rollout(&mesh, options).fuse();
        let mut rollout = std::pin::pin!(rollout);
        let mut last = Sample::default();
        let replaced = loop {
            tokio::select! {
                replaced = &mut rollout => break replaced?,
                change = async {
                    sleep(Duration::from_millis(500)).await;
                    self.change().await
                } => last.push(change?.1),
            }
        };
        let took = begin.elapsed().as_secs_f64();
        let waiting = self.operator.metric("weft_operator_agents_behind").await?;
        // Whatever waited anywhere is in every agent before this change is.
        let (_, behind) = self.change().await?;
        let (rate, wanted) = (replaced as f64 / took, f64::from(options.rate));
        let what = format!("churn of {wanted} Pods/s for {} s", options.churn);
        self.report.add(format!("{what}: Pods replaced each second"), rate, "Pods/s");
        self.report.must(
            format!("{what}: missing from that rate"),
            (1.0 - rate / wanted).max(0.0) * 100.0,
            "%",
            (10.0, 2.0),
        );
        self.report.add(
            format!("{what}: policy apply to last ack, p50 of {}", last.len()),
            last.quantile(0.5),
            "ms",
        );
        self.report.add(format!("{what}: policy apply to last ack, worst"), last.quantile(1.0), "ms");
        self.report.must(
            format!("{what}: behind at its end, until the last agent's ack"),
            behind.as_secs_f64() * 1000.0,
            "ms",
            (2000.0, 1000.0),
        );
        self.report.add(format!("{what}: agents without the newest version at its end"), waiting, "agents");
        let after = self.published().await?;
        let mean = (after.0 - sum) / (after.1 - count).max(1.0) * 1000.0;
        self.report.add(format!("{what}: from noticing a change to sending it, mean"), mean, "ms");
        let share = (self.operator.cpu()? - cpu) / took * 100.0;
        self.report.add(format!("{what}: operator's processor use"), share, "% of a core");
        let messages = (self.fleet()?.received().0 - before.0) as f64 / took / self.fleet()?.len() as f64;
        self.report.add(format!("{what}: messages to each agent"), messages, "/s");
        let kib = (self.fleet()?.kib() - kib) / took;
        self.report.add(format!("{what}: sent to each agent"), kib, "KiB/s");
        let (_, peak) = self.operator.memory()?;
        self.report.must(format!("{what}: operator's memory (peak)"), peak, "MiB", (500.0, 300.0));
        Ok(())
    }

    /// The operator is killed and started anew: every agent comes back and needs everything.
    async fn restart(&mut self) -> Result<()> {
        let listen = self.operator.listen;
        self.operator.kill()?;
        let begin = Instant::now();
        self.operator = Operator::start(&self.options.operator, &self.kubeconfig, &self.log, Some(listen))?;
        self.operator.ready().await?;
        let done = self.fleet()?.synced(begin, LIMIT).await?;
        self.report.add(
            "restart: operator killed and started until every agent holds its state",
            (done - begin).as_secs_f64(),
            "s",
        );
        let (_, peak) = self.operator.memory()?;
        self.report.must("restart: operator's memory (peak)", peak, "MiB", (500.0, 300.0));
        let (_, behind) = self.change().await?;
        self.report.add("restart: the first policy change after it", behind.as_secs_f64() * 1000.0, "ms");
        Ok(())
    }
}

/// Replaces Pods at an even rate and keeps the Services' endpoints with them; how many were replaced.
async fn rollout(mesh: &Mesh, options: &Options) -> Result<usize> {
    let mut behind: Vec<Vec<usize>> =
        (0..options.services).map(|s| (s..options.pods).step_by(options.services).collect()).collect();
    let total = usize::try_from(options.churn)? * usize::try_from(options.rate)?;
    let mut ticks = interval(Duration::from_secs(1) / options.rate.max(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut second = interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut working = FuturesUnordered::new();
    let mut touched = BTreeSet::new();
    let (mut begun, mut done) = (0, 0);
    while done < total {
        tokio::select! {
            _ = ticks.tick(), if begun < total && working.len() < PARALLEL => {
                // The next number of the same Service; its oldest Pod goes.
                let service = begun % options.services;
                let new = options.pods.next_multiple_of(options.services) + begun;
                let list = &mut behind[service];
                let old = std::mem::replace(&mut list[0], new);
                list.rotate_left(1);
                touched.insert(service);
                begun += 1;
                working.push(async move { mesh.replace(old, new).await.map(|()| 1) }.boxed());
            }
            _ = second.tick() => {
                for service in std::mem::take(&mut touched) {
                    let pods = behind[service].clone();
                    working.push(async move { mesh.endpoints(service, &pods).await.map(|()| 0) }.boxed());
                }
            }
            Some(outcome) = working.next() => done += outcome?,
        }
    }
    Ok(done)
}
