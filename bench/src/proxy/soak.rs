//! Weft under mixed load for a long time, while streams, clients, servers and tunnels are killed at random: what was
//! left alone is answered, and what is over leaves nothing behind.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use weft_tests::wait;

use super::{account, ground::Ground, parts::Parts};
use crate::load::soak::Tally;

mod kills;
mod loads;
mod place;
mod rest;
mod table;

use kills::Reaper;
use loads::Loads;
use rest::Held;
use table::Story;

/// How long every load runs before the first measurement.
const WARM: Duration = Duration::from_secs(10);
/// How often the loads are looked at.
const TICK: Duration = Duration::from_millis(100);

/// How long it lasts.
#[derive(Debug, Args)]
pub(crate) struct SoakArgs {
    /// Minutes of load.
    #[arg(long, default_value_t = 15.0)]
    minutes: f64,
    /// Repeats the choices of a run that printed it.
    #[arg(long)]
    seed: Option<u64>,
    /// Where table.md and results.json are written.
    #[arg(long)]
    out: PathBuf,
}

/// The agents at a moment of the load.
#[derive(Debug, Clone)]
struct Moment {
    /// Seconds after the load began.
    at: f64,
    /// Each agent.
    held: Vec<Held>,
    /// Processors that both agents used since the moment before.
    cpu: f64,
}

/// Runs it, prints the table and writes it. Gives the number of rows that are short.
///
/// # Errors
/// When a part is missing, a server or an agent ends, or the nodes do not come to rest after the warm-up.
pub(crate) fn run(args: &SoakArgs, say: &dyn Fn(&str)) -> Result<usize> {
    ensure!(nix::unistd::Uid::effective().is_root(), "run this as root: it makes network namespaces");
    ensure!(args.minutes > 0.0 && args.minutes < 1e4, "--minutes takes more than 0");
    weft_tests::interrupt::watch()?;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let seed = args.seed.unwrap_or_else(now);
    say(&format!("seed {seed}"));
    fs::create_dir_all(&args.out).with_context(|| format!("make {}", args.out.display()))?;
    let folder = tempfile::tempdir()?;
    say("raising two nodes with Weft and 99 Pods");
    let mut ground = Ground::raise(&Parts::without_envoy(say)?, folder.path(), true)?;
    place::settle(&mut ground)?;

    say("warming up");
    warm(&mut ground, seed)?;
    let before = rest::before(&ground).context("after the warm-up")?;
    say(&format!("at rest: {}", table::line(&before)));

    let span = Duration::from_secs_f64(args.minutes * 60.0);
    let (loads, kills, moments, cpu) = load(&mut ground, seed, span, say)?;
    let wall_s = moments.last().map_or(0.0, |moment| moment.at);
    say("the load is over");
    let (after, waited) = rest::after(&ground, &before)?;
    say(&format!("at rest: {}", table::line(&after)));
    ground.check()?;

    let story = Story {
        date: super::date()?,
        machine: super::machine()?,
        minutes: args.minutes,
        seed,
        before,
        after,
        waited,
        moments,
        cpu,
        wall_s,
        loads,
        kills,
    };
    let (text, short) = table::text(&story);
    fs::write(args.out.join("table.md"), &text)?;
    fs::write(args.out.join("results.json"), serde_json::to_string_pretty(&table::json(&story))? + "\n")?;
    say(&text);
    Ok(short)
}

/// Runs every load with kills for a while, and as many connections as the record of flows has room for.
fn warm(ground: &mut Ground, seed: u64) -> Result<()> {
    let loads = Loads::start(ground, &loads::all(ground)?, seed)?;
    let mut reaper = Reaper::start(ground, !seed, WARM)?;
    let start = Instant::now();
    while start.elapsed() < WARM {
        tick(ground, &mut reaper, start.elapsed())?;
    }
    reaper.finish(ground)?;
    loads.finish()?;
    loads::fill(ground)
}

/// One look at a load that has lasted for so long.
fn tick(ground: &mut Ground, reaper: &mut Reaper, at: Duration) -> Result<()> {
    reaper.tick(ground, at)?;
    ground.check()?;
    weft_tests::interrupt::check()?;
    std::thread::sleep(TICK);
    Ok(())
}

/// Both agents' and everything else's processor seconds.
#[derive(Debug, Clone, Copy)]
struct Cpu {
    agents: f64,
    lab: f64,
    machine: f64,
}

impl Cpu {
    fn now(ground: &Ground) -> Result<Self> {
        Ok(Self {
            agents: account::cpu(&ground.agents()?)?,
            lab: account::cpu(&[ground.lab.record().cgroup.clone()])?,
            machine: account::machine()?,
        })
    }

    fn since(self, before: Self) -> Self {
        Self {
            agents: self.agents - before.agents,
            lab: self.lab - before.lab,
            machine: self.machine - before.machine,
        }
    }
}

type Told = Vec<(loads::Load, Tally)>;

/// Every load for `span`, with kills.
fn load(
    ground: &mut Ground,
    seed: u64,
    span: Duration,
    say: &dyn Fn(&str),
) -> Result<(Told, kills::Kills, Vec<Moment>, Cpu)> {
    let every = if span < Duration::from_secs(180) { 10.0 } else { 60.0 };
    let (first, start) = (Cpu::now(ground)?, Instant::now());
    let loads = Loads::start(ground, &loads::all(ground)?, seed.wrapping_add(1 << 16))?;
    let mut reaper = Reaper::start(ground, seed, span)?;
    let (mut moments, mut cpu): (Vec<Moment>, Cpu) = (Vec::new(), first);
    loop {
        let at = start.elapsed();
        let due = every * (moments.len() + 1) as f64;
        if at.as_secs_f64() >= due || at >= span {
            let now = Cpu::now(ground)?;
            let past = moments.last().map_or(0.0, |moment| moment.at);
            let spent = now.since(cpu).agents / (at.as_secs_f64() - past).max(0.1);
            cpu = now;
            moments.push(Moment { at: at.as_secs_f64(), held: rest::look(ground)?, cpu: spent });
            if let Some(moment) = moments.last() {
                say(&format!("{:4.0} s: {}", moment.at, table::moment(moment)));
            }
        }
        if at >= span {
            break;
        }
        tick(ground, &mut reaper, at)?;
    }
    let kills = reaper.finish(ground)?;
    let told = loads.finish()?;
    Ok((told, kills, moments, cpu.since(first)))
}

/// Waits for something that is looked at every half second.
fn until<T>(limit: Duration, what: &str, look: impl FnMut() -> Result<T>) -> Result<(T, Duration)> {
    wait::until_every(Duration::from_millis(500), limit, what, look)
}
