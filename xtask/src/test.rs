//! `cargo xtask test`: eight tiers, from plain units to a real cluster and other kernels.

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
};

use crate::{
    Failure, Outcome,
    bpf::{self, Profile},
    cluster, failed, images, kernels, machine, sh,
};

mod lanes;

/// What a tier is, for the person who reads the output.
const TIERS: [(u8, &str); 8] = [
    (1, "units"),
    (2, "ABI and verifier"),
    (3, "BPF test runs"),
    (4, "real attach"),
    (5, "two nodes"),
    (6, "API server"),
    (7, "cluster"),
    (8, "other kernels"),
];

#[derive(Debug, Default)]
struct Tally {
    passed: u64,
    failed: u64,
    broken: Vec<String>,
    skipped: Vec<String>,
}

/// Runs the tiers that are asked for, all without arguments.
pub(crate) fn run(args: &[&str]) -> Outcome {
    let tiers = wanted(args)?;
    let needs_kernel = tiers.iter().any(|tier| *tier > 1);
    let able = if needs_kernel { machine::check() } else { Ok(String::new()) };
    let mut tally = Tally::default();
    let mut ran = Vec::new();
    for (tier, what) in TIERS.iter().filter(|(tier, _)| tiers.contains(tier)) {
        sh::say(&format!("== tier {tier}: {what}"));
        if let (true, Err(reason)) = (*tier > 1, &able) {
            let reason =
                reason.lines().skip(1).take_while(|line| line.starts_with("  - ")).collect::<Vec<_>>();
            let line = format!("tier {tier} skipped: {}", reason.join("; ").replace("  - ", ""));
            sh::say(&line);
            tally.skipped.push(line);
            continue;
        }
        match run_tier(*tier, &mut tally) {
            Ok(()) => {}
            Err(Failure::Unable(reason)) => {
                let line = format!("tier {tier} skipped: {reason}");
                sh::say(&line);
                tally.skipped.push(line);
                continue;
            }
            Err(Failure::Failed(reason) | Failure::Usage(reason)) => {
                tally.broken.push(format!("tier {tier}: {reason}"));
            }
        }
        ran.push(tier.to_string());
    }
    sh::say(&format!("tiers that ran: {}", if ran.is_empty() { "none".into() } else { ran.join(", ") }));
    for line in tally.skipped.iter().chain(&tally.broken) {
        sh::say(line);
    }
    // A test that could not be built or a tier that CI may not skip counts as a failure.
    let failures =
        tally.failed + tally.broken.len() as u64 + if sh::ci() { tally.skipped.len() as u64 } else { 0 };
    let line = format!("{} passed, {failures} failed", tally.passed);
    if failures > 0 {
        return failed(line);
    }
    sh::say(&line);
    Ok(())
}

fn wanted(args: &[&str]) -> Outcome<Vec<u8>> {
    if args.is_empty() {
        return Ok(TIERS.iter().map(|(tier, _)| *tier).collect());
    }
    let mut tiers = Vec::new();
    let mut rest = args;
    while let ["--tier", value, more @ ..] = rest {
        match value.parse() {
            Ok(tier @ 1..=8) => tiers.push(tier),
            _ => return Err(Failure::Usage(format!("--tier takes 1 to 8, not {value:?}"))),
        }
        rest = more;
    }
    match rest {
        [] => Ok(tiers),
        other => Err(Failure::Usage(format!("test takes --tier N, not {:?}", other.join(" ")))),
    }
}

fn run_tier(tier: u8, tally: &mut Tally) -> Outcome {
    match tier {
        1 => {
            // Without the tests of other tiers: the operator's own beside an API server are tier 6.
            let mut cargo = sh::cargo();
            libtest(cargo.args(["test", "--no-fail-fast", "--lib", "--bins"]), tally)?;
            let mut cargo = sh::cargo();
            cargo.args(["test", "--no-fail-fast", "--package", "weft-operator", "--test", "grpc"]);
            libtest(&mut cargo, tally)?;
            let mut cargo = sh::cargo();
            cargo.args(["test", "--no-fail-fast", "--package", "weft-cni", "--test", "plugin"]);
            libtest(&mut cargo, tally)?;
            bpf::build_ebpf()?;
            let mut cargo = sh::cargo();
            cargo.args([
                "test",
                "--no-fail-fast",
                "--package",
                "weft-agent",
                "--package",
                "weft-tests",
                "--lib",
                "--bins",
            ]);
            libtest(&mut cargo, tally)
        }
        2..=4 => bpf_tests(tier, tally),
        5 => two_nodes(tally),
        6 => api_server(tally),
        7 => cluster(tally),
        _ => other_kernels(tally),
    }
}

/// Files of bpf-tests that tier 2 runs, and tier 3; every other one attaches to real hooks and is tier 4.
const VERIFIER: [&str; 2] = ["abi", "verifier"];
const TEST_RUNS: [&str; 2] = ["services", "tc"];

fn bpf_tests(tier: u8, tally: &mut Tally) -> Outcome {
    bpf::build_ebpf()?;
    let of = |name: &str| match name {
        name if VERIFIER.contains(&name) => 2,
        name if TEST_RUNS.contains(&name) => 3,
        _ => 4,
    };
    let mut chosen = executables("weft-bpf-tests", "--tests", Profile::Dev)?;
    chosen.retain(|(name, _)| of(name) == tier);
    if tier == 4 {
        chosen.extend(executables("weft-agent", "--tests", Profile::Dev)?);
    }
    if chosen.is_empty() {
        return failed(format!("bpf-tests has no file for tier {tier}"));
    }
    run_as_root(&chosen, Profile::Dev, tally)
}

