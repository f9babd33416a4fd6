//! Labels and annotations on objects of other groups, and what their values mean.

use std::collections::BTreeMap;

use weft_core::workload::{FailMode, Mode};

use crate::error::FieldError;

/// On a Namespace or Pod: `strict`, `permissive` or `disabled`.
pub const MODE: &str = "weft.mesh/mode";
/// On a Namespace: `closed` or `open`.
pub const FAIL_MODE: &str = "weft.mesh/fail-mode";
/// On a Pod, directory source only: the path of its network namespace.
pub const NETNS: &str = "weft.mesh/netns";
/// On a Node: taken off when strict Pods may start.
pub const NOT_READY_TAINT: &str = "weft.mesh/not-ready";

/// The mode that an object's own label asks for; `None` without the label.
///
/// # Errors
/// When the label has another value than the three.
pub fn mode(labels: Option<&BTreeMap<String, String>>) -> Result<Option<Mode>, FieldError> {
    match labels.and_then(|l| l.get(MODE)).map(String::as_str) {
        None => Ok(None),
        Some("strict") => Ok(Some(Mode::Strict)),
        Some("permissive") => Ok(Some(Mode::Permissive)),
        Some("disabled") => Ok(Some(Mode::Disabled)),
        Some(other) => Err(FieldError::new(
            format!("metadata.labels[{MODE}]"),
            format_args!("{other:?} is no mode; write strict, permissive or disabled"),
        )),
    }
}

/// What a Namespace's labels say: mode and fail mode.
///
/// # Errors
/// When a label has an unknown value, or `open` is asked for together with `strict`.
pub fn namespace_modes(labels: Option<&BTreeMap<String, String>>) -> Result<(Mode, FailMode), FieldError> {
    let mode = mode(labels)?.unwrap_or_default();
    let field = format!("metadata.labels[{FAIL_MODE}]");
    let fail = match labels.and_then(|l| l.get(FAIL_MODE)).map(String::as_str) {
        None | Some("closed") => FailMode::Closed,
        Some("open") => FailMode::Open,
        Some(other) => {
            return Err(FieldError::new(
                field,
                format_args!("{other:?} is no fail mode; write closed or open"),
            ));
        }
    };
    if mode == Mode::Strict && fail == FailMode::Open {
        return Err(FieldError::new(
            field,
            format_args!(
                "open and {MODE}: strict exclude each other (strict promises that plaintext never passes); take this \
                 label away, or set {MODE} to permissive"
            ),
        ));
    }
    Ok((mode, fail))
}
