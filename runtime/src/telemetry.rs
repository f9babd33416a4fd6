//! Logging of the process itself.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

/// The environment variable that holds the log filter, e.g. `info,weft_proxy=debug`.
pub const FILTER_VARIABLE: &str = "WEFT_LOG";

/// Sends the process's log to stderr, one JSON object a line with `json`, else as text.
///
/// The filter comes from `WEFT_LOG`; where that is unset or malformed, `default_filter` holds. A second call in one
/// process, as tests make it, changes nothing.
pub fn init(default_filter: &str, json: bool) {
    let given = std::env::var(FILTER_VARIABLE).ok().filter(|given| !given.is_empty());
    let (filter, problem) = match given.as_deref().map(EnvFilter::try_new) {
        Some(Ok(filter)) => (filter, None),
        Some(Err(error)) => (EnvFilter::new(default_filter), Some(error)),
        None => (EnvFilter::new(default_filter), None),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    let installed = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(stderr().is_terminal()).try_init()
    };
    if let Err(error) = installed {
        tracing::debug!(%error, "logging is set up already");
    }
    if let Some(error) = problem {
        tracing::warn!(%error, default_filter, "{FILTER_VARIABLE} is malformed and ignored; the form is `info,weft_proxy=debug`");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_second_call_changes_nothing() {
        super::init("info", false);
        super::init("nonsense=nonsense=nonsense", true);
    }
}
