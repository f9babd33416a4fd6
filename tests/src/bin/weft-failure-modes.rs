//! Writes `docs/failure-modes.md`, or with `--check` fails where it is stale.

#![forbid(unsafe_code)]

use std::{env, fs, io::Write as _, process::ExitCode};

fn main() -> ExitCode {
    let path = "docs/failure-modes.md";
    let page = weft_tests::failure::page();
    let outcome = if env::args().any(|arg| arg == "--check") {
        match fs::read_to_string(path) {
            Ok(text) if text == page => Ok(()),
            _ => Err(format!("{path} is stale; run `cargo xtask docs`")),
        }
    } else {
        fs::write(path, page).map_err(|error| format!("write {path}: {error}"))
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}
