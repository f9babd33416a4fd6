//! Pages of documentation that are made from the code that they speak of; a test of each crate fails where one is stale.

use crate::{Outcome, sh};

/// Each page's package and the program that writes it.
const GENERATORS: &[(&str, &str)] = &[("weft-api", "reference"), ("weft-tests", "weft-failure-modes")];

/// Writes the pages.
pub(crate) fn run() -> Outcome {
    for (package, program) in GENERATORS {
        sh::run(sh::cargo().args(["run", "--quiet", "--package", package, "--bin", program]))?;
    }
    Ok(())
}
