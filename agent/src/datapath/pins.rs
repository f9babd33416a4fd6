//! Pods as their pins tell of them, after the agent that enrolled them is gone.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use weft_core::WorkloadUid;
use weft_ebpf_common::{Pod, codes::program};

use super::{attach, error::DatapathError, loader::Programs, maps::Maps, pods, sys};

/// Every pinned link of a Pod: the program's pin name, the Pod, the path.
fn pod_pins(bpffs: &Path) -> Result<Vec<(&'static str, WorkloadUid, PathBuf)>, DatapathError> {
    let folder = attach::links(bpffs);
    let list =
        || -> io::Result<Vec<PathBuf>> { fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect() };
    let paths = list().map_err(|source| DatapathError::Pin { path: folder.clone(), source })?;
    let known = |path: PathBuf| {
        let (name, uid) = path.file_name()?.to_str()?.split_once('-')?;
        let name = pods::PINS.into_iter().find(|pin| *pin == name)?;
        Some((name, pods::unescape(uid)?, path))
    };
    Ok(paths.into_iter().filter_map(known).collect())
}

/// The Pods that have pins.
pub(super) fn pinned_uids(bpffs: &Path) -> Result<HashSet<WorkloadUid>, DatapathError> {
    Ok(pod_pins(bpffs)?.into_iter().map(|(_, uid, _)| uid).collect())
}

/// The entries of a Pod that only its pins are known of: those of the interface its links name.
pub(super) fn pinned_entries(
    bpffs: &Path,
    maps: &Maps,
    uid: &WorkloadUid,
) -> Result<Vec<Pod>, DatapathError> {
    let mut entries = Vec::new();
    for (name, owner, path) in pod_pins(bpffs)? {
        if owner == *uid && name != pods::PINS[2] {
            let target = sys::open_pin(&path)
                .and_then(|link| sys::link_info(link.as_fd(), sys::LinkKind::Tcx))
                .map_err(|source| DatapathError::Pin { path, source })?
                .target;
            let index = u32::try_from(target).unwrap_or_default();
            entries.extend(maps.veths.get(&index)?.filter(|_| index != 0));
        }
    }
    entries.dedup();
    Ok(entries)
}

/// Puts the new programs into the links of Pods that an earlier agent enrolled.
pub(super) fn replace_in_pods(programs: &Programs, bpffs: &Path) -> Result<(), DatapathError> {
    for (name, _, path) in pod_pins(bpffs)? {
        let program = match name {
            "tc_from_pod" => program::FROM_POD,
            "tc_to_pod" => program::TO_POD,
            _ => program::SK_LOOKUP,
        };
        let program = programs.get(program)?;
        let replaced = sys::open_pin(&path).and_then(|link| sys::link_update(link.as_fd(), program.as_fd()));
        match replaced {
            // ENOLINK: the namespace or interface is gone; the sweep removes the pin.
            Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => {}
            done => done.map_err(|source| DatapathError::Pin { path, source })?,
        }
    }
    Ok(())
}
