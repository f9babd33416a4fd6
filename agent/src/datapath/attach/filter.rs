//! Filters at a Pod's veth, our own among those of others.
//!
//! A filter is no link: it belongs to the interface, survives the agent, and nothing is pinned that would name it. So
//! every Pod with filters has a folder below `<bpffs>/filters` that names interface and UID, made before the first
//! filter; a folder `qdisc` in it says that the `clsact` was made for us and goes when it is empty.

use std::{
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use weft_core::WorkloadUid;

use super::super::{
    error::DatapathError,
    loader::Program,
    netlink::tc::{self, Filter, Way},
    pods,
};

/// The handles that are ours. The second one is for the moment in which a filter has to go to the front again: the
/// new one is there before the old one goes.
const HANDLES: [u32; 2] = [0x7765_6601, 0x7765_6602];
/// What our programs' names begin with.
const NAME: &str = "weft_";
const QDISC: &str = "qdisc";

/// The records of Pods with filters.
fn records(bpffs: &Path) -> PathBuf {
    bpffs.join("filters")
}

/// Where it is noted that a Pod has filters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Record {
    /// The host-side interface.
    pub(in super::super) interface: u32,
    /// The Pod.
    pub(in super::super) uid: WorkloadUid,
    path: PathBuf,
}

impl Record {
    /// The record of a Pod, made or not.
    pub(in super::super) fn new(bpffs: &Path, interface: u32, uid: &WorkloadUid) -> Self {
        let path = records(bpffs).join(format!("{interface}-{}", pods::escape(&uid.0)));
        Self { interface, uid: uid.clone(), path }
    }

    /// Every record that was made.
    pub(in super::super) fn all(bpffs: &Path) -> Result<Vec<Self>, DatapathError> {
        let folder = records(bpffs);
        let names = match fs::read_dir(&folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            names => names.and_then(Iterator::collect::<io::Result<Vec<_>>>),
        };
        let names = names.map_err(|source| DatapathError::Pin { path: folder, source })?;
        let parse = |entry: fs::DirEntry| {
            let name = entry.file_name();
            let (interface, uid) = name.to_str()?.split_once('-')?;
            let uid = pods::unescape(uid)?;
            Some(Self { interface: interface.parse().ok()?, uid, path: entry.path() })
        };
        Ok(names.into_iter().filter_map(parse).collect())
    }

    /// Puts a program's filter before all others of the interface, or the program into the filter that is there.
    pub(super) fn put(&self, way: Way, program: &Program) -> io::Result<()> {
        make(&self.path)?;
        if tc::add_clsact(self.interface)? {
            make(&self.path.join(QDISC))?;
        }
        let filters = met_first(self.interface, way)?;
        let ours: Vec<u32> = filters.iter().filter(|f| is_ours(f)).map(|f| f.handle).collect();
        let handle = match filters.first() {
            Some(first) if is_ours(first) => first.handle,
            _ => HANDLES.into_iter().find(|handle| !ours.contains(handle)).unwrap_or(HANDLES[0]),
        };
        tc::set_filter(self.interface, way, handle, program.as_fd(), program.name)?;
        let mut superfluous = ours.into_iter().filter(|old| *old != handle);
        superfluous.try_for_each(|old| tc::delete_filter(self.interface, way, old))
    }

    /// Puts another program into the filter that is there; nothing where there is none.
    pub(in super::super) fn replace(&self, way: Way, program: &Program) -> io::Result<()> {
        for filter in tc::filters(self.interface, way)?.iter().filter(|f| is_ours(f)) {
            tc::set_filter(self.interface, way, filter.handle, program.as_fd(), program.name)?;
        }
        Ok(())
    }

    /// Removes our filters, the qdisc that was made for them unless somebody else uses it by now, and the record.
    pub(in super::super) fn remove(&self) -> Result<(), DatapathError> {
        let removal = || -> io::Result<()> {
            let mut empty = true;
            for way in [Way::In, Way::Out] {
                remove(self.interface, way)?;
                empty &= tc::filters(self.interface, way)?.is_empty();
            }
            if empty && self.path.join(QDISC).exists() {
                tc::delete_clsact(self.interface)?;
            }
            fs::remove_dir_all(&self.path)
        };
        match removal() {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(DatapathError::Pin { path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

/// Removes our filters of one direction.
pub(super) fn remove(interface: u32, way: Way) -> io::Result<()> {
    let filters = tc::filters(interface, way)?;
    filters.iter().filter(|f| is_ours(f)).try_for_each(|f| tc::delete_filter(interface, way, f.handle))
}

/// The handle of our filter, if it has the program in it and runs before all others; otherwise what is wrong.
pub(super) fn look(interface: u32, way: Way, program: u32) -> Result<u32, String> {
    let filters = match met_first(interface, way) {
        Ok(filters) => filters,
        Err(error) => return Err(format!("the interface's filters cannot be read: {error}")),
    };
    let Some(ours) = filters.iter().find(|f| is_ours(f)) else {
        return Err("the filter was removed".into());
    };
    if ours.program != program {
        return Err("another program is in the filter".into());
    }
    match filters.first() {
        Some(first) if first != ours => Err(format!("the filter {} runs before ours", describe(first))),
        _ => Ok(ours.handle),
    }
}

/// The filters that every packet meets, in their order.
fn met_first(interface: u32, way: Way) -> io::Result<Vec<Filter>> {
    Ok(tc::filters(interface, way)?.into_iter().filter(|f| f.chain == 0).collect())
}

fn describe(filter: &Filter) -> String {
    format!("{:#x} of priority {} ({})", filter.handle, filter.priority, filter.name)
}

fn is_ours(filter: &Filter) -> bool {
    filter.chain == 0 && HANDLES.contains(&filter.handle) && filter.name.starts_with(NAME)
}

fn make(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        done => done,
    }
}
