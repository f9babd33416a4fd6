//! Real attachments: the programs at a cgroup of their own, with this process in it.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, Program},
};
use weft_ebpf_common::codes::program;

use crate::{load, netns::Netns, unique};

/// A process is in one cgroup only: tests that move it take turns.
static TURN: Mutex<()> = Mutex::new(());

/// A child cgroup that holds this process; on drop the process goes back and the cgroup away.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    home: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Cgroup {
    /// Makes one under the cgroup2 mount, and enters it.
    ///
    /// # Errors
    /// There is no cgroup2 mount, or no right to change it (run as root).
    pub fn enter() -> Result<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let root = cgroup2_mount()?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let home = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
        let path = root.join(unique("weft-test-"));
        fs::create_dir(&path)
            .with_context(|| format!("no cgroup {}; these tests need root", path.display()))?;
        let cgroup = Self { path, home: root.join(home), _turn: turn };
        join(&cgroup.path)?;
        Ok(cgroup)
    }

    /// Its id: what `bpf_skb_cgroup_id` tells of the sockets that are made while it is held.
    ///
    /// # Errors
    /// It is gone.
    pub fn id(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A failure leaves an empty cgroup behind; the next line says which.
        if let Err(error) = join(&self.home).and_then(|()| Ok(fs::remove_dir(&self.path)?)) {
            eprintln!("cgroup {} stays: {error:#}", self.path.display());
        }
    }
}

fn join(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
        .with_context(|| format!("cannot enter {}", cgroup.display()))
}

/// Where cgroup2 is mounted: never guessed, machines differ.
///
/// # Errors
/// It is not mounted.
pub fn cgroup2_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for line in mounts.lines() {
        // The file system type follows the separator (proc(5)).
        if let Some((before, after)) = line.split_once(" - ")
            && after.starts_with("cgroup2 ")
            && let Some(path) = before.split(' ').nth(4)
        {
            return Ok(path.into());
        }
    }
    bail!("no cgroup2 mount; `mount -t cgroup2 none <folder>` makes one")
}

/// The object with its programs attached: detached on drop, before the cgroup goes.
pub struct Attached {
    /// The object.
    pub bpf: Ebpf,
    _cgroup: Cgroup,
}

/// Loads every program and attaches those of the cgroup.
///
/// # Errors
/// A program does not load or attach.
pub fn attach_cgroup() -> Result<Attached> {
    let cgroup = Cgroup::enter()?;
    let mut bpf = load(&program::ALL)?;
    let file = File::open(&cgroup.path)?;
    for (name, program) in bpf.programs_mut() {
        match program {
            Program::CgroupSockAddr(program) => {
                program.attach(&file, CgroupAttachMode::Single).with_context(|| name.to_owned())?;
            }
            Program::SockOps(program) => {
                program.attach(&file, CgroupAttachMode::Single).with_context(|| name.to_owned())?;
            }
            _ => {}
        }
    }
    Ok(Attached { bpf, _cgroup: cgroup })
}

/// Attaches the listener choice to a namespace; the program must be loaded.
///
/// # Errors
/// There is no such program, or the kernel refuses.
pub fn attach_sk_lookup(bpf: &mut Ebpf, netns: &Netns) -> Result<()> {
    match bpf.program_mut(program::SK_LOOKUP) {
        Some(Program::SkLookup(program)) => program.attach(netns).map(drop).context("sk_lookup"),
        _ => bail!("the object has no program {}", program::SK_LOOKUP),
    }
}
