//! Ctrl-C and SIGTERM: every wait ends with an error, the lab is dropped on the way out, and so nothing stays.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Result, bail};
use nix::sys::signal::{SigSet, Signal};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Takes SIGINT and SIGTERM from now on. Called before any other thread is made.
///
/// # Errors
/// When the mask cannot be set.
pub fn watch() -> Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        while set.wait().is_ok() {
            INTERRUPTED.store(true, Ordering::Release);
        }
    })?;
    Ok(())
}

/// Whether a signal came.
pub fn came() -> bool {
    INTERRUPTED.load(Ordering::Acquire)
}

/// An error once a signal came.
///
/// # Errors
/// Then.
pub fn check() -> Result<()> {
    if came() {
        bail!("interrupted");
    }
    Ok(())
}
