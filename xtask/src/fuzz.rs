//! `cargo xtask fuzz`: every parser of hostile bytes under libFuzzer, for some seconds each.

use std::{fs, process::Command};

use crate::{Failure, Outcome, bpf, failed, sh, test};

/// Runs every target for that many seconds, 20 without an argument.
pub(crate) fn run(args: &[&str]) -> Outcome {
    let seconds: u32 = match args {
        [] => 20,
        [seconds] => {
            seconds.parse().map_err(|_| Failure::Usage(format!("fuzz takes seconds, not {seconds:?}")))?
        }
        _ => return Err(Failure::Usage("fuzz takes one number, the seconds for each target".into())),
    };
    bpf::build_ebpf()?;
    let (_, found) = targets(seconds)?;
    if found.is_empty() {
        return Ok(());
    }
    failed(format!(
        "fuzzing found something in {}; the inputs are in {}",
        found.join(", "),
        sh::target().join("fuzz/findings").display()
    ))
}

/// Runs every target for that many seconds. How many found nothing, and the names of those that did.
pub(crate) fn targets(seconds: u32) -> Outcome<(u64, Vec<String>)> {
    if sh::which("c++").is_none() {
        return Err(Failure::Unable(
            "libFuzzer is built by a C++ compiler, and there is no c++ here; install g++ or clang".into(),
        ));
    }
    let mut cargo = test::together("build");
    cargo.args(["--package", "weft-fuzz"]);
    let mut targets: Vec<_> = fs::read_dir(sh::root().join("fuzz/seeds"))?.flatten().collect();
    targets.sort_by_key(fs::DirEntry::file_name);
    for seeds in &targets {
        cargo.arg("--bin").arg(seeds.file_name());
    }
    // Coverage goes into this workspace's crates alone, by options of the stable compiler.
    sh::run(cargo.env("RUSTC_WORKSPACE_WRAPPER", sh::root().join("fuzz/rustc.sh")))?;
    let scratch = sh::target().join("fuzz");
    let (mut quiet, mut found) = (0, Vec::new());
    for seeds in targets {
        let name = seeds.file_name().to_string_lossy().into_owned();
        let (corpus, findings) = (scratch.join("corpus").join(&name), scratch.join("findings"));
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&findings)?;
        let mut target = Command::new(sh::target().join("debug").join(&name));
        target.args([
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-verbosity=0",
            &format!("-max_total_time={seconds}"),
        ]);
        target.arg(format!("-artifact_prefix={}/{name}-", findings.display()));
        let outcome = sh::run(target.arg(&corpus).arg(seeds.path()));
        sh::say(&format!(
            "fuzz: {name}: {}",
            if outcome.is_ok() { "nothing found" } else { "FOUND SOMETHING" }
        ));
        match outcome {
            Ok(()) => quiet += 1,
            Err(_) => found.push(name),
        }
    }
    Ok((quiet, found))
}
