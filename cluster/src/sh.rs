//! Running other programs.

use std::{
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// The program's path, searched as a shell does and in the folders that a user's PATH may lack.
pub(crate) fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin", "/usr/local/go/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// The program's path.
///
/// # Errors
/// When it is not installed; names the Debian package.
pub(crate) fn need(name: &str, package: &str) -> Result<PathBuf> {
    which(name).with_context(|| format!("{name} is missing; `apt-get install {package}` brings it"))
}

/// Runs a command to its end, with `input`, and gives what it printed. It stands in a process group of its own, so
/// that a Ctrl-C reaches only the process that will clean up.
///
/// # Errors
/// When it cannot run or fails; the message holds what it wrote to stderr.
pub(crate) fn output(command: &mut Command, input: Option<&[u8]>) -> Result<String> {
    let out = finish(command, input)?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("{} failed ({}): {}", describe(command), out.status, tail(&said, 20));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// As [`output`], whatever the exit code.
///
/// # Errors
/// When it cannot run.
pub(crate) fn finish(command: &mut Command, input: Option<&[u8]>) -> Result<Output> {
    command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.spawn().with_context(|| format!("run {}", describe(command)))?;
    let pipe = child.stdin.take();
    thread::scope(|scope| {
        if let (Some(mut pipe), Some(input)) = (pipe, input) {
            // A program that ends early closes its end; its exit code tells.
            scope.spawn(move || pipe.write_all(input));
        }
        child.wait_with_output().with_context(|| format!("run {}", describe(command)))
    })
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The words of a command; of one that is entered by a wrapper, those after the first `--`.
fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    let inner = words.iter().position(|word| word == "--").filter(|_| words[0] == "sh");
    let text = words.split_off(inner.map_or(0, |at| at + 1)).join(" ");
    text.chars().take(300).collect()
}

/// Tries `step` every `pause` until it gives something.
///
/// # Errors
/// What `step` gives as an error at once, or that `what` did not happen within `limit`.
pub(crate) fn until<T>(
    limit: Duration,
    pause: Duration,
    what: &str,
    mut step: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = step()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            bail!("{what} did not happen in {} s", limit.as_secs());
        }
        thread::sleep(pause);
    }
}
