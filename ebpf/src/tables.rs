//! Look-ups that several hooks share.

use aya_ebpf::btf_maps::lpm_trie::Key;
use weft_ebpf_common::{
    Addr, AddrInfo, FrontKey, PolicyKey, PolicyVal, addr,
    codes::{info, pod, subject},
    judge::{Judgement, Query, judge, judge_service, outside_subject},
};

use crate::maps::{ADDRS, CIDRS, CONFIG, FRONTS, POLICY};

/// What is known of this very address.
#[inline(always)]
pub(crate) fn address(addr: &Addr) -> Option<AddrInfo> {
    // SAFETY: eight bytes, copied at once; a concurrent update yields the old or the new row.
    unsafe { ADDRS.get(addr) }.copied()
}

/// What is known of the range the address is in.
#[inline(always)]
pub(crate) fn range(addr: &Addr) -> Option<AddrInfo> {
    CIDRS.get(&Key::new(128, *addr)).copied()
}

/// What is known of a port of an address, and the port that policy knows it by: a Service may have ports on addresses
/// that are not its own, such as a node's.
#[inline(always)]
pub(crate) fn dialled(to: &Addr, port: u16, proto: u8) -> Option<(AddrInfo, u16)> {
    let found = address(to)?;
    if found.flags & info::FRONT == 0 {
        return Some((found, port));
    }
    let mut key = FrontKey { addr: *to, port, proto, pad: 0 };
    // SAFETY: rows are replaced whole by the agent, and copied at once.
    let mut front = unsafe { FRONTS.get(&key) };
    if front.is_none() && found.flags & info::NODE != 0 {
        key.addr = addr::NONE;
        // SAFETY: as above.
        front = unsafe { FRONTS.get(&key) };
    }
    match front {
        Some(front) => Some((AddrInfo { subject: front.subject, flags: front.flags }, front.port)),
        None => Some((found, port)),
    }
}

/// The port of the address, else the address's range.
#[inline(always)]
pub(crate) fn dialled_or_range(to: &Addr, port: u16, proto: u8) -> Option<AddrInfo> {
    match dialled(to, port, proto) {
        Some((found, _)) => Some(found),
        None => range(to),
    }
}

/// True for what only the mesh may carry towards: enrolled Pods, Services, and the cluster's ranges.
#[inline(always)]
pub(crate) fn is_mesh(flags: u32) -> bool {
    flags & (info::ENROLLED | info::SERVICE | info::MESH_RANGE) != 0
}

/// True for what an unclassified Pod may not reach: enrolled Pods, and Services with one behind them. An address that
/// nobody has described is no such thing: who listens there judges for himself, and Pods outside the mesh must come up
/// while no agent runs.
#[inline(always)]
pub(crate) fn is_enrolled(flags: u32) -> bool {
    flags & info::ENROLLED != 0 || flags & (info::SERVICE | info::MESHED) == info::SERVICE | info::MESHED
}

/// The subject of a client that only its address speaks for.
#[inline(always)]
pub(crate) fn outside(addr: &Addr) -> u32 {
    outside_subject(range(addr).map(|found| (found.subject, found.flags)))
}

/// The subject to report of a destination: a Service has none.
#[inline(always)]
pub(crate) fn reported(found: &AddrInfo) -> u32 {
    // Without a branch, which the compiler would make of it: the verifier would walk all that follows twice.
    found.subject & core::hint::black_box((found.flags & info::SERVICE) / info::SERVICE).wrapping_sub(1)
}

const _: () = assert!(subject::UNKNOWN == 0);

/// The verdict of a Service's rows on what is not TCP.
#[inline(always)]
pub(crate) fn service_verdict(query: &Query) -> Judgement {
    judge_service(query, row)
}

/// The verdict over the rows of the map.
#[inline(always)]
pub(crate) fn verdict(query: &Query) -> Judgement {
    judge(query, row)
}

#[inline(always)]
fn row(key: &PolicyKey) -> Option<PolicyVal> {
    // SAFETY: eight bytes, copied at once.
    unsafe { POLICY.get(key) }.copied()
}

/// Flags of a Pod as a destination. A Pod whose address nobody described yet counts as having rows: there are none,
/// so nothing enters.
#[inline(always)]
pub(crate) fn destination(addr: &Addr, pod_flags: u32) -> u32 {
    match address(addr) {
        Some(found) => found.flags,
        None if pod_flags & pod::STRICT != 0 => info::ENROLLED | info::LOCAL | info::POLICED | info::STRICT,
        None => info::ENROLLED | info::LOCAL | info::POLICED,
    }
}

/// The switches of [`weft_ebpf_common::codes::config`].
#[inline(always)]
pub(crate) fn config() -> u32 {
    CONFIG.get(0).map_or(0, |config| config.flags)
}
