//! The CRD YAML, written by the api crate's `crdgen` from the types.

use crate::{Outcome, sh};

/// Writes `deploy/crds`, or checks it.
pub(crate) fn run(check: bool) -> Outcome {
    let mut command = sh::cargo();
    command.args(["run", "--quiet", "--package", "weft-api", "--bin", "crdgen", "--", "deploy/crds"]);
    if check {
        command.arg("--check");
    }
    sh::run(&mut command)
}
