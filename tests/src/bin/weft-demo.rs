//! Two nodes on this machine, and the story of a service mesh on them. `cargo xtask demo` runs it.

#![forbid(unsafe_code)]

use std::{io::Write as _, process::ExitCode};

use clap::Parser as _;
use weft_tests::demo;

fn main() -> ExitCode {
    match demo::run(&demo::Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}
