//! The loads, and what one run of one of them showed.

use std::{
    ffi::OsString,
    net::{IpAddr, SocketAddr},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use weft_tests::lab::run;

use super::{
    account,
    beside::Beside,
    ground::{self, BULK, H2, HTTP},
    subject::{Running, Subject},
};

/// Requests per second of the loads with a fixed rate.
const RATE: u32 = 1_000;
/// How long a subject may take at most to do with the load before.
const SETTLE: Duration = Duration::from_secs(5);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Of [`tunnels`], rounds of eight that are not counted: a proxy's first ones fill its caches.
const FIRST_TUNNELS: usize = 2;
/// Of one processor, what a subject that rests may use.
const QUIET: f64 = 0.05;

/// A load. Its name is its key in the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Load {
    /// Memory after a first connection.
    Start,
    /// HTTP/1.1 as fast as 64 connections go.
    H1,
    /// HTTP/2, 8 connections with 32 streams each.
    H2,
    /// 1,000 requests/s over 16 connections.
    Rate,
    /// The same beside a stream of 500 Mbit/s.
    Mixed,
    /// One stream as fast as it goes.
    Bulk1,
    /// Eight.
    Bulk8,
    /// Connect, one request, close; 8 at once.
    Connect,
    /// [`Self::Rate`] beside 16 readers that do not read.
    Stalled16,
    /// Beside 200.
    Stalled200,
    /// 1,000 connections that do nothing.
    Idle,
    /// The first connection of each of many Pods: a tunnel each.
    Tunnel,
    /// HTTP/1.1 over 64 connections that were open before: what opening them costs is not in it.
    Held64,
    /// Over 1,024.
    Held1024,
    /// Over 8,000.
    Held8000,
    /// [`Self::H1`] to the server on the client's own node.
    NearH1,
    /// [`Self::Rate`] to it.
    NearRate,
    /// [`Self::Bulk1`] to it.
    NearBulk,
    /// [`Self::Connect`] to it.
    NearConnect,
    /// The kernel's judgement of packets.
    Lookup,
}

impl Load {
    /// All, in the order in which they run: what fills memory comes last.
    pub(crate) const ALL: [Self; 20] = [
        Self::Start,
        Self::Tunnel,
        Self::Idle,
        Self::H1,
        Self::H2,
        Self::Rate,
        Self::Mixed,
        Self::Bulk1,
        Self::Bulk8,
        Self::Connect,
        Self::NearH1,
        Self::NearRate,
        Self::NearBulk,
        Self::NearConnect,
        Self::Lookup,
        Self::Held64,
        Self::Held1024,
        Self::Held8000,
        Self::Stalled16,
        Self::Stalled200,
    ];

    /// Whether client and server are on one node.
    pub(crate) fn is_near(self) -> bool {
        matches!(self, Self::NearH1 | Self::NearRate | Self::NearBulk | Self::NearConnect)
    }

    /// Whether a row of the table needs it of that subject.
    pub(crate) fn wanted(self, subject: Subject) -> bool {
        match self {
            Self::Start => subject != Subject::Direct,
            Self::H1 | Self::H2 => true,
            // Of the peers to see how much of the growth is the kernel's.
            Self::Held64 | Self::Held1024 | Self::Held8000 => {
                matches!(subject, Subject::Weft | Subject::Splice | Subject::EnvoyHbone(_))
            }
            Self::Tunnel => matches!(subject, Subject::Weft | Subject::EnvoyL4(_)),
            Self::Lookup => subject == Subject::Weft,
            Self::NearH1 | Self::NearRate | Self::NearBulk | Self::NearConnect => {
                Subject::NEAR.contains(&subject)
            }
            Self::Idle => matches!(subject, Subject::Weft | Subject::EnvoyHbone(_) | Subject::HaproxyL4),
            Self::Bulk1 | Self::Bulk8 | Self::Rate | Self::Mixed | Self::Connect => !subject.is_l7(),
            Self::Stalled16 | Self::Stalled200 => matches!(subject, Subject::Weft | Subject::EnvoyHbone(_)),
        }
    }
}

/// What one run showed. What a load has nothing to say of is zero.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Requests, connections or bytes.
    pub(crate) n: f64,
    /// Per second, or Gbit/s.
    pub(crate) per_s: f64,
    /// Requests that failed.
    pub(crate) errors: f64,
    /// Median latency, microseconds.
    pub(crate) p50_us: f64,
    /// 99th percentile, microseconds; of [`Load::Lookup`], what is not at hand.
    pub(crate) p99_us: f64,
    /// Processor seconds of the subject's processes at both ends.
    pub(crate) cpu_s: f64,
    /// Seconds that it took.
    pub(crate) wall_s: f64,
    /// Resident memory of the subject's processes after it, MiB.
    pub(crate) rss_mib: f64,
    /// Resident memory before it.
    pub(crate) rss_before_mib: f64,
    /// Share of the machine's processors that something else used.
    pub(crate) others: f64,
}

