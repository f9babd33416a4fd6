//! A program under a clock that is off, for one process and its threads: the kernel has no namespace for the time of
//! day, so its calls are watched (ptrace) and their answers moved. CLOCK_MONOTONIC stays as it is.

use std::{fs, path::PathBuf};

use anyhow::Result;
use clap::Args;
use serde_json::Value;

/// Runs a program whose time of day is moved by what a file says, in seconds; the file is read at each question, so
/// that the clock can jump.
#[derive(Debug, Clone, Args)]
pub struct Clock {
    /// The file; 0 where there is none.
    #[arg(long)]
    offset: PathBuf,
    /// Stop, and become the program when continued: how this begins it.
    #[arg(long, hide = true)]
    stopped: bool,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

impl Clock {
    fn seconds(&self) -> i64 {
        fs::read_to_string(&self.offset).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// Runs it to its end, which becomes this process's.
    ///
    /// # Errors
    /// When it cannot be run or watched.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn run(self) -> Result<Value> {
        anyhow::bail!("clocks can be moved on x86-64 only: {} s were asked for", self.seconds())
    }

    /// Runs it to its end, which becomes this process's.
    ///
    /// # Errors
    /// When it cannot be run or watched.
    #[cfg(target_arch = "x86_64")]
    pub fn run(self) -> Result<Value> {
        if self.stopped { x86::become_it(&self) } else { x86::run(&self) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{os::unix::process::CommandExt as _, process::Command};

    use anyhow::{Context as _, Result, bail};
    use nix::{
        errno::Errno,
        sys::{
            ptrace::{self, Options},
            signal::{Signal, kill, raise},
            wait::{WaitPidFlag, WaitStatus, waitpid},
        },
        unistd::Pid,
    };
    use serde_json::{Value, json};

    use super::Clock;

    const GETTIMEOFDAY: u64 = 96;
    const TIME: u64 = 201;
    const CLOCK_GETTIME: u64 = 228;
    /// CLOCK_REALTIME and its coarse form.
    const TIME_OF_DAY: [u64; 2] = [0, 5];
    /// Where the kernel says that its own code for the time lies: a program that finds none makes real calls.
    const AT_SYSINFO_EHDR: i64 = 33;
    const AT_IGNORE: i64 = 1;

    pub(super) fn run(clock: &Clock) -> Result<Value> {
        // It waits until it is watched, and then becomes the program.
        let mut command = Command::new("/proc/self/exe");
        command.args(["clock", "--stopped", "--offset"]).arg(&clock.offset).arg("--").args(&clock.command);
        let child = command.spawn()?;
        let main = Pid::from_raw(i32::try_from(child.id())?);
        waitpid(main, Some(WaitPidFlag::WUNTRACED))?;
        let options = Options::PTRACE_O_EXITKILL
            | Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK;
        ptrace::seize(main, options).context("watch the program; is this root?")?;
        kill(main, Signal::SIGCONT)?;
        loop {
            match waitpid(None, Some(WaitPidFlag::__WALL)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == main => return Ok(json!({"exit": code})),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == main => bail!("ended by {signal}"),
                Ok(WaitStatus::PtraceSyscall(pid)) => {
                    passing(answered(pid, clock))?;
                    passing(ptrace::syscall(pid, None))?;
                }
                Ok(WaitStatus::PtraceEvent(pid, _, event)) => {
                    if event == ptrace::Event::PTRACE_EVENT_EXEC as i32 {
                        passing(without_own_clock(pid))?;
                    }
                    passing(ptrace::syscall(pid, None))?;
                }
                Ok(WaitStatus::Stopped(pid, signal)) => passing(ptrace::syscall(pid, signal))?,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("wait for the program"),
            }
        }
    }

    pub(super) fn become_it(clock: &Clock) -> Result<Value> {
        raise(Signal::SIGSTOP)?;
        let (program, arguments) = clock.command.split_first().context("no program")?;
        Err(Command::new(program).args(arguments).exec()).with_context(|| format!("become {program}"))
    }

    /// A thread may end at any time.
    fn passing(result: nix::Result<()>) -> Result<()> {
        match result {
            Ok(()) | Err(Errno::ESRCH | Errno::EIO | Errno::EFAULT) => Ok(()),
            Err(error) => Err(error).context("watch the program"),
        }
    }

    /// Moves the answer of a call that asked for the time of day.
    fn answered(pid: Pid, clock: &Clock) -> nix::Result<()> {
        let mut registers = ptrace::getregs(pid)?;
        let call = registers.orig_rax;
        let place = match call {
            CLOCK_GETTIME if registers.rax == 0 && TIME_OF_DAY.contains(&registers.rdi) => registers.rsi,
            GETTIMEOFDAY if registers.rax == 0 => registers.rdi,
            // At its beginning a call has a negative number where its answer will be.
            TIME if registers.rax as i64 > 0 => registers.rdi,
            _ => return Ok(()),
        };
        let seconds = clock.seconds();
        if place != 0 {
            let told = ptrace::read(pid, place as ptrace::AddressType)?;
            ptrace::write(pid, place as ptrace::AddressType, told + seconds)?;
        }
        if call == TIME {
            registers.rax = registers.rax.wrapping_add_signed(seconds);
            ptrace::setregs(pid, registers)?;
        }
        Ok(())
    }

    /// Hides the kernel's own code for the time from a program that begins.
    fn without_own_clock(pid: Pid) -> nix::Result<()> {
        let word = |at: u64| ptrace::read(pid, at as ptrace::AddressType);
        let mut at = ptrace::getregs(pid)?.rsp;
        // The number of arguments, the arguments, nothing, the environment, nothing, then pairs until a zero.
        at += 8 * (word(at)?.unsigned_abs() + 2);
        while word(at)? != 0 {
            at += 8;
        }
        at += 8;
        loop {
            match word(at)? {
                0 => return Ok(()),
                AT_SYSINFO_EHDR => return ptrace::write(pid, at as ptrace::AddressType, AT_IGNORE),
                _ => at += 16,
            }
        }
    }
}
