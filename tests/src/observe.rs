//! Flow records, through `weft observe -o json`.

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::Lab;

/// The flows that `weft observe` gives for these filters, oldest first, one JSON object each.
///
/// # Errors
/// When the command fails or prints something else.
pub fn flows(lab: &Lab, filters: &[&str]) -> Result<Vec<Value>> {
    let mut args = vec!["observe", "-o", "json"];
    args.extend_from_slice(filters);
    let text = lab.weft(&args)?;
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
        .collect()
}
