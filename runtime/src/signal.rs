//! The signals that end a process.

use std::{future::pending, io};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Waits for SIGTERM or SIGINT and names the one that came.
///
/// Where a handler cannot be installed, that is logged, and the signal keeps its default effect: it ends the
/// process at once.
pub async fn shutdown() -> &'static str {
    let (mut term, mut int) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    tokio::select! {
        () = received(&mut term, "SIGTERM") => "SIGTERM",
        () = received(&mut int, "SIGINT") => "SIGINT",
    }
}

async fn received(signal: &mut io::Result<Signal>, name: &'static str) {
    match signal {
        Ok(signal) => {
            if signal.recv().await.is_some() {
                return;
            }
        }
        Err(error) => {
            tracing::error!(name, %error, "cannot handle the signal: it will end the process without a drain");
        }
    }
    pending::<()>().await;
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal, getpid, kill_process};

    use super::shutdown;

    /// One test for both: signals are the whole process's.
    #[tokio::test]
    async fn both_signals_are_named() {
        for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
            let mut waiting = std::pin::pin!(shutdown());
            // The first poll installs the handlers.
            assert!(futures_util::poll!(waiting.as_mut()).is_pending());
            kill_process(getpid(), signal).unwrap();
            assert_eq!(waiting.await, name);
        }
    }
}
