//! Rows of a result: what was measured, what is required, and the verdict.

use std::{fmt::Write as _, fs, io::Write as _, path::Path, time::Duration};

use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// One thing that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// What exactly.
    pub(crate) what: String,
    /// How much.
    pub(crate) value: f64,
    /// Of what.
    pub(crate) unit: &'static str,
    /// The most that is allowed, where something is promised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) required: Option<f64>,
    /// The most that is wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) aim: Option<f64>,
}

/// What a benchmark found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    benchmark: &'static str,
    date: String,
    machine: Machine,
    setting: String,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Machine {
    processor: String,
    processors: usize,
    memory_mib: u64,
    kernel: String,
}

impl Report {
    /// An empty one. `setting` says what was simulated.
    pub(crate) fn new(benchmark: &'static str, setting: String) -> Self {
        let date = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        Self { benchmark, date, machine: Machine::this(), setting, rows: Vec::new() }
    }

    /// Adds a figure, and shows it at once: a run takes minutes.
    pub(crate) fn add(&mut self, what: impl Into<String>, value: f64, unit: &'static str) {
        self.row(Row { what: what.into(), value, unit, required: None, aim: None });
    }

    /// Adds a figure that must not be larger than `required`.
    pub(crate) fn must(
        &mut self,
        what: impl Into<String>,
        value: f64,
        unit: &'static str,
        (required, aim): (f64, f64),
    ) {
        self.row(Row { what: what.into(), value, unit, required: Some(required), aim: Some(aim) });
    }

    fn row(&mut self, row: Row) {
        say(&line(&row));
        self.rows.push(row);
    }

    /// Prints everything, with one VERDICT line for each promise; true where all are kept.
    pub(crate) fn finish(&self, json: Option<&Path>) -> anyhow::Result<bool> {
        let machine = &self.machine;
        say(&format!(
            "\n{} on {}\n{} x {}, {} MiB, Linux {}\n{}\n",
            self.benchmark,
            self.date,
            machine.processors,
            machine.processor,
            machine.memory_mib,
            machine.kernel,
            self.setting
        ));
        for row in &self.rows {
            say(&line(row));
        }
        say("");
        let mut kept = true;
        for row in &self.rows {
            let Some(required) = row.required else { continue };
            let word = if row.value <= required { "PASS" } else { "SHORT" };
            kept &= row.value <= required;
            let aim = row.aim.map_or_else(String::new, |aim| {
                format!(", aim {aim} {}{}", row.unit, if row.value <= aim { " reached" } else { " missed" })
            });
            say(&format!(
                "VERDICT {word} {}: {:.1} {} (required {required} {}{aim})",
                row.what, row.value, row.unit, row.unit
            ));
        }
        if let Some(path) = json {
            fs::write(path, serde_json::to_string_pretty(self)? + "\n")?;
        }
        Ok(kept)
    }
}

fn line(row: &Row) -> String {
    format!("  {:<74} {:>10.1} {}", row.what, row.value, row.unit)
}

impl Machine {
    fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let found = text.lines().find(|l| l.starts_with(name)).and_then(|l| l.split_once(':'));
            found.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        Self {
            processor: field(&read("/proc/cpuinfo"), "model name"),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) >> 10,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }
}

/// Durations, from which parts are asked.
#[derive(Debug, Default)]
pub(crate) struct Sample(Vec<Duration>);

impl Sample {
    pub(crate) fn push(&mut self, value: Duration) {
        self.0.push(value);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The value that this part (0 to 1) of the sample does not exceed, in milliseconds; the nearest rank.
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).map_or(f64::NAN, |d| d.as_secs_f64() * 1000.0)
    }
}

impl std::fmt::Display for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = String::new();
        for (name, part) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
            write!(text, "{name} {:.1} ms ", self.quantile(part))?;
        }
        f.write_str(text.trim_end())
    }
}

/// Prints a line.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints a line to stderr.
pub(crate) fn warn(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_the_nearest_rank() {
        let sample = Sample((1..=100).rev().map(Duration::from_millis).collect());
        let found = [0.5, 0.99, 1.0].map(|part| sample.quantile(part));
        assert_eq!(found, [50.0, 99.0, 100.0]);
        assert!(Sample::default().quantile(0.5).is_nan());
    }

    #[test]
    fn a_promise_is_kept_or_not() {
        let mut report = Report::new("test", String::new());
        report.must("a", 1.0, "s", (1.0, 0.5));
        assert!(report.finish(None).unwrap());
        report.must("b", 1.1, "s", (1.0, 0.5));
        assert!(!report.finish(None).unwrap());
    }
}
