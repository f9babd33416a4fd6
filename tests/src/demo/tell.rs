//! How the story is printed: one line for what was done, one for what was seen, and whether it is as told.

use std::{
    io::{IsTerminal as _, Write as _},
    time::Instant,
};

use anyhow::{Result, bail};

/// Prints the story and remembers what was not as told.
#[derive(Debug)]
pub struct Teller {
    start: Instant,
    colour: bool,
    wrong: Vec<String>,
}

impl Default for Teller {
    fn default() -> Self {
        Self::new()
    }
}

impl Teller {
    /// Colour only on a terminal, and not where `NO_COLOR` is set.
    pub fn new() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { start: Instant::now(), colour, wrong: Vec::new() }
    }

    /// A line as it is.
    pub fn line(&self, text: &str) {
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    /// A step's title.
    pub fn step(&self, number: u8, title: &str) {
        let (bold, plain) = if self.colour { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        self.line(&format!("{bold}{number}  {title}{plain}"));
    }

    /// What was done.
    pub fn did(&self, text: &str) {
        self.line(&format!("   {text}"));
    }

    /// What was seen, and whether it is as told.
    pub fn saw(&mut self, as_told: bool, text: &str) {
        let (colour, plain) = match (self.colour, as_told) {
            (true, true) => ("\x1b[32m", "\x1b[0m"),
            (true, false) => ("\x1b[31m", "\x1b[0m"),
            (false, _) => ("", ""),
        };
        let mark = if as_told { "ok " } else { "NOT" };
        self.line(&format!("   {colour}{mark}{plain} {text}"));
        if !as_told {
            self.wrong.push(text.into());
        }
    }

    /// What was not as told so far.
    pub fn wrong(&self) -> &[String] {
        &self.wrong
    }

    /// The last line.
    ///
    /// # Errors
    /// When something was not as told.
    pub fn end(&self) -> Result<()> {
        let seconds = self.start.elapsed().as_secs_f64();
        if self.wrong.is_empty() {
            self.line(&format!("The story was as told, in {seconds:.0} s."));
            return Ok(());
        }
        bail!(
            "{} of the story's claims were not as told (in {seconds:.0} s):\n  {}",
            self.wrong.len(),
            self.wrong.join("\n  ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_false_claim_fails_the_story() {
        let mut tell = Teller::new();
        tell.saw(true, "true");
        assert!(tell.end().is_ok());
        tell.saw(false, "false");
        let error = tell.end().unwrap_err().to_string();
        assert!(error.starts_with("1 of") && error.contains("false"), "{error}");
    }
}
