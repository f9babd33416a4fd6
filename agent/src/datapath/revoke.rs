//! Ending connections beside the proxy: those that policy no longer allows, and those from before a Pod's enrolment.

use std::{collections::HashSet, io, net::SocketAddr};

use weft_core::WorkloadUid;
use weft_ebpf_common::{
    Addr, FlowSeen, Pod,
    codes::{TUNNEL_PORT, kind, pod, proto},
};

use super::{
    Datapath,
    addr::{decode, encode},
    error::DatapathError,
    maps::Maps,
    netlink::{self, TcpSocket},
    pods::{Enrolment, Pods},
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
    /// No hook has judged it: it is from before the caller came into the mesh, or from outside.
    pub earlier: bool,
}

impl Datapath {
    /// Ends what passes beside the proxy and is `denied` now: resets TCP connections between Pods of this node,
    /// forgets flows of other protocols. Returns how many.
    ///
    /// # Errors
    /// When sockets cannot be listed or ended.
    pub fn revoke(&self, denied: impl FnMut(KernelConnection<'_>) -> bool) -> Result<usize, DatapathError> {
        revoke(&self.inner.pods.lock(), &self.inner.maps, denied)
    }

    /// Resets what `earlier` Pods of this node had open with anybody else when they came into the mesh, or under a
    /// stricter mode, and that is `denied` now. Returns how many.
    ///
    /// Spared are the proxy's own connections, whichever agent they belong to, what stays within a Pod, the
    /// kubelet's, and those between two enrolled Pods of this node, which are [`Self::revoke`]'s.
    ///
    /// # Errors
    /// When sockets cannot be listed or ended.
    pub fn end_earlier(
        &self,
        earlier: &HashSet<WorkloadUid>,
        denied: impl FnMut(KernelConnection<'_>) -> bool,
    ) -> Result<usize, DatapathError> {
        end_earlier(&self.inner.pods.lock(), &self.inner.maps, earlier, denied)
    }

    /// Writes down that what these Pods had open from before they became strict was looked at, so that no later agent
    /// does it again. An agent that dies before leaves it to the next.
    ///
    /// # Errors
    /// When the maps cannot be written.
    pub fn settled(&self, uids: &HashSet<WorkloadUid>) -> Result<(), DatapathError> {
        let mut pods = self.inner.pods.lock();
        self.inner.in_charge()?;
        for (_, enrolment) in pods.enrolled.iter_mut().filter(|(uid, _)| uids.contains(*uid)) {
            let entry = Pod { flags: enrolment.entry.flags & !pod::UNSETTLED, ..enrolment.entry };
            if entry != enrolment.entry {
                self.inner.ground().rewrite(&entry)?;
                enrolment.entry = entry;
            }
        }
        Ok(())
    }
}

/// The TCP sockets of a Pod with their marks.
fn sockets(pod: &Enrolment, maps: &Maps) -> Result<Vec<TcpSocket>, DatapathError> {
    let marks = maps.sk_meta.fd();
    pod.netns.run(|| netlink::tcp_sockets(Some(marks))).map_err(failed("the Pod's sockets"))
}

/// Connections that the node's kubelet made, as its Pods see them: their own address, then the kubelet's.
fn of_the_kubelet(maps: &Maps) -> Result<HashSet<(SocketAddr, SocketAddr)>, DatapathError> {
    let cgroups: HashSet<u64> = maps.kubelets.keys()?.into_iter().collect();
    if cgroups.is_empty() {
        return Ok(HashSet::new());
    }
    let sockets = netlink::tcp_sockets(None).map_err(failed("the node's sockets"))?;
    Ok(sockets.iter().filter(|s| cgroups.contains(&s.cgroup)).map(|s| (s.remote, s.local)).collect())
}

fn failed(call: &'static str) -> impl FnOnce(io::Error) -> DatapathError {
    move |source| DatapathError::Netlink { call, source }
}

/// Ends sockets of a Pod; how many.
fn destroy(pod: &Enrolment, doomed: &[TcpSocket]) -> Result<usize, DatapathError> {
    if doomed.is_empty() {
        return Ok(0);
    }
    let ended = pod
        .netns
        .run(|| doomed.iter().map(netlink::destroy).try_fold(0, |n, done| Ok(n + usize::from(done?))));
    ended.map_err(failed("the end of a connection"))
}

fn listening(sockets: &[TcpSocket]) -> HashSet<u16> {
    sockets.iter().filter(|s| s.listening).map(|s| s.local.port()).collect()
}

/// Connections between two Pods of this node that do not run through the proxy are looked at where they arrive; the
/// reset ends both sides. Those of the proxy itself are on loopback or the tunnel port.
fn revoke(
    pods: &Pods,
    maps: &Maps,
    mut denied: impl FnMut(KernelConnection<'_>) -> bool,
) -> Result<usize, DatapathError> {
    let here = pods.addresses();
    let mut arrived = Vec::new();
    let mut judged = HashSet::new();
    for (uid, pod) in &pods.enrolled {
        let sockets = sockets(pod, maps)?;
        judged.extend(sockets.iter().filter(|s| s.kind == kind::DIRECT).map(|s| (s.local, s.remote)));
        let listening = listening(&sockets);
        let pairs = sockets.into_iter().filter(|s| {
            !s.listening && here.contains(&encode(s.local.ip())) && here.contains(&encode(s.remote.ip()))
        });
        let pairs = pairs
            .filter(|s| s.local.ip() != s.remote.ip())
            .filter(|s| s.local.port() != TUNNEL_PORT && s.remote.port() != TUNNEL_PORT)
            // Without a listener here the connection went out from this Pod: it is looked at on the other side.
            .filter(|s| listening.contains(&s.local.port()));
        arrived.push((uid, pod, pairs.collect::<Vec<_>>()));
    }
    let mut ended = 0;
    for (uid, pod, mut pairs) in arrived {
        pairs.retain(|s| {
            denied(KernelConnection {
                pod: Some(uid),
                client: s.remote,
                server: s.local,
                protocol: proto::TCP,
                earlier: !judged.contains(&(s.remote, s.local)),
            })
        });
        ended += destroy(pod, &pairs)?;
    }
    ended += forget_flows(pods, maps, &mut denied)?;
    Ok(ended)
}

fn end_earlier(
    pods: &Pods,
    maps: &Maps,
    earlier: &HashSet<WorkloadUid>,
    mut denied: impl FnMut(KernelConnection<'_>) -> bool,
) -> Result<usize, DatapathError> {
    let chosen: Vec<_> = pods.enrolled.iter().filter(|(uid, _)| earlier.contains(*uid)).collect();
    if chosen.is_empty() {
        return Ok(0);
    }
    let here = pods.addresses();
    let kubelet = of_the_kubelet(maps)?;
    let mut ended = 0;
    for (uid, pod) in chosen {
        let sockets = sockets(pod, maps)?;
        let listening = listening(&sockets);
        let doomed: Vec<_> = sockets
            .into_iter()
            .filter(|s| !s.listening && s.kind != kind::PROXY)
            .filter(|s| !s.local.ip().is_loopback() && !s.remote.ip().is_loopback())
            .filter(|s| s.local.ip() != s.remote.ip() && !here.contains(&encode(s.remote.ip())))
            // Tunnels, also those of an agent whose marks were in other maps.
            .filter(|s| s.local.port() != TUNNEL_PORT && s.remote.port() != TUNNEL_PORT)
            .filter(|s| !kubelet.contains(&(s.local, s.remote)))
            .filter(|s| {
                let inbound = listening.contains(&s.local.port());
                let (client, server) = if inbound { (s.remote, s.local) } else { (s.local, s.remote) };
                denied(KernelConnection {
                    pod: inbound.then_some(uid),
                    client,
                    server,
                    protocol: proto::TCP,
                    earlier: s.kind != kind::DIRECT,
                })
            })
            .collect();
        ended += destroy(pod, &doomed)?;
    }
    Ok(ended)
}

fn forget_flows(
    pods: &Pods,
    maps: &Maps,
    denied: &mut impl FnMut(KernelConnection<'_>) -> bool,
) -> Result<usize, DatapathError> {
    let at = |address: &Addr| {
        let mut enrolled = pods.enrolled.iter();
        enrolled.find(|(_, e)| e.entry.ip4 == *address || e.entry.ip6 == *address).map(|(uid, _)| uid)
    };
    let mut forgotten = 0;
    for (row, seen) in maps.flows.entries()? {
        // What the packet hooks write is a protocol's number.
        let protocol = u8::try_from(row.proto).unwrap_or_default();
        let (src, dst) = ((row.src, row.sport), (row.dst, row.dport));
        let mut left = seen;
        for (noted, client, server) in [(&mut left.forth, src, dst), (&mut left.back, dst, src)] {
            let pod = at(&server.0);
            if *noted == 0 || (pod.is_none() && at(&client.0).is_none()) {
                continue;
            }
            let [client, server] = [client, server].map(|(ip, port)| SocketAddr::new(decode(ip), port));
            if denied(KernelConnection { pod, client, server, protocol, earlier: false }) {
                *noted = 0;
                forgotten += 1;
            }
        }
        if left == FlowSeen::default() {
            maps.flows.delete(&row)?;
        } else if left != seen {
            maps.flows.set(&row, &left)?;
        }
    }
    Ok(forgotten)
}
