//! Attachments: links that are pinned, so that they outlive the agent, and repaired where they are gone.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type;
use weft_ebpf_common::codes::program;

use super::{
    error::DatapathError,
    loader::{Program, Programs},
    mounts::CgroupRoot,
    sys::{self, LinkKind, Target},
};

/// The state of one attached program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachmentStatus {
    /// The program's name.
    pub program: &'static str,
    /// The link's id; 0 where there is none.
    pub id: u32,
    /// The cgroup, namespace or interface.
    pub attached_to: String,
    /// Whether it is attached (after this look's repair).
    pub healthy: bool,
    /// How often it had to be attached again.
    pub repairs: u64,
    /// What is wrong, or was until this look.
    pub problem: Option<String>,
}

/// A program in its place.
#[derive(Debug)]
pub(super) struct Attachment {
    program: &'static str,
    kind: LinkKind,
    attach_type: bpf_attach_type,
    /// Cgroup id, namespace inode or interface index.
    target: u64,
    shown: String,
    pin: PathBuf,
    link: OwnedFd,
    repairs: u64,
}

/// Where a program goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) kind: LinkKind,
    pub(super) attach_type: bpf_attach_type,
    pub(super) target: Target<'a>,
    /// What the link's info must name as its target.
    pub(super) id: u64,
    pub(super) shown: &'a str,
    pub(super) pin: &'a Path,
}

impl Attachment {
    /// Attaches a program, or adopts the pinned link and puts the program into it.
    pub(super) fn ensure(program: &Program, place: &Place<'_>) -> Result<Self, DatapathError> {
        let link = adopt(program, place).and_then(|adopted| match adopted {
            Some(link) => Ok(link),
            None => create(program, place),
        });
        let link = link.map_err(|source| DatapathError::Attach {
            program: program.name,
            target: place.shown.to_owned(),
            source,
        })?;
        Ok(Self {
            program: program.name,
            kind: place.kind,
            attach_type: place.attach_type,
            target: place.id,
            shown: place.shown.to_owned(),
            pin: place.pin.to_owned(),
            link,
            repairs: 0,
        })
    }

    /// Looks whether the program is still in its place, and puts it back into `target` where it is not.
    pub(super) fn check(&mut self, programs: &Programs, target: Option<Target<'_>>) -> AttachmentStatus {
        let problem = match programs.get(self.program) {
            Err(error) => Some(error.to_string()),
            Ok(program) => {
                self.problem(program).map(|problem| match target.map(|t| self.repair(program, t)) {
                    None => format!("{problem}; a newer agent is in charge"),
                    Some(Ok(())) => problem,
                    Some(Err(error)) => format!("{problem}, and cannot be attached again: {error}"),
                })
            }
        };
        let healthy = programs.get(self.program).is_ok_and(|program| self.problem(program).is_none());
        let id = sys::link_info(self.link.as_fd(), self.kind).map_or(0, |i| i.id);
        AttachmentStatus {
            program: self.program,
            id,
            attached_to: self.shown.clone(),
            healthy,
            repairs: self.repairs,
            problem,
        }
    }

    fn problem(&self, program: &Program) -> Option<String> {
        let info = match sys::link_info(self.link.as_fd(), self.kind) {
            Ok(info) => info,
            Err(error) => return Some(format!("the link cannot be asked: {error}")),
        };
        if info.target != self.target {
            return Some("the link was detached".into());
        }
        if info.program != program.id {
            return Some("another program is in the link".into());
        }
        let pinned = sys::open_pin(&self.pin).and_then(|fd| sys::link_info(fd.as_fd(), self.kind));
        match pinned {
            Ok(pinned) if pinned.id == info.id => None,
            Ok(_) => Some("the pin holds another link".into()),
            Err(error) => Some(format!("the pin is gone: {error}")),
        }
    }

