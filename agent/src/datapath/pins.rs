//! Pods as their pins tell of them, after the agent that enrolled them is gone.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use weft_core::WorkloadUid;
use weft_ebpf_common::{
    Config, Pod,
    codes::{map, program},
};

use super::{
    attach::{self, Record},
    error::DatapathError,
    loader::Programs,
    maps::{Map, Maps},
    netlink::tc::Way,
    pods, sys,
};

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

/// The Pods that have pins or filters.
pub(super) fn pinned_uids(bpffs: &Path) -> Result<HashSet<WorkloadUid>, DatapathError> {
    let filtered = Record::all(bpffs)?.into_iter().map(|record| record.uid);
    Ok(pod_pins(bpffs)?.into_iter().map(|(_, uid, _)| uid).chain(filtered).collect())
}

/// The entries of a Pod that only its pins are known of: those of the interface its links or filters name.
pub(super) fn pinned_entries(
    bpffs: &Path,
    maps: &Maps,
    uid: &WorkloadUid,
) -> Result<Vec<Pod>, DatapathError> {
    let mut entries = Vec::new();
    for record in Record::all(bpffs)?.iter().filter(|record| record.uid == *uid) {
        entries.extend(maps.veths.get(&record.interface)?);
    }
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

/// Puts the new programs into the links and filters of Pods that an earlier agent enrolled.
pub(super) fn replace_in_pods(programs: &Programs, bpffs: &Path) -> Result<(), DatapathError> {
    for record in Record::all(bpffs)? {
        for (name, way) in [(program::FROM_POD, Way::In), (program::TO_POD, Way::Out)] {
            record.replace(way, programs.get(name)?).map_err(|source| DatapathError::Attach {
                program: name,
                target: format!("interface {}", record.interface),
                source,
            })?;
        }
    }
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

/// Detaches and removes everything that is pinned or noted below `bpffs`.
pub(super) fn uninstall(bpffs: &Path) -> Result<(), DatapathError> {
    // An agent that still runs must not put back what goes. Maps of another layout have no such agent.
    if let Ok(config) = Map::<u32, Config>::open(bpffs, map::CONFIG) {
        let current = config.get(&0)?.unwrap_or_default();
        config.set(&0, &Config { generation: current.generation.wrapping_add(1), ..current })?;
    }
    let links = attach::links(bpffs);
    let mut pins = match fs::read_dir(&links) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        list => list
            .and_then(|list| list.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>())
            .map_err(|source| DatapathError::Pin { path: links, source })?,
    };
    // By name, so that `connect4` and `connect6` go first: what is not steered any more needs nothing of the rest.
    pins.sort_unstable();
    for path in pins {
        // A link stays attached for as long as somebody has it open, pinned or not.
        let detached = sys::open_pin(&path).and_then(|link| sys::link_detach(link.as_fd()));
        match detached {
            Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => {}
            done => done.map_err(|source| DatapathError::Pin { path, source })?,
        }
    }
    Record::all(bpffs)?.iter().try_for_each(Record::remove)?;
    for folder in ["filters", "links", "maps"] {
        let path = bpffs.join(folder);
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(DatapathError::Pin { path, source });
            }
            _ => {}
        }
    }
    Ok(())
}
