//! Attachments: programs in their places, so that they outlive the agent, and put back where they are gone. Links
//! are pinned ([`link`]); filters belong to the interface ([`filter`]).

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type;
use weft_core::WorkloadUid;
use weft_ebpf_common::codes::program;

use super::{
    error::DatapathError,
    loader::{Program, Programs},
    mounts::CgroupRoot,
    netlink::tc::Way,
    sys::{self, LinkKind, Target},
};

mod filter;
mod link;

pub(super) use filter::Record;
pub(super) use link::{Place, unpin};

use link::Link;

/// How the programs that judge packets are attached to a Pod's host-side interface.
///
/// A link (tcx, Linux 6.6) cannot be taken away by accident and runs before every filter, but making one waits for
/// an RCU grace period under the RTNL lock: some 8 to 15 ms for each direction of each Pod. A filter (`cls_bpf` on
/// `clsact`, every kernel) takes some 0.1 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VethHook {
    /// A filter; a link where somebody else's program would run before the filter, and where a link is there already.
    #[default]
    Automatic,
    /// Always a filter, as on kernels without tcx.
    Filter,
    /// Always a link.
    Link,
}

/// The state of one attached program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachmentStatus {
    /// The program's name.
    pub program: &'static str,
    /// The link's id or the filter's handle; 0 where there is none.
    pub id: u32,
    /// The cgroup, namespace or interface.
    pub attached_to: String,
    /// The Pod that it is for; `None` at the cgroup.
    pub pod: Option<WorkloadUid>,
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
    shown: String,
    repairs: u64,
    hold: Hold,
}

#[derive(Debug)]
enum Hold {
    Link(Link),
    Packets(Packets),
}

/// A program at a Pod's veth.
#[derive(Debug, Clone)]
pub(super) struct Packets {
    pub(super) hook: VethHook,
    pub(super) way: Way,
    pub(super) record: Record,
    /// Where a link is pinned, if it becomes one.
    pub(super) pin: PathBuf,
}

impl Packets {
    /// The link's place, if it becomes one.
    fn place(&self) -> Place<'_> {
        Place {
            kind: LinkKind::Tcx,
            attach_type: self.attach_type(),
            target: Target::Interface(self.record.interface),
            id: self.record.interface.into(),
            pin: &self.pin,
        }
    }

    fn attach_type(&self) -> bpf_attach_type {
        match self.way {
            Way::In => bpf_attach_type::BPF_TCX_INGRESS,
            Way::Out => bpf_attach_type::BPF_TCX_EGRESS,
        }
    }

    /// Programs of links that run before every filter.
    fn links(&self) -> std::io::Result<u32> {
        match self.hook {
            VethHook::Filter => Ok(0),
            _ => sys::tcx_programs(self.record.interface, self.attach_type()),
        }
    }

    /// Attaches the program, or adopts what is there. At no moment is neither in place.
    fn ensure(self, program: &Program) -> std::io::Result<Hold> {
        if let Some(link) = Link::adopt(program, &self.place())? {
            filter::remove(self.record.interface, self.way)?;
            return Ok(Hold::Link(link));
        }
        let refused = if self.hook != VethHook::Link && self.links()? == 0 {
            match self.record.put(self.way, program) {
                Ok(()) => return Ok(Hold::Packets(self)),
                Err(error) if self.hook == VethHook::Filter => return Err(error),
                Err(error) => Some(error),
            }
        } else {
            None
        };
        match Link::create(program, &self.place()) {
            Ok(link) => {
                filter::remove(self.record.interface, self.way)?;
                Ok(Hold::Link(link))
            }
            // Neither: what kept the filter away is what an operator can change.
            Err(error) => Err(refused.unwrap_or(error)),
        }
    }

    fn look(&self, program: &Program) -> Result<u32, String> {
        match self.links() {
            Ok(0) => filter::look(self.record.interface, self.way, program.id),
            Ok(_) => Err("a program of another link runs before the filter".into()),
            Err(error) => Err(format!("the interface cannot be asked for its programs: {error}")),
        }
    }
}

impl Attachment {
    /// Attaches a program by a link, or adopts the pinned link and puts the program into it.
    pub(super) fn link(program: &Program, place: &Place<'_>, shown: &str) -> Result<Self, DatapathError> {
        let adopted = Link::adopt(program, place).and_then(|adopted| match adopted {
            Some(link) => Ok(link),
            None => Link::create(program, place),
        });
        Self::new(program, shown, adopted.map(Hold::Link))
    }

    /// Attaches a program to a Pod's veth, or adopts what an earlier agent attached.
    pub(super) fn packets(program: &Program, packets: Packets, shown: &str) -> Result<Self, DatapathError> {
        Self::new(program, shown, packets.ensure(program))
    }

    fn new(program: &Program, shown: &str, hold: std::io::Result<Hold>) -> Result<Self, DatapathError> {
        let (program, shown) = (program.name, shown.to_owned());
        match hold {
            Ok(hold) => Ok(Self { program, shown, repairs: 0, hold }),
            Err(source) => Err(DatapathError::Attach { program, target: shown, source }),
        }
    }

    /// Looks whether the program is still in its place, and puts it back where it is not. `target`: the cgroup,
    /// namespace or interface; `None` where nothing may be changed.
    pub(super) fn check(&mut self, programs: &Programs, target: Option<Target<'_>>) -> AttachmentStatus {
        let look = |hold: &Hold| {
            let program = programs.get(self.program).map_err(|e| e.to_string())?;
            match hold {
                Hold::Link(link) => link.look(program),
                Hold::Packets(packets) => packets.look(program),
            }
        };
        let first = look(&self.hold);
        let mut state = first.clone();
        let problem = first.err().map(|problem| match (target, programs.get(self.program)) {
            (None, _) | (_, Err(_)) => format!("{problem}; a newer agent is in charge"),
            (Some(target), Ok(program)) => {
                let repaired = match &mut self.hold {
                    Hold::Link(link) => link.repair(program, target),
                    Hold::Packets(packets) => packets.clone().ensure(program).map(|hold| self.hold = hold),
                };
                match repaired {
                    Ok(()) => {
                        self.repairs += 1;
                        state = look(&self.hold);
                        problem
                    }
                    Err(error) => format!("{problem}, and cannot be attached again: {error}"),
                }
            }
        });
        AttachmentStatus {
            program: self.program,
            id: state.as_ref().copied().unwrap_or(0),
            attached_to: self.shown.clone(),
            pod: None,
            healthy: state.is_ok(),
            repairs: self.repairs,
            problem,
        }
    }

    /// Whether it is at an interface.
    pub(super) fn at_interface(&self) -> bool {
        match &self.hold {
            Hold::Link(link) => link.kind() == LinkKind::Tcx,
            Hold::Packets(_) => true,
        }
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
            pin: &pin,
        };
        attached.push(Attachment::link(programs.get(name)?, &place, &shown)?);
    }
    Ok((attached, adopted))
}

/// The folder of the pinned links.
pub(super) fn links(bpffs: &Path) -> PathBuf {
    bpffs.join("links")
}
