//! What can go wrong, and what an operator can do about it.

use std::{io, net::IpAddr, path::PathBuf};

use weft_core::WorkloadUid;

/// A failure of the datapath.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// No bpffs, and none could be mounted.
    #[error(
        "{path} is on no bpffs and none could be mounted there; mount one (`mount -t bpf bpf /sys/fs/bpf`) or run the agent privileged"
    )]
    Bpffs {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The object is none, or does not fit this kernel at all.
    #[error(
        "kernel {kernel} does not take the BPF object ({reason}): nothing can be enrolled on this node; Linux 5.15 or newer with BTF is needed"
    )]
    Object {
        /// `uname -r`.
        kernel: String,
        /// Why.
        reason: String,
    },
    /// The embedded object lacks something.
    #[error("the BPF object holds no {what}; build agent and object together with `cargo xtask build-ebpf`")]
    Missing {
        /// A program or map.
        what: String,
    },
    /// The verifier or the kernel refused a program.
    #[error("kernel {kernel} does not take the BPF program {program} ({reason}): {consequence}")]
    Program {
        /// Its name.
        program: String,
        /// `uname -r`.
        kernel: String,
        /// What stops working.
        consequence: &'static str,
        /// Why.
        reason: String,
    },
    /// A pinned map is of another make.
    #[error(
        "the pinned map {name} ({path}) has another layout than this agent's; drain the node and run `weft-agent uninstall`, or give the agent another bpffs folder"
    )]
    MapLayout {
        /// Its name.
        name: String,
        /// Its pin.
        path: PathBuf,
    },
    /// A map is full.
    #[error(
        "the map {name} is full ({capacity} entries): give the agents a larger --map-size {name}=ENTRIES, and drain and restart this node, or spread Pods over more nodes"
    )]
    MapFull {
        /// Its name.
        name: &'static str,
        /// Entries it can hold.
        capacity: u32,
    },
    /// A map call failed.
    #[error("map {name}: {call} failed")]
    Map {
        /// Its name.
        name: &'static str,
        /// What was tried.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A pin could not be read, made or removed.
    #[error("the pin {path} cannot be used")]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No cgroup2 hierarchy.
    #[error(
        "no cgroup2 hierarchy was found and none could be mounted; the agent needs hostPID, or set its cgroup root"
    )]
    CgroupRoot {
        /// Why.
        source: io::Error,
    },
    /// A program could not be attached.
    #[error("{program} cannot be attached to {target}")]
    Attach {
        /// Its name.
        program: &'static str,
        /// Cgroup, namespace or interface.
        target: String,
        /// Why.
        source: io::Error,
    },
    /// The hooks are attached but a connect below the cgroup root does not meet them.
    #[error(
        "a connect below {root} does not meet the attached programs ({outcome}); the cgroup root is not the one Pods live under: set the agent's cgroup root to the node's cgroup2 mount"
    )]
    Probe {
        /// The cgroup root.
        root: PathBuf,
        /// What the connect answered.
        outcome: String,
    },
    /// A network namespace could not be entered or asked.
    #[error("the network namespace {path} cannot be used; the Pod may be gone")]
    Netns {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The namespace does not hold the Pod's address.
    #[error(
        "the network namespace {path} does not hold the Pod's address {address}: it is another Pod's, or the CNI has not set it up yet"
    )]
    Address {
        /// The namespace.
        path: PathBuf,
        /// The address.
        address: IpAddr,
    },
    /// A Pod without an address.
    #[error("Pod {uid} has no address to enrol")]
    NoAddress {
        /// Its UID.
        uid: WorkloadUid,
    },
    /// The Pod's interface has no host side here.
    #[error(
        "interface {interface} of {path} has no host-side veth in the agent's network namespace (ipvlan, macvlan and SR-IOV are not supported): the Pod stays refused"
    )]
    NoVeth {
        /// The namespace.
        path: PathBuf,
        /// Index of the Pod's interface.
        interface: u32,
    },
    /// Listeners or sockets could not be made.
    #[error("listeners for Pod {uid} cannot be made")]
    Listen {
        /// Its UID.
        uid: WorkloadUid,
        /// Why.
        source: io::Error,
    },
    /// Every slot is taken.
    #[error("all 65,535 Pod slots of this node are taken")]
    Slots,
    /// A newer agent of this node took over.
    #[error("a newer agent has taken this node's datapath over; this one only drains")]
    Superseded,
    /// A Pod that is not enrolled.
    #[error("Pod {uid} is not enrolled")]
    NotEnrolled {
        /// Its UID.
        uid: WorkloadUid,
    },
    /// Fail-open together with strict.
    #[error("Pod {uid} asks for fail-mode open in mode strict; one of the two has to go")]
    OpenStrict {
        /// Its UID.
        uid: WorkloadUid,
    },
    /// A netlink request failed.
    #[error("netlink: {call} failed")]
    Netlink {
        /// What was asked.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The event ring is taken or cannot be read.
    #[error("the event ring cannot be read: {reason}")]
    Events {
        /// Why.
        reason: String,
    },
}