/// Runs a load against a subject for `seconds`.
///
/// # Errors
/// When a tool fails or says nothing that can be read.
pub(crate) fn measure(load: Load, running: &Running<'_>, seconds: u32) -> Result<Sample> {
    settle(running)?;
    let rss_before_mib = account::rss_mib(&running.cgroups)?;
    let everything = [running.ground.lab.record().cgroup.clone()];
    let (cpu, all, machine, start) =
        (account::cpu(&running.cgroups)?, account::cpu(&everything)?, account::machine()?, Instant::now());
    let mut sample =
        drive(load, running, seconds).with_context(|| format!("{load:?} of {}", running.subject.name()))?;
    sample.wall_s = start.elapsed().as_secs_f64();
    if sample.cpu_s == 0.0 {
        sample.cpu_s = account::cpu(&running.cgroups)? - cpu;
    }
    let ours = account::cpu(&everything)? - all;
    let cores = std::thread::available_parallelism()?.get() as f64;
    sample.others = ((account::machine()? - machine - ours) / (sample.wall_s * cores)).max(0.0);
    sample.rss_before_mib = rss_before_mib;
    if sample.rss_mib == 0.0 {
        sample.rss_mib = account::rss_mib(&running.cgroups)?;
    }
    Ok(sample)
}

/// Waits until the subject has done with the load before: what 8,000 connections leave to be closed is none of the next
/// one's.
fn settle(running: &Running<'_>) -> Result<()> {
    let end = Instant::now() + SETTLE;
    let mut before = account::cpu(&running.cgroups)?;
    while Instant::now() < end {
        std::thread::sleep(LOOK);
        let now = account::cpu(&running.cgroups)?;
        if now - before < QUIET * LOOK.as_secs_f64() {
            return Ok(());
        }
        before = now;
    }
    Ok(())
}

fn drive(load: Load, running: &Running<'_>, seconds: u32) -> Result<Sample> {
    let far = |port| running.target(port);
    let near = |port| -> Result<Target> { Ok((running.ground.address("near")?, port)) };
    match load {
        Load::Start => own(running, far(HTTP), &["rate", "2", "20", "1"]),
        Load::H1 => wrk(running, far(HTTP), 64, seconds),
        Load::Held64 => held(running, 64, seconds),
        Load::Held1024 => held(running, 1_024, seconds),
        Load::Held8000 => held(running, 8_000, seconds),
        Load::NearH1 => wrk(running, near(HTTP)?, 64, seconds),
        Load::NearRate => rate(running, near(HTTP)?, seconds),
        Load::NearBulk => bulk(running, near(BULK)?, 1, seconds),
        Load::Lookup => {
            let program = std::env::current_exe()?.with_file_name("weft-judgement");
            let answer: Value = serde_json::from_str(&text(Command::new(program))?)?;
            let micros = |name: &str| answer[name].as_f64().map(|ns| ns / 1e3).context("it says no time");
            Ok(Sample { n: 1.0, p50_us: micros("hot_ns")?, p99_us: micros("cold_ns")?, ..Sample::default() })
        }
        Load::NearConnect => own(running, near(HTTP)?, &["connect", "8", &seconds.to_string()]),
        Load::Tunnel => tunnels(running),
        Load::H2 => h2load(running, seconds),
        Load::Rate => rate(running, far(HTTP), seconds),
        Load::Mixed => {
            let words = ["-b", "500M", "-t", &(seconds + 1).to_string()].map(OsString::from);
            let beside = Beside::start(iperf(running, far(BULK), &words)?, None)?;
            let sample = rate(running, far(HTTP), seconds)?;
            beside.end()?;
            Ok(sample)
        }
        Load::Bulk1 => bulk(running, far(BULK), 1, seconds),
        Load::Bulk8 => bulk(running, far(BULK), 8, seconds),
        Load::Connect => own(running, far(HTTP), &["connect", "8", &seconds.to_string()]),
        Load::Stalled16 => stalled(running, 16, seconds),
        Load::Stalled200 => stalled(running, 200, seconds),
        Load::Idle => {
            let (beside, held) = holding(running, "idle", 1_000)?;
            let sample =
                Sample { n: held, rss_mib: account::rss_mib(&running.cgroups)?, ..Sample::default() };
            beside.end()?;
            Ok(sample)
        }
    }
}

