//! The programs' debug lines.

use std::{fmt, io, os::fd::AsFd as _};

use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

/// The programs' debug lines, on their way to `tracing`.
pub struct BpfLog {
    lines: Option<EbpfLogger<Forward>>,
}

impl fmt::Debug for BpfLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BpfLog")
    }
}

/// Turns a line into an event of `tracing`, whatever level the program gave it.
struct Forward;

impl log::Log for Forward {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::debug!(target: "weft::bpf", level = %record.level(), "{}", record.args());
    }

    fn flush(&self) {}
}

impl BpfLog {
    /// Takes the log of a loaded object; without one, nothing will be logged.
    pub(super) fn open(object: &mut aya::Ebpf) -> Self {
        let lines = EbpfLogger::init_with_logger(object, Forward);
        if let Err(error) = &lines {
            tracing::warn!(%error, "the BPF object was built without log lines");
        }
        Self { lines: lines.ok() }
    }

    /// Forwards lines until the log cannot be read any more.
    ///
    /// # Errors
    /// When the log cannot be waited for.
    pub async fn run(self) -> io::Result<()> {
        let Some(mut lines) = self.lines else { return Ok(()) };
        let readable = lines.as_fd().try_clone_to_owned()?;
        // SAFETY: the AsyncFd owns the descriptor, and nothing replaces it.
        let readable = unsafe { AsyncFd::register_with_interest(readable, Interest::READABLE) }?;
        loop {
            let mut guard = readable.readable().await?;
            lines.flush();
            guard.clear_ready();
        }
    }
}
