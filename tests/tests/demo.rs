//! The demo as its reader runs it: interrupted, kept standing, ended.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use weft_tests::{
    lab::{Bins, Process, Record, run},
    wait,
};

/// Runs the demo in a process group of its own, as a shell does.
fn demo(name: &str, args: &[&str]) -> (Process, PathBuf) {
    use std::os::unix::process::CommandExt as _;
    let bins = Bins::find().unwrap();
    bins.require(&["weft-demo", "weft-agent", "weft-operator", "weft"]).unwrap();
    let log = std::env::temp_dir().join(format!("weft-demo-test-{}-{name}.log", std::process::id()));
    let mut command = Command::new(bins.path("weft-demo"));
    command.args(args).process_group(0).env("WEFT_BIN_DIR", bins.path(""));
    (Process::spawn(command, "the demo", &log).unwrap(), log)
}

/// What the demo has put on the machine, as soon as it is written down.
fn record(demo: &mut Process) -> Record {
    let pid = demo.pid();
    let (record, _) = wait::until(Duration::from_secs(20), "the demo's record", || {
        demo.check()?;
        Record::all().into_iter().find(|record| record.owner == pid).context("none yet")
    })
    .unwrap();
    record
}

/// Names of namespaces, mounts and cgroups of that lab, whatever its record says of them.
fn traces(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let netns = entry.file_name().to_string_lossy().into_owned();
        if netns.starts_with(&format!("{name}-")) {
            found.push(netns);
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    found
        .extend(mounts.lines().filter(|line| line.contains(&format!("weft-lab/{name}/"))).map(str::to_owned));
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let cgroups = fs::read_to_string(process.path().join("cgroup")).unwrap_or_default();
        let state = fs::read_to_string(process.path().join("stat")).unwrap_or_default();
        // What is dead and only not collected by the machine's first process is gone.
        let dead = state.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'));
        if cgroups.contains(&format!("weft-lab-{name}")) && !dead {
            found.push(format!("process {:?}", process.file_name()));
        }
    }
    found
}

fn interrupted_at(name: &str, there: &str) {
    let (mut demo, log) = demo(name, &[]);
    let first = record(&mut demo);
    wait::until(Duration::from_secs(90), there, || {
        demo.check()?;
        ensure!(demo.output().contains(there), "not yet: {}", demo.tail(3));
        Ok(())
    })
    .unwrap();
    assert!(!traces(&first.name).is_empty(), "something stands");
    killpg(Pid::from_raw(demo.pid() as i32), Signal::SIGINT).unwrap();
    let status = demo.wait(Duration::from_secs(30)).unwrap();
    assert_eq!(status.code(), Some(1), "{}", demo.tail(5));
    assert!(demo.output().contains("interrupted; everything was removed"), "{}", demo.tail(5));
    assert_eq!(first.leftovers(), Vec::<String>::new());
    assert_eq!(traces(&first.name), Vec::<String>::new());
    fs::remove_file(log).unwrap();
}

#[test]
fn ctrl_c_while_it_is_raised_leaves_nothing() {
    interrupted_at("raising", "Two nodes on this machine");
}

#[test]
fn ctrl_c_in_the_middle_of_its_calls_leaves_nothing() {
    interrupted_at("calls", "HTTPRoute web-canary is applied");
}

#[test]
fn ctrl_c_during_the_capture_leaves_nothing() {
    interrupted_at("capture", "Nothing readable on the wire");
}

#[test]
fn ctrl_c_while_an_agent_is_replaced_leaves_nothing() {
    interrupted_at("replaced", "The agent of node-b is replaced");
}

#[test]
fn what_is_kept_can_be_played_with_and_ended() {
    let (mut kept, log) = demo("keep", &["--keep"]);
    let record = record(&mut kept);
    let status = kept.wait(Duration::from_secs(240)).unwrap();
    let text = kept.output();
    assert!(status.success(), "{text}");
    let outcome = std::panic::catch_unwind(|| {
        for step in 0..=8 {
            let titles = text.lines().filter(|line| line.starts_with(&format!("{step}  "))).count();
            assert_eq!(titles, 1, "step {step} is told once:\n{text}");
        }
        assert!(text.lines().all(|line| !line.starts_with("   NOT")), "{text}");
        let lines = text.lines().count();
        assert!((40..=70).contains(&lines), "{lines} lines");
        let commands: Vec<&str> = text
            .lines()
            .skip_while(|line| !line.starts_with("  As root:"))
            .skip(1)
            .take(5)
            .map(str::trim)
            .collect();
        assert_eq!(commands.len(), 5, "{text}");
        for command in commands {
            // Those that stay open are bounded; the editor is not started.
            let bounded = match command {
                follow if follow.contains("--follow") => follow.replace("--follow", "--last 5"),
                edit if edit.contains("EDITOR") => {
                    edit.replace("${EDITOR:-vi}", "grep -c AuthorizationPolicy")
                }
                other => other.to_owned(),
            };
            let mut shell = Command::new("sh");
            shell.args(["-c", &bounded]);
            let out = run(shell, Duration::from_secs(20)).unwrap();
            let said = String::from_utf8_lossy(&out.stdout);
            assert!(
                out.status.success(),
                "{bounded}: {} {said}{}",
                out.status,
                String::from_utf8_lossy(&out.stderr)
            );
            assert!(!said.trim().is_empty(), "{bounded} says something");
        }
    });
    // By name: another demo on this machine is not this test's to end.
    let (mut down, down_log) = demo("down", &["--down", &record.name]);
    assert!(down.wait(Duration::from_secs(60)).unwrap().success(), "{}", down.output());
    assert!(down.output().contains(&format!("{} is removed", record.name)), "{}", down.output());
    assert_eq!(record.leftovers(), Vec::<String>::new());
    assert_eq!(traces(&record.name), Vec::<String>::new());
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    for log in [log, down_log] {
        fs::remove_file(log).unwrap();
    }
}