/// Where a load goes.
type Target = (IpAddr, u16);

fn rate(running: &Running<'_>, target: Target, seconds: u32) -> Result<Sample> {
    own(running, target, &["rate", "16", &RATE.to_string(), &seconds.to_string()])
}

/// Requests at the fixed rate beside `readers` that asked for a large body and read nothing.
fn stalled(running: &Running<'_>, readers: u32, seconds: u32) -> Result<Sample> {
    let (beside, held) = holding(running, "stall", readers)?;
    ensure!(held == f64::from(readers), "{held} of {readers} readers could connect");
    let mut sample =
        own(running, running.target(HTTP), &["rate", "16", &RATE.to_string(), &seconds.to_string(), "1000"])?;
    sample.rss_mib = account::rss_mib(&running.cgroups)?;
    beside.end()?;
    Ok(sample)
}

fn holding(running: &Running<'_>, what: &str, count: u32) -> Result<(Beside, f64)> {
    let args = arguments(running.target(HTTP), &[what, &count.to_string()]);
    let beside = Beside::start(running.ground.load("client", &args)?, Some("READY"))?;
    let held = beside.said().split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or_default();
    Ok((beside, held))
}

/// A closed loop, counted from when all its connections stood.
fn held(running: &Running<'_>, connections: u32, seconds: u32) -> Result<Sample> {
    let args = arguments(running.target(HTTP), &["held", &connections.to_string(), &seconds.to_string()]);
    let mut beside = Beside::start(running.ground.load("client", &args)?, Some("READY"))?;
    let cpu = account::cpu(&running.cgroups)?;
    beside.begin()?;
    let answer = sample(&beside.rest()?)?;
    Ok(Sample { cpu_s: account::cpu(&running.cgroups)? - cpu, ..answer })
}

fn arguments((ip, port): Target, words: &[&str]) -> Vec<String> {
    let mut all = vec![words[0].to_owned(), SocketAddr::new(ip, port).to_string()];
    all.extend(words[1..].iter().map(ToString::to_string));
    all
}

/// This program's own load generator.
fn own(running: &Running<'_>, target: Target, words: &[&str]) -> Result<Sample> {
    sample(&text(running.ground.load("client", &arguments(target, words))?)?)
}

/// One connection with one request from each of the Pods that have spoken to nobody to each server, eight at once. Of a
/// peer, which has a tunnel for each connection, as many from the client. The generators have been started before, so that
/// their start is not in it.
fn tunnels(running: &Running<'_>) -> Result<Sample> {
    let (server, port) = running.target(HTTP);
    let servers =
        running.ground.all_servers(server)?.into_iter().map(|ip| SocketAddr::new(ip, port).to_string());
    let args: Vec<String> = std::iter::once("once".to_owned()).chain(servers).collect();
    let start = |pod: String| {
        let pod = if running.subject == Subject::Weft { &pod } else { "client" };
        Beside::start(running.ground.load(pod, &args)?, Some("READY"))
    };
    let mut waiting = ground::idle_pods().map(start).collect::<Result<Vec<_>>>()?;
    let mut cpu = account::cpu(&running.cgroups)?;
    let mut sum = Sample::default();
    for (index, eight) in waiting.chunks_mut(8).enumerate() {
        if index == FIRST_TUNNELS {
            sum = Sample { errors: sum.errors, ..Sample::default() };
            cpu = account::cpu(&running.cgroups)?;
        }
        eight.iter_mut().try_for_each(Beside::begin)?;
        for one in eight {
            let one = sample(&one.rest()?)?;
            sum.n += one.n;
            sum.errors += one.errors;
            sum.p99_us = sum.p99_us.max(one.p99_us);
        }
    }
    sum.cpu_s = account::cpu(&running.cgroups)? - cpu;
    ensure!(sum.errors == 0.0, "{} first connections failed", sum.errors);
    Ok(sum)
}

/// What this program's own generator says.
fn sample(answer: &str) -> Result<Sample> {
    let answer: Value = serde_json::from_str(answer)?;
    let field = |name: &str| answer[name].as_f64().unwrap_or_default();
    Ok(Sample {
        n: field("n"),
        per_s: field("per_s"),
        errors: field("errors"),
        p50_us: field("p50_us"),
        p99_us: field("p99_us"),
        ..Sample::default()
    })
}

