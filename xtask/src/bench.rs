//! `cargo xtask bench`: builds what is measured as images hold it, and runs the crate `bench`.

use std::process::Command;

use crate::{
    Failure, Outcome,
    bpf::{self, Profile},
    cluster, sh,
};

/// Runs one benchmark; what follows its name goes to it.
pub(crate) fn run(args: &[&str]) -> Outcome {
    match args {
        ["control-plane", rest @ ..] => control_plane(rest),
        ["soak", rest @ ..] => soak(rest),
        ["--quick" | "--full", ..] => proxy(args),
        _ => Err(Failure::Usage(
            "bench takes --quick, --full, soak or control-plane, and their options (--help lists them)"
                .into(),
        )),
    }
}

fn control_plane(args: &[&str]) -> Outcome {
    let profile = Profile::Dist;
    let mut cargo = sh::cargo();
    cargo.args(["build", "--package", "weft-operator", "--package", "weft-bench", "--bins"]);
    profile.apply(&mut cargo);
    sh::run(&mut cargo)?;
    cluster::parts(&[])?;
    let folder = profile.folder();
    let mut bench = Command::new(folder.join("weft-bench"));
    bench.arg("control-plane").arg("--operator").arg(folder.join("weft-operator"));
    sh::run(bench.args(args))
}

/// The node proxy beside its peers.
fn proxy(args: &[&str]) -> Outcome {
    let profile = Profile::Dist;
    bpf::build_programs(
        profile,
        &["weft-agent", "weft-operator", "weft-cli", "weft-tests", "weft-bench", "weft-bpf-tests"],
    )?;
    let folder = profile.folder();
    let mut bench = sh::as_root(folder.join("weft-bench"))?;
    bench.arg("proxy").args(args).arg("--out").arg(sh::target().join("bench"));
    sh::run(bench.env("WEFT_BIN_DIR", &folder).current_dir(sh::root()))
}

/// The node proxy under mixed load with kills.
fn soak(args: &[&str]) -> Outcome {
    let profile = Profile::Quick;
    bpf::build_programs(profile, &["weft-agent", "weft-operator", "weft-cli", "weft-tests", "weft-bench"])?;
    let folder = profile.folder();
    let mut bench = sh::as_root(folder.join("weft-bench"))?;
    bench.arg("soak").args(args).arg("--out").arg(sh::target().join("soak"));
    sh::run(bench.env("WEFT_BIN_DIR", &folder).current_dir(sh::root()))
}
