//! bpf(2) where aya has no call for it: links that are opened from a pin and updated in place, and map access
//! through a shared reference.
//!
//! The attribute structs are the prefixes of `union bpf_attr` (include/uapi/linux/bpf.h) that each command reads;
//! the kernel takes everything behind the given size as zero.

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya_obj::generated::{bpf_attach_type, bpf_cmd, bpf_link_info, bpf_map_info, bpf_prog_info};

/// One call of bpf(2).
///
/// # Safety
/// `attr` must be what `command` expects, and every pointer in it valid for as long as the call takes.
unsafe fn bpf<T>(command: bpf_cmd, attr: &mut T) -> io::Result<i64> {
    loop {
        // SAFETY: `attr` is a live, exclusively borrowed value of the size that is passed; the caller vouches
        // for the pointers in it.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, command as u32, std::ptr::from_mut(attr), mem::size_of::<T>())
        };
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        // The verifier and batch reads answer EAGAIN when a signal came in between.
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return Err(error);
        }
    }
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(|_| io::Error::other("bpf(2) answered with no descriptor"))?;
    // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[repr(C)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Pins an object on a bpffs.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = c_path(path)?;
    let mut attr =
        ObjAttr { pathname: name.as_ptr() as u64, bpf_fd: fd.as_raw_fd().cast_unsigned(), file_flags: 0 };
    // SAFETY: BPF_OBJ_PIN reads ObjAttr; `name` lives until the call is over.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens what is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let name = c_path(path)?;
    let mut attr = ObjAttr { pathname: name.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: BPF_OBJ_GET reads ObjAttr; `name` lives until the call is over.
    owned(unsafe { bpf(bpf_cmd::BPF_OBJ_GET, &mut attr) }?)
}

#[repr(C)]
struct LinkCreateAttr {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// What a program is attached to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target<'a> {
    /// A cgroup or network namespace.
    Fd(BorrowedFd<'a>),
    /// A network interface.
    Interface(u32),
}

/// `BPF_F_BEFORE`: without a program to be relative to, before all others.
const BEFORE: u32 = 1 << 3;

/// Attaches a program by a link, which detaches when its last descriptor or pin goes away. At an interface it goes
/// before every other program: one that answers anything but "next" ends the run.
pub(super) fn link_create(
    program: BorrowedFd<'_>,
    target: Target<'_>,
    kind: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let flags = if matches!(target, Target::Interface(_)) { BEFORE } else { 0 };
    let target = match target {
        Target::Fd(fd) => fd.as_raw_fd().cast_unsigned(),
        Target::Interface(index) => index,
    };
    let prog_fd = program.as_raw_fd().cast_unsigned();
    let mut attr = LinkCreateAttr { prog_fd, target, attach_type: kind as u32, flags };
    // SAFETY: BPF_LINK_CREATE reads LinkCreateAttr, which holds no pointer.
    owned(unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) }?)
}

#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Puts another program into a link, without a moment in which none is attached.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link_fd: link.as_raw_fd().cast_unsigned(),
        new_prog_fd: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: BPF_LINK_UPDATE reads LinkUpdateAttr, which holds no pointer.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches a link at once, whoever else has it open.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut link_fd = link.as_raw_fd().cast_unsigned();
    // SAFETY: BPF_LINK_DETACH reads one descriptor.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut link_fd) }.map(drop)
}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// How many programs are attached to an interface by tcx; 0 where the kernel knows no tcx (before Linux 6.6).
pub(super) fn tcx_programs(interface: u32, kind: bpf_attach_type) -> io::Result<u32> {
    let mut attr = QueryAttr { target: interface, attach_type: kind as u32, ..QueryAttr::default() };
    // SAFETY: BPF_PROG_QUERY writes flags, count and revision back into QueryAttr, which has room for all of them;
    // there is no array of ids that it could fill.
    match unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr) } {
        Ok(_) => Ok(attr.count),
        // ENOENT: Linux 6.6 and 6.7 where nothing is attached.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(0),
        Err(e) => Err(e),
    }
}

#[repr(C)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The kernel's info structs: plain numbers, for which all zeroes is a value.
trait Info: Copy {}
impl Info for bpf_link_info {}
impl Info for bpf_prog_info {}
impl Info for bpf_map_info {}

fn info<T: Info>(fd: BorrowedFd<'_>) -> io::Result<T> {
    // SAFETY: `Info` is only implemented for structs of integers and unions of them; zeroes are valid.
    let mut info: T = unsafe { mem::zeroed() };
    let info_len = u32::try_from(mem::size_of::<T>()).unwrap_or(u32::MAX);
    let bpf_fd = fd.as_raw_fd().cast_unsigned();
    let mut attr = InfoAttr { bpf_fd, info_len, info: std::ptr::from_mut(&mut info) as u64 };
    // SAFETY: BPF_OBJ_GET_INFO_BY_FD writes at most `info_len` bytes to `info`, which lives across the call.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// What a link says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkInfo {
    /// The link's id.
    pub(super) id: u32,
    /// The program in it; 0 where there is none.
    pub(super) program: u32,
    /// Cgroup id, netns inode or interface index, by the link's kind; 0 where the target is gone.
    pub(super) target: u64,
}

