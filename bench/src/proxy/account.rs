//! What processes use: processor time by their cgroup, memory by `/proc`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Processor seconds that everything ever run in these cgroups has used, from `cpu.stat` (microseconds, also of
/// processes that have ended).
///
/// # Errors
/// When a cgroup is gone.
pub(crate) fn cpu(cgroups: &[PathBuf]) -> Result<f64> {
    let mut total = 0.0;
    for cgroup in cgroups {
        let path = cgroup.join("cpu.stat");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        total += line.and_then(|n| n.parse::<f64>().ok()).context("cpu.stat without usage_usec")? / 1e6;
    }
    Ok(total)
}

/// Processor seconds of the whole machine that were not idle.
///
/// # Errors
/// When `/proc/stat` cannot be read.
pub(crate) fn machine() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let fields: Vec<f64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|n| n.parse().ok())
        .collect();
    let idle = fields.get(3).copied().unwrap_or_default() + fields.get(4).copied().unwrap_or_default();
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100) as f64;
    Ok((fields.iter().sum::<f64>() - idle) / ticks)
}

/// The processes in these cgroups.
///
/// # Errors
/// When a cgroup is gone.
pub(crate) fn processes(cgroups: &[PathBuf]) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    for cgroup in cgroups {
        let text = fs::read_to_string(cgroup.join("cgroup.procs"))?;
        all.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    }
    Ok(all)
}

/// Resident memory of the processes in these cgroups, MiB.
///
/// # Errors
/// When a cgroup is gone.
pub(crate) fn rss_mib(cgroups: &[PathBuf]) -> Result<f64> {
    let kib = |pid: &u32| -> Option<f64> {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    Ok(processes(cgroups)?.iter().filter_map(kib).sum::<f64>() / 1024.0)
}

/// Makes a cgroup to run a subject in, so that its use can be told from the rest's.
///
/// # Errors
/// When it cannot be made.
pub(crate) fn room(parent: &Path, name: &str) -> Result<PathBuf> {
    let path = parent.join(name);
    fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
    Ok(path)
}
