//! What the machine gives: the cgroup2 mount, and the built binaries.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};

/// Where cgroup2 is mounted, from `/proc/self/mountinfo` (on hybrid machines not at `/sys/fs/cgroup`).
///
/// # Errors
/// When mountinfo cannot be read.
pub fn cgroup2_mount() -> Result<Option<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    Ok(text.lines().find_map(cgroup2_of))
}

/// The mount point of a mountinfo line, where it is a writable cgroup2 whose root is the hierarchy's root.
fn cgroup2_of(line: &str) -> Option<PathBuf> {
    let (left, right) = line.split_once(" - ")?;
    let mut right = right.split(' ');
    let left: Vec<&str> = left.split(' ').collect();
    (right.next() == Some("cgroup2")).then_some(())?;
    (!left.get(5)?.split(',').any(|option| option == "ro")).then_some(())?;
    Some(PathBuf::from(left.get(4)?.replace("\\040", " ")))
}

/// Mounts a file system of type `kind` at `at`, which is made where missing.
///
/// # Errors
/// What the kernel says.
pub fn mount_at(kind: &str, at: &Path) -> Result<()> {
    fs::create_dir_all(at)?;
    mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mount {kind} at {}; is this root with CAP_SYS_ADMIN?", at.display()))
}

/// The built programs.
#[derive(Debug, Clone)]
pub struct Bins {
    dir: PathBuf,
}

impl Bins {
    /// Finds them: in `WEFT_BIN_DIR`, else beside the running program or in the folder above it (where cargo
    /// puts tests).
    ///
    /// # Errors
    /// When one is missing; says what to run.
    pub fn find() -> Result<Self> {
        let exe = env::current_exe().context("the running program's own path")?;
        let folders: Vec<PathBuf> = match env::var_os("WEFT_BIN_DIR") {
            Some(dir) => vec![PathBuf::from(dir)],
            None => exe.ancestors().skip(1).take(2).map(Path::to_path_buf).collect(),
        };
        let wanted = ["weft-lab-app"];
        let dir = folders.iter().find(|dir| wanted.iter().all(|name| dir.join(name).is_file()));
        let dir = dir.or(folders.first()).context("the running program has no folder")?;
        let bins = Self { dir: dir.clone() };
        bins.require(&wanted)?;
        Ok(bins)
    }

    /// An error that names those which are not built.
    ///
    /// # Errors
    /// When one is missing; says what to run.
    pub fn require(&self, names: &[&str]) -> Result<()> {
        let missing: Vec<&str> =
            names.iter().copied().filter(|name| !self.dir.join(name).is_file()).collect();
        ensure!(
            missing.is_empty(),
            "{} is not built in {}; run `cargo xtask build`",
            missing.join(", "),
            self.dir.display()
        );
        Ok(())
    }

    /// The path of one.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// The checkout that these sources were built from: its examples and its object are read from there.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_by_type() {
        let hybrid = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
        assert_eq!(cgroup2_of(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_of("35 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"), None);
        assert_eq!(cgroup2_of("41 31 0:38 / /mnt ro,relatime - cgroup2 cgroup2 ro"), None);
    }
}
