//! `cargo xtask test`: eight tiers, from plain units to a real cluster and other kernels.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
};

use crate::{
    Failure, Outcome,
    bpf::{self, Profile},
    cluster, failed, fuzz, images, kernels, lint, machine, sh,
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
    if let Some((what, seconds)) = bpf::pending() {
        sh::say(&format!("Missing, about {seconds} s: {what}."));
        // The tiers that can run without do; the others say what they lack.
        if let Err(Failure::Failed(reason) | Failure::Unable(reason) | Failure::Usage(reason)) = bpf::setup()
        {
            sh::warn(&reason);
        }
    }
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
        1 => units(tally),
        2..=4 => bpf_tests(tier, tally),
        5 => two_nodes(tally),
        6 => api_server(tally),
        7 => cluster(tally),
        _ => other_kernels(tally),
    }
}

/// For each target of the fuzzer: enough to run its seeds and what is near them.
const FUZZ_SECONDS: u32 = 3;

/// What needs neither rights nor other programs: each crate's own tests, the operator's services over gRPC, the CNI
/// plugin as a process, and the parsers of hostile bytes under libFuzzer for a moment.
fn units(tally: &mut Tally) -> Outcome {
    // Where there is no compiler for BPF, the crates that do not hold the object are tested before that is told.
    let object = bpf::build_ebpf();
    let mut cargo = if object.is_ok() { together("test") } else { plain("test") };
    cargo.args(["--no-fail-fast", "--lib", "--bins", "--test", "grpc", "--test", "plugin"]);
    libtest(&mut cargo, tally)?;
    object?;
    match fuzz::targets(FUZZ_SECONDS) {
        Ok((quiet, found)) => {
            tally.passed += quiet;
            tally.failed += found.len() as u64;
        }
        Err(Failure::Unable(reason)) => {
            let line = format!("nothing was fuzzed: {reason}");
            sh::say(&line);
            tally.skipped.push(line);
        }
        Err(failure) => return Err(failure),
    }
    Ok(())
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
    let mut names = files("bpf-tests")?;
    names.retain(|name| of(name) == tier);
    let mut chosen = executables("bpf-tests", &names)?;
    if tier == 4 {
        chosen.append(&mut executables("agent", &files("agent")?)?);
    }
    run_as_root(&chosen, Profile::Dev, tally)
}

fn two_nodes(tally: &mut Tally) -> Outcome {
    bpf::build(Profile::Quick)?;
    let mut names = files("tests")?;
    names.retain(|name| !name.starts_with(CLUSTER));
    let mut tests = executables("tests", &names)?;
    // The soak, in short.
    tests.append(&mut executables("bench", &files("bench")?)?);
    run_as_root(&tests, Profile::Quick, tally)
}

/// The operator beside a real etcd and API server.
fn api_server(tally: &mut Tally) -> Outcome {
    cluster::parts(&[])?;
    let tests = executables("operator", &["apiserver".into()])?;
    run_as_root(&tests, Profile::Dev, tally)
}

/// Files of the end-to-end tests whose names begin so raise a cluster.
const CLUSTER: &str = "cluster";

/// Real clusters: first the tool that raises them, then Weft on them.
fn cluster(tally: &mut Tally) -> Outcome {
    cluster::parts(&["--all"])?;
    // With a stranger's programs, for the tests beside a CNI that has its own.
    bpf::build_programs(Profile::Quick, &[&bpf::PROGRAMS[..], &["weft-bpf-tests"]].concat())?;
    images::save(Profile::Quick, "registry.test/weft", "test", &sh::target().join("test-images"))?;
    let mut tests = executables("cluster", &files("cluster")?)?;
    let mut names = files("tests")?;
    names.retain(|name| name.starts_with(CLUSTER));
    tests.append(&mut executables("tests", &names)?);
    lanes::run(&tests, |words| as_root(words, Profile::Quick), sh::say, tally)
}

/// The datapath on Debian's kernels.
fn other_kernels(tally: &mut Tally) -> Outcome {
    bpf::build_ebpf()?;
    libtest(&mut kernels::command(&executables("agent", &files("agent")?)?)?, tally)
}

/// A cargo command on the default members, which need no BPF object.
fn plain(what: &str) -> Command {
    let mut cargo = sh::cargo();
    cargo.arg(what);
    cargo
}

/// A cargo command on all crates. cargo joins what the named crates want of a library's features, and builds the library
/// once for each such sum: with the same crates named each time there is one.
pub(crate) fn together(what: &str) -> Command {
    let mut cargo = plain(what);
    // What is fuzzed is built in another way.
    for package in lint::packages().filter(|package| package != "weft-fuzz") {
        cargo.args(["--package", &package]);
    }
    cargo
}

/// The names of the test files of the crate in `folder`.
fn files(folder: &str) -> Outcome<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(sh::root().join(folder).join("tests"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

/// Builds these test files of the crate in `folder`, and gives their names and programs.
fn executables(folder: &str, names: &[String]) -> Outcome<Vec<(String, PathBuf)>> {
    let mut cargo = together("test");
    cargo.arg("--no-run");
    for name in names {
        cargo.args(["--test", name]);
    }
    sh::run(&mut cargo)?;
    let out = cargo.args(["--message-format", "json"]).stderr(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let mut tests = Vec::new();
    for name in names {
        let file = sh::root().join(folder).join("tests").join(name).with_extension("rs");
        let source = format!(r#""src_path":"{}""#, file.display());
        let line = text.lines().find(|line| line.contains(&source));
        let path = line.and_then(|line| Some(line.split_once(r#""executable":""#)?.1.split_once('"')?.0));
        let Some(path) = path else {
            return failed(format!("cargo built no program of {}", file.display()));
        };
        tests.push((name.clone(), PathBuf::from(path)));
    }
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
