//! The CRD YAML, written by the api crate's `crdgen` from the types; a test of that crate fails where it is stale.

use crate::{Outcome, sh};

/// Writes `deploy/crds`.
pub(crate) fn run() -> Outcome {
    sh::run(sh::cargo().args([
        "run",
        "--quiet",
        "--package",
        "weft-api",
        "--bin",
        "crdgen",
        "--",
        "deploy/crds",
    ]))
}
