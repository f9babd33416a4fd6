//! Bringing the maps to what they should hold: desired against actual, inserts before deletes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::Hash,
    net::IpAddr,
};

use aya::Pod as Plain;
use weft_core::policy::{Cidr, kernel::RowVerdict};
use weft_ebpf_common::{
    Addr, AddrInfo, Front, FrontKey, PolicyKey, PolicyVal, VipKey,
    addr::NONE,
    codes::{config, info, subject, verdict},
};

use super::{
    addr::encode,
    error::DatapathError,
    maps::{Map, Maps, Prefix},
    tables::{AddressInfo, FrontInfo, RangeInfo, Tables},
};

/// What a reconciliation changed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// Entries that were new or different.
    pub inserted: usize,
    /// Entries that should not have been there.
    pub removed: usize,
    /// (inserted, removed) of each map that changed.
    pub maps: BTreeMap<&'static str, (usize, usize)>,
}

impl Changes {
    fn add(&mut self, map: &'static str, inserted: usize, removed: usize) {
        if inserted + removed > 0 {
            self.inserted += inserted;
            self.removed += removed;
            let entry = self.maps.entry(map).or_default();
            *entry = (entry.0 + inserted, entry.1 + removed);
        }
    }
}

/// The entries of one map that are superfluous once everything is in.
struct Superfluous<'a, K, V> {
    map: &'a Map<K, V>,
    keys: Vec<K>,
}

/// Puts in what is missing or different; hands back what is too much.
fn insert<'a, K, V>(
    map: &'a Map<K, V>,
    desired: &HashMap<K, V>,
    changes: &mut Changes,
) -> Result<Superfluous<'a, K, V>, DatapathError>
where
    K: Plain + Eq + Hash,
    V: Plain + PartialEq,
{
    let actual: HashMap<K, V> = map.entries()?.into_iter().collect();
    let mut keys: Vec<K> = actual.keys().filter(|k| !desired.contains_key(k)).copied().collect();
    let (mut inserted, mut removed) = (0, 0);
    for (key, value) in desired.iter().filter(|(k, v)| actual.get(k) != Some(v)) {
        match map.set(key, value) {
            Err(DatapathError::MapFull { .. }) if !keys.is_empty() => {
                // Only a map without room has its old entries go first.
                for old in keys.drain(..) {
                    removed += usize::from(map.delete(&old)?);
                }
                map.set(key, value)?;
            }
            done => done?,
        }
        inserted += 1;
    }
    changes.add(map.name(), inserted, removed);
    Ok(Superfluous { map, keys })
}

impl<K: Plain, V: Plain> Superfluous<'_, K, V> {
    fn delete(self, changes: &mut Changes) -> Result<(), DatapathError> {
        let mut removed = 0;
        for key in self.keys {
            removed += usize::from(self.map.delete(&key)?);
        }
        changes.add(self.map.name(), 0, removed);
        Ok(())
    }
}

/// Brings every table to `tables`. Only addresses whose Pods are enrolled by now (by this agent or an earlier one)
/// count as local, because only their sources are checked.
///
/// The flags of `CONFIG` are the caller's to write, see [`flags`].
pub(super) fn reconcile(maps: &Maps, tables: &Tables) -> Result<Changes, DatapathError> {
    let here: HashSet<Addr> = maps.pod_addrs.keys()?.into_iter().collect();
    let addresses = (tables.addresses.iter())
        .map(|(a, i)| (encode(*a), address(i, here.contains(&encode(*a)))))
        .collect();
    let fronts = tables.fronts.iter().map(front).collect();
    let ranges = tables.ranges.iter().filter_map(|(cidr, i)| Some((prefix(cidr)?, range(i)))).collect();
    let denied =
        tables.vip_denied.iter().map(|((s, a, port), policy)| (vip(s.0, *a, *port), *policy)).collect();
    let rows: HashMap<_, _> = tables.rows.iter().map(row).collect();
    let mut changes = Changes::default();
    // Rows before the addresses that are judged by them; the other way round when they go.
    let rows = insert(&maps.policy, &rows, &mut changes)?;
    let denied = insert(&maps.vip_denied, &denied, &mut changes)?;
    let ranges = insert(&maps.cidrs, &ranges, &mut changes)?;
    let fronts = insert(&maps.fronts, &fronts, &mut changes)?;
    let addresses = insert(&maps.addrs, &addresses, &mut changes)?;
    addresses.delete(&mut changes)?;
    fronts.delete(&mut changes)?;
    ranges.delete(&mut changes)?;
    denied.delete(&mut changes)?;
    rows.delete(&mut changes)?;
    Ok(changes)
}

