//! Programs that run beside a measurement.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Something that runs beside a load, until its standard input closes or by itself; killed when dropped.
#[derive(Debug)]
pub(crate) struct Beside {
    child: Child,
    said: String,
}

impl Beside {
    /// Starts it, and waits for a first line that begins with a word where one is given.
    ///
    /// # Errors
    /// When it cannot be started or says something else.
    pub(crate) fn start(mut command: Command, until: Option<&str>) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn()?;
        let mut said = String::new();
        if let Some(word) = until {
            let mut out = BufReader::new(child.stdout.take().context("no output")?);
            out.read_line(&mut said)?;
            if !said.starts_with(word) {
                let _ = child.kill();
                let _ = child.wait();
                bail!("{command:?} said {said:?}, not {word}");
            }
            child.stdout = Some(out.into_inner());
        }
        Ok(Self { child, said })
    }

    /// The first line, where one was waited for.
    pub(crate) fn said(&self) -> &str {
        &self.said
    }

    /// Lets it begin.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn begin(&mut self) -> Result<()> {
        Ok(self.child.stdin.take().context("no input")?.write_all(b"\n")?)
    }

    /// What it says to its end.
    ///
    /// # Errors
    /// When that cannot be read.
    pub(crate) fn rest(&mut self) -> Result<String> {
        let mut text = String::new();
        self.child.stdout.take().context("no output")?.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Ends it.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub(crate) fn end(self) -> Result<()> {
        self.finish().map(drop)
    }

    /// Has it end, without waiting for that.
    pub(crate) fn ask(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Whether it runs no more.
    ///
    /// # Errors
    /// When the system does not say.
    pub(crate) fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Ends it, and gives what it said.
    ///
    /// # Errors
    /// When its output cannot be read.
    pub(crate) fn finish(mut self) -> Result<String> {
        self.ask();
        let said = self.rest()?;
        self.child.wait()?;
        Ok(said)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
