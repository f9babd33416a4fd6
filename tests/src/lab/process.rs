//! Processes of the lab: each lives in the network namespace and the cgroup of its Pod or node from its first
//! instruction, because `weft-lab-app enter` moves itself there and then becomes the program.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{lab::machine::Bins, wait};

/// What an agent says when it has nothing left to do.
const DRAINED: &str = "replaced and drained";

/// Where a process lives.
#[derive(Debug, Clone)]
pub struct Place {
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its cgroup.
    pub cgroup: PathBuf,
}

impl Place {
    /// A command that will run here.
    pub fn command(&self, bins: &Bins, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(bins.path("weft-lab-app"));
        command.arg("enter").arg("--netns").arg(&self.netns).arg("--cgroup").arg(&self.cgroup);
        command.arg("--").arg(program).stdin(Stdio::null());
        command.process_group(0);
        command
    }
}

/// A running process; ended when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output in `log` (appended).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(mut command: Command, name: &str, log: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(log)?;
        let child = command
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { child, name: name.into(), log: log.into() })
    }

    /// Its process id (the same before and after it became the program).
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), signal).with_context(|| format!("signal {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let (name, child) = (&self.name, &mut self.child);
        let (status, _) = wait::until(limit, &format!("the end of {name}"), || {
            child.try_wait()?.with_context(|| format!("{name} still runs"))
        })?;
        Ok(status)
    }

    /// An error with the end of its log, where it has ended already.
    ///
    /// # Errors
    /// When it has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended ({status}); its last lines:\n{}", self.name, self.tail(25));
        }
        Ok(())
    }

    /// The last lines of its output.
    pub fn tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Its output so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until an agent that another one took over from has drained.
    ///
    /// # Errors
    /// When it has not within `limit`.
    pub fn drained(&self, limit: Duration) -> Result<()> {
        wait::until(limit, &format!("the drain of {}", self.name), || {
            let output = self.output();
            ensure!(output.contains(DRAINED), "{} still serves:\n{}", self.name, self.tail(5));
            Ok(())
        })
        .map(drop)
    }

    /// Ends an agent that another one took over from with SIGTERM, as Kubernetes does, once it has drained.
    ///
    /// # Errors
    /// When it does not drain within `limit`, ends before it is told to, or does not end then.
    pub fn end_replaced(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.drained(limit)?;
        self.check()?;
        self.signal(Signal::SIGTERM)?;
        self.wait(limit)
    }

    /// Ends it: SIGTERM, and SIGKILL after `grace`.
    pub fn stop(&mut self, grace: Duration) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let _ = self.signal(Signal::SIGTERM);
        if self.wait(grace).is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end and gives what it printed.
///
/// # Errors
/// When it cannot start, or runs longer than `limit`.
pub fn run(mut command: Command, limit: Duration) -> Result<Output> {
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start a command")?;
    let pid = Pid::from_raw(child.id() as i32);
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let drain = |pipe: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                let _ = pipe.read_to_end(&mut bytes);
            }
            bytes
        })
    };
    let out = drain(out.map(|p| Box::new(p) as _));
    let err = drain(err.map(|p| Box::new(p) as _));
    let start = Instant::now();
    let status = wait::until_every(Duration::from_millis(2), limit, "a command", || {
        child.try_wait()?.context("it still runs")
    });
    if status.is_err() {
        let _ = kill(pid, Signal::SIGKILL);
        let _ = child.wait();
    }
    let (stdout, stderr) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    match status {
        Ok((status, _)) => Ok(Output { status, stdout, stderr }),
        Err(_) => bail!(
            "{command:?} did not end in {:.0} s; it said: {}",
            start.elapsed().as_secs_f64(),
            String::from_utf8_lossy(&stderr)
        ),
    }
}
