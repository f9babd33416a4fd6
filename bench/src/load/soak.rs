//! Loads without a length of their own: they go on until standard input ends, and then say what they did.

use std::{
    collections::BTreeMap,
    io::{self, Read as _},
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Subcommand;
use serde::{Deserialize, Serialize};

use crate::dice::Dice;

pub(crate) mod blob;
mod doomed;
mod steady;
mod streams;

pub(crate) use doomed::Doomed;
pub(crate) use steady::{BODY, Steady};

/// How long any answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a server may take until it is reached again after a cut: a tunnel that fell silent is given up after 30 s.
const RETURN: Duration = Duration::from_secs(60);
/// Reasons of failures that are told apart.
const REASONS: usize = 24;

static ENDING: AtomicBool = AtomicBool::new(false);

/// Loads of the soak.
#[derive(Debug, Subcommand)]
pub(crate) enum Soak {
    /// The server of [`blob`].
    Blobs {
        /// Where it listens, on every address.
        port: u16,
    },
    /// Clients that are left alone: all that they ask must be answered.
    Steady {
        /// What they do.
        kind: Steady,
        /// The server.
        server: SocketAddr,
        /// Connections at a time.
        connections: u32,
        /// Requests per second, all together.
        rate: f64,
        /// Of their choices.
        seed: u64,
    },
    /// Clients that end in the middle of things, or whose server does.
    Doomed {
        /// What they speak.
        kind: Doomed,
        /// The server.
        server: SocketAddr,
        /// Connections at a time.
        connections: u32,
        /// Ends per second, all together.
        rate: f64,
        /// Of their choices.
        seed: u64,
    },
    /// Asks until it is answered, a minute at most.
    Again {
        /// The server.
        server: SocketAddr,
    },
}

/// What a load did.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Tally {
    /// Requests that were answered as they should be.
    pub(crate) answered: u64,
    /// Those that were not.
    pub(crate) failed: u64,
    /// Ends of one side that the other saw as something else: a reset as a clean end, or the reverse.
    pub(crate) untrue: u64,
    /// Bytes of blobs, every one of them looked at.
    pub(crate) bytes: u64,
    /// What was done to connections and streams, and how often.
    pub(crate) did: BTreeMap<String, u64>,
    /// What failed, and how often.
    pub(crate) why: BTreeMap<String, u64>,
    /// Median time of an answer, microseconds.
    pub(crate) p50_us: u64,
    /// 99th percentile.
    pub(crate) p99_us: u64,
    /// The longest.
    pub(crate) max_us: u64,
    #[serde(skip)]
    times: Vec<u32>,
}

impl Tally {
    /// Counts a request that was sent at `start`.
    fn count<T>(&mut self, start: Instant, done: &io::Result<T>) {
        match done {
            Ok(_) => {
                self.answered += 1;
                self.times.push(u32::try_from(start.elapsed().as_micros()).unwrap_or(u32::MAX));
            }
            Err(error) => self.fail(error),
        }
    }

    fn fail(&mut self, error: &io::Error) {
        self.failed += 1;
        self.because(error.to_string());
    }

    fn untrue(&mut self, what: String) {
        self.untrue += 1;
        self.because(what);
    }

    fn because(&mut self, what: String) {
        let what = if self.why.len() < REASONS { what } else { "further reasons".into() };
        *self.why.entry(what).or_default() += 1;
    }

    fn did(&mut self, what: &str) {
        *self.did.entry(what.to_owned()).or_default() += 1;
    }

    /// Takes another's counts in.
    pub(crate) fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.failed += other.failed;
        self.untrue += other.untrue;
        self.bytes += other.bytes;
        for (what, n) in other.did {
            *self.did.entry(what).or_default() += n;
        }
        for (what, n) in other.why {
            *self.why.entry(what).or_default() += n;
        }
        self.times.extend(other.times);
        self.max_us = self.max_us.max(other.max_us);
    }

    fn finish(&mut self) {
        self.times.sort_unstable();
        let at = |q: f64| self.times.get((self.times.len() as f64 * q) as usize).map_or(0, |t| u64::from(*t));
        (self.p50_us, self.p99_us) = (at(0.5), at(0.99));
        self.max_us = self.times.last().map_or(0, |t| u64::from(*t));
    }
}

/// Whether standard input has ended.
fn ending() -> bool {
    ENDING.load(Ordering::Acquire)
}

