//! The maps, typed, behind shared references.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::Pod as Plain;
use weft_ebpf_common::{
    Addr, AddrInfo, Config, CountKey, FlowSeen, Front, FrontKey, ListenerKey, OrigDst, Pod, PolicyKey,
    PolicyVal, SkMeta, Tuple, VipKey, codes::map,
};

use super::{error::DatapathError, sys};

/// Entries that are read at once.
const BATCH: usize = 4096;

/// A hash-like map with keys of `K` and values of `V`.
#[derive(Debug)]
pub(super) struct Map<K, V> {
    name: &'static str,
    fd: OwnedFd,
    layout: sys::MapLayout,
    types: PhantomData<fn() -> (K, V)>,
}

/// Where a map is pinned.
pub(super) fn pin_path(bpffs: &Path, name: &str) -> std::path::PathBuf {
    bpffs.join("maps").join(format!("{name}_v{}", weft_ebpf_common::codes::MAP_VERSION))
}

impl<K: Plain, V: Plain> Map<K, V> {
    /// Opens a pinned map, and checks that its sizes are those of `K` and `V`.
    pub(super) fn open(bpffs: &Path, name: &'static str) -> Result<Self, DatapathError> {
        let path = pin_path(bpffs, name);
        let open = || {
            let fd = sys::open_pin(&path)?;
            let layout = sys::map_layout(fd.as_fd())?;
            Ok((fd, layout))
        };
        let (fd, layout) = open().map_err(|source| DatapathError::Pin { path: path.clone(), source })?;
        if layout.key as usize != size_of::<K>() || layout.value as usize != size_of::<V>() {
            return Err(DatapathError::MapLayout { name: name.into(), path });
        }
        Ok(Self { name, fd, layout, types: PhantomData })
    }

    fn failed(&self, call: &'static str) -> impl Fn(io::Error) -> DatapathError + use<'_, K, V> {
        move |source| match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => {
                DatapathError::MapFull { name: self.name, capacity: self.layout.capacity }
            }
            _ => DatapathError::Map { name: self.name, call, source },
        }
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &K) -> Result<Option<V>, DatapathError> {
        // SAFETY: V is `aya::Pod`: zeroes are a value.
        let mut value: V = unsafe { std::mem::zeroed() };
        // SAFETY: every byte of a V may be written, and V has no other borrower here.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(&mut value).cast(), size_of::<V>()) };
        // SAFETY: `open` compared the sizes of K and V with the map's.
        let found = unsafe { sys::map_lookup(self.fd.as_fd(), key, bytes) }.map_err(self.failed("lookup"))?;
        Ok(found.then_some(value))
    }

    /// Sets the value of a key.
    pub(super) fn set(&self, key: &K, value: &V) -> Result<(), DatapathError> {
        // SAFETY: `open` compared the sizes of K and V with the map's.
        unsafe { sys::map_update(self.fd.as_fd(), key, value) }.map_err(self.failed("update"))
    }

    /// Deletes a key; false where it was not there.
    pub(super) fn delete(&self, key: &K) -> Result<bool, DatapathError> {
        // SAFETY: `open` compared the size of K with the map's.
        unsafe { sys::map_delete(self.fd.as_fd(), key) }.map_err(self.failed("delete"))
    }

    /// Every entry by batch reads; `None` where the map or the kernel has none.
    fn read_in_batches(&self) -> Option<Vec<(K, V)>> {
        // A batch must be able to hold a whole bucket of a hash map.
        let batch = (self.layout.capacity as usize).clamp(16, BATCH);
        // SAFETY: K and V are `aya::Pod`: zeroes are a value.
        let zero: (K, V) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        let (mut keys, mut values) = (vec![zero.0; batch], vec![zero.1; batch]);
        let (mut entries, mut cursor) = (Vec::new(), None);
        while entries.len() <= self.walk_limit() {
            // SAFETY: `open` compared the sizes of K and V with the map's; both are `aya::Pod`.
            let read = unsafe { sys::map_read(self.fd.as_fd(), &mut cursor, &mut keys, &mut values) };
            let (count, end) = read.ok()?;
            entries.extend(keys.iter().copied().zip(values.iter().copied()).take(count));
            if end {
                return Some(entries);
            }
        }
        None
    }

    /// More keys than the map holds: a walk over a map that changes meanwhile may begin again and again.
    fn walk_limit(&self) -> usize {
        2 * self.layout.capacity as usize
    }

    /// Every key, as of now; keys that come and go meanwhile may be missed or be there twice.
    pub(super) fn keys(&self) -> Result<Vec<K>, DatapathError> {
        let mut keys = Vec::new();
        let mut last: Option<K> = None;
        while keys.len() < self.walk_limit() {
            // SAFETY: K is `aya::Pod`: zeroes are a value.
            let mut next: K = unsafe { std::mem::zeroed() };
            // SAFETY: `open` compared the size of K with the map's.
            if !unsafe { sys::map_next_key(self.fd.as_fd(), last.as_ref(), &mut next) }
                .map_err(self.failed("walk"))?
            {
                break;
            }
            keys.push(next);
            last = Some(next);
        }
        Ok(keys)
    }

    /// Every entry, as of now.
    pub(super) fn entries(&self) -> Result<Vec<(K, V)>, DatapathError> {
        if let Some(entries) = self.read_in_batches() {
            return Ok(entries);
        }
        let mut entries = Vec::new();
        for key in self.keys()? {
            if let Some(value) = self.get(&key)? {
                entries.push((key, value));
            }
        }
        Ok(entries)
    }