fn two_nodes(tally: &mut Tally) -> Outcome {
    bpf::build(Profile::Release)?;
    let mut tests = executables("weft-tests", "--tests", Profile::Release)?;
    tests.retain(|(name, _)| !name.starts_with(CLUSTER));
    // The soak, in short.
    tests.append(&mut executables("weft-bench", "--tests", Profile::Release)?);
    run_as_root(&tests, Profile::Release, tally)
}

/// The operator beside a real etcd and API server.
fn api_server(tally: &mut Tally) -> Outcome {
    cluster::parts(&[])?;
    let tests = executables("weft-operator", "--test=apiserver", Profile::Dev)?;
    run_as_root(&tests, Profile::Dev, tally)
}

/// Files of the end-to-end tests whose names begin so raise a cluster.
const CLUSTER: &str = "cluster";

/// Real clusters: first the tool that raises them, then Weft on them.
fn cluster(tally: &mut Tally) -> Outcome {
    cluster::parts(&["--all"])?;
    bpf::build(Profile::Release)?;
    // A stranger's programs, for the tests beside a CNI that has its own.
    bpf::build_programs(Profile::Release, &["weft-bpf-tests"])?;
    images::save(Profile::Release, "registry.test/weft", "test", &sh::target().join("test-images"))?;
    let mut tests = executables("weft-cluster", "--tests", Profile::Dev)?;
    let mut own = executables("weft-tests", "--tests", Profile::Release)?;
    own.retain(|(name, _)| name.starts_with(CLUSTER));
    tests.append(&mut own);
    lanes::run(&tests, |words| as_root(words, Profile::Release), sh::say, tally)
}

/// The datapath on Debian's kernels.
fn other_kernels(tally: &mut Tally) -> Outcome {
    bpf::build_ebpf()?;
    libtest(&mut kernels::command(&executables("weft-agent", "--tests", Profile::Dev)?)?, tally)
}

/// Builds those of a package's test files that `which` chooses, and gives their names and programs.
fn executables(package: &str, which: &str, profile: Profile) -> Outcome<Vec<(String, PathBuf)>> {
    let mut cargo = sh::cargo();
    cargo.args(["test", "--no-run", which, "--package", package]);
    profile.apply(&mut cargo);
    sh::run(&mut cargo)?;
    let out = cargo.args(["--message-format", "json"]).stderr(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let mut tests = Vec::new();
    for line in text.lines().filter(|line| line.contains(r#""kind":["test"]"#)) {
        let field = |name: &str| {
            let rest = line.split_once(&format!("\"{name}\":\""))?.1;
            Some(rest.split_once('"')?.0.to_owned())
        };
        let name = line.split_once(r#""target":{"#).and_then(|(_, rest)| {
            let rest = rest.split_once("\"name\":\"")?.1;
            Some(rest.split_once('"')?.0.to_owned())
        });
        if let (Some(name), Some(path)) = (name, field("executable")) {
            tests.push((name, PathBuf::from(path)));
        }
    }
    tests.sort();
    Ok(tests)
}

fn run_as_root(tests: &[(String, PathBuf)], profile: Profile, tally: &mut Tally) -> Outcome {
    for (name, path) in tests {
        sh::say(&format!("-- {name}"));
        // One file at a time: they time what they see, and a machine with two cores has no room for two labs.
        libtest(&mut as_root(&[&path.to_string_lossy()], profile)?, tally)?;
    }
    Ok(())
}

/// A test file, by the words that start it, with what `profile` built; its tests one at a time.
fn as_root(words: &[&str], profile: Profile) -> Outcome<Command> {
    let (program, arguments) = words.split_first().ok_or_else(|| Failure::Failed("no test file".into()))?;
    let mut command = sh::as_root(program)?;
    command.args(arguments).args(["--test-threads", "1"]).env("WEFT_BIN_DIR", profile.folder());
    command.env("WEFT_IMAGES", sh::target().join("test-images")).current_dir(sh::root());
    Ok(command)
}

/// Runs a command that prints libtest's output, passes it on and counts.
fn libtest(command: &mut Command, tally: &mut Tally) -> Outcome {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut summaries = 0;
    let mut failures = 0;
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).lines() {
            let line = line?;
            if let Some((passed, failed)) = summary(&line) {
                tally.passed += passed;
                tally.failed += failed;
                failures += failed;
                summaries += 1;
            }
            sh::say(&line);
        }
    }
    let status = child.wait()?;
    // Failed without a failed test: it did not build, or it crashed.
    if !status.success() && failures == 0 {
        return failed(format!("{command:?} ended with {status}"));
    }
    if summaries == 0 {
        return failed(format!("{command:?} ran no tests"));
    }
    Ok(())
}

fn summary(line: &str) -> Option<(u64, u64)> {
    let rest = line.trim().strip_prefix("test result: ")?.split_once(". ")?.1;
    let mut parts = rest.split("; ");
    let passed = parts.next()?.strip_suffix(" passed")?.parse().ok()?;
    let failed = parts.next()?.strip_suffix(" failed")?.parse().ok()?;
    Some((passed, failed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_libtest_summaries() {
        let line = "test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(summary(line), Some((12, 3)));
        assert_eq!(summary("test a ... ok"), None);
    }

    #[test]
    fn tiers_are_checked() {
        assert_eq!(wanted(&["--tier", "2", "--tier", "4"]).ok(), Some(vec![2, 4]));
        assert!(wanted(&["--tier", "9"]).is_err());
        assert!(wanted(&["--tier"]).is_err());
    }
}
