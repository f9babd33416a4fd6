//! Rows for the maps, and two Pods to talk about in either family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{
        HashMap, LpmTrie, MapData, PerCpuArray, PerCpuHashMap, RingBuf, SkStorage, SockHash, lpm_trie::Key,
    },
};
use weft_ebpf_common::{
    Addr, AddrInfo, CountKey, Event, ListenerKey, Pod, PolicyKey, PolicyVal, SkMeta,
    codes::{info, map},
};

/// Subject of the Pod whose hooks run.
pub const OWN: u32 = 300;
/// Subject of another enrolled Pod.
pub const PEER: u32 = 301;
/// The Pod's number.
pub const SLOT: u32 = 0x1234;

/// The addresses of one family.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// The Pod whose hooks run.
    pub own: IpAddr,
    /// Another enrolled Pod.
    pub peer: IpAddr,
    /// A Service.
    pub service: IpAddr,
    /// Outside the mesh.
    pub world: IpAddr,
}

/// Both families: what holds for one must hold for the other.
pub const FAMILIES: [Family; 2] = [
    Family {
        own: IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2)),
        peer: IpAddr::V4(Ipv4Addr::new(10, 9, 0, 3)),
        service: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 7)),
        world: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 9)),
    },
    Family {
        own: IpAddr::V6(Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 2)),
        peer: IpAddr::V6(Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 3)),
        service: IpAddr::V6(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 7)),
        world: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9)),
    },
];

/// An address in the form of the maps.
pub fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The Pod of [`FAMILIES`], with both addresses.
pub fn own_pod(flags: u32) -> Pod {
    Pod {
        cookie: 0,
        ip4: addr(FAMILIES[0].own),
        ip6: addr(FAMILIES[1].own),
        slot: SLOT,
        subject: OWN,
        flags,
        ifindex: 1,
        ..Pod::default()
    }
}

/// Typed hands on the maps of a loaded object.
pub struct Maps<'a>(pub &'a mut Ebpf);

