//! `cargo xtask demo`: checks the machine, sets up, builds as the caller, and runs the story as root.

use std::os::unix::process::CommandExt as _;

use crate::{
    Failure, Outcome,
    bpf::{self, Profile},
    machine, sh,
};

/// Runs it.
pub(crate) fn run(args: &[&str]) -> Outcome {
    if let Some(unknown) = args.iter().find(|arg| !["--keep", "--down"].contains(*arg)) {
        return Err(Failure::Usage(format!("demo takes --keep or --down, not {unknown:?}")));
    }
    let machine = machine::check().map_err(Failure::Unable)?;
    sh::say(&format!("This machine can run it: {machine}."));
    let program = Profile::Quick.folder().join("weft-demo");
    if !args.contains(&"--down") || !program.is_file() {
        match bpf::pending() {
            Some((what, seconds)) => {
                sh::say(&format!("Missing, about {seconds} s: {what}."));
                bpf::setup()?;
            }
            None => sh::say("Nothing has to be installed."),
        }
        sh::say("Building as this user, into target/ (some minutes the first time, seconds after).");
        bpf::build(Profile::Quick)?;
    }
    if !machine::is_root() {
        sh::say(
            "The run needs root: it loads BPF programs and makes network namespaces. sudo may ask for your password.",
        );
    }
    let mut command = sh::as_root(&program)?;
    command.args(args).env("WEFT_BIN_DIR", Profile::Quick.folder());
    // Becomes the demo: Ctrl-C must reach it alone, and this terminal stays its own until it has cleaned up.
    let error = command.exec();
    Err(Failure::Failed(format!("{} cannot be run: {error}", program.display())))
}
