//! Below which cgroups the kubelet's Pods are, and which one is this process's own. In the node's own network only they
//! tell a Pod's process from a daemon's.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use weft_runtime::DrainWatcher;

use crate::{
    datapath::{Datapath, DatapathError, cgroup2_mount, in_the_nodes_cgroups},
    enrolment::chain,
};

/// How often they are looked for: the kubelet makes its own when it starts.
const LOOK: Duration = Duration::from_secs(3);
/// How far below the root the kubelet's cgroup may be (`--cgroup-root`, nodes within containers).
const DEPTH: usize = 6;
/// Folders that one look goes through.
const FOLDERS: usize = 4096;
/// Most cgroups that are told of.
const MOST: usize = 16;

/// Keeps the kernel's list of them, until the drain begins. `expected` where the node is a cluster's.
pub async fn run(datapath: Datapath, expected: bool, found: Gauge, drain: DrainWatcher) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told: Option<(Vec<u64>, Option<u64>)> = None;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = drain.draining() => return,
        }
        let (kernel, before) = (datapath.clone(), told.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let now = look(&kernel.cgroup_root());
            let done = if before.as_ref() == Some(&now) { Ok(()) } else { kernel.pod_cgroups(&now.0, now.1) };
            (now, done)
        });
        match looked.await {
            Ok((now, Ok(()))) => {
                found.set(i64::try_from(now.0.len()).unwrap_or(i64::MAX));
                if told.as_ref() != Some(&now) {
                    if now.0.is_empty() && expected {
                        tracing::warn!(
                            "no cgroup of the kubelet's Pods (kubepods, kubepods.slice) is found in cgroup2: Pods of the \
                             node's own network do not speak for the node, and strict Pods refuse them"
                        );
                    }
                    tracing::info!(pods = ?now.0, own = ?now.1, "cgroups of the node's Pods");
                    told = Some(now);
                }
            }
            // The new agent looks for itself.
            Ok((_, Err(DatapathError::Superseded))) => {}
            Ok((_, Err(error))) => {
                tracing::error!(error = %chain(&error), "the kernel cannot be told the cgroups of the node's Pods");
            }
            Err(error) => {
                tracing::error!(%error, "the cgroups of the node's Pods are not looked for any more; restart the agent");
                return;
            }
        }
    }
}

/// Registers the metric that [`run`] keeps.
pub fn metric(registry: &mut Registry) -> Gauge {
    let found = Gauge::default();
    registry.register(
        "weft_pod_cgroups",
        "Cgroups below which Pods of the node's own network are known",
        found.clone(),
    );
    found
}

/// The cgroup2 ids of the kubelet's Pods below `root`, and of this process's own cgroup.
fn look(root: &Path) -> (Vec<u64>, Option<u64>) {
    in_the_nodes_cgroups(|| {
        let mut pods = Vec::new();
        let mut room = FOLDERS;
        walk(root, DEPTH, &mut room, &mut pods);
        pods.sort_unstable();
        (pods, own())
    })
}

fn walk(folder: &Path, depth: usize, room: &mut usize, pods: &mut Vec<u64>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
        if *room == 0 || pods.len() >= MOST {
            return;
        }
        *room -= 1;
        let path = entry.path();
        if entry.file_name().to_str().is_some_and(of_the_kubelet) {
            pods.extend(fs::metadata(&path).map(|m| m.ino()));
        } else if depth > 1 {
            walk(&path, depth - 1, room, pods);
        }
    }
}

/// Whether the kubelet calls the cgroup of its Pods so: by the cgroupfs driver, or by systemd's, which writes the names
/// of the slices around it into a slice's.
fn of_the_kubelet(name: &str) -> bool {
    name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice")
}

/// The id of this process's cgroup. Where the calling thread sees the hierarchy from the node's root, its path begins
/// there.
fn own() -> Option<u64> {
    let text = fs::read_to_string("/proc/thread-self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let tables = [("/proc/1/mountinfo", "/proc/1/root"), ("/proc/self/mountinfo", "/")];
    tables.into_iter().find_map(|(table, root)| {
        let point = cgroup2_mount(&fs::read_to_string(table).ok()?)?;
        let folder: PathBuf =
            [root, point.trim_start_matches('/'), path.trim_start_matches('/')].iter().collect();
        fs::metadata(folder).ok().map(|m| m.ino())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_drivers_and_roots_of_their_own() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(&path).unwrap();
            fs::metadata(path).unwrap().ino()
        };
        make("system.slice/kubelet.service");
        let mut want = vec![
            make("kubepods"),
            make("kubepods.slice"),
            make("kubelet.slice/kubelet-kubepods.slice"),
            make("docker/0123/kubelet/kubepods"),
        ];
        make("kubepods/burstable/pod1/0123/kubepods");
        make("system.slice/kubepods-backup.service");
        make("a/b/c/d/e/f/kubepods");
        want.sort_unstable();
        assert_eq!(look(root.path()).0, want);
    }
}
