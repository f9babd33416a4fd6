//! The kernel side of a node: loads and pins the BPF object, enrols Pods, keeps the maps as the state says, repairs
//! what is detached. Synchronous; no call waits for anything but the kernel.
//!
//! Everything that matters is pinned below one folder of a bpffs and outlives the agent: without an agent the hooks
//! go on refusing what they refused. The next agent adopts maps and links and replaces the programs in place.

#![allow(unsafe_code, reason = "bpf(2), sockopts and fork have no safe form")]

use std::{
    collections::{BTreeMap, HashSet},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use parking_lot::Mutex;
use weft_core::{
    SubjectId, WorkloadUid,
    workload::{FailMode, Mode},
};
use weft_ebpf_common::{Config, Pod, codes::pod};
use weft_proxy::platform::{PodListeners, PodNet};

mod addr;
mod attach;
mod dial;
mod error;
mod events;
mod exempt;
mod host;
mod listeners;
mod loader;
mod log;
mod maps;
mod mounts;
mod netlink;
mod netns;
mod pins;
mod podnet;
mod pods;
mod probe;
mod reconcile;
mod revoke;
mod slots;
mod sys;
mod tables;
mod trial;

pub use attach::{AttachmentStatus, VethHook};
pub use error::DatapathError;
#[cfg(feature = "fuzzing")]
pub use events::fuzz as fuzz_event;
pub use events::{CounterKey, EventStream, Hook, KernelEvent, KernelVerdict};
pub use host::{Host, HostSpec};
pub use log::BpfLog;
pub use maps::MapFill;
pub(crate) use mounts::{cgroup2_mount, in_the_nodes_cgroups};
pub use pods::PodSpec;
pub use reconcile::Changes;
pub use revoke::KernelConnection;
pub use tables::{AddressInfo, FrontInfo, Fronts, RangeInfo, Tables};

use attach::Attachment;
use loader::Programs;
use maps::Maps;
use mounts::CgroupRoot;
use netns::NetNs;
use pods::{Ground, Pods};
use sys::Target;

/// How the datapath is set up.
#[derive(Debug, Clone)]
pub struct DatapathConfig {
    /// The cgroup2 folder whose processes are steered; `None`: the node's cgroup2 root.
    pub cgroup_root: Option<PathBuf>,
    /// The folder for pins, one per node, on a bpffs (mounted where there is none), e.g. `/sys/fs/bpf/weft`.
    pub bpffs: PathBuf,
    /// Whether the programs log, see [`Datapath::log`].
    pub bpf_log: bool,
    /// How packets are judged at the Pods' interfaces.
    pub veth_hook: VethHook,
    /// Entries of maps that should differ from the object's; a map that is pinned already keeps its size.
    pub map_sizes: BTreeMap<String, u32>,
}

impl Default for DatapathConfig {
    fn default() -> Self {
        Self {
            cgroup_root: None,
            bpffs: "/sys/fs/bpf/weft".into(),
            bpf_log: false,
            veth_hook: VethHook::default(),
            map_sizes: BTreeMap::new(),
        }
    }
}

/// What loading found and did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadReport {
    /// `uname -r`.
    pub kernel: String,
    /// The cgroup the programs are attached to.
    pub cgroup_root: PathBuf,
    /// Name and id of each program.
    pub programs: Vec<(&'static str, u32)>,
    /// Maps that an earlier agent left.
    pub adopted_maps: Vec<&'static str>,
    /// True where links of an earlier agent were taken over.
    pub adopted_links: bool,
}

/// A Pod after enrolment.
#[derive(Debug)]
pub struct Enrolled {
    /// Its namespace, for the proxy.
    pub net: Arc<dyn PodNet>,
    /// The proxy's listeners in it; closing them refuses the Pod's connections.
    pub listeners: PodListeners,
    /// The cookie of its network namespace.
    pub cookie: u64,
    /// The index of its host-side interface.
    pub host_ifindex: u32,
    /// Whether nothing is open from before it became strict: an agent has said so ([`Datapath::settled`]).
    pub settled: bool,
}

/// The datapath of a node. A clone is another handle to the same one.
#[derive(Debug, Clone)]
pub struct Datapath {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: DatapathConfig,
    programs: Programs,
    maps: Arc<Maps>,
    root: CgroupRoot,
    /// The agent's own namespace.
    host: u64,
    /// The generation of `CONFIG` that this agent wrote last; another one there is a newer agent's.
    generation: AtomicU32,
    cgroup: Mutex<Vec<Attachment>>,
    pods: Mutex<Pods>,
    /// What the proxy has of each Pod.
    nets: podnet::Nets,
    /// The tables as of the last reconciliation.
    tables: Mutex<Arc<Tables>>,
    ring_taken: Arc<AtomicBool>,
    log: Mutex<Option<BpfLog>>,
}

impl Inner {
    fn ground(&self) -> Ground<'_> {
        let Self { maps, programs, config, .. } = self;
        Ground { maps, programs, bpffs: &config.bpffs, hook: config.veth_hook }
    }

    /// Refuses to change anything once a newer agent is at work: two agents would take turns undoing each other.
    fn in_charge(&self) -> Result<(), DatapathError> {
        let current = self.maps.config.get(&0)?.unwrap_or_default();
        if current.generation == self.generation.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(DatapathError::Superseded)
        }
    }

    /// Writes the configuration's flags, where they differ; true where they did.
    fn configure(&self, tables: &Tables) -> Result<bool, DatapathError> {
        let old = self.maps.config.get(&0)?.unwrap_or_default();
        let flags = reconcile::flags(old.flags, tables);
        if flags != old.flags {
            let generation = old.generation.wrapping_add(1);
            self.maps.config.set(&0, &Config { flags, generation })?;
            self.generation.store(generation, Ordering::Release);
        }
        Ok(flags != old.flags)
    }

    /// Makes the entries of a Pod's addresses say whether the Pod is enrolled here.
    fn mark(&self, entry: &Pod, here: bool) -> Result<(), DatapathError> {
        let tables = self.tables.lock().clone();
        for address in pods::addresses(entry) {
            if let Some(known) = tables.addresses.get(&addr::decode(address)) {
                self.maps.addrs.set(&address, &reconcile::address(known, here))?;
            }
        }
        Ok(())
    }
}

