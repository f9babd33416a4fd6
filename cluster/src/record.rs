//! What a cluster has put on the machine, on disk before it is made: so that another process can find it, and remove
//! it after a crash.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{cgroup::Hierarchies, net, options::Options};

/// A cluster on this machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// What it is.
    pub options: Options,
    /// The process that it ends with (id, and when that began: an id is used again); none where it stays.
    pub owner: Option<(u32, u64)>,
}

/// When a process that runs began, in ticks after boot (field 22 of `/proc/PID/stat`). One that has ended and was not
/// buried yet does not run.
pub(crate) fn began(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Free bytes that a cluster starts with: the images and layers of its nodes, its database, and what the kubelets keep
/// free ([`crate::node`]).
const ROOM: u64 = 1 << 30;

/// Where clusters keep their folders: `WEFT_CLUSTER_DIR`, else `/var/tmp/weft-cluster`.
pub fn base() -> PathBuf {
    env::var_os("WEFT_CLUSTER_DIR").map_or_else(|| PathBuf::from("/var/tmp/weft-cluster"), PathBuf::from)
}

/// Held while records come and go: another process neither sweeps the same cluster meanwhile nor takes the folder of
/// all clusters away.
fn alone() -> Result<File> {
    let base = base();
    let parent = base.parent().filter(|parent| parent.is_dir()).unwrap_or_else(|| Path::new("/"));
    let lock = File::open(parent).with_context(|| format!("open {}", parent.display()))?;
    lock.lock().with_context(|| format!("lock {}", parent.display()))?;
    Ok(lock)
}

/// Refuses a disk on which the kubelets would soon evict what the cluster is for.
fn enough_room(at: &Path) -> Result<()> {
    let disk =
        nix::sys::statvfs::statvfs(at).with_context(|| format!("ask what is free at {}", at.display()))?;
    let free = disk.blocks_available() * disk.fragment_size();
    if free < ROOM {
        bail!(
            "{} has {} MiB free and a cluster needs {}: remove something there (`cargo clean` gives back what builds \
             keep) or set WEFT_CLUSTER_DIR to a folder on another disk",
            at.display(),
            free >> 20,
            ROOM >> 20,
        );
    }
    Ok(())
}

impl Record {
    /// A new one of this process. Its folder is made.
    ///
    /// # Errors
    /// When the options make no sense, a cluster of that name stands, or the disk is full.
    pub fn new(options: &Options) -> Result<Self> {
        let name = match &options.name {
            Some(name) => name.clone(),
            None => unique(),
        };
        let fits = (1..=12).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if !fits {
            bail!("{name:?} is no name for a cluster: at most 12 of a-z, 0-9 and -");
        }
        if !(1..=9).contains(&options.nodes) {
            bail!("{} nodes: 1 to 9 are possible", options.nodes);
        }
        let pid = std::process::id();
        let record =
            Self { name, options: options.clone(), owner: Some((pid, began(pid).unwrap_or_default())) };
        let folder = record.folder();
        if let Some(covered) = crate::node::COVERED.iter().find(|covered| folder.starts_with(covered)) {
            bail!(
                "{} lies below {covered}, which each node replaces; set WEFT_CLUSTER_DIR",
                folder.display()
            );
        }
        let _alone = alone()?;
        fs::create_dir_all(base()).with_context(|| format!("make {}; is this root?", base().display()))?;
        enough_room(&base())?;
        match fs::create_dir(&folder) {
            Ok(()) => record.save()?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => bail!(
                "the cluster {} stands already; `cargo xtask cluster down --name {0}` removes it",
                record.name
            ),
            Err(error) => return Err(error).with_context(|| format!("make {}", folder.display())),
        }
        Ok(record)
    }

    /// Writes it.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self) -> Result<()> {
        let part = self.folder().join("record.json.part");
        fs::write(&part, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", part.display()))?;
        Ok(fs::rename(&part, self.folder().join("record.json"))?)
    }

    /// Every cluster on this machine.
    pub fn all() -> Vec<Self> {
        let mut all: Vec<Self> = fs::read_dir(base())
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|folder| fs::read(folder.path().join("record.json")).ok())
            .filter_map(|bytes| serde_json::from_slice(&bytes).ok())
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Removes the clusters whose process ended without doing it.
    ///
    /// # Errors
    /// When something stays.
    pub fn sweep(say: &dyn Fn(&str)) -> Result<()> {
        let _alone = alone()?;
        for record in Self::all().iter().filter(|record| record.abandoned()) {
            say(&format!("removing the cluster {}, whose process is gone", record.name));
            record.clear()?;
        }
        Ok(())
    }

    /// Whether the process that it should end with is gone.
    pub fn abandoned(&self) -> bool {
        self.owner.is_some_and(|(pid, start)| began(pid) != Some(start))
    }

    /// Its folder.
    pub fn folder(&self) -> PathBuf {
        base().join(&self.name)
    }

    /// The control plane's network namespace.
    pub(crate) fn control_netns(&self) -> String {
        format!("weft-{}-cp", self.name)
    }

    /// A node's network namespace.
    pub(crate) fn node_netns(&self, node: u8) -> String {
        format!("weft-{}-n{node}", self.name)
    }

    /// Its cgroup in each hierarchy.
    pub(crate) fn group(&self) -> String {
        format!("weft-cluster-{}", self.name)
    }

    /// Ends every process and removes everything.
    ///
    /// # Errors
    /// Names what stayed.
    pub fn remove(&self) -> Result<()> {
        self.clear()?;
        let _alone = alone()?;
        // Gone with the last cluster; while others stand it is not empty, which is fine.
        let _ = fs::remove_dir(base());
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        Hierarchies::find()?.remove(&self.group())?;
        for netns in self.netns() {
            net::remove(&netns)?;
        }
        let folder = self.folder();
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        let left = self.left()?;
        if !left.is_empty() {
            bail!("still there: {}", left.join(", "));
        }
        Ok(())
    }

    /// What of it is on the machine.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn left(&self) -> Result<Vec<String>> {
        let mut left: Vec<String> = self.netns().filter(|netns| net::path(netns).exists()).collect();
        left.extend(Hierarchies::find()?.left(&self.group()).iter().map(|path| path.display().to_string()));
        let folder = self.folder().display().to_string();
        if Path::new(&folder).exists() {
            left.push(folder.clone());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        left.extend(mounts.lines().filter(|line| line.contains(&format!("{folder}/"))).map(str::to_owned));
        Ok(left)
    }

    fn netns(&self) -> impl Iterator<Item = String> + '_ {
        (1..=self.options.nodes).map(|node| self.node_netns(node)).chain([self.control_netns()])
    }
}

fn unique() -> String {
    use std::sync::atomic::{AtomicU8, Ordering};
    static MADE: AtomicU8 = AtomicU8::new(0);
    let serial = MADE.fetch_add(1, Ordering::Relaxed);
    format!("c{:x}{}", std::process::id(), char::from(b'a' + serial % 26))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_refused() {
        // A file system without a single free block.
        let refused = enough_room(Path::new("/proc")).expect_err("no room");
        assert!(refused.to_string().contains("/proc has 0 MiB free"), "{refused}");
    }
}
