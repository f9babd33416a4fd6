//! Links, pinned below the node's bpffs folder.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type;

use super::super::{
    loader::Program,
    sys::{self, LinkKind, Target},
};

/// Where a program goes.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Place<'a> {
    pub(in super::super) kind: LinkKind,
    pub(in super::super) attach_type: bpf_attach_type,
    pub(in super::super) target: Target<'a>,
    /// What the link's info must name as its target: cgroup id, namespace inode or interface index.
    pub(in super::super) id: u64,
    pub(in super::super) pin: &'a Path,
}

/// A pinned link.
#[derive(Debug)]
pub(super) struct Link {
    kind: LinkKind,
    attach_type: bpf_attach_type,
    target: u64,
    pin: PathBuf,
    fd: OwnedFd,
}

impl Link {
    fn new(place: &Place<'_>, fd: OwnedFd) -> Self {
        let Place { kind, attach_type, id, pin, .. } = *place;
        Self { kind, attach_type, target: id, pin: pin.to_owned(), fd }
    }

    /// Opens the pinned link, if it is one to this very target, and puts the program into it.
    pub(super) fn adopt(program: &Program, place: &Place<'_>) -> io::Result<Option<Self>> {
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
        Ok(Some(Self::new(place, link)))
    }

    /// Attaches the program by a new link and pins that.
    pub(super) fn create(program: &Program, place: &Place<'_>) -> io::Result<Self> {
        let created = sys::link_create(program.as_fd(), place.target, place.attach_type);
        let link = created.map_err(|error| match (place.kind, error.raw_os_error()) {
            (LinkKind::Tcx, Some(libc::EINVAL)) => io::Error::other("tcx links need Linux 6.6 or newer"),
            _ => error,
        })?;
        unpin(place.pin)?;
        sys::pin(link.as_fd(), place.pin)?;
        Ok(Self::new(place, link))
    }

    /// Its id, if it is attached with the program in it and pinned; otherwise what is wrong.
    pub(super) fn look(&self, program: &Program) -> Result<u32, String> {
        let info = sys::link_info(self.fd.as_fd(), self.kind)
            .map_err(|error| format!("the link cannot be asked: {error}"))?;
        if info.target != self.target {
            return Err("the link was detached".into());
        }
        if info.program != program.id {
            return Err("another program is in the link".into());
        }
        let pinned = sys::open_pin(&self.pin).and_then(|fd| sys::link_info(fd.as_fd(), self.kind));
        match pinned {
            Ok(pinned) if pinned.id == info.id => Ok(info.id),
            Ok(_) => Err("the pin holds another link".into()),
            Err(error) => Err(format!("the pin is gone: {error}")),
        }
    }

    /// Puts it back: the program and the pin into a live link, or a new link into `target`.
    pub(super) fn repair(&mut self, program: &Program, target: Target<'_>) -> io::Result<()> {
        if sys::link_info(self.fd.as_fd(), self.kind)?.target == self.target {
            sys::link_update(self.fd.as_fd(), program.as_fd())?;
            unpin(&self.pin)?;
            return sys::pin(self.fd.as_fd(), &self.pin);
        }
        let Self { kind, attach_type, target: id, pin, .. } = &*self;
        let place = Place { kind: *kind, attach_type: *attach_type, target, id: *id, pin };
        *self = Self::create(program, &place)?;
        Ok(())
    }

    /// What kind of link it is.
    pub(super) fn kind(&self) -> LinkKind {
        self.kind
    }
}

/// Removes a pin that may not be there.
pub(in super::super) fn unpin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
