//! Look-ups that several hooks share.

use aya_ebpf::btf_maps::lpm_trie::Key;
use weft_ebpf_common::{
    Addr, AddrInfo, PolicyKey, PolicyVal,
    codes::{info, pod, subject},
    judge::{Judgement, Query, judge, judge_service, outside_subject},
};

use crate::maps::{ADDRS, CIDRS, CONFIG, POLICY};

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

/// The address, else its range.
#[inline(always)]
pub(crate) fn address_or_range(addr: &Addr) -> Option<AddrInfo> {
    match address(addr) {
        Some(found) => Some(found),
        None => range(addr),
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
