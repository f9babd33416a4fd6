//! Ending connections of the kernel path that policy no longer allows.

use std::{collections::HashSet, net::SocketAddr};

use weft_core::WorkloadUid;
use weft_ebpf_common::{Addr, codes::TUNNEL_PORT};

use super::{
    addr::{decode, encode},
    error::DatapathError,
    maps::Maps,
    netlink,
    pods::Pods,
};

/// Something that passes beside the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelConnection<'a> {
    /// The Pod of this node that is called; none where what is called is elsewhere, or a Service's address.
    pub pod: Option<&'a WorkloadUid>,
    /// The caller.
    pub client: SocketAddr,
    /// What is called.
    pub server: SocketAddr,
    /// IP protocol number.
    pub protocol: u8,
}

/// Resets TCP connections and forgets flows for which `denied` says yes; how many.
///
/// Connections between two Pods of this node that do not run through the proxy are looked at where they arrive; the
/// reset ends both sides. Those of the proxy itself are on loopback or the tunnel port.
pub(super) fn revoke(
    pods: &Pods,
    maps: &Maps,
    mut denied: impl FnMut(KernelConnection<'_>) -> bool,
) -> Result<usize, DatapathError> {
    let here = pods.addresses();
    let failed = |call| move |source| DatapathError::Netlink { call, source };
    let mut ended = 0;
    for (uid, enrolment) in &pods.enrolled {
        let sockets = enrolment.netns.run(netlink::tcp_sockets).map_err(failed("the Pod's sockets"))?;
        let listening: HashSet<u16> =
            sockets.iter().filter(|s| s.listening).map(|s| s.local.port()).collect();
        let doomed: Vec<_> = sockets
            .iter()
            .filter(|s| {
                !s.listening && here.contains(&encode(s.local.ip())) && here.contains(&encode(s.remote.ip()))
            })
            .filter(|s| s.local.ip() != s.remote.ip())
            .filter(|s| s.local.port() != TUNNEL_PORT && s.remote.port() != TUNNEL_PORT)
            // Without a listener here the connection went out from this Pod: it is looked at on the other side.
            .filter(|s| listening.contains(&s.local.port()))
            .filter(|s| {
                denied(KernelConnection { pod: Some(uid), client: s.remote, server: s.local, protocol: 6 })
            })
            .copied()
            .collect();
        if !doomed.is_empty() {
            let destroyed = enrolment.netns.run(|| {
                doomed.iter().map(netlink::destroy).try_fold(0, |n, done| Ok(n + usize::from(done?)))
            });
            ended += destroyed.map_err(failed("the end of a connection"))?;
        }
    }
    ended += forget_flows(pods, maps, &mut denied)?;
    Ok(ended)
}

fn forget_flows(
    pods: &Pods,
    maps: &Maps,
    denied: &mut impl FnMut(KernelConnection<'_>) -> bool,
) -> Result<usize, DatapathError> {
    let mut forgotten = 0;
    for flow in maps.flows.keys()? {
        let server = SocketAddr::new(decode(flow.dst), flow.dport);
        let client = SocketAddr::new(decode(flow.src), flow.sport);
        let at = |address: &Addr| {
            let mut enrolled = pods.enrolled.iter();
            enrolled.find(|(_, e)| e.entry.ip4 == *address || e.entry.ip6 == *address).map(|(uid, _)| uid)
        };
        let pod = at(&flow.dst);
        if pod.is_none() && at(&flow.src).is_none() {
            continue;
        }
        if denied(KernelConnection { pod, client, server, protocol: flow.proto }) {
            forgotten += usize::from(maps.flows.delete(&flow)?);
        }
    }
    Ok(forgotten)
}
