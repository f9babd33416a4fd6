//! `BPF_PROG_TEST_RUN` of a packet program: one packet, one answer.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyhow::{Context as _, Result, bail};
use aya::{Ebpf, programs::Program};

/// The packet goes on to the next program (`TC_ACT_UNSPEC`, -1).
pub const PASS: u32 = u32::MAX;
/// The packet is dropped (`TC_ACT_SHOT`).
pub const DROP: u32 = 2;

const BPF_PROG_TEST_RUN: libc::c_long = 10;

/// The part of `union bpf_attr` that the command reads (linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct Attr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// Runs the program on an Ethernet frame that came in on interface 1 (`lo`), and returns its verdict.
///
/// # Errors
/// There is no such program, or the kernel refuses the frame.
pub fn run(bpf: &Ebpf, name: &str, frame: &[u8]) -> Result<u32> {
    Ok(test_run(bpf, name, frame, 1)?.retval)
}

/// As [`run`], so often in a row: the verdict, and how many nanoseconds one run took.
///
/// # Errors
/// As [`run`].
pub fn time(bpf: &Ebpf, name: &str, frame: &[u8], repeat: u32) -> Result<(u32, u32)> {
    let done = test_run(bpf, name, frame, repeat)?;
    Ok((done.retval, done.duration))
}

fn test_run(bpf: &Ebpf, name: &str, frame: &[u8], repeat: u32) -> Result<Attr> {
    let Some(Program::SchedClassifier(program)) = bpf.program(name) else {
        bail!("no packet program {name}");
    };
    let fd = program.fd()?.as_fd().as_raw_fd();
    let mut attr = Attr {
        prog_fd: fd.cast_unsigned(),
        data_size_in: u32::try_from(frame.len())?,
        data_in: frame.as_ptr() as u64,
        repeat,
        ..Attr::default()
    };
    // SAFETY: the attribute and the frame live through the call, and their sizes are told.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attr, size_of::<Attr>()) };
    if result < 0 {
        return Err(io::Error::last_os_error()).context("BPF_PROG_TEST_RUN");
    }
    Ok(attr)
}