/// The configuration's flags, `old` ones changed to what the tables say.
pub(super) fn flags(old: u32, tables: &Tables) -> u32 {
    let refuse = if tables.refuse_unknown { config::UNKNOWN_REFUSE_ALL } else { 0 };
    old & !config::UNKNOWN_REFUSE_ALL | refuse
}

/// An address's entry; `here`: its Pod is enrolled on this node by now.
pub(super) fn address(entry: &AddressInfo, here: bool) -> AddrInfo {
    let local = entry.local && here;
    let flags = [
        (entry.enrolled, info::ENROLLED),
        (local, info::LOCAL),
        (entry.strict, info::STRICT),
        (entry.policed, info::POLICED),
        (entry.shortcut && local, info::SHORTCUT_OK),
        (entry.service, info::SERVICE),
        (entry.meshed, info::MESHED),
        (entry.front, info::FRONT),
        (entry.node, info::NODE),
    ];
    let flags = flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
    AddrInfo { subject: entry.subject.0, flags }
}

fn front(((address, protocol, port), entry): (&(Option<IpAddr>, u8, u16), &FrontInfo)) -> (FrontKey, Front) {
    let AddrInfo { subject, flags } = self::address(&entry.service, false);
    let key = FrontKey { addr: address.map_or(NONE, encode), port: *port, proto: *protocol, pad: 0 };
    (key, Front { subject, flags, port: entry.port, pad: 0 })
}

fn range(entry: &RangeInfo) -> AddrInfo {
    let mesh = if entry.mesh { info::MESH_RANGE } else { 0 };
    match entry.class {
        Some(class) => AddrInfo { subject: class.0, flags: mesh | info::CIDR },
        None => AddrInfo { subject: subject::WORLD, flags: mesh },
    }
}

/// A range's key; `None` for a prefix that no address has.
fn prefix(cidr: &Cidr) -> Option<Prefix> {
    let bits = if cidr.address.is_ipv4() { 96 + u32::from(cidr.prefix) } else { u32::from(cidr.prefix) };
    (bits <= 128).then(|| Prefix { bits, addr: encode(cidr.address) })
}

fn vip(subject: u32, address: IpAddr, port: u16) -> VipKey {
    VipKey { subject, port, pad: 0, addr: encode(address) }
}

fn row(row: &weft_core::policy::kernel::Row) -> (PolicyKey, PolicyVal) {
    let verdict = match row.verdict {
        RowVerdict::Allow => verdict::ALLOW,
        RowVerdict::AllowPlaintext => verdict::ALLOW_PLAINTEXT,
        RowVerdict::Deny => verdict::DENY,
        RowVerdict::Proxy => verdict::PROXY,
    };
    let key =
        PolicyKey { src: row.source.0, dst: row.destination.0, port: row.port, proto: row.protocol, pad: 0 };
    (key, PolicyVal { verdict, pad: [0; 3], policy: row.policy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_local_only_once_its_pod_is_enrolled() {
        let entry = AddressInfo { enrolled: true, local: true, shortcut: true, ..AddressInfo::default() };
        assert_eq!(address(&entry, false).flags, info::ENROLLED);
        assert_eq!(address(&entry, true).flags, info::ENROLLED | info::LOCAL | info::SHORTCUT_OK);
    }

    #[test]
    fn ipv4_ranges_lie_under_the_mapped_prefix() {
        let key = prefix(&"10.0.0.0/8".parse().expect("range")).expect("key");
        assert_eq!((key.bits, &key.addr[10..14]), (104, &[0xff, 0xff, 10, 0][..]));
        let key = prefix(&"fd00::/64".parse().expect("range")).expect("key");
        assert_eq!(key.bits, 64);
    }
}