/// Which target field of a link's info is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LinkKind {
    /// A cgroup link.
    Cgroup,
    /// A network namespace link.
    Netns,
    /// A tcx link.
    Tcx,
}

/// Asks a link for its id, program and target.
pub(super) fn link_info(link: BorrowedFd<'_>, kind: LinkKind) -> io::Result<LinkInfo> {
    let info: bpf_link_info = info(link)?;
    // SAFETY: every variant of the union is made of integers, all bits of which were written or zeroed.
    let target = unsafe {
        match kind {
            LinkKind::Cgroup => info.__bindgen_anon_1.cgroup.cgroup_id,
            LinkKind::Netns => info.__bindgen_anon_1.netns.netns_ino.into(),
            LinkKind::Tcx => info.__bindgen_anon_1.tcx.ifindex.into(),
        }
    };
    Ok(LinkInfo { id: info.id, program: info.prog_id, target })
}

/// A program's id.
pub(super) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(info::<bpf_prog_info>(program)?.id)
}

/// Type, key size and value size of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MapLayout {
    /// `enum bpf_map_type`.
    pub(super) kind: u32,
    /// Bytes.
    pub(super) key: u32,
    /// Bytes.
    pub(super) value: u32,
    /// Entries.
    pub(super) capacity: u32,
}

/// A map's layout.
pub(super) fn map_layout(map: BorrowedFd<'_>) -> io::Result<MapLayout> {
    let info: bpf_map_info = info(map)?;
    Ok(MapLayout { kind: info.type_, key: info.key_size, value: info.value_size, capacity: info.max_entries })
}

#[repr(C)]
struct ElemAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value_or_next: u64,
    flags: u64,
}

/// A pointer that a map call may take: null or the first byte of a buffer of the map's key or value size.
fn elem<K>(map: BorrowedFd<'_>, key: Option<&K>, value: u64, flags: u64) -> ElemAttr {
    let key = key.map_or(0, |k| std::ptr::from_ref(k) as u64);
    ElemAttr { map_fd: map.as_raw_fd().cast_unsigned(), pad: 0, key, value_or_next: value, flags }
}

fn found(result: io::Result<i64>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Reads one entry into `value`; false where there is none.
///
/// # Safety
/// `K` must have the map's key size, and `value` hold as many bytes as the map's lookup writes.
pub(super) unsafe fn map_lookup<K>(map: BorrowedFd<'_>, key: &K, value: &mut [u8]) -> io::Result<bool> {
    let mut attr = elem(map, Some(key), value.as_mut_ptr() as u64, 0);
    // SAFETY: the caller vouches for the sizes; both buffers live across the call.
    found(unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) })
}

/// Writes one entry.
///
/// # Safety
/// `K` and `V` must have the map's key and value sizes.
pub(super) unsafe fn map_update<K, V>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = elem(map, Some(key), std::ptr::from_ref(value) as u64, 0);
    // SAFETY: the caller vouches for the sizes; both values live across the call.
    unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Deletes one entry; false where there was none.
///
/// # Safety
/// `K` must have the map's key size.
pub(super) unsafe fn map_delete<K>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = elem(map, Some(key), 0, 0);
    // SAFETY: the caller vouches for the size; the key lives across the call.
    found(unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) })
}

/// The key after `key` (the first one for `None`) into `next`; false at the end.
///
/// # Safety
/// `K` must have the map's key size.
pub(super) unsafe fn map_next_key<K>(map: BorrowedFd<'_>, key: Option<&K>, next: &mut K) -> io::Result<bool> {
    let mut attr = elem(map, key, std::ptr::from_mut(next) as u64, 0);
    // SAFETY: the caller vouches for the size; both keys live across the call.
    found(unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) })
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Where a batch read stands: opaque to us, as long as the longest key of a map that is read this way.
pub(super) type Cursor = [u64; 8];

/// Reads up to `keys.len()` entries, going on at `cursor`; how many, and whether that was the end.
///
/// # Safety
/// `K` and `V` must have the map's key and value sizes, and any bit pattern must be one of their values.
pub(super) unsafe fn map_read<K, V>(
    map: BorrowedFd<'_>,
    cursor: &mut Option<Cursor>,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<(usize, bool)> {
    assert!(size_of::<K>() <= size_of::<Cursor>() && keys.len() == values.len());
    let mut next = Cursor::default();
    let mut attr = BatchAttr {
        in_batch: cursor.as_ref().map_or(0, |c| c.as_ptr() as u64),
        out_batch: next.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: u32::try_from(keys.len()).unwrap_or(u32::MAX),
        map_fd: map.as_raw_fd().cast_unsigned(),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: BPF_MAP_LOOKUP_BATCH writes at most `count` keys and values, whose sizes the caller vouches for, and
    // one key's length to `out_batch`; all of them live across the call.
    let more = found(unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) })?;
    *cursor = Some(next);
    Ok((attr.count as usize, !more))
}
