//! What an agent holds, and waiting until it holds no more.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use weft_tests::{
    lab::Node,
    metrics::{self, Sample},
};

use super::{super::ground::Ground, until};

/// A tunnel without streams ends after a minute, and its other end with it; one whose peer fell silent is found by TCP's
/// keepalive within two.
const LIMIT: Duration = Duration::from_secs(150);
/// Of resident memory, what may be more afterwards.
pub(super) const GROWTH: f64 = 1.10;
/// How long everything must have been the same.
const STILL: Duration = Duration::from_secs(10);
/// Two looks at memory at rest differ by less, MiB.
const FLUTTER: f64 = 0.5;

/// What an agent holds.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Held {
    pub(super) node: String,
    /// Resident memory, MiB.
    pub(super) rss_mib: f64,
    /// Open file descriptors.
    pub(super) fds: u64,
    /// Threads.
    pub(super) threads: u64,
    /// Tasks alive, by its own account.
    pub(super) tasks: f64,
    /// Connections that it counted as opened and not as closed.
    pub(super) connections: f64,
    /// Tunnels that it counts as open.
    pub(super) tunnels: f64,
    /// Tasks that have panicked.
    pub(super) panics: f64,
}

/// Both agents now.
///
/// # Errors
/// When one does not answer.
pub(super) fn look(ground: &Ground) -> Result<Vec<Held>> {
    ground.lab.nodes().iter().map(held).collect()
}

fn held(node: &Node) -> Result<Held> {
    let pid = node.agent.as_ref().with_context(|| format!("{} has no agent", node.name))?.pid();
    // First: the question for the metrics is a connection too.
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let word = line.and_then(|rest| rest.split_whitespace().next());
        word.and_then(|n| n.parse().ok()).with_context(|| format!("/proc/{pid}/status has no {name}"))
    };
    let (rss, threads) = (field("VmRSS")?, field("Threads")?);
    let samples = metrics::parse(&node.admin("/metrics")?);
    let sum = |name: &str| counted(&samples, name);
    Ok(Held {
        node: node.name.clone(),
        rss_mib: rss / 1024.0,
        fds,
        threads: threads as u64,
        tasks: sum("weft_tasks")?,
        connections: sum("weft_connections_opened_total")? - sum("weft_connections_closed_total")?,
        tunnels: sum("weft_tunnels")?,
        // No series until there is one; an empty sum is minus zero.
        panics: metrics::sum(&samples, "weft_task_panics_total", &[]) + 0.0,
    })
}

/// The sum of a metric that must be there: one of another name would be zero forever.
fn counted(samples: &[Sample], name: &str) -> Result<f64> {
    ensure!(samples.iter().any(|sample| sample.name == name), "the agent has no metric {name}");
    Ok(metrics::sum(samples, name, &[]))
}

/// Whether what they hold has been the same for [`STILL`].
#[derive(Debug, Default)]
struct Stillness {
    since: Option<(Instant, Vec<Held>)>,
}

impl Stillness {
    /// Takes a look in.
    ///
    /// # Errors
    /// While it still changes.
    fn see(&mut self, now: &[Held]) -> Result<()> {
        let same = |old: &[Held]| {
            old.iter().zip(now).all(|(old, new)| {
                old.fds == new.fds
                    && old.tasks == new.tasks
                    && old.connections == new.connections
                    && old.tunnels == new.tunnels
                    && (old.rss_mib - new.rss_mib).abs() < FLUTTER
            })
        };
        match &self.since {
            Some((since, old)) if same(old) => {
                ensure!(since.elapsed() >= STILL, "the same for {:.0} s", since.elapsed().as_secs_f64());
                Ok(())
            }
            _ => {
                self.since = Some((Instant::now(), now.to_vec()));
                bail!("it changes: {now:?}")
            }
        }
    }
}

/// Waits until neither agent has a connection or tunnel and everything stands still, and gives what they hold then.
///
/// # Errors
/// When they do not come to rest.
pub(super) fn before(ground: &Ground) -> Result<Vec<Held>> {
    let mut stillness = Stillness::default();
    let (held, _) = until(LIMIT, "both agents to rest", || {
        let now = look(ground)?;
        stillness.see(&now)?;
        ensure!(now.iter().all(|one| one.connections == 0.0 && one.tunnels == 0.0), "{now:?}");
        Ok(now)
    })?;
    Ok(held)
}

/// Waits until they hold no more than before and that stands still, or for as long as it may take; what they hold then,
/// and how long it took.
///
/// # Errors
/// When an agent does not answer.
pub(super) fn after(ground: &Ground, before: &[Held]) -> Result<(Vec<Held>, Duration)> {
    let (start, mut stillness) = (Instant::now(), Stillness::default());
    let resting = until(LIMIT, "both agents to rest", || {
        let now = look(ground)?;
        stillness.see(&now)?;
        for (old, new) in before.iter().zip(&now) {
            ensure!(new.connections <= old.connections && new.tunnels <= old.tunnels, "{new:?}");
            ensure!(new.fds <= old.fds && new.tasks <= old.tasks, "{new:?}");
            ensure!(new.rss_mib <= GROWTH * old.rss_mib, "{new:?}");
        }
        Ok(now)
    });
    weft_tests::interrupt::check()?;
    let held = match resting {
        Ok((held, _)) => held,
        // The rows say what is left.
        Err(_) => look(ground)?,
    };
    Ok((held, start.elapsed()))
}
