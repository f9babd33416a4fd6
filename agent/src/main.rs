//! `weft-agent`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use weft_agent::{
    app,
    config::{Cli, Command},
    datapath::Datapath,
};
use weft_runtime::telemetry;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.run.as_ref().is_some_and(|c| c.log_json);
    telemetry::init("info", json);
    match (cli.command, cli.run) {
        (Some(Command::Uninstall { bpffs, .. }), _) => match Datapath::uninstall(&bpffs) {
            Ok(()) => {
                tracing::info!(bpffs = %bpffs.display(), "everything pinned was removed; Pods pass untouched");
                ExitCode::SUCCESS
            }
            Err(error) => failed(&error.into()),
        },
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
