//! Connections that are watched while something fails: one that stands, or one after another.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::Fate;
use crate::{
    app::calls::{Target, kind_of},
    http, wait,
};

/// Exchanges with a server that greets and echoes lines (`banner`), and tells how each went: `ok` or `bad` with the
/// reason.
#[derive(Debug, Clone, Args)]
pub struct Watch {
    #[command(flatten)]
    target: Target,
    /// One connection for all exchanges; its end is the end. Without it, a new one for each.
    #[arg(long)]
    running: bool,
    /// Milliseconds between exchanges.
    #[arg(long, default_value_t = 100)]
    pace_ms: u64,
    /// Seconds until it ends by itself.
    #[arg(long, default_value_t = 900)]
    limit_s: u64,
}

type Line = BufReader<TcpStream>;

impl Watch {
    /// Watches until the limit, or the end of the one connection.
    ///
    /// # Errors
    /// None: a failed exchange is a line.
    pub fn run(self) -> Result<Value> {
        let begin = Instant::now();
        let mut standing: Option<Line> = None;
        let (mut ok, mut bad) = (0_u64, 0_u64);
        while begin.elapsed() < Duration::from_secs(self.limit_s) {
            match self.exchange(&mut standing) {
                Ok(()) => {
                    ok += 1;
                    crate::app::say("ok");
                }
                Err(error) => {
                    bad += 1;
                    crate::app::say(&format!("bad {}", kind_of(&error)));
                    if self.running {
                        break;
                    }
                }
            }
            thread::sleep(Duration::from_millis(self.pace_ms));
        }
        Ok(json!({"ok": ok, "bad": bad}))
    }

    fn exchange(&self, standing: &mut Option<Line>) -> Result<()> {
        let mut line = match standing.take() {
            Some(line) => line,
            None => {
                let stream = http::dial(&self.target.to, Duration::from_millis(self.target.timeout_ms))?;
                let mut line = BufReader::new(stream);
                ensure!(heard(&mut line)?.starts_with("220 "), "another greeting");
                line
            }
        };
        line.get_mut().write_all(b"are you there?\n")?;
        ensure!(heard(&mut line)? == "are you there?\n", "another answer");
        if self.running {
            *standing = Some(line);
        }
        Ok(())
    }
}

fn heard(line: &mut Line) -> Result<String> {
    let mut text = String::new();
    if line.read_line(&mut text)? == 0 {
        bail!("the connection was closed");
    }
    Ok(text)
}

/// How exchanges went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Those that went well.
    pub ok: usize,
    /// The reasons of the others.
    pub bad: Vec<String>,
}

impl Seen {
    /// Reads the lines of a [`Watch`], without the first `from` exchanges.
    pub fn of(output: &str, from: usize) -> Self {
        let mut seen = Self::default();
        for line in output.lines().filter(|line| *line == "ok" || line.starts_with("bad")).skip(from) {
            match line.strip_prefix("bad ") {
                None => seen.ok += 1,
                Some(why) => seen.bad.push(why.to_owned()),
            }
        }
        seen
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.ok + self.bad.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The fate of new connections.
    ///
    /// # Errors
    /// When some went well and some did not.
    pub fn fate(&self) -> Result<Fate> {
        match (self.ok, self.bad.len()) {
            (0, 0) => Ok(Fate::None),
            (_, 0) => Ok(Fate::GoOn),
            (0, _) => Ok(Fate::Refused),
            _ => bail!("{} went well and {} did not: {:?}", self.ok, self.bad.len(), self.bad),
        }
    }
}

/// A [`Watch`] that runs, by what it has printed so far.
pub trait Watched {
    /// What it has printed.
    ///
    /// # Errors
    /// When that cannot be read.
    fn printed(&self) -> Result<String>;

    /// How many exchanges there were.
    ///
    /// # Errors
    /// As [`Self::printed`].
    fn mark(&self) -> Result<usize> {
        Ok(Seen::of(&self.printed()?, 0).len())
    }

    /// What happened after `mark`, as soon as there are `count` exchanges.
    ///
    /// # Errors
    /// When there are not as many in time.
    fn after(&self, mark: usize, count: usize) -> Result<Seen> {
        let (seen, _) =
            wait::until_every(Duration::from_millis(50), Duration::from_secs(60), "exchanges", || {
                let text = self.printed()?;
                let seen = Seen::of(&text, mark);
                ensure!(seen.len() >= count, "{} of {count}; it says {}", seen.len(), end(&text));
                Ok(seen)
            })?;
        Ok(seen)
    }

    /// Waits until `count` exchanges in a row went as `fate` says.
    ///
    /// # Errors
    /// When they do not in `limit`.
    fn settled(&self, fate: Fate, count: usize, limit: Duration) -> Result<()> {
        let what = format!("connections that {}", fate.text());
        wait::until_every(Duration::from_millis(100), limit, &what, || {
            let text = self.printed()?;
            let all = Seen::of(&text, 0).len();
            let last = Seen::of(&text, all.saturating_sub(count));
            ensure!(last.len() == count && last.fate().ok() == Some(fate), "the last are {last:?}");
            Ok(())
        })
        .map(drop)
    }

    /// The fate of a connection that stands: whether it has ended, or goes on for `count` exchanges more.
    ///
    /// # Errors
    /// When there is neither in time.
    fn still(&self, count: usize) -> Result<Fate> {
        self.standing(0, self.mark()? + count)
    }

    /// The fate of a connection that stands, after `mark`, once `count` exchanges are over or it has ended.
    ///
    /// # Errors
    /// When there is neither in time.
    fn standing(&self, mark: usize, count: usize) -> Result<Fate> {
        let (fate, _) =
            wait::until_every(Duration::from_millis(50), Duration::from_secs(60), "exchanges", || {
                let text = self.printed()?;
                let seen = Seen::of(&text, mark);
                if !seen.bad.is_empty() {
                    return Ok(Fate::End);
                }
                ensure!(seen.ok >= count, "{} of {count}; it says {}", seen.ok, end(&text));
                Ok(Fate::GoOn)
            })?;
        Ok(fate)
    }
}

impl Watched for crate::lab::Process {
    fn printed(&self) -> Result<String> {
        Ok(self.output())
    }
}

fn end(text: &str) -> String {
    text.lines().rev().take(3).collect::<Vec<_>>().join(" | ")
}

/// Starts a [`Watch`] in a Pod of a lab.
///
/// # Errors
/// When it cannot be started.
pub fn in_lab(
    lab: &crate::Lab,
    pod: &str,
    name: &str,
    to: &str,
    running: bool,
) -> Result<crate::lab::Process> {
    let mut args = vec!["watch", "--to", to, "--timeout-ms", "3000"];
    args.extend(running.then_some("--running"));
    let watch = lab.spawn_app(pod, name, &args)?;
    watch.after(0, 3).with_context(|| format!("watch {to} from {pod}"))?;
    Ok(watch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_is_counted_from_a_mark() {
        let text = "ok\nok\nbad ConnectionRefused\npeer 1\nbad TimedOut\n";
        let all = Seen::of(text, 0);
        assert_eq!((all.ok, all.len()), (2, 4));
        assert!(all.fate().is_err());
        assert_eq!(Seen::of(text, 2).fate().unwrap(), Fate::Refused);
        assert_eq!(Seen::of("ok\n", 0).fate().unwrap(), Fate::GoOn);
        assert_eq!(Seen::of(text, 9).fate().unwrap(), Fate::None);
    }
}