impl Datapath {
    /// Loads the object, or takes over from an earlier agent: pinned maps are adopted, programs replaced inside
    /// their pinned links without a moment in which none is attached, what is missing is attached. Proves by a
    /// connect that the hooks are met. Blocks for some 100 ms.
    ///
    /// # Errors
    /// When something that enrolment stands on cannot be had; the message says what to do.
    pub fn load(config: DatapathConfig) -> Result<(Self, LoadReport), DatapathError> {
        mounts::bpffs(&config.bpffs)?;
        let root = CgroupRoot::open(config.cgroup_root.as_deref())?;
        let loaded = loader::load(&config)?;
        let maps = Arc::new(Maps::open(&config.bpffs)?);
        let host = netns::cookie()
            .map_err(|source| DatapathError::Netns { path: "/proc/self/ns/net".into(), source })?;
        // Before anything is attached: the node's own processes are none of our business. What an earlier agent steers
        // goes on; where its listeners are gone connections pass.
        if !maps.pods.get(&host)?.is_some_and(|entry| host::steered(&entry)) {
            maps.pods.set(&host, &passed(host))?;
        }
        let switches = maps.config.get(&0)?.unwrap_or_default();
        let generation = switches.generation.wrapping_add(1);
        maps.config.set(&0, &Config { generation, ..switches })?;
        let pods = Pods::adopt(&maps)?;
        let (cgroup, adopted_links) = attach::cgroup(&loaded.programs, &root, &config.bpffs)?;
        pins::replace_in_pods(&loaded.programs, &config.bpffs)?;
        probe::probe(root.path(), &maps)?;
        let report = LoadReport {
            kernel: loader::kernel(),
            cgroup_root: root.path().to_owned(),
            programs: loaded.programs.ids(),
            adopted_maps: loaded.adopted,
            adopted_links,
        };
        let inner = Inner {
            config,
            programs: loaded.programs,
            maps,
            root,
            host,
            generation: AtomicU32::new(generation),
            cgroup: Mutex::new(cgroup),
            pods: Mutex::new(pods),
            nets: podnet::Nets::default(),
            tables: Mutex::default(),
            ring_taken: Arc::default(),
            log: Mutex::new(loaded.log),
        };
        Ok((Self { inner: Arc::new(inner) }, report))
    }

