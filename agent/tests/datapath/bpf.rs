//! What a test asks of the kernel behind the datapath's back: bpf(2) and the scheduler, nothing of the code under test.

use std::{
    ffi::CString,
    fs::File,
    io, mem,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const PROG_GET_FD_BY_ID: u32 = 13;
const OBJ_GET: u32 = 7;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const PROG_QUERY: u32 = 16;
const LINK_CREATE: u32 = 28;
const LINK_DETACH: u32 = 34;
/// `BPF_CGROUP_INET4_CONNECT`.
const CONNECT4: u32 = 10;
/// `BPF_TCX_INGRESS`.
const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`.
const TCX_EGRESS: u32 = 47;

/// One call with 16 words of attributes, which every command here is content with.
fn call(command: u32, attributes: &mut [u32; 16]) -> i64 {
    // SAFETY: the array is live and of the size that is passed; pointers in it outlive the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), mem::size_of_val(attributes))
    };
    assert!(result >= 0, "bpf({command}): {}", io::Error::last_os_error());
    result
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor")) }
}

fn words<T>(pointer: *const T) -> [u32; 2] {
    let address = pointer as u64;
    [address as u32, (address >> 32) as u32]
}

/// Detaches the link that is pinned at `path`, as somebody else might.
pub(crate) fn detach(path: &Path) {
    let name = CString::new(path.as_os_str().as_bytes()).expect("a path");
    let [low, high] = words(name.as_ptr());
    let mut attributes = [0; 16];
    (attributes[0], attributes[1]) = (low, high);
    let link = owned(call(OBJ_GET, &mut attributes));
    let mut attributes = [0; 16];
    attributes[0] = link.as_raw_fd().cast_unsigned();
    call(LINK_DETACH, &mut attributes);
}

/// How many programs are attached at a hook.
fn attached(target: u32, hook: u32) -> u32 {
    let mut attributes = [0; 16];
    (attributes[0], attributes[1]) = (target, hook);
    call(PROG_QUERY, &mut attributes);
    attributes[6]
}

/// How many programs are attached to a cgroup's `connect4` hook.
pub(crate) fn connect_hooks(cgroup: &Path) -> u32 {
    let cgroup = File::open(cgroup).expect("the cgroup");
    attached(cgroup.as_raw_fd().cast_unsigned(), CONNECT4)
}

/// How many programs are attached to an interface by tcx, both ways.
pub(crate) fn packet_hooks(interface: &str) -> u32 {
    let index = index(interface);
    attached(index, TCX_INGRESS) + attached(index, TCX_EGRESS)
}

fn index(interface: &str) -> u32 {
    let name = CString::new(interface).expect("a name");
    // SAFETY: the name is a live C string.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

fn program(id: u32) -> OwnedFd {
    let mut attributes = [0; 16];
    attributes[0] = id;
    owned(call(PROG_GET_FD_BY_ID, &mut attributes))
}

/// Attaches a program to an interface by a tcx link, as another agent of the node might.
pub(crate) fn foreign_link(program_id: u32, interface: &str) -> OwnedFd {
    let index = index(interface);
    let program = program(program_id);
    let mut attributes = [0; 16];
    attributes[..3].copy_from_slice(&[program.as_raw_fd().cast_unsigned(), index, TCX_INGRESS]);
    owned(call(LINK_CREATE, &mut attributes))
}

/// The size of a program after the verifier removed what it cannot reach, in bytes (struct bpf_prog_info).
pub(crate) fn translated(program_id: u32) -> u32 {
    let program = program(program_id);
    let mut info = [0_u32; 64];
    let [low, high] = words(info.as_mut_ptr());
    let mut attributes = [0; 16];
    attributes[..4].copy_from_slice(&[
        program.as_raw_fd().cast_unsigned(),
        u32::try_from(mem::size_of_val(&info)).expect("small"),
        low,
        high,
    ]);
    call(OBJ_GET_INFO_BY_FD, &mut attributes);
    info[5]
}

/// Gives this thread, and those it starts, real-time priority.
pub(crate) fn real_time() {
    // SAFETY: sched_param is a struct of integers, and lives across the call.
    let done = unsafe {
        let mut parameters: libc::sched_param = mem::zeroed();
        parameters.sched_priority = 5;
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameters)
    };
    assert_eq!(done, 0, "real-time priority; run as root");
}
