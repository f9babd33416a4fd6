//! The story that `cargo xtask demo` tells: each step with what was done and what was seen.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Parser;

use crate::{
    interrupt,
    lab::{Lab, Record},
};

pub mod agents;
pub mod calls;
pub mod policy;
mod tell;
pub mod wire;

pub use tell::Teller;

/// Arguments of the demo.
#[derive(Debug, Parser)]
#[command(name = "weft-demo", about = "Two nodes on this machine, and the story of a service mesh on them")]
pub struct Arguments {
    /// Leave everything standing at the end, with commands to play with.
    #[arg(long)]
    pub keep: bool,
    /// End what an earlier run left standing.
    #[arg(long, conflicts_with = "keep")]
    pub down: bool,
    /// With --down: end these only, by name.
    #[arg(requires = "down")]
    pub labs: Vec<String>,
}

/// Runs the demo.
///
/// # Errors
/// When something was not as told, or could not be done; what was raised is removed.
pub fn run(arguments: &Arguments) -> Result<()> {
    interrupt::watch()?;
    if arguments.down {
        return down(&arguments.labs);
    }
    let mut tell = Teller::new();
    let outcome = story(&mut tell, arguments.keep);
    if interrupt::came() {
        bail!("interrupted; everything was removed");
    }
    outcome?;
    tell.end()
}

fn down(only: &[String]) -> Result<()> {
    let tell = Teller::new();
    let mut all = Record::all();
    all.retain(|record| only.is_empty() || only.contains(&record.name));
    if all.is_empty() {
        tell.line("Nothing is standing.");
    }
    for record in all {
        if record.in_use() {
            tell.line(&format!("{} is in use by process {}; end that one.", record.name, record.owner));
            continue;
        }
        record.remove()?;
        tell.line(&format!(
            "{} is removed: {} namespaces, its processes, cgroups and pins.",
            record.name,
            record.netns.len()
        ));
    }
    Ok(())
}

fn story(tell: &mut Teller, keep: bool) -> Result<()> {
    let mut lab = raise(tell)?;
    let mut seen = calls::Seen::default();
    calls::canary(tell, &lab)?;
    calls::truth(tell, &lab)?;
    wire::secret(tell, &lab, &mut seen)?;
    policy::enforce(tell, &lab)?;
    policy::observe(tell, &lab)?;
    calls::signals(tell, &lab, &mut seen)?;
    agents::replace(tell, &mut lab)?;
    agents::kill(tell, &mut lab)?;
    if keep {
        stay(tell, &mut lab);
        return Ok(());
    }
    remove(tell, lab)
}

/// Step 8.
///
/// # Errors
/// When something could not be removed; what stays also goes to the teller.
pub fn remove(tell: &mut Teller, lab: Lab) -> Result<()> {
    tell.step(8, "Everything is removed");
    let record = lab.record().clone();
    let start = Instant::now();
    let removed = lab.down();
    let left = record.leftovers();
    tell.saw(
        removed.is_ok() && left.is_empty(),
        &format!(
            "{} namespaces, 1 cgroup tree, the pins and every process gone in {:.1} s; left over: {}",
            record.netns.len(),
            start.elapsed().as_secs_f64(),
            if left.is_empty() { "nothing".into() } else { left.join(", ") }
        ),
    );
    removed
}

/// Raises the lab.
///
/// # Errors
/// What could not be done.
pub fn raise(tell: &mut Teller) -> Result<Lab> {
    tell.step(0, "Two nodes on this machine");
    let start = Instant::now();
    let lab = Lab::shop()?;
    let (v4, v6) = (lab.pod("client")?.v4, lab.pod("client")?.v6);
    tell.did(&format!("node-a: client ({v4}, {v6}), intruder, echo, and stranger outside the mesh"));
    tell.did("node-b: web-v1 and web-v2, each an nginx; an operator; one agent per node; a veth as the wire");
    let status = lab.status()?;
    let programs: Vec<usize> = agents_of(&status).map(healthy).collect();
    let pods: Vec<usize> =
        agents_of(&status).map(|agent| agent["pods"].as_array().map_or(0, Vec::len)).collect();
    tell.saw(
        programs.iter().all(|count| *count > 0),
        &format!(
            "up in {:.1} s; attached programs {programs:?}, Pods enrolled {pods:?} (node-a, node-b)",
            start.elapsed().as_secs_f64()
        ),
    );
    Ok(lab)
}

fn agents_of(status: &serde_json::Value) -> impl Iterator<Item = &serde_json::Value> {
    status["agents"].as_array().into_iter().flatten()
}

fn healthy(agent: &serde_json::Value) -> usize {
    agent["programs"].as_array().into_iter().flatten().filter(|program| program["healthy"] == true).count()
}

fn stay(tell: &mut Teller, lab: &mut Lab) {
    tell.step(8, "It stays, because of --keep");
    lab.keep();
    let weft = lab.bins().path("weft").display().to_string();
    let servers: Vec<String> = lab.nodes().iter().map(|node| format!("--server {}", node.server())).collect();
    let servers = servers.join(" ");
    let app = lab.bins().path("weft-lab-app").display().to_string();
    let enter = lab.pod("client").map(|pod| {
        format!("{app} enter --netns {} --cgroup {}", pod.place.netns.display(), pod.place.cgroup.display())
    });
    let enter = enter.unwrap_or_default();
    let vip = lab.service("shop/web", false).map(|address| address.to_string()).unwrap_or_default();
    tell.line("  As root:");
    tell.line(&format!("  {weft} status {servers}"));
    tell.line(&format!("  {weft} observe --follow {servers}"));
    tell.line(&format!("  {enter} -- curl -i http://{vip}/"));
    tell.line(&format!("  {enter} -- curl -i -X POST http://{vip}/admin"));
    tell.line(&format!(
        "  ${{EDITOR:-vi}} {}/policy.yaml   # enforced when you save",
        lab.source().path().display()
    ));
    tell.line("  cargo xtask demo --down      ends it");
}