    /// Its name.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Its descriptor, for a call that names the map.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A map that holds a `u64` per CPU.
#[derive(Debug)]
pub(super) struct PerCpu<K> {
    map: Map<K, u64>,
    cpus: usize,
}

impl<K: Plain> PerCpu<K> {
    fn open(bpffs: &Path, name: &'static str) -> Result<Self, DatapathError> {
        let cpus =
            aya::util::nr_cpus().map_err(|(_, source)| DatapathError::Map { name, call: "cpus", source })?;
        Ok(Self { map: Map::open(bpffs, name)?, cpus })
    }

    /// The sum over all CPUs.
    pub(super) fn sum(&self, key: &K) -> Result<Option<u64>, DatapathError> {
        let mut values = vec![0_u8; self.cpus * size_of::<u64>()];
        // SAFETY: the key's size was compared at `open`; a lookup writes 8 bytes for every possible CPU.
        let found = unsafe { sys::map_lookup(self.map.fd.as_fd(), key, &mut values) }
            .map_err(self.map.failed("lookup"))?;
        let (words, _) = values.as_chunks::<8>();
        Ok(found.then(|| words.iter().map(|w| u64::from_ne_bytes(*w)).fold(0, u64::wrapping_add)))
    }

    /// Every key with its sum.
    pub(super) fn sums(&self) -> Result<Vec<(K, u64)>, DatapathError> {
        let mut sums = Vec::new();
        for key in self.map.keys()? {
            if let Some(sum) = self.sum(&key)? {
                sums.push((key, sum));
            }
        }
        Ok(sums)
    }

    /// The map below, for its fill.
    pub(super) fn fill(&self) -> Result<MapFill, DatapathError> {
        self.map.fill()
    }
}

/// How full a map is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapFill {
    /// Its name.
    pub name: &'static str,
    /// Entries in it.
    pub entries: usize,
    /// Entries it can hold.
    pub capacity: u32,
}

impl<K: Plain, V: Plain> Map<K, V> {
    fn fill(&self) -> Result<MapFill, DatapathError> {
        Ok(MapFill { name: self.name, entries: self.keys()?.len(), capacity: self.layout.capacity })
    }
}

/// Key of an LPM trie.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Prefix {
    /// Bits of `addr` that count, native order.
    pub(super) bits: u32,
    /// The network address.
    pub(super) addr: Addr,
}

// SAFETY: repr(C), integers only, 4 + 16 bytes without padding.
unsafe impl Plain for Prefix {}

/// Every map that the agent reads or writes.
#[derive(Debug)]
pub(super) struct Maps {
    pub(super) pods: Map<u64, Pod>,
    pub(super) veths: Map<u32, Pod>,
    pub(super) pod_addrs: Map<Addr, Pod>,
    pub(super) sk_meta: Map<i32, SkMeta>,
    pub(super) orig_dst: Map<Tuple, OrigDst>,
    pub(super) listeners: Map<ListenerKey, u32>,
    pub(super) addrs: Map<Addr, AddrInfo>,
    pub(super) cidrs: Map<Prefix, AddrInfo>,
    pub(super) vip_denied: Map<VipKey, u32>,
    pub(super) policy: Map<PolicyKey, PolicyVal>,
    pub(super) flows: Map<Tuple, FlowSeen>,
    pub(super) counts: PerCpu<CountKey>,
    pub(super) stats: PerCpu<u32>,
    pub(super) config: Map<u32, Config>,
    pub(super) kubelets: Map<u64, u32>,
    pub(super) fronts: Map<FrontKey, Front>,
    pub(super) cgroups: Map<u64, u32>,
}

impl Maps {
    /// Opens the pinned maps.
    pub(super) fn open(bpffs: &Path) -> Result<Self, DatapathError> {
        Ok(Self {
            pods: Map::open(bpffs, map::PODS)?,
            veths: Map::open(bpffs, map::VETHS)?,
            pod_addrs: Map::open(bpffs, map::POD_ADDRS)?,
            sk_meta: Map::open(bpffs, map::SK_META)?,
            orig_dst: Map::open(bpffs, map::ORIG_DST)?,
            listeners: Map::open(bpffs, map::LISTENERS)?,
            addrs: Map::open(bpffs, map::ADDRS)?,
            cidrs: Map::open(bpffs, map::CIDRS)?,
            vip_denied: Map::open(bpffs, map::VIP_DENIED)?,
            policy: Map::open(bpffs, map::POLICY)?,
            flows: Map::open(bpffs, map::FLOW_PAIRS)?,
            counts: PerCpu::open(bpffs, map::COUNTS)?,
            stats: PerCpu::open(bpffs, map::STATS)?,
            config: Map::open(bpffs, map::CONFIG)?,
            kubelets: Map::open(bpffs, map::KUBELETS)?,
            fronts: Map::open(bpffs, map::FRONTS)?,
            cgroups: Map::open(bpffs, map::CGROUPS)?,
        })
    }

    /// The fill of every map whose filling up refuses something. LRU maps are meant to be full.
    pub(super) fn fill(&self) -> Result<Vec<MapFill>, DatapathError> {
        Ok(vec![
            self.pods.fill()?,
            self.veths.fill()?,
            self.pod_addrs.fill()?,
            self.listeners.fill()?,
            self.addrs.fill()?,
            self.cidrs.fill()?,
            self.vip_denied.fill()?,
            self.fronts.fill()?,
            self.policy.fill()?,
            self.counts.fill()?,
        ])
    }
}
