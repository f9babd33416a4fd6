//! `weft-cni`: what the container runtime runs for each Pod of the node; see the library.

#![forbid(unsafe_code)]

use std::{io::Write as _, process::ExitCode};

fn main() -> ExitCode {
    let (output, fine) = weft_cni::plugin::run();
    let told = output.is_none_or(|output| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{output}").and_then(|()| out.flush()).is_ok()
    });
    if fine && told { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
