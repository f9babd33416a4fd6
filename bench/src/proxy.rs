//! The node proxy beside its peers: same topology, same loads, same run, in turns.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

mod account;
mod beside;
mod envoy;
mod ground;
mod haproxy;
mod load;
mod parts;
mod pki;
mod report;
mod rows;
mod soak;
mod subject;

use ground::Ground;
use load::Load;
use parts::Parts;
use rows::Round;
pub(crate) use soak::{SoakArgs, run as soak};
use subject::{Room, Running, Subject};

/// How much is measured.
#[derive(Debug, Args)]
pub(crate) struct ProxyArgs {
    /// One short round, peers on the nodes only: about five minutes.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Six rounds, Envoy in both places, the cheaper of which counts.
    #[arg(long)]
    full: bool,
    /// Rounds, instead of what --quick or --full say.
    #[arg(long)]
    rounds: Option<u32>,
    /// Seconds a load, instead of what they say.
    #[arg(long)]
    seconds: Option<u32>,
    /// Only these subjects.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these loads (H1, Bulk1, ...).
    #[arg(long, value_delimiter = ',')]
    loads: Vec<String>,
    /// Where table.md, results.json and picture.svg are written.
    #[arg(long)]
    out: PathBuf,
}

/// Measures, prints the table and writes it. Gives the number of rows that are short.
///
/// # Errors
/// When a part is missing or a load fails.
pub(crate) fn run(args: &ProxyArgs, say: &dyn Fn(&str)) -> Result<usize> {
    ensure!(nix::unistd::Uid::effective().is_root(), "run this as root: it makes network namespaces");
    weft_tests::interrupt::watch()?;
    let rounds = args.rounds.unwrap_or(if args.full { 6 } else { 1 });
    let seconds = args.seconds.unwrap_or(if args.full { 3 } else { 2 });
    let subjects = subjects(args)?;
    let loads: Vec<Load> = Load::ALL
        .into_iter()
        .filter(|load| args.loads.is_empty() || args.loads.contains(&format!("{load:?}")))
        .collect();
    let parts = Parts::ensure(say)?;
    let folder = tempfile::tempdir()?;
    let certificates = folder.path().join("certificates");
    pki::make(&certificates)?;
    let mut grounds = Grounds::raise(&parts, folder.path(), &subjects, say)?;
    fs::create_dir_all(&args.out).with_context(|| format!("make {}", args.out.display()))?;
    let machine = report::Machine { date: date()?, machine: machine()?, seconds };
    let rows = rows::all();
    let mut done: Vec<Round> = Vec::new();
    for index in 1..=rounds {
        let mut round = Round::new();
        for subject in &subjects {
            say(&format!("round {index} of {rounds}: {}", subject.name()));
            if subject.is_weft() {
                grounds.meshed()?.restart()?;
            }
            let start = |subject| Running::start(subject, grounds.of(subject)?, &parts, &certificates);
            let running = start(*subject)?;
            let pair = Subject::NEAR.iter().all(|one| subjects.contains(one));
            let direct = if pair && *subject == Subject::Weft { Some(start(Subject::Direct)?) } else { None };
            let later = |load: &Load| pair && *subject == Subject::Direct && load.is_near();
            for load in loads.iter().filter(|load| load.wanted(*subject) && !later(load)) {
                let mut measure = |running: &Running<'_>| -> Result<()> {
                    let sample = load::measure(*load, running, seconds)?;
                    round.entry(running.subject).or_default().insert(*load, sample);
                    weft_tests::interrupt::check()
                };
                if let Some(direct) = direct.as_ref().filter(|_| load.is_near()) {
                    measure(direct)?;
                }
                measure(&running)?;
            }
            running.stop()?;
        }
        done.push(round);
        let results = report::json(&machine, &rows, &done);
        fs::write(args.out.join("results.json"), serde_json::to_string_pretty(&results)? + "\n")?;
    }
    let (verdicts, short) = report::verdicts(&rows, &done);
    let text = format!(
        "{verdicts}\n{}\nMedians of {rounds} rounds of {seconds} s a load, {}, {}; something else used {:.0} % of the machine.\n",
        report::table(&subjects, &done),
        machine.machine,
        machine.date,
        100.0 * report::others(&done)
    );
    fs::write(args.out.join("table.md"), &text)?;
    fs::write(args.out.join("picture.svg"), report::picture(&subjects, &done))?;
    say(&text);
    Ok(short)
}

fn subjects(args: &ProxyArgs) -> Result<Vec<Subject>> {
    if !args.only.is_empty() {
        return args.only.iter().map(|name| subject::by_name(name)).collect();
    }
    let in_pods = |subject: &Subject| {
        matches!(
            subject,
            Subject::EnvoyL4(Room::Pod) | Subject::EnvoyHbone(Room::Pod) | Subject::EnvoyL7(Room::Pod)
        )
    };
    Ok(Subject::ALL.into_iter().filter(|subject| args.full || !in_pods(subject)).collect())
}

/// The bare nodes and those with Weft: a peer must not be measured below our hooks.
struct Grounds {
    bare: Option<Ground>,
    meshed: Option<Ground>,
}

impl Grounds {
    fn raise(parts: &Parts, folder: &Path, subjects: &[Subject], say: &dyn Fn(&str)) -> Result<Self> {
        let raise = |meshed: bool| {
            if !subjects.iter().any(|subject| subject.is_weft() == meshed) {
                return Ok(None);
            }
            say(if meshed {
                "raising two nodes with Weft and 99 Pods"
            } else {
                "raising two nodes without a mesh"
            });
            Ground::raise(parts, folder, meshed).map(Some)
        };
        Ok(Self { bare: raise(false)?, meshed: raise(true)? })
    }

    fn of(&self, subject: Subject) -> Result<&Ground> {
        let ground = if subject.is_weft() { &self.meshed } else { &self.bare };
        ground.as_ref().context("these nodes were not raised")
    }

    fn meshed(&mut self) -> Result<&mut Ground> {
        self.meshed.as_mut().context("these nodes were not raised")
    }
}

fn date() -> Result<String> {
    let now = time::OffsetDateTime::now_utc();
    Ok(now.format(time::macros::format_description!("[year]-[month]-[day] [hour]:[minute] UTC"))?)
}

fn machine() -> Result<String> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown processor");
    let cores = std::thread::available_parallelism()?;
    Ok(format!("Linux {}, {}, {cores} cores", kernel.trim(), model.trim_start_matches([' ', '\t', ':'])))
}
