//! Waiting for a condition: poll with a deadline, never a bare sleep.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Polls `condition` every `step` until it gives a value; after `limit` it is an error that says what was waited
/// for and what the last look saw. Returns the value and how long it took.
///
/// # Errors
/// When the limit passes first.
pub fn until_every<T>(
    step: Duration,
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<T>,
) -> Result<(T, Duration)> {
    let start = Instant::now();
    loop {
        let last = match condition() {
            Ok(value) => return Ok((value, start.elapsed())),
            Err(error) => error,
        };
        crate::interrupt::check()?;
        if start.elapsed() >= limit {
            bail!("waited {:.1} s for {what}: {last:#}", limit.as_secs_f64());
        }
        thread::sleep(step);
    }
}

/// [`until_every`] with a step of 5 ms.
///
/// # Errors
/// When the limit passes first.
pub fn until<T>(limit: Duration, what: &str, condition: impl FnMut() -> Result<T>) -> Result<(T, Duration)> {
    until_every(Duration::from_millis(5), limit, what, condition)
}
