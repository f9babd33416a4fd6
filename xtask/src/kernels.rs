//! Tier 8: the datapath's tests on Debian's kernels, in virtual machines that have cgroup2 alone. `cluster/src/vm.rs`
//! boots them.

use std::{path::PathBuf, process::Command};

use crate::{Failure, Outcome, failed, sh};

/// Files of the agent's tests, with what of each is for every kernel. Left out is what times the machine, which here is
/// an emulated one, and what needs tcx, which came with Linux 6.6.
const CHOSEN: [(&str, &[&str]); 4] = [
    ("datapath_root", &["--ignored"]),
    ("datapath", &["an_application", "the_proxy_dials", "the_next_agent", "what_is_detached", "events_and"]),
    ("datapath_attach", &["a_filter_that_is_gone"]),
    ("datapath_earlier", &[]),
];

/// The command that runs those of `tests` that are for every kernel, and prints libtest's output.
pub(crate) fn command(tests: &[(String, PathBuf)]) -> Outcome<Command> {
    sh::run(sh::cargo().args(["build", "--quiet", "--package", "weft-cluster"]))?;
    let tool = sh::target().join("debug/weft-cluster");
    let fetched = Command::new(&tool).args(["kernels", "--fetch"]).status()?;
    if !fetched.success() {
        return Err(Failure::Unable("QEMU or a kernel of Debian cannot be had; see above".into()));
    }
    let mut command = Command::new(tool);
    command.arg("kernels");
    for (name, arguments) in CHOSEN {
        let Some((_, path)) = tests.iter().find(|(test, _)| test == name) else {
            return failed(format!("the agent has no test file {name}"));
        };
        let words = [path.to_string_lossy().as_ref(), "--test-threads=1"].join(" ");
        command.args(["--run", &[&[words.as_str()], arguments].concat().join(" ")]);
    }
    Ok(command)
}