    /// Enrols a Pod. Again for a Pod that is enrolled: its listeners are made anew at the same ports, and new
    /// connections go to them.
    ///
    /// # Errors
    /// When the namespace is not the Pod's, or something cannot be made. A Pod that was not known before then stays
    /// refused, and a strict one is closed.
    pub fn enroll(&self, spec: &PodSpec) -> Result<Enrolled, DatapathError> {
        let inner = &*self.inner;
        let mut pods = inner.pods.lock();
        inner.in_charge()?;
        let mut inside = inner.ground().enter(&mut pods, spec)?;
        let (cookie, settled) = (inside.cookie(), inside.settled());
        // A new sandbox of the same Pod, or a namespace that changed hands: the old one goes first.
        let stale =
            |(uid, e): &(&WorkloadUid, &pods::Enrolment)| (*uid == &spec.uid) != (e.entry.cookie == cookie);
        let stale: Vec<_> = pods.enrolled.iter().filter(stale).map(|(uid, _)| uid.clone()).collect();
        if !stale.is_empty() {
            for uid in stale {
                self.remove_locked(&mut pods, &uid)?;
            }
            inside = inner.ground().enter(&mut pods, spec)?;
        }
        let sockets = inner.ground().enroll(&mut pods, spec, inside)?;
        let enrolment = pods.enrolled.get(&spec.uid).ok_or_else(|| not_enrolled(&spec.uid))?;
        inner.mark(&enrolment.entry, true)?;
        let mut listeners = PodListeners {
            outbound: vec![sockets.out4],
            inbound: vec![sockets.in4],
            tunnel: vec![sockets.tunnel4],
        };
        if let Some(v6) = sockets.v6 {
            listeners.outbound.push(v6.out);
            listeners.inbound.push(v6.inbound);
            listeners.tunnel.push(v6.tunnel);
        }
        let net = podnet::PodNetwork::new(enrolment.netns.clone(), inner.maps.clone())
            .with_addresses(&spec.addresses);
        let net = inner.nets.share(net);
        Ok(Enrolled { net, listeners, cookie, host_ifindex: enrolment.entry.ifindex, settled })
    }

    /// Gives an enrolled Pod another subject, mode or fail mode. Listeners and connections stay.
    ///
    /// # Errors
    /// When it is not enrolled, or the maps cannot be written.
    pub fn update(
        &self,
        uid: &WorkloadUid,
        subject: SubjectId,
        mode: Mode,
        fail_mode: FailMode,
    ) -> Result<(), DatapathError> {
        let mut pods = self.inner.pods.lock();
        self.inner.in_charge()?;
        let enrolment = pods.enrolled.get_mut(uid).ok_or_else(|| not_enrolled(uid))?;
        let spec = PodSpec { subject, mode, fail_mode, ..enrolment.spec.clone() };
        let flags = pods::flags_after(&spec, enrolment.entry.flags)?;
        let entry = Pod { subject: subject.0, flags, ..enrolment.entry };
        if entry != enrolment.entry {
            self.inner.ground().rewrite(&entry)?;
            enrolment.entry = entry;
        }
        enrolment.spec = spec;
        Ok(())
    }

    /// Notes that a namespace belongs to a Pod outside the mesh: it passes untouched. A Pod that is enrolled has to
    /// be removed first.
    ///
    /// # Errors
    /// When the namespace is gone or the map is full.
    pub fn pass(&self, uid: &WorkloadUid, netns: &Path) -> Result<(), DatapathError> {
        let cookie = NetNs::open(netns)?.cookie();
        let mut pods = self.inner.pods.lock();
        self.inner.in_charge()?;
        self.inner.maps.pods.set(&cookie, &passed(cookie))?;
        if let Some(old) = pods.passed.insert(uid.clone(), cookie)
            && old != cookie
        {
            self.inner.maps.pods.delete(&old)?;
        }
        Ok(())
    }

    /// Removes a Pod and everything of it: map entries, attachments, pins. Its connects are refused from then on.
    /// A Pod that is not known is fine.
    ///
    /// # Errors
    /// When the kernel refuses a deletion.
    pub fn remove(&self, uid: &WorkloadUid) -> Result<(), DatapathError> {
        self.remove_locked(&mut self.inner.pods.lock(), uid)
    }

    fn remove_locked(&self, pods: &mut Pods, uid: &WorkloadUid) -> Result<(), DatapathError> {
        let inner = &*self.inner;
        inner.in_charge()?;
        if let Some(cookie) = pods.passed.get(uid).copied() {
            inner.maps.pods.delete(&cookie)?;
            pods.passed.remove(uid);
        }
        if let Some(enrolment) = pods.enrolled.remove(uid) {
            inner.ground().forget(&enrolment.entry)?;
            inner.mark(&enrolment.entry, false)?;
            pods.slots.free(enrolment.entry.cookie);
        } else {
            for entry in pins::pinned_entries(&inner.config.bpffs, &inner.maps, uid)? {
                inner.ground().forget(&entry)?;
                inner.mark(&entry, false)?;
                pods.slots.free(entry.cookie);
            }
        }
        inner.ground().unpin(uid)
    }

    /// Brings addresses, ranges, Services and policy rows to `desired`, against what the maps hold now.
    ///
    /// # Errors
    /// When a map is full or refuses a write; what was written stays, and the next call goes on.
    pub fn reconcile(&self, desired: &Tables) -> Result<Changes, DatapathError> {
        let _pods = self.inner.pods.lock();
        self.inner.in_charge()?;
        *self.inner.tables.lock() = Arc::new(desired.clone());
        let mut changes = reconcile::reconcile(&self.inner.maps, desired)?;
        changes.inserted += usize::from(self.inner.configure(desired)?);
        Ok(changes)
    }

