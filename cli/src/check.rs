//! `weft check`: looks at everything that Weft stands on, one finding a line, and says what to do.
//!
//! [`facts`] asks the cluster; the other modules judge what came back, without asking anything, so that every judgement
//! can be tested.

use std::{fmt::Write as _, time::SystemTime};

use serde::Serialize;

use crate::{
    Failure, Outcome,
    args::{CheckArgs, CheckOutput},
    cluster::Cluster,
    text::{self, Colour, clean},
};

mod access;
pub(crate) mod agents;
mod facts;
mod live;
mod namespaces;
mod objects;
mod schema;
pub(crate) mod system;
mod traffic;
mod trial;

use facts::Facts;

/// Lines of detail that a finding shows; the rest is counted.
const MAX_DETAILS: usize = 8;

/// How a finding is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Info,
    /// It works, and something should be done.
    Warning,
    /// It does not work.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) section: &'static str,
    pub(crate) level: Level,
    pub(crate) message: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) details: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) remedy: String,
}

impl Finding {
    fn new(section: &'static str, level: Level, message: impl Into<String>) -> Self {
        Self { section, level, message: message.into(), details: Vec::new(), remedy: String::new() }
    }

    fn ok(section: &'static str, message: impl Into<String>) -> Self {
        Self::new(section, Level::Ok, message)
    }

    fn info(section: &'static str, message: impl Into<String>) -> Self {
        Self::new(section, Level::Info, message)
    }

    fn warning(section: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: remedy.into(), ..Self::new(section, Level::Warning, message) }
    }

    fn error(section: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: remedy.into(), ..Self::new(section, Level::Error, message) }
    }

    fn with(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }

    /// What could not be looked at.
    fn unseen(section: &'static str, what: &str, why: &str) -> Self {
        Self::warning(
            section,
            format!("{what} could not be looked at: {why}"),
            "run this as somebody who may read them, such as an administrator of the cluster",
        )
    }
}

/// Runs the command.
pub(crate) async fn run(args: &CheckArgs) -> Result<Outcome, Failure> {
    let cluster = Cluster::connect(&args.cluster).await?;
    let server = facts::server(&cluster).await?;
    let mut findings = system::server(&server);
    if args.pre {
        let facts = Facts::before(&cluster).await;
        findings.extend(system::kinds_before(&facts));
        findings.extend(system::nodes(&facts, &server));
        findings.extend(access::install(&cluster).await);
        if let Some(image) = &args.trial {
            findings.extend(trial::run(&cluster, image).await?);
        }
    } else {
        let facts = Facts::collect(&cluster, args.namespace.as_deref()).await;
        if let (Ok(None), Ok(None)) = (&facts.operator, &facts.agents) {
            // Nothing else has anything to stand on.
            findings.push(system::absent());
            return Ok(finish(args.output, &findings));
        }
        findings.extend(system::kinds(&facts));
        findings.extend(access::operator(&cluster).await);
        findings.extend(system::operator(&facts));
        findings.extend(system::skew(&facts));
        findings.extend(system::trust(&facts, SystemTime::now()));
        findings.extend(agents::rollout(&facts));
        findings.extend(agents::states(&facts, &server, SystemTime::now()));
        findings.extend(system::nodes(&facts, &server));
        findings.extend(objects::all(&facts));
        findings.extend(namespaces::all(&facts, args.namespace.as_deref()));
        if let Some(namespace) = &args.namespace {
            findings.extend(traffic::all(&facts, namespace, args.pod.as_deref()));
            if let Some(pod) = &args.pod {
                findings.extend(live::run(&cluster, &facts, namespace, pod, args.to).await);
            }
        }
    }
    Ok(finish(args.output, &findings))
}

/// Prints the findings; a warning is a finding too.
fn finish(output: CheckOutput, findings: &[Finding]) -> Outcome {
    match output {
        CheckOutput::Table => text::print(&table(findings, text::colours())),
        CheckOutput::Json => text::print(&json(findings)),
    }
    let worst = findings.iter().map(|f| f.level).max().unwrap_or(Level::Ok);
    if worst >= Level::Warning { Outcome::Finding } else { Outcome::Fine }
}

fn count(findings: &[Finding], level: Level) -> usize {
    findings.iter().filter(|f| f.level == level).count()
}

fn json(findings: &[Finding]) -> String {
    let answer = serde_json::json!({
        "errors": count(findings, Level::Error),
        "warnings": count(findings, Level::Warning),
        "findings": findings,
    });
    serde_json::to_string_pretty(&answer).unwrap_or_default() + "\n"
}

fn table(findings: &[Finding], colour: bool) -> String {
    let mut out = String::new();
    let mut sections: Vec<&str> = Vec::new();
    for finding in findings {
        if !sections.contains(&finding.section) {
            sections.push(finding.section);
        }
    }
    for section in sections {
        let _ = writeln!(out, "{section}");
        for finding in findings.iter().filter(|f| f.section == section) {
            line(&mut out, finding, colour);
        }
        out.push('\n');
    }
    let (errors, warnings) = (count(findings, Level::Error), count(findings, Level::Warning));
    let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let (shade, sum) = match (errors, warnings) {
        (0, 0) => (Colour::Good, "Everything is fine.".to_owned()),
        (0, _) => (Colour::Warn, format!("{}.", plural(warnings, "warning"))),
        (_, 0) => (Colour::Bad, format!("{}.", plural(errors, "error"))),
        _ => (Colour::Bad, format!("{}, {}.", plural(errors, "error"), plural(warnings, "warning"))),
    };
    let _ = writeln!(out, "{}", text::paint(colour, shade, &sum));
    out
}

fn line(out: &mut String, finding: &Finding, colour: bool) {
    let (word, shade) = match finding.level {
        Level::Ok => ("ok   ", Colour::Good),
        Level::Info => ("info ", Colour::Dim),
        Level::Warning => ("WARN ", Colour::Warn),
        Level::Error => ("ERROR", Colour::Bad),
    };
    let _ = writeln!(out, "  {} {}", text::paint(colour, shade, word), clean(&finding.message));
    for detail in finding.details.iter().take(MAX_DETAILS) {
        let _ = writeln!(out, "          {}", clean(detail));
    }
    if let Some(more) = finding.details.len().checked_sub(MAX_DETAILS).filter(|n| *n > 0) {
        let _ = writeln!(out, "          and {more} more (-o json has all)");
    }
    if !finding.remedy.is_empty() {
        let _ = writeln!(out, "          fix: {}", clean(&finding.remedy));
    }
}

/// `a, b, c` of at most some names.
fn names<T: AsRef<str>>(all: &[T]) -> String {
    let mut text = all.iter().take(5).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    if let Some(more) = all.len().checked_sub(5).filter(|n| *n > 0) {
        let _ = write!(text, " and {more} more");
    }
    text
}

#[cfg(test)]
mod tests;
