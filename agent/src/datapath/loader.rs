//! Loading the object: pinned maps made or adopted, programs through the verifier.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::{
    EbpfLoader, include_bytes_aligned,
    programs::{Program as AyaProgram, ProgramError},
};
use weft_ebpf_common::codes::{LOG_GLOBAL, map, program};

use super::{DatapathConfig, error::DatapathError, log::BpfLog, maps::pin_path, sys};

/// The object, as `cargo xtask build-ebpf` made it.
static OBJECT: &[u8] = include_bytes_aligned!(env!("WEFT_BPF_OBJECT_PATH"));

/// Longest tail of a verifier's log that an error repeats.
const REASON: usize = 1200;

/// A loaded program.
#[derive(Debug)]
pub(super) struct Program {
    /// Its name.
    pub(super) name: &'static str,
    /// Its id.
    pub(super) id: u32,
    fd: OwnedFd,
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Every program of the object.
#[derive(Debug)]
pub(super) struct Programs(BTreeMap<&'static str, Program>);

impl Programs {
    /// The program of a name.
    pub(super) fn get(&self, name: &'static str) -> Result<&Program, DatapathError> {
        self.0.get(name).ok_or_else(|| DatapathError::Missing { what: format!("program {name}") })
    }

    /// Name and id of each.
    pub(super) fn ids(&self) -> Vec<(&'static str, u32)> {
        self.0.values().map(|p| (p.name, p.id)).collect()
    }
}

/// What loading brought.
pub(super) struct Loaded {
    pub(super) programs: Programs,
    /// Maps that were there already.
    pub(super) adopted: Vec<&'static str>,
    /// The log of the programs, where it is switched on.
    pub(super) log: Option<BpfLog>,
}

/// Loads the object with its maps pinned in `<bpffs>/maps`.
pub(super) fn load(config: &DatapathConfig) -> Result<Loaded, DatapathError> {
    if OBJECT.is_empty() {
        return Err(DatapathError::Missing { what: "program at all".into() });
    }
    let adopted = adoptable(&config.bpffs)?;
    let mut loader = EbpfLoader::new();
    let pins: Vec<_> = map::ALL.iter().map(|name| (*name, pin_path(&config.bpffs, name))).collect();
    for (name, path) in &pins {
        loader.map_pin_path(name, path.as_path());
    }
    for (name, entries) in &config.map_sizes {
        loader.map_max_entries(name, *entries);
    }
    let log = u8::from(config.bpf_log);
    loader.override_global(LOG_GLOBAL, &log, false);
    let mut object =
        loader.load(OBJECT).map_err(|e| DatapathError::Object { kernel: kernel(), reason: reason(&e) })?;

    let mut programs = BTreeMap::new();
    for name in program::ALL {
        let loaded = object
            .program_mut(name)
            .ok_or_else(|| DatapathError::Missing { what: format!("program {name}") })?;
        let Some(result) = verified(loaded) else {
            return Err(DatapathError::Missing { what: format!("program {name} of the expected type") });
        };
        let refused = |reason| DatapathError::Program {
            program: name.into(),
            kernel: kernel(),
            consequence: consequence(name),
            reason,
        };
        result.map_err(|e| refused(reason(&e)))?;
        let fd = loaded.fd().map_err(|e| refused(reason(&e)))?;
        let fd = fd.as_fd().try_clone_to_owned().map_err(|e| refused(e.to_string()))?;
        let id = sys::program_id(fd.as_fd()).map_err(|e| refused(e.to_string()))?;
        programs.insert(name, Program { name, id, fd });
    }
    let log = config.bpf_log.then(|| BpfLog::open(&mut object));
    Ok(Loaded { programs: Programs(programs), adopted, log })
}

/// Takes a program through the verifier; `None` for one of a type that the object should not hold.
fn verified(program: &mut AyaProgram) -> Option<Result<(), ProgramError>> {
    Some(match program {
        AyaProgram::CgroupSockAddr(p) => p.load(),
        AyaProgram::SockOps(p) => p.load(),
        AyaProgram::SkLookup(p) => p.load(),
        AyaProgram::SchedClassifier(p) => p.load(),
        _ => return None,
    })
}

/// Takes each program through the verifier with maps of its own, and lets go of all of it: what the kernel says against
/// each, if anything.
pub(super) fn trial() -> Result<Vec<(&'static str, Option<String>)>, DatapathError> {
    if OBJECT.is_empty() {
        return Err(DatapathError::Missing { what: "program at all".into() });
    }
    let mut object = EbpfLoader::new()
        .load(OBJECT)
        .map_err(|e| DatapathError::Object { kernel: kernel(), reason: reason(&e) })?;
    let one = |name: &'static str| {
        let outcome = object.program_mut(name).and_then(verified);
        let problem = match outcome {
            None => Some("the object does not hold it".to_owned()),
            Some(outcome) => outcome.err().map(|e| format!("{}: {}", consequence(name), reason(&e))),
        };
        (name, problem)
    };
    Ok(program::ALL.into_iter().map(one).collect())
}

/// The maps that are pinned already; an error for one whose layout is not the object's, because the programs would
/// read its bytes as something else.
fn adoptable(bpffs: &Path) -> Result<Vec<&'static str>, DatapathError> {
    let object = aya_obj::Object::parse(OBJECT)
        .map_err(|e| DatapathError::Object { kernel: kernel(), reason: reason(&e) })?;
    let mut adopted = Vec::new();
    for name in map::ALL {
        let wanted =
            object.maps.get(name).ok_or_else(|| DatapathError::Missing { what: format!("map {name}") })?;
        let path = pin_path(bpffs, name);
        if !path.exists() {
            continue;
        }
        let layout = sys::open_pin(&path)
            .and_then(|fd| sys::map_layout(fd.as_fd()))
            .map_err(|source| DatapathError::Pin { path: path.clone(), source })?;
        // A ring has neither keys nor values, whatever its definition says.
        let ring = wanted.map_type() == aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_RINGBUF as u32;
        let same = layout.kind == wanted.map_type()
            && (ring || (layout.key == wanted.key_size() && layout.value == wanted.value_size()));
        if !same {
            return Err(DatapathError::MapLayout { name: name.into(), path });
        }
        adopted.push(name);
    }
    Ok(adopted)
}

fn consequence(name: &str) -> &'static str {
    match name {
        program::CONNECT4 | program::CONNECT6 | program::SOCK_OPS => {
            "outgoing connections cannot be steered into the proxy; nothing is enrolled on this node"
        }
        program::SK_LOOKUP => {
            "inbound connections cannot be steered into the proxy; nothing is enrolled on this node"
        }
        program::FROM_POD | program::TO_POD => {
            "UDP, ICMP and raw packets cannot be judged and sources not be checked; nothing is enrolled on this node"
        }
        _ => {
            "applications would see loopback addresses instead of their peers; nothing is enrolled on this node"
        }
    }
}

/// `uname -r`.
pub(super) fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// An error with everything below it, cut to the end of a verifier's log.
fn reason(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    let count = text.chars().count();
    if count <= REASON {
        text
    } else {
        format!("... {}", text.chars().skip(count - REASON).collect::<String>())
    }
}