impl Maps<'_> {
    fn hash<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        HashMap::try_from(self.0.map_mut(name).with_context(|| format!("no map {name}"))?).context("map type")
    }

    /// Inserts a row.
    ///
    /// # Errors
    /// There is no such map, or it has other types.
    pub fn set<K: aya::Pod, V: aya::Pod>(&mut self, name: &str, key: K, value: V) -> Result<()> {
        self.hash(name)?.insert(key, value, 0).with_context(|| name.to_owned())
    }

    /// Deletes a row.
    ///
    /// # Errors
    /// There is no such row.
    pub fn delete<K: aya::Pod, V: aya::Pod>(&mut self, name: &str, key: K) -> Result<()> {
        self.hash::<K, V>(name)?.remove(&key).with_context(|| name.to_owned())
    }

    /// The number of rows.
    ///
    /// # Errors
    /// There is no such map.
    pub fn rows<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Result<usize> {
        Ok(self.hash::<K, V>(name)?.keys().count())
    }

    /// Describes an address.
    ///
    /// # Errors
    /// The map refuses.
    pub fn describe(&mut self, ip: IpAddr, subject: u32, flags: u32) -> Result<()> {
        self.set(map::ADDRS, addr(ip), AddrInfo { subject, flags })
    }

    /// Describes a range; `length` counts in the family of the address.
    ///
    /// # Errors
    /// The map refuses.
    pub fn describe_range(&mut self, ip: IpAddr, length: u32, subject: u32, flags: u32) -> Result<()> {
        let length = if ip.is_ipv4() { 96 + length } else { length };
        let mut trie: LpmTrie<_, Addr, AddrInfo> =
            LpmTrie::try_from(self.0.map_mut(map::CIDRS).context("no map CIDRS")?)?;
        trie.insert(&Key::new(length, addr(ip)), AddrInfo { subject, flags }, 0).context("CIDRS")
    }

    /// Forgets a range.
    ///
    /// # Errors
    /// It is not described.
    pub fn forget_range(&mut self, ip: IpAddr, length: u32) -> Result<()> {
        let length = if ip.is_ipv4() { 96 + length } else { length };
        let mut trie: LpmTrie<_, Addr, AddrInfo> =
            LpmTrie::try_from(self.0.map_mut(map::CIDRS).context("no map CIDRS")?)?;
        trie.remove(&Key::new(length, addr(ip))).context("CIDRS")
    }

    /// A policy row.
    ///
    /// # Errors
    /// The map refuses.
    pub fn row(&mut self, src: u32, dst: u32, port: u16, proto: u8, verdict: u8) -> Result<()> {
        let key = PolicyKey { src, dst, port, proto, pad: 0 };
        self.set(map::POLICY, key, PolicyVal { verdict, pad: [0; 3], policy: 7 })
    }

    /// Registers a listener of the Pod.
    ///
    /// # Errors
    /// The map refuses.
    pub fn listener(&mut self, kind: u8, port: u16, socket: &impl std::os::fd::AsRawFd) -> Result<()> {
        let mut listeners: SockHash<_, ListenerKey> =
            SockHash::try_from(self.0.map_mut(map::LISTENERS).context("no map LISTENERS")?)?;
        listeners
            .insert(ListenerKey { slot: SLOT, kind, shard: 0, port }, socket.as_raw_fd(), 0)
            .context("LISTENERS")
    }

    /// What is known of a socket.
    ///
    /// # Errors
    /// Nothing is.
    pub fn meta(&mut self, socket: &impl std::os::fd::AsRawFd) -> Result<SkMeta> {
        let map: SkStorage<_, SkMeta> =
            SkStorage::try_from(self.0.map_mut(map::SK_META).context("no map SK_META")?)?;
        map.get(socket, 0).context("SK_META")
    }

    /// Marks a socket.
    ///
    /// # Errors
    /// The map refuses.
    pub fn set_meta(&mut self, socket: &impl std::os::fd::AsRawFd, meta: SkMeta) -> Result<()> {
        let mut map: SkStorage<_, SkMeta> =
            SkStorage::try_from(self.0.map_mut(map::SK_META).context("no map SK_META")?)?;
        map.insert(socket, meta, 0).context("SK_META")
    }

    /// A named total, over all CPUs.
    ///
    /// # Errors
    /// There is no such counter.
    pub fn stat(&mut self, index: u32) -> Result<u64> {
        let stats: PerCpuArray<_, u64> =
            PerCpuArray::try_from(self.0.map(map::STATS).context("no map STATS")?)?;
        Ok(stats.get(&index, 0)?.iter().sum())
    }

    /// The exact counters, over all CPUs.
    ///
    /// # Errors
    /// There is no such map.
    pub fn counts(&mut self) -> Result<Vec<(CountKey, u64)>> {
        let counts: PerCpuHashMap<_, CountKey, u64> =
            PerCpuHashMap::try_from(self.0.map(map::COUNTS).context("no map COUNTS")?)?;
        counts
            .iter()
            .map(|row| row.map(|(key, values)| (key, values.iter().sum())).context("COUNTS"))
            .collect()
    }

    /// Takes the records that are in the ring.
    ///
    /// # Errors
    /// There is no ring, or a record of another size.
    pub fn events(&mut self) -> Result<Vec<Event>> {
        let mut ring = RingBuf::try_from(self.0.map_mut(map::EVENTS).context("no map EVENTS")?)?;
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            anyhow::ensure!(item.len() == size_of::<Event>(), "a record of {} bytes", item.len());
            // SAFETY: the length is right, and an Event is any bytes.
            events.push(unsafe { item.as_ptr().cast::<Event>().read_unaligned() });
        }
        Ok(events)
    }

    /// An enrolled Pod of this node, both families.
    ///
    /// # Errors
    /// The map refuses.
    pub fn describe_both(
        &mut self,
        which: impl Fn(&Family) -> IpAddr,
        subject: u32,
        flags: u32,
    ) -> Result<()> {
        FAMILIES.iter().try_for_each(|family| self.describe(which(family), subject, info::ENROLLED | flags))
    }
}