    fn repair(&mut self, program: &Program, target: Target<'_>) -> io::Result<()> {
        let info = sys::link_info(self.link.as_fd(), self.kind)?;
        if info.target == self.target {
            // Never detached: the program and the pin go back into the live link.
            sys::link_update(self.link.as_fd(), program.as_fd())?;
            unpin(&self.pin)?;
            sys::pin(self.link.as_fd(), &self.pin)?;
        } else {
            let (pin, shown) = (&self.pin, self.shown.as_str());
            let (kind, attach_type) = (self.kind, self.attach_type);
            self.link = create(program, &Place { kind, attach_type, target, id: self.target, shown, pin })?;
        }
        self.repairs += 1;
        Ok(())
    }

    /// What kind of link it is.
    pub(super) fn kind(&self) -> LinkKind {
        self.kind
    }

    /// Detaches for good.
    pub(super) fn remove(self) -> Result<(), DatapathError> {
        unpin(&self.pin).map_err(|source| DatapathError::Pin { path: self.pin.clone(), source })
    }
}

/// Opens the pinned link, if it is one to this very target, and puts the program into it.
fn adopt(program: &Program, place: &Place<'_>) -> io::Result<Option<OwnedFd>> {
    let link = match sys::open_pin(place.pin) {
        Ok(link) => link,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let info = sys::link_info(link.as_fd(), place.kind)?;
    if info.target != place.id {
        return Ok(None);
    }
    if info.program != program.id {
        sys::link_update(link.as_fd(), program.as_fd())?;
    }
    Ok(Some(link))
}

fn create(program: &Program, place: &Place<'_>) -> io::Result<OwnedFd> {
    let link =
        sys::link_create(program.as_fd(), place.target, place.attach_type).map_err(|error| {
            match (place.kind, error.raw_os_error()) {
                (LinkKind::Tcx, Some(libc::EINVAL)) => io::Error::other("tcx links need Linux 6.6 or newer"),
                _ => error,
            }
        })?;
    unpin(place.pin)?;
    sys::pin(link.as_fd(), place.pin)?;
    Ok(link)
}

/// Removes a pin that may not be there.
pub(super) fn unpin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The programs of the cgroup root and how they are attached.
const CGROUP: [(&str, &str, bpf_attach_type); 7] = [
    (program::GETPEERNAME4, "getpeername4", bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME),
    (program::GETPEERNAME6, "getpeername6", bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME),
    (program::GETSOCKNAME4, "getsockname4", bpf_attach_type::BPF_CGROUP_INET4_GETSOCKNAME),
    (program::GETSOCKNAME6, "getsockname6", bpf_attach_type::BPF_CGROUP_INET6_GETSOCKNAME),
    (program::SOCK_OPS, "sock_ops", bpf_attach_type::BPF_CGROUP_SOCK_OPS),
    // Last: from here on connections are steered, and everything that carries them has to be there.
    (program::CONNECT4, "connect4", bpf_attach_type::BPF_CGROUP_INET4_CONNECT),
    (program::CONNECT6, "connect6", bpf_attach_type::BPF_CGROUP_INET6_CONNECT),
];

/// Attaches the cgroup's programs; the second is true where links were there already.
pub(super) fn cgroup(
    programs: &Programs,
    root: &CgroupRoot,
    bpffs: &Path,
) -> Result<(Vec<Attachment>, bool), DatapathError> {
    let mut attached = Vec::with_capacity(CGROUP.len());
    let mut adopted = false;
    let shown = root.path().display().to_string();
    for (name, file, attach_type) in CGROUP {
        let pin = links(bpffs).join(file);
        adopted |= pin.exists();
        let place = Place {
            kind: LinkKind::Cgroup,
            attach_type,
            target: Target::Fd(root.as_fd()),
            id: root.id(),
            shown: &shown,
            pin: &pin,
        };
        attached.push(Attachment::ensure(programs.get(name)?, &place)?);
    }
    Ok((attached, adopted))
}

/// The folder of the pinned links.
pub(super) fn links(bpffs: &Path) -> PathBuf {
    bpffs.join("links")
}