/// Sleeps, at most until it is to end.
fn rest(span: Duration) {
    let end = Instant::now() + span;
    while let Some(left) = end.checked_duration_since(Instant::now())
        && !ending()
    {
        thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// When the next request is due. What comes late is not caught up with: the load stays bounded.
struct Pace {
    next: Instant,
    period: Duration,
}

impl Pace {
    /// Of one of `connections` that make `rate` requests per second together.
    fn new(connections: u32, rate: f64, dice: &mut Dice) -> Self {
        let period = Duration::from_secs_f64(f64::from(connections) / rate);
        Self { next: Instant::now() + dice.millis(0, period.as_millis() as u64), period }
    }

    /// When the next is due after now, half a period earlier or later by chance.
    fn due(&mut self, dice: &mut Dice) -> Instant {
        let due = self.next;
        self.next = due.max(Instant::now()) + self.period.mul_f64(dice.between(500, 1_500) as f64 / 1e3);
        due
    }

    /// Sleeps until then; false once it is to end.
    fn wait(&mut self, dice: &mut Dice) -> bool {
        let due = self.due(dice);
        rest(due.saturating_duration_since(Instant::now()));
        !ending()
    }
}

/// Runs it and prints its [`Tally`].
///
/// # Errors
/// When a thread cannot be started, or one panicked.
pub(super) fn run(load: &Soak) -> Result<()> {
    let mut tally = match *load {
        Soak::Blobs { port } => return blob::serve(port),
        Soak::Again { server } => again(server),
        Soak::Steady { kind: Steady::Http2, server, connections, rate, seed } => {
            watch()?;
            streams::steady(server, connections, rate, seed)?
        }
        Soak::Doomed { kind: Doomed::Http2, server, connections, rate, seed } => {
            watch()?;
            streams::doomed(server, connections, rate, seed)?
        }
        Soak::Steady { kind, server, connections, rate, seed } => {
            each(connections, rate, seed, |pace, dice, tally| steady::one(kind, server, pace, dice, tally))?
        }
        Soak::Doomed { kind, server, connections, rate, seed } => {
            each(connections, rate, seed, |pace, dice, tally| doomed::one(kind, server, pace, dice, tally))?
        }
    };
    tally.finish();
    super::say(&serde_json::to_string(&tally)?)
}

/// A thread for each connection.
fn each(
    connections: u32,
    rate: f64,
    seed: u64,
    work: impl Fn(&mut Pace, &mut Dice, &mut Tally) + Sync,
) -> Result<Tally> {
    watch()?;
    ensure!(connections > 0 && rate > 0.0, "a load needs a connection and a rate");
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for index in 0..connections {
            let work = &work;
            let run = move || {
                let mut dice = Dice::new(seed.wrapping_add(u64::from(index) << 32));
                let mut tally = Tally::default();
                work(&mut Pace::new(connections, rate, &mut dice), &mut dice, &mut tally);
                tally
            };
            threads.push(thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, run)?);
        }
        let mut sum = Tally::default();
        for thread in threads {
            sum.add(thread.join().ok().context("a thread of the load panicked")?);
        }
        Ok(sum)
    })
}

/// Sees to it that the load ends with standard input.
fn watch() -> Result<()> {
    thread::Builder::new().name("input".into()).spawn(|| {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        ENDING.store(true, Ordering::Release);
    })?;
    Ok(())
}

fn again(server: SocketAddr) -> Tally {
    let (start, request) = (Instant::now(), super::request(server, "/", true));
    let mut tally = Tally::default();
    loop {
        let done = super::connect(server, PATIENCE)
            .and_then(|mut stream| super::exchange(&mut stream, &request, &mut vec![0; 4096]));
        if done.is_ok() || start.elapsed() > RETURN {
            tally.count(start, &done);
            return tally;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_late_is_not_caught_up_with() {
        let mut dice = Dice::new(1);
        let mut pace = Pace::new(1, 10.0, &mut dice);
        pace.next = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
        assert!(pace.due(&mut dice) < Instant::now());
        assert!(pace.due(&mut dice) > Instant::now());
    }

    #[test]
    fn tallies_add_up() {
        let mut sum = Tally::default();
        for _ in 0..2 {
            let mut one = Tally::default();
            one.count(Instant::now(), &Ok(()));
            one.count::<()>(Instant::now(), &Err(io::Error::other("no")));
            one.did("RST");
            sum.add(one);
        }
        sum.finish();
        assert_eq!((sum.answered, sum.failed, sum.did["RST"], sum.why["no"]), (2, 2, 2, 2));
    }
}
