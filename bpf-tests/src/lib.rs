//! The real BPF object in a real kernel: what the tests share. They need root, and leave nothing behind.

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError},
};
use weft_ebpf_common::codes::program;

pub mod attach;
pub mod enrolled;
pub mod netns;
pub mod packet;
pub mod tables;
pub mod test_run;

/// Where the object is: `WEFT_BPF_OBJECT`, else `target/bpf/weft.bpf.o` of the workspace.
pub fn object_path() -> PathBuf {
    env::var_os("WEFT_BPF_OBJECT")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/weft.bpf.o"), PathBuf::from)
}

/// The object's bytes.
///
/// # Errors
/// There is no object: the message says how to build one.
pub fn object() -> Result<Vec<u8>> {
    let path = object_path();
    fs::read(&path).with_context(|| {
        format!(
            "no BPF object at {}; run `cargo xtask build-ebpf`, or name one in WEFT_BPF_OBJECT",
            path.display()
        )
    })
}

/// Loads the object: maps are made, programs not yet.
///
/// # Errors
/// There is no object, or the kernel refuses a map (run as root).
pub fn maps_only() -> Result<Ebpf> {
    let bytes = object()?;
    EbpfLoader::new().load(&bytes).context("the object's maps cannot be made; these tests need root")
}

/// Loads the object and the programs with these names.
///
/// # Errors
/// As [`maps_only`], or the verifier refuses a program: the message ends with its log.
pub fn load(names: &[&str]) -> Result<Ebpf> {
    let mut bpf = maps_only()?;
    for name in names {
        load_program(&mut bpf, name)?;
    }
    Ok(bpf)
}

/// Loads every program.
///
/// # Errors
/// As [`load`].
pub fn load_all() -> Result<Ebpf> {
    load(&program::ALL)
}

/// Loads one program.
///
/// # Errors
/// The object has no such program, or the verifier refuses it.
pub fn load_program(bpf: &mut Ebpf, name: &str) -> Result<()> {
    let found = bpf.program_mut(name).ok_or_else(|| anyhow!("the object has no program {name}"))?;
    let result = match found {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        other => bail!("{name} is of an unexpected type {:?}", other.prog_type()),
    };
    match result {
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            let from = log.len().saturating_sub(4_000);
            Err(anyhow!("{name}: {io_error}; the verifier's last words:\n{}", &log[from..]))
        }
        other => other.with_context(|| name.to_owned()),
    }
}

/// A name no other test has: the process and a counter.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
