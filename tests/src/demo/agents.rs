//! An agent is replaced under load, and killed.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{
    Teller,
    calls::{http, ms, number, vip},
    wire::captured,
};
use crate::{Lab, wait};

/// The pins below a bpffs folder.
pub fn pins(folder: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { out.extend(pins(&path)) } else { out.push(path) }
    }
    out.sort();
    out
}

/// What became of the calls that web did not answer, ready to follow a number.
fn listed(answer: &Value) -> String {
    let outcomes =
        [&answer["statuses"], &answer["errors"]].into_iter().filter_map(Value::as_object).flatten();
    let parts: Vec<String> = outcomes
        .filter(|(what, _)| *what != "200")
        .map(|(what, count)| format!("{count} times {what}"))
        .collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
}

/// Step 7, first half.
///
/// # Errors
/// When something could not be done; what is not as told goes to the teller.
pub fn replace(tell: &mut Teller, lab: &mut Lab) -> Result<()> {
    tell.step(7, "The agent of node-b is replaced under load, then killed");
    let web = vip(lab, "shop/web", 80)?;
    let args =
        ["http", "--to", &web, "--count", "2000", "--concurrency", "4", "--pace-ms", "8", "--progress"];
    let mut load = lab.spawn_app("client", "load", &args)?;
    let done = |output: &str| output.lines().filter(|line| *line == "call").count();
    wait::until(Duration::from_secs(20), "the load to run", || {
        load.check()?;
        ensure!(done(&load.output()) >= 200, "few calls yet");
        Ok(())
    })?;
    let start = Instant::now();
    let mut old = lab.start_agent("node-b")?.context("node-b had no agent")?;
    let old_pid = old.pid();
    let status = old.end_replaced(Duration::from_secs(30))?;
    let (gone, at) = (start.elapsed(), done(&load.output()));
    lab.node_mut("node-b")?.wait_ready(Duration::from_secs(20))?;
    let new_pid = lab.node("node-b")?.agent.as_ref().map_or(0, crate::lab::Process::pid);
    load.wait(Duration::from_secs(60))?;
    let output = load.output();
    let last = output.lines().last().unwrap_or_default();
    let answer: Value = serde_json::from_str(last).with_context(|| format!("the load said {last:?}"))?;
    tell.did(&format!(
        "agent {new_pid} took over from {old_pid}, which drained and ended ({status}) after {}, at call {at}",
        ms(gone)
    ));
    let failed = 2000 - number(&answer, "/statuses/200");
    tell.saw(
        failed == 0 && status.success() && at < 2000,
        &format!("2,000 calls meanwhile: {failed} failed{}", listed(&answer)),
    );
    Ok(())
}

/// Step 7, second half.
///
/// # Errors
/// When something could not be done; what is not as told goes to the teller.
pub fn kill(tell: &mut Teller, lab: &mut Lab) -> Result<()> {
    let web = vip(lab, "shop/web", 80)?;
    let bpffs = lab.node("node-b")?.bpffs.clone();
    let before = pins(&bpffs);
    let mut agent = lab.node_mut("node-b")?.agent.take().context("node-b has no agent")?;
    let word = format!("canary-{:08x}-after-sigkill", std::process::id());
    let header = format!("x-canary: {word}");
    let mut answer = Value::Null;
    let trace = captured(lab, "killed", || {
        agent.signal(Signal::SIGKILL)?;
        agent.wait(Duration::from_secs(5))?;
        answer = http(lab, "client", &web, &["--count", "20", "--header", &header, "--timeout-ms", "8000"])?;
        Ok(())
    })?;
    let found = trace.find(word.as_bytes());
    let kept = pins(&bpffs);
    tell.saw(
        number(&answer, "/statuses/200") == 0 && found == 0,
        &format!(
            "killed with SIGKILL: 20 calls, {} answered by web{}; {found} of {} packets hold their word",
            number(&answer, "/statuses/200"),
            listed(&answer),
            trace.len()
        ),
    );
    tell.saw(
        !kept.is_empty() && kept == before,
        &format!("its {} pinned programs, links and maps are still there", kept.len()),
    );
    lab.start_agent("node-b")?;
    let start = Instant::now();
    lab.node_mut("node-b")?.wait_ready(Duration::from_secs(20))?;
    let (_, _) = wait::until(Duration::from_secs(10), "a call after the agent came back", || {
        let answer = http(lab, "client", &web, &["--timeout-ms", "2000"])?;
        (number(&answer, "/statuses/200") == 1).then_some(()).with_context(|| answer.to_string())
    })?;
    tell.saw(true, &format!("it comes back; a call works again {} after its start", ms(start.elapsed())));
    Ok(())
}
