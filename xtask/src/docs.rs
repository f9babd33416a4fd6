//! Pages of documentation that are made from the code that they speak of.

use crate::{Outcome, sh};

/// Each page's package and program. A program writes its pages; with `--check` it fails where one is stale.
const GENERATORS: &[(&str, &str)] = &[("weft-api", "reference"), ("weft-tests", "weft-failure-modes")];

/// Writes the pages, or checks them.
pub(crate) fn run(check: bool) -> Outcome {
    for (package, program) in GENERATORS {
        let mut command = sh::cargo();
        command.args(["run", "--quiet", "--package", package, "--bin", program, "--"]);
        if check {
            command.arg("--check");
        }
        sh::run(command.current_dir(sh::root()))?;
    }
    Ok(())
}
