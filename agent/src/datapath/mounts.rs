//! The two filesystems the datapath stands on: a bpffs for pins, and the cgroup2 hierarchy Pods live in.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FsWord, fstat, statfs},
    mount::{MountFlags, mount},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::error::DatapathError;

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
pub(super) const BPF_FS: FsWord = 0xcafe_4a11;
/// Where a cgroup2 hierarchy is mounted on a node that has none.
const OWN_CGROUP_MOUNT: &str = "/run/weft/cgroup2";

/// Makes `path` a folder on a bpffs, mounting one where there is none.
pub(super) fn bpffs(path: &Path) -> Result<(), DatapathError> {
    let on_bpffs = |path: &Path| statfs(path).is_ok_and(|s| s.f_type == BPF_FS);
    let prepare = || -> io::Result<()> {
        let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
        if !on_bpffs(existing) {
            // Below /sys no folder can be made: the mount goes onto what is there.
            let target = if fs::create_dir_all(path).is_ok() { path } else { existing };
            mount("bpf", target, "bpf", MountFlags::empty(), None)?;
        }
        for folder in ["maps", "links", "filters"] {
            fs::create_dir_all(path.join(folder))?;
        }
        Ok(())
    };
    prepare().map_err(|source| DatapathError::Bpffs { path: path.to_owned(), source })
}

/// The cgroup below which programs are attached.
#[derive(Debug)]
pub(super) struct CgroupRoot {
    path: PathBuf,
    folder: File,
    id: u64,
}

impl CgroupRoot {
    /// Opens the configured root, or finds the node's: PID 1's cgroup2 mount, because a container's own is only
    /// its subtree.
    pub(super) fn open(configured: Option<&Path>) -> Result<Self, DatapathError> {
        let failed = |source| DatapathError::CgroupRoot { source };
        let path = match configured {
            Some(path) => path.to_owned(),
            None => in_the_nodes_cgroups(find).map_err(failed)?,
        };
        let folder = File::open(&path).map_err(failed)?;
        let id = fstat(&folder).map_err(|e| failed(e.into()))?.st_ino;
        Ok(Self { path, folder, id })
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its cgroup id, by which links name it.
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

impl AsFd for CgroupRoot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// Runs `f` on a thread in the cgroup namespace of the node's first process: in a container's own one the container's
/// subtree passes for the hierarchy's root, in paths, mount tables and new mounts. Where that namespace is not to be had
/// `f` runs in the agent's.
pub(crate) fn in_the_nodes_cgroups<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        let entered = File::open("/proc/1/ns/cgroup").and_then(|namespace| {
            Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ControlGroup))?)
        });
        if let Err(error) = entered {
            tracing::debug!(%error, "the node's cgroup namespace cannot be entered");
        }
        f()
    };
    std::thread::scope(|scope| match scope.spawn(inside).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn find() -> io::Result<PathBuf> {
    for (table, root) in [("/proc/1/mountinfo", "/proc/1/root"), ("/proc/self/mountinfo", "/")] {
        let Ok(table) = fs::read_to_string(table) else { continue };
        if let Some(point) = cgroup2_mount(&table) {
            return Ok(Path::new(root).join(point.trim_start_matches('/')));
        }
    }
    fs::create_dir_all(OWN_CGROUP_MOUNT)?;
    mount("weft", OWN_CGROUP_MOUNT, "cgroup2", MountFlags::empty(), None)?;
    Ok(OWN_CGROUP_MOUNT.into())
}

/// The mount point of the first cgroup2 mount that shows the hierarchy's root (proc_pid_mountinfo(5)). A reader in a
/// cgroup namespace of its own, as a container is, sees the root of PID 1's mount as a way up: `/..`, `/../..`.
pub(crate) fn cgroup2_mount(table: &str) -> Option<String> {
    table.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let whole = root.split('/').all(|step| step.is_empty() || step == "..");
        (filesystem.split(' ').next()? == "cgroup2" && whole).then(|| unescape(point))
    })
}

/// Undoes the octal escapes of a mount table (`\040` for a blank).
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        match after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_on_hybrid_and_unified_nodes() {
        let hybrid = "24 1 0:22 / /sys rw - sysfs sysfs rw\n\
                      30 24 0:26 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n\
                      31 24 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 master:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(hybrid).as_deref(), Some("/sys/fs/cgroup/unified"));
        let odd = "31 24 0:27 / /mnt/a\\040b rw - cgroup2 none rw\n";
        assert_eq!(cgroup2_mount(odd).as_deref(), Some("/mnt/a b"));
    }

    #[test]
    fn a_subtree_is_not_the_root() {
        let contained = "31 24 0:27 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(contained), None);
        let from_inside = "31 24 0:27 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(from_inside).as_deref(), Some("/sys/fs/cgroup"));
        let sibling = "31 24 0:27 /../pod2 /mnt rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(sibling), None);
        assert_eq!(cgroup2_mount("nonsense\n- cgroup2"), None);
    }
}
