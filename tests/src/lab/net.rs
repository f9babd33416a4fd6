//! Network namespaces and links, by iproute2's batch mode.

use std::{
    fs::File,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

/// Runs `ip` with several commands at once, in the namespace with that name, or in the caller's.
///
/// # Errors
/// When `ip` refuses one; the message holds what it said.
pub fn ip_batch(netns: Option<&str>, commands: &str) -> Result<()> {
    let mut ip = Command::new("ip");
    ip.process_group(0);
    if let Some(name) = netns {
        ip.args(["-n", name]);
    }
    let mut child = ip
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("ip cannot be run; install iproute2")?;
    child.stdin.take().context("ip has no stdin")?.write_all(commands.as_bytes())?;
    let out = child.wait_with_output()?;
    if !out.status.success() {
        bail!("ip {netns:?}: {}\nof:\n{commands}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

/// Runs `work` on a thread of its own inside the network namespace at `netns`.
///
/// # Errors
/// When the namespace cannot be entered, and what `work` gives.
pub fn within<T: Send>(netns: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = File::open(netns).with_context(|| format!("open {}", netns.display()))?;
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
            work()
        });
        thread.join().map_err(|_| anyhow!("the thread inside {} panicked", netns.display()))?
    })
}

/// Sets sysctls (`net/ipv4/ip_forward=1`) inside a namespace.
///
/// # Errors
/// When one cannot be written.
pub fn sysctls(netns: &Path, settings: &[impl AsRef<str> + Sync]) -> Result<()> {
    within(netns, || {
        for setting in settings {
            let setting = setting.as_ref();
            let (key, value) = setting.split_once('=').context("a setting without =")?;
            std::fs::write(format!("/proc/sys/{key}"), value).with_context(|| format!("set {setting}"))?;
        }
        Ok(())
    })
}

/// Packets that an interface has sent and received, from `/proc/net/dev` of the namespace.
///
/// # Errors
/// When there is no such interface.
pub fn packets(netns: &Path, interface: &str) -> Result<u64> {
    let interface = format!("{interface}:");
    within(netns, move || {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let line = text.lines().find_map(|l| l.trim().strip_prefix(interface.as_str()));
        let fields: Vec<u64> = line
            .with_context(|| format!("no interface {interface}"))?
            .split_whitespace()
            .filter_map(|field| field.parse().ok())
            .collect();
        Ok(fields.get(1).zip(fields.get(9)).map(|(rx, tx)| rx + tx).unwrap_or_default())
    })
}
