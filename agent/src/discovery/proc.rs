//! The last resort: Pods found by their processes, where the runtime does not answer. They have a UID but no name;
//! the operator's description says the rest, and enrolment checks that the namespace holds the Pod's address, because
//! a foreign process may just be passing through.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    path::Path,
};

use weft_core::{NamespacedName, WorkloadUid, workload::Mode};

use super::{Sandbox, netns};

/// Longest cgroup file that is read, in bytes.
const MAX_FILE: u64 = 16 << 10;
/// Length of a UID as the API server makes them.
const UUID: usize = 36;

/// The Pods that have processes, each by its oldest one, except those of the host's network.
pub(super) fn scan(proc: &Path) -> Vec<Sandbox> {
    let host = netns::inode(&proc.join("self/ns/net")).unwrap_or_default();
    let mut oldest: BTreeMap<WorkloadUid, (u64, u32)> = BTreeMap::new();
    let Ok(entries) = fs::read_dir(proc) else { return Vec::new() };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let path = entry.path();
        let Some(uid) = read(&path.join("cgroup")).and_then(|text| pod_uid(&text)) else { continue };
        let Ok(inode) = netns::inode(&path.join("ns/net")) else { continue };
        if inode == host {
            continue;
        }
        let Some(started) = read(&path.join("stat")).and_then(|text| start_time(&text)) else { continue };
        let this = (started, pid);
        oldest.entry(uid).and_modify(|known| *known = this.min(*known)).or_insert(this);
    }
    let sandbox = |(uid, (started, pid)): (WorkloadUid, (u64, u32))| {
        let netns = netns::locate(Path::new("/"), None, Some(pid))?;
        Some(Sandbox {
            // Not the number of the process alone: it may be another's tomorrow.
            id: format!("process-{pid}-{started}"),
            uid,
            name: NamespacedName::new("", ""),
            mode: Mode::Disabled,
            isolated: None,
            created: i64::try_from(started).unwrap_or(i64::MAX),
            ..Sandbox::network(Some(netns), false, Vec::new())
        })
    };
    oldest.into_iter().filter_map(sandbox).collect()
}

fn read(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The Pod that a process belongs to, by the text of its cgroup file: `/kubepods/burstable/pod<UID>/<container>`, or
/// `kubepods-burstable-pod<UID with underscores>.slice` where systemd makes the groups.
fn pod_uid(text: &str) -> Option<WorkloadUid> {
    let groups = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    groups.filter(|group| group.contains("kubepods")).find_map(|group| {
        group.split('/').find_map(|part| {
            let part = part.strip_suffix(".slice").unwrap_or(part);
            let (_, uid) = part.rsplit_once("pod")?;
            let uid = uid.replace('_', "-");
            let plain = uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
            (uid.len() == UUID && plain).then(|| WorkloadUid::from(uid.as_str()))
        })
    })
}

/// When a process began (proc_pid_stat(5), field 22), in ticks since boot. The name before it may hold anything.
fn start_time(text: &str) -> Option<u64> {
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "5e0b9c4e-1f2a-4c1d-9a3b-0123456789ab";

    #[test]
    fn pods_are_known_by_their_cgroup() {
        let found = |text: &str| pod_uid(text).map(|u| u.to_string());
        let plain = format!("12:cpu:/\n0::/kubepods/burstable/pod{UID}/0123abc\n");
        assert_eq!(found(&plain).as_deref(), Some(UID));
        let systemd = format!(
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{}.slice/cri-containerd-1.scope",
            UID.replace('-', "_")
        );
        assert_eq!(found(&systemd).as_deref(), Some(UID));
        for no in ["0::/system.slice/kubelet.service", "0::/kubepods/burstable", "", "0::/kubepods/podx/y"] {
            assert_eq!(found(no), None, "{no}");
        }
        assert_eq!(found(&format!("0::/user.slice/pod{UID}")), None);
    }

    #[test]
    fn the_start_time_is_read_behind_any_name() {
        let stat = format!(
            "7 (a) b (c)) S {} 4242 1",
            (1..=18).map(|i| i.to_string()).collect::<Vec<_>>().join(" ")
        );
        assert_eq!(start_time(&stat), Some(4242));
        assert_eq!(start_time("7 (x"), None);
        let own = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(start_time(&own).is_some());
    }

    #[test]
    fn the_hosts_own_processes_are_no_pods() {
        assert!(scan(Path::new("/proc")).iter().all(|s| !s.host_network && s.netns.is_some()));
        assert!(scan(Path::new("/nonexistent")).is_empty());
    }
}
