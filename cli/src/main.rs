//! `weft`: a person's view of the mesh.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this is a command: its output goes to stdout")]

mod args;
mod check;
mod cluster;
mod connect;
mod format;
mod install;
mod mesh;
mod observe;
mod status;
mod text;
mod uninstall;
mod when;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use args::{Cli, Command};

/// How a command ended, as an exit code (api.md, Commands).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// 0.
    Fine,
    /// 1: it ran and found something wrong.
    Finding,
}

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// 2: the arguments make no sense together.
    #[error("{0}")]
    Usage(String),
    /// 3: it cannot run here.
    #[error("{0}")]
    Unable(String),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Completion { shell } = cli.command {
        clap_complete::generate(shell, &mut Cli::command(), "weft", &mut std::io::stdout());
        return ExitCode::SUCCESS;
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("weft: cannot start: {e}");
            return ExitCode::from(3);
        }
    };
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Install(args) => install::run(&args),
            Command::Upgrade(args) => install::upgrade(&args).await,
            Command::Uninstall(args) => uninstall::run(&args).await,
            Command::Check(args) => check::run(&args).await,
            Command::Status(args) => status::run(&args).await,
            Command::Observe(args) => observe::run(&args).await,
            Command::Completion { .. } => Ok(Outcome::Fine),
        }
    });
    match outcome {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::Finding) => ExitCode::from(1),
        Err(e @ Failure::Usage(_)) => {
            eprintln!("weft: {e}");
            ExitCode::from(2)
        }
        Err(e @ Failure::Unable(_)) => {
            eprintln!("weft: {e}");
            ExitCode::from(3)
        }
    }
}
