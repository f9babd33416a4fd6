//! `cargo xtask cluster`: builds the tool as the caller, and runs it as root. What it does is in the crate `cluster`.

use std::{env, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use crate::{Failure, Outcome, machine, sh};

/// Runs it with those arguments.
pub(crate) fn run(args: &[&str]) -> Outcome {
    if cfg!(not(target_os = "linux")) {
        return Err(Failure::Unable("A cluster's nodes are Linux namespaces: run it on Linux.".into()));
    }
    sh::run(sh::cargo().args(["build", "--quiet", "--package", "weft-cluster"]))?;
    let program = sh::target().join("debug/weft-cluster");
    // Only its own help: `cluster kubectl get --help` is kubectl's.
    let asks = |word: &&str| ["--help", "-h", "help"].contains(word);
    if args.first().is_none_or(asks) || (args.len() == 2 && asks(&args[1])) {
        return become_it(Command::new(&program).args(args));
    }
    if !machine::is_root() && matches!(args, ["up" | "parts", ..]) {
        // What is fetched and built is the caller's own, in the caller's cache.
        let mut parts = Command::new(&program);
        sh::run(if args[0] == "parts" { parts.args(args) } else { parts.arg("parts") })?;
        if args[0] == "parts" {
            return Ok(());
        }
    }
    let mut command = sh::as_root("env")?;
    command.arg(format!("WEFT_CACHE={}", cache()?.display()));
    for name in ["WEFT_CLUSTER", "WEFT_CLUSTER_DIR"] {
        if let Some(value) = env::var_os(name) {
            let mut pair = std::ffi::OsString::from(format!("{name}="));
            pair.push(value);
            command.arg(pair);
        }
    }
    become_it(command.arg(program).args(args))
}

/// Makes the parts that are missing (Kubernetes from Go modules: some minutes, once).
pub(crate) fn parts(more: &[&str]) -> Outcome {
    sh::run(sh::cargo().args(["build", "--quiet", "--package", "weft-cluster"]))?;
    sh::run(Command::new(sh::target().join("debug/weft-cluster")).arg("parts").args(more))
}

/// The caller's cache, which root shall use too.
fn cache() -> Outcome<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("WEFT_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("weft")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache/weft")))
        .ok_or_else(|| {
            Failure::Unable("HOME is not set; set WEFT_CACHE to a folder for the cluster's parts".into())
        })
}

fn become_it(command: &mut Command) -> Outcome {
    let error = command.exec();
    Err(Failure::Failed(format!("{command:?} cannot be run: {error}")))
}
