//! Removal, from what is recorded on disk alone: works after a crash, after `--keep`, and twice.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

/// Where labs keep their folders.
pub const LABS: &str = "/run/weft-lab";

/// What a lab has put on the machine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Record {
    /// The lab's name.
    pub name: String,
    /// Its cgroup: every process of the lab lives below it.
    pub cgroup: PathBuf,
    /// Names of its network namespaces.
    pub netns: Vec<String>,
    /// What it mounted.
    pub mounts: Vec<PathBuf>,
    /// The process that raised it.
    pub owner: u32,
    /// When that process began, in ticks after boot: a process id is used again.
    pub owner_began: u64,
}

/// When a process began, in ticks after boot (field 22 of `/proc/PID/stat`).
fn began(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = text.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

impl Record {
    /// A record of the running process.
    pub fn own(name: &str) -> Self {
        let owner = std::process::id();
        Self { name: name.into(), owner, owner_began: began(owner).unwrap_or(0), ..Self::default() }
    }

    /// Whether the process that raised it still runs.
    pub fn in_use(&self) -> bool {
        began(self.owner) == Some(self.owner_began)
    }

    /// The lab's folder.
    pub fn dir(&self) -> PathBuf {
        Path::new(LABS).join(&self.name)
    }

    /// Writes it, before anything that it names is made.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self) -> Result<()> {
        let path = self.dir().join("record.json");
        let part = self.dir().join("record.json.part");
        fs::write(&part, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&part, &path).with_context(|| format!("write {}", path.display()))
    }

    /// Every lab on this machine.
    pub fn all() -> Vec<Self> {
        let folders = fs::read_dir(LABS).into_iter().flatten().flatten();
        folders
            .filter_map(|folder| fs::read(folder.path().join("record.json")).ok())
            .filter_map(|bytes| serde_json::from_slice(&bytes).ok())
            .collect()
    }

    /// Ends every process and removes everything.
    ///
    /// # Errors
    /// Names what stayed.
    pub fn remove(&self) -> Result<()> {
        if self.cgroup.is_dir() {
            end_all(&self.cgroup)?;
        }
        for name in &self.netns {
            if Path::new("/run/netns").join(name).exists() {
                let status = Command::new("ip").args(["netns", "del", name]).process_group(0).status();
                status.context("ip netns del")?;
            }
        }
        for mount in self.mounts.iter().rev() {
            if mount.is_dir() {
                // EINVAL: it is not mounted any more.
                let _ = umount2(mount, MntFlags::MNT_DETACH);
            }
        }
        remove_cgroups(&self.cgroup)?;
        let dir = self.dir();
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
        }
        // Gone with the last lab; while others stand it is not empty, which is fine.
        let _ = fs::remove_dir(LABS);
        let left = self.leftovers();
        if !left.is_empty() {
            bail!("still there: {}", left.join(", "));
        }
        Ok(())
    }

    /// What of it is still on the machine.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for name in &self.netns {
            if Path::new("/run/netns").join(name).exists() {
                left.push(format!("namespace {name}"));
            }
        }
        if self.cgroup.exists() {
            left.push(format!("cgroup {}", self.cgroup.display()));
        }
        if self.dir().exists() {
            left.push(format!("folder {}", self.dir().display()));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for mount in &self.mounts {
            if mounts.contains(&format!(" {} ", mount.display())) {
                left.push(format!("mount {}", mount.display()));
            }
        }
        left
    }
}

fn end_all(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.kill"), "1").context("end the lab's processes")?;
    patiently(Duration::from_secs(10), || {
        let events = fs::read_to_string(cgroup.join("cgroup.events"))?;
        if events.contains("populated 0") {
            Ok(())
        } else {
            bail!("some still run below {}", cgroup.display())
        }
    })
}

/// Tries until it succeeds. Not [`crate::wait`]: a signal must not end a removal in its middle.
fn patiently(limit: Duration, mut step: impl FnMut() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    loop {
        match step() {
            Ok(()) => return Ok(()),
            Err(error) if start.elapsed() >= limit => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn remove_cgroups(cgroup: &Path) -> Result<()> {
    if !cgroup.is_dir() {
        return Ok(());
    }
    for child in fs::read_dir(cgroup)?.flatten() {
        if child.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&child.path())?;
        }
    }
    patiently(Duration::from_secs(5), || {
        fs::remove_dir(cgroup).with_context(|| format!("remove {}", cgroup.display()))
    })
}
