//! Where a cluster's processes live: one cgroup for it in each hierarchy, and below that one for each node. In cgroup2
//! all of them can be ended at once.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

const ROOT: &str = "/sys/fs/cgroup";

/// A version 1 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Legacy {
    /// Its folder below [`ROOT`].
    folder: String,
    /// The mount options that give it again: its controllers or its name.
    options: String,
}

/// The hierarchies of this machine.
#[derive(Debug)]
pub(crate) struct Hierarchies {
    unified: PathBuf,
    legacy: Vec<Legacy>,
}

impl Hierarchies {
    /// Those that are mounted.
    ///
    /// # Errors
    /// When cgroup2 is not mounted.
    pub(crate) fn find() -> Result<Self> {
        Self::parse(&fs::read_to_string("/proc/self/mountinfo")?)
    }

    fn parse(mountinfo: &str) -> Result<Self> {
        let mut unified = None;
        let mut legacy = Vec::new();
        for line in mountinfo.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let at = before.split(' ').nth(4).unwrap_or_default();
            let mut after = after.split(' ');
            match (after.next(), after.nth(1), at.strip_prefix(ROOT)) {
                (Some("cgroup2"), _, Some(_)) => unified = Some(PathBuf::from(at)),
                (Some("cgroup"), Some(options), Some(folder)) => {
                    let ours = |option: &&str| {
                        !["rw", "ro", "xattr", "clone_children"].contains(option)
                            && !option.starts_with("release_agent=")
                    };
                    let mut options: Vec<&str> = options.split(',').filter(ours).collect();
                    if options.iter().any(|option| option.starts_with("name=")) {
                        options.insert(0, "none");
                    }
                    legacy.push(Legacy {
                        folder: folder.trim_matches('/').to_owned(),
                        options: options.join(","),
                    });
                }
                _ => {}
            }
        }
        let unified = unified.with_context(|| {
            format!("cgroup2 is not mounted below {ROOT}; `mkdir -p {ROOT}/unified && mount -t cgroup2 none {ROOT}/unified`")
        })?;
        Ok(Self { unified, legacy })
    }

    /// The version 1 hierarchies for a node's first process: `folder:options` for each.
    pub(crate) fn describe(&self) -> String {
        let list: Vec<String> =
            self.legacy.iter().map(|one| format!("{}:{}", one.folder, one.options)).collect();
        list.join(" ")
    }

    /// Where a node finds cgroup2.
    pub(crate) fn unified(&self) -> &Path {
        &self.unified
    }

    /// The folders of the group `name` (such as `weft-x/node1`) in each hierarchy.
    fn folders(&self, name: &str) -> Vec<PathBuf> {
        let legacy = self.legacy.iter().map(|one| Path::new(ROOT).join(&one.folder).join(name));
        legacy.chain([self.unified.join(name)]).collect()
    }

    /// Makes the group in each hierarchy, and gives its folders.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn make(&self, name: &str) -> Result<Vec<PathBuf>> {
        let mut path = PathBuf::new();
        for part in Path::new(name).components() {
            let above = path.clone();
            path.push(part);
            for (root, folder) in self.folders("").into_iter().zip(self.folders(&path.to_string_lossy())) {
                if root == self.unified {
                    delegate(&root.join(&above));
                }
                if folder.is_dir() {
                    continue;
                }
                fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
                // A new version 1 cpuset is empty, and takes no process.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if root != self.unified && folder.join(file).exists() {
                        fs::write(folder.join(file), fs::read(root.join(&above).join(file))?)?;
                    }
                }
            }
        }
        Ok(self.folders(name))
    }

    /// Ends every process of the group and of those below it, and removes them.
    ///
    /// # Errors
    /// When something stays.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let unified = self.unified.join(name);
        if unified.is_dir() {
            fs::write(unified.join("cgroup.kill"), "1").context("end the cluster's processes")?;
            patiently(|| {
                let events = fs::read_to_string(unified.join("cgroup.events"))?;
                if !events.contains("populated 0") {
                    bail!("processes still run in {}", unified.display());
                }
                Ok(())
            })?;
        }
        for folder in self.folders(name) {
            patiently(|| remove_tree(&folder))?;
        }
        Ok(())
    }

    /// What of the group is left.
    pub(crate) fn left(&self, name: &str) -> Vec<PathBuf> {
        self.folders(name).into_iter().filter(|folder| folder.exists()).collect()
    }
}

/// Lets the groups below use what this one may use. On a hybrid machine cgroup2 has no controllers, and in the root of
/// a container some cannot be handed on: a node then counts without them.
fn delegate(folder: &Path) {
    let controllers = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

fn remove_tree(folder: &Path) -> Result<()> {
    let Ok(list) = fs::read_dir(folder) else { return Ok(()) };
    for child in list.flatten().filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_tree(&child.path())?;
    }
    fs::remove_dir(folder).with_context(|| format!("remove {}", folder.display()))
}

/// The kernel ends processes and forgets groups a little after it was asked to.
fn patiently(mut step: impl FnMut() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    loop {
        match step() {
            Ok(()) => return Ok(()),
            Err(error) if start.elapsed() >= Duration::from_secs(20) => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_and_unified_machines() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
                      40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:3 - cgroup2 cgroup2 rw\n";
        let found = Hierarchies::parse(hybrid).unwrap();
        assert_eq!(found.describe(), "cpu,cpuacct:cpu,cpuacct systemd:none,name=systemd");
        assert_eq!(found.unified(), Path::new("/sys/fs/cgroup/unified"));
        let unified = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = Hierarchies::parse(unified).unwrap();
        assert_eq!((found.describe().as_str(), found.unified()), ("", Path::new("/sys/fs/cgroup")));
        assert!(Hierarchies::parse("").unwrap_err().to_string().contains("mount -t cgroup2"));
    }
}
