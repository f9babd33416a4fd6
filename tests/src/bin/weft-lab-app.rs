//! The application, attacker and server inside the lab's Pods; prints one JSON object.

#![forbid(unsafe_code)]

use std::{io::Write as _, process::ExitCode};

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "weft-lab-app", about = "Runs inside the Pods of the two-node lab")]
struct Arguments {
    #[command(subcommand)]
    app: weft_tests::app::App,
}

fn main() -> ExitCode {
    match Arguments::parse().app.run() {
        Ok(value) => {
            let _ = writeln!(std::io::stdout(), "{value}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}
