//! The node's own network. Pods there have no namespace of their own: what their processes open towards the mesh is
//! steered to listeners in the node's namespace, and goes in the node's name. Nothing else there is touched.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use weft_core::SubjectId;
use weft_ebpf_common::{
    Pod,
    addr::NONE,
    codes::{cgroup, pod},
};
use weft_proxy::platform::{PodListeners, PodNet};

use super::{Datapath, DatapathError, addr::encode, listeners, netns::NetNs, passed, podnet::PodNetwork};

/// The calling thread's network namespace: the agent runs in the node's.
const OWN: &str = "/proc/thread-self/ns/net";

/// In whose name Pods of the node's own network speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSpec {
    /// The node's policy subject.
    pub subject: SubjectId,
    /// The node's addresses, at most one of each family counts: as which they are shown.
    pub addresses: Vec<IpAddr>,
}

/// The node's own network, steered.
#[derive(Debug)]
pub struct Host {
    /// Its namespace, for the proxy.
    pub net: Arc<dyn PodNet>,
    /// The proxy's listeners in it. Without them connections pass as they are.
    pub listeners: PodListeners,
}

impl Datapath {
    /// Steers what Pods of the node's own network open towards enrolled Pods to new listeners, at ports that were free.
    /// Listeners from before go on with what they have.
    ///
    /// # Errors
    /// When a listener or the entry cannot be made; things stay as they were.
    pub fn steer_host(&self, spec: &HostSpec) -> Result<Host, DatapathError> {
        let inner = &*self.inner;
        let mut pods = inner.pods.lock();
        inner.in_charge()?;
        let slot = pods.slots.take(inner.host)?;
        let sockets = listeners::open_host(slot)
            .map_err(|source| DatapathError::Listen { uid: "of the node's own network".into(), source })?;
        let netns = NetNs::open(Path::new(OWN))?;
        let entry = Pod {
            cookie: inner.host,
            slot,
            flags: pod::HOST | pod::FAIL_OPEN,
            out_port: sockets.ports.out4,
            out_port6: sockets.ports.out6,
            ..Pod::default()
        };
        inner.maps.pods.set(&inner.host, &named(entry, spec))?;
        let net = inner.nets.share(PodNetwork::new(Arc::new(netns), inner.maps.clone()));
        let listeners = PodListeners { outbound: sockets.outbound, inbound: Vec::new(), tunnel: Vec::new() };
        Ok(Host { net, listeners })
    }

    /// Gives the node another subject or other addresses. Listeners and connections stay.
    ///
    /// # Errors
    /// When the map cannot be read or written.
    pub fn rename_host(&self, spec: &HostSpec) -> Result<(), DatapathError> {
        let inner = &*self.inner;
        let _pods = inner.pods.lock();
        inner.in_charge()?;
        match inner.maps.pods.get(&inner.host)? {
            Some(entry) if entry.flags & pod::HOST != 0 => {
                inner.maps.pods.set(&inner.host, &named(entry, spec))
            }
            _ => Ok(()),
        }
    }

    /// Leaves the node's own network alone again.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn release_host(&self) -> Result<(), DatapathError> {
        let inner = &*self.inner;
        let _pods = inner.pods.lock();
        inner.in_charge()?;
        inner.maps.pods.set(&inner.host, &passed(inner.host))
    }

    /// Says below which cgroups (cgroup2 ids) the kubelet's Pods are, and which one is the agent's own. What an agent of
    /// before left as its own goes.
    ///
    /// # Errors
    /// When a newer agent is in charge, or the map refuses a write.
    pub fn pod_cgroups(&self, pods: &[u64], own: Option<u64>) -> Result<(), DatapathError> {
        let _pods = self.inner.pods.lock();
        self.inner.in_charge()?;
        let map = &self.inner.maps.cgroups;
        let told: BTreeMap<u64, u32> = map.entries()?.into_iter().collect();
        let wanted: BTreeMap<u64, u32> =
            (pods.iter().map(|id| (*id, cgroup::PODS))).chain(own.map(|id| (id, cgroup::AGENT))).collect();
        wanted
            .iter()
            .filter(|(id, kind)| told.get(*id) != Some(*kind))
            .try_for_each(|(id, kind)| map.set(id, kind))?;
        for gone in told.keys().filter(|id| !wanted.contains_key(*id)) {
            map.delete(gone)?;
        }
        Ok(())
    }

    /// The cgroup2 folder whose processes are steered.
    pub fn cgroup_root(&self) -> PathBuf {
        self.inner.root.path().to_owned()
    }
}

/// The entry with what `spec` says in it.
fn named(entry: Pod, spec: &HostSpec) -> Pod {
    let address = |v4: bool| {
        let mut all = spec.addresses.iter().map(IpAddr::to_canonical);
        all.find(|a| a.is_ipv4() == v4).map_or(NONE, encode)
    };
    Pod { subject: spec.subject.0, ip4: address(true), ip6: address(false), ..entry }
}

/// Whether the entry steers a node's own network.
pub(super) fn steered(entry: &Pod) -> bool {
    entry.flags & pod::HOST != 0
}