    /// Looks at every attachment and puts back what is gone, unless a newer agent took over. Meant for once a second.
    pub fn check(&self) -> Vec<AttachmentStatus> {
        let inner = &*self.inner;
        let repair = inner.in_charge().is_ok();
        let mut statuses = Vec::new();
        for attachment in inner.cgroup.lock().iter_mut() {
            let target = repair.then(|| Target::Fd(inner.root.as_fd()));
            statuses.push(attachment.check(&inner.programs, target));
        }
        for enrolment in inner.pods.lock().enrolled.values_mut() {
            let (index, namespace) = (enrolment.entry.ifindex, enrolment.netns.clone());
            for attachment in &mut enrolment.attachments {
                let target = match attachment.at_interface() {
                    true => Target::Interface(index),
                    false => Target::Fd(namespace.as_fd()),
                };
                let status = attachment.check(&inner.programs, repair.then_some(target));
                statuses.push(AttachmentStatus { pod: Some(enrolment.spec.uid.clone()), ..status });
            }
        }
        statuses
    }

    /// True once a newer agent of this node took over: nothing can be changed any more, connections go on.
    pub fn superseded(&self) -> bool {
        matches!(self.inner.in_charge(), Err(DatapathError::Superseded))
    }

    /// The fill of each map that must not fill up.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn maps(&self) -> Result<Vec<MapFill>, DatapathError> {
        self.inner.maps.fill()
    }

    /// What the hooks decided, counted exactly.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn counters(&self) -> Result<Vec<(CounterKey, u64)>, DatapathError> {
        events::counters(&self.inner.maps)
    }

    /// Named totals, among them the events lost (`ring_lost`).
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn stats(&self) -> Result<Vec<(&'static str, u64)>, DatapathError> {
        events::stats(&self.inner.maps)
    }

    /// Opens the event ring. One reader at a time; needs a tokio runtime around.
    ///
    /// # Errors
    /// When it has a reader already or cannot be mapped.
    pub fn events(&self) -> Result<EventStream, DatapathError> {
        EventStream::open(&self.inner.config, &self.inner.ring_taken)
    }

    /// The programs' debug lines, where [`DatapathConfig::bpf_log`] is set; taken once.
    pub fn log(&self) -> Option<BpfLog> {
        self.inner.log.lock().take()
    }

    /// After a takeover, once every Pod of the node was enrolled or passed: removes what belongs to Pods that are
    /// gone. Pods in `keep` whose enrolment failed stay as the earlier agent left them. Returns how many entries
    /// and Pods were removed.
    ///
    /// # Errors
    /// When the kernel refuses a deletion.
    pub fn sweep(&self, keep: &HashSet<WorkloadUid>) -> Result<usize, DatapathError> {
        let inner = &*self.inner;
        let mut pods = inner.pods.lock();
        let mut swept = 0;
        let mut kept = HashSet::from([inner.host]);
        for uid in pins::pinned_uids(&inner.config.bpffs)?
            .into_iter()
            .chain(pods.enrolled.keys().cloned().collect::<Vec<_>>())
        {
            if !keep.contains(&uid) {
                self.remove_locked(&mut pods, &uid)?;
                swept += 1;
            } else if !pods.enrolled.contains_key(&uid) {
                kept.extend(
                    pins::pinned_entries(&inner.config.bpffs, &inner.maps, &uid)?.iter().map(|e| e.cookie),
                );
            }
        }
        kept.extend(pods.enrolled.values().map(|e| e.entry.cookie));
        kept.extend(pods.passed.values());
        for (cookie, entry) in inner.maps.pods.entries()? {
            if !kept.contains(&cookie) {
                if entry.flags & pod::PASS == 0 {
                    inner.ground().forget(&entry)?;
                    inner.mark(&entry, false)?;
                    pods.slots.free(cookie);
                } else {
                    inner.maps.pods.delete(&cookie)?;
                }
                swept += 1;
            }
        }
        Ok(swept)
    }

    /// Takes everything out of the kernel that is pinned or noted in `bpffs`: every Pod passes untouched afterwards.
    /// Only an explicit uninstall may do that, in the agent's own network namespace. An agent that still runs repairs
    /// nothing afterwards.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub fn uninstall(bpffs: &Path) -> Result<(), DatapathError> {
        pins::uninstall(bpffs)
    }
}

fn not_enrolled(uid: &WorkloadUid) -> DatapathError {
    DatapathError::NotEnrolled { uid: uid.clone() }
}

/// The entry of a namespace outside the mesh.
fn passed(cookie: u64) -> Pod {
    Pod { cookie, flags: pod::PASS, ..Pod::default() }
}
