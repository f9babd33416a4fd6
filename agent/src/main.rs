//! `weft-agent`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use weft_agent::{
    app,
    config::{Cli, Command},
    datapath::Datapath,
    files, guard,
};
use weft_runtime::telemetry;

/// glibc's keeps what thousands of connections needed once; how this one is set stands in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.run.as_ref().is_some_and(|c| c.log_json);
    telemetry::init("info", json);
    match (cli.command, cli.run) {
        (Some(Command::Uninstall { bpffs, cni_conf_dir, cni_bin_dir, state_dir, run_dir, .. }), _) => {
            let guard = guard::remove(cni_conf_dir.as_deref(), cni_bin_dir.as_deref(), state_dir.as_deref());
            let pinned = Datapath::uninstall(&bpffs);
            let folders = files::remove(run_dir.as_deref(), [Some(&*bpffs), state_dir.as_deref()]);
            if let Err(error) = folders {
                return failed(&error.into());
            }
            match (pinned, guard) {
                (Ok(()), Ok(())) => {
                    tracing::info!(bpffs = %bpffs.display(), "everything pinned was removed; Pods pass untouched");
                    ExitCode::SUCCESS
                }
                (Err(error), _) => failed(&error.into()),
                (_, Err(error)) => failed(&error.into()),
            }
        }
        (Some(Command::Trial { report }), _) => {
            let found = Datapath::trial().to_string();
            tracing::info!("{found}");
            match std::fs::write(&report, &found) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => failed(&error.into()),
            }
        }
        (Some(Command::Ready { file }), _) => {
            if file.exists() {
                ExitCode::SUCCESS
            } else {
                tracing::error!("the agent is not ready yet; /readyz and its log name what is missing");
                ExitCode::FAILURE
            }
        }
        (None, Some(config)) => {
            let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return failed(&error.into()),
            };
            match runtime.block_on(app::run(config)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => failed(&error),
            }
        }
        (None, None) => {
            tracing::error!("nothing to do: see weft-agent --help");
            ExitCode::from(2)
        }
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    tracing::error!("{error:#}");
    ExitCode::FAILURE
}
