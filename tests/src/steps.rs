//! Named steps of one test that share what is dear to raise: each is run whatever became of the others, and the test
//! fails with all that failed.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// The steps so far.
#[derive(Debug, Default)]
pub struct Steps {
    passed: usize,
    failed: Vec<String>,
}

impl Steps {
    /// Runs a step. `name` is what the user would see to work.
    pub fn step(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        let start = Instant::now();
        let result = check();
        self.note(name, start.elapsed(), result);
    }

    fn note(&mut self, name: &str, took: Duration, result: Result<()>) {
        let said = match result {
            Ok(()) => {
                self.passed += 1;
                format!("{:6.1} s  works: {name}", took.as_secs_f64())
            }
            Err(error) => {
                self.failed.push(format!("{name}: {error:#}"));
                format!("{:6.1} s  DOES NOT WORK: {name}: {error:#}", took.as_secs_f64())
            }
        };
        let _ = writeln!(std::io::stdout(), "{said}");
    }

    /// The end of the test.
    ///
    /// # Errors
    /// Names every step that failed.
    pub fn finish(self) -> Result<()> {
        if !self.failed.is_empty() {
            let all = self.passed + self.failed.len();
            bail!("{} of {all} do not work:\n{}", self.failed.len(), self.failed.join("\n"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_stops_nothing_and_is_told() {
        let mut steps = Steps::default();
        steps.step("one", || bail!("first"));
        let mut ran = false;
        steps.step("two", || {
            ran = true;
            Ok(())
        });
        assert!(ran);
        let told = steps.finish().map_err(|error| error.to_string());
        assert_eq!(told, Err("1 of 2 do not work:\none: first".into()));
    }
}