fn wrk(running: &Running<'_>, (ip, port): Target, connections: u32, seconds: u32) -> Result<Sample> {
    let words = [
        "-t2".to_owned(),
        format!("-c{connections}"),
        format!("-d{seconds}"),
        "--latency".into(),
        format!("http://{ip}:{port}/"),
    ];
    let said = text(running.ground.command("client", "wrk", &words.map(OsString::from))?)?;
    let number = |before: &str, after: &str| between(&said, before, after);
    let errors: f64 = said
        .lines()
        .filter(|line| line.contains("Socket errors") || line.contains("Non-2xx"))
        .flat_map(|line| line.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<f64>().ok()))
        .sum();
    // "Non-2xx or 3xx responses" has digits of its own.
    let errors = if said.contains("Non-2xx") { errors - 5.0 } else { errors };
    let n = said
        .lines()
        .find_map(|line| line.trim().split_once(" requests in ").map(|(n, _)| n))
        .and_then(|n| n.parse().ok())
        .with_context(|| format!("wrk said no number of requests: {said}"))?;
    let quantile = |name: &str| said.lines().find_map(|l| l.trim().strip_prefix(name)).and_then(micros);
    Ok(Sample {
        n,
        per_s: number("Requests/sec:", "\n").context("wrk said no rate")?,
        errors,
        p50_us: quantile("50%").unwrap_or_default(),
        p99_us: quantile("99%").unwrap_or_default(),
        ..Sample::default()
    })
}

/// `1.23ms`, `45.00us`, `1.00s`.
fn micros(text: &str) -> Option<f64> {
    let text = text.trim();
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let value: f64 = text[..unit].parse().ok()?;
    Some(match &text[unit..] {
        "us" => value,
        "ms" => value * 1e3,
        "s" => value * 1e6,
        _ => return None,
    })
}

fn between(text: &str, before: &str, after: &str) -> Option<f64> {
    let rest = text.split_once(before)?.1;
    rest.split_once(after).map_or(rest, |(value, _)| value).trim().parse().ok()
}

fn h2load(running: &Running<'_>, seconds: u32) -> Result<Sample> {
    let (ip, port) = running.target(H2);
    let words = [
        "-t1".to_owned(),
        "-c8".into(),
        "-m32".into(),
        format!("-D{seconds}"),
        format!("http://{ip}:{port}/"),
    ];
    let said = text(running.ground.command("client", "h2load", &words.map(OsString::from))?)?;
    let line = said.lines().find(|line| line.starts_with("requests:")).context("h2load said no requests")?;
    let count = |what: &str| {
        line.split(',')
            .find_map(|part| part.trim().strip_suffix(what))
            .and_then(|n| n.trim().parse::<f64>().ok())
            .unwrap_or_default()
    };
    let per_s = said.lines().find_map(|line| {
        line.strip_prefix("finished in ")?.split(',').find_map(|part| part.trim().strip_suffix(" req/s"))
    });
    Ok(Sample {
        n: count("succeeded"),
        per_s: per_s.and_then(|n| n.parse().ok()).context("h2load said no rate")?,
        errors: count("errored") + count("failed"),
        ..Sample::default()
    })
}

fn iperf(running: &Running<'_>, (ip, port): Target, words: &[OsString]) -> Result<Command> {
    let mut all: Vec<OsString> =
        ["-c", &ip.to_string(), "-p", &port.to_string(), "-J"].map(OsString::from).into();
    all.extend_from_slice(words);
    running.ground.command("client", "iperf3", &all)
}

fn bulk(running: &Running<'_>, target: Target, streams: u32, seconds: u32) -> Result<Sample> {
    let words = ["-t", &seconds.to_string(), "-P", &streams.to_string()].map(OsString::from);
    let answer: Value = serde_json::from_str(&text(iperf(running, target, &words)?)?)?;
    let sum = &answer["end"]["sum_received"];
    let bytes = sum["bytes"].as_f64().with_context(|| format!("iperf3 said {}", answer["error"]))?;
    let rate = sum["bits_per_second"].as_f64().unwrap_or_default() / 1e9;
    Ok(Sample { n: bytes, per_s: rate, ..Sample::default() })
}

fn text(command: Command) -> Result<String> {
    let shown = format!("{command:?}");
    let out = run(command, Duration::from_secs(120))?;
    let (said, errors) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    ensure!(out.status.success(), "{shown}: {said}{errors}");
    Ok(said.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_durations() {
        assert_eq!(micros("  2.50ms"), Some(2500.0));
        assert_eq!(micros("87.00us"), Some(87.0));
        assert_eq!(micros("1.10s"), Some(1_100_000.0));
        assert_eq!(micros("-"), None);
    }
}
