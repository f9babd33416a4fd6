//! Enrolling Pods: namespace, listeners, map entries, attachments. At no step is a Pod open: what carries its
//! connections is there before the entry that says it is known.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use aya_obj::generated::bpf_attach_type;
use socket2::Socket;
use weft_core::{
    SubjectId, WorkloadUid,
    workload::{FailMode, Mode},
};
use weft_ebpf_common::{
    Addr, ListenerKey, Pod,
    addr::NONE,
    codes::{listener, pod, program},
};

use super::{
    addr::encode,
    attach::{Attachment, Packets, Place, Record, VethHook, links},
    error::DatapathError,
    listeners::{self, Ports, Sockets},
    loader::Programs,
    maps::Maps,
    netlink::{self, tc::Way},
    netns::NetNs,
    slots::Slots,
    sys::{LinkKind, Target},
};

/// A Pod to enrol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// Its UID.
    pub uid: WorkloadUid,
    /// Its policy subject; [`SubjectId::UNKNOWN`] holds it: it neither reaches the mesh nor is reached.
    pub subject: SubjectId,
    /// How the mesh treats it; not `Disabled` (see [`super::Datapath::pass`]).
    pub mode: Mode,
    /// What happens when Weft cannot decide.
    pub fail_mode: FailMode,
    /// Its addresses, at most one of each family counts.
    pub addresses: Vec<IpAddr>,
    /// Its network namespace.
    pub netns: PathBuf,
}

/// The programs' names in pins, in the order they are attached.
pub(super) const PINS: [&str; 3] = ["tc_from_pod", "tc_to_pod", "sk_lookup"];

/// An enrolled Pod.
#[derive(Debug)]
pub(super) struct Enrolment {
    pub(super) spec: PodSpec,
    pub(super) entry: Pod,
    pub(super) netns: Arc<NetNs>,
    pub(super) attachments: Vec<Attachment>,
    /// Holds the second IPv6 port.
    _reserved: Option<Socket>,
}

/// The Pods of this node.
#[derive(Debug, Default)]
pub(super) struct Pods {
    pub(super) enrolled: HashMap<WorkloadUid, Enrolment>,
    /// Pods outside the mesh, with the cookies of their namespaces.
    pub(super) passed: HashMap<WorkloadUid, u64>,
    pub(super) slots: Slots,
}

impl Pods {
    /// Begins with the slots that the entries of an earlier agent hold.
    pub(super) fn adopt(maps: &Maps) -> Result<Self, DatapathError> {
        let entries = maps.pods.entries()?;
        let slots =
            entries.iter().filter(|(_, p)| p.flags & pod::PASS == 0).map(|(cookie, p)| (p.slot, *cookie));
        Ok(Self { slots: Slots::adopt(slots), ..Self::default() })
    }

    /// The addresses that are enrolled here.
    pub(super) fn addresses(&self) -> HashSet<Addr> {
        self.enrolled.values().flat_map(|e| addresses(&e.entry)).collect()
    }
}

/// The addresses of an entry.
pub(super) fn addresses(entry: &Pod) -> impl Iterator<Item = Addr> + use<> {
    [entry.ip4, entry.ip6].into_iter().filter(|a| *a != NONE)
}

/// Where things go while a Pod is enrolled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ground<'a> {
    pub(super) maps: &'a Maps,
    pub(super) programs: &'a Programs,
    pub(super) bpffs: &'a Path,
    pub(super) hook: VethHook,
}

/// What was found and made inside a Pod's namespace.
pub(super) struct Inside {
    netns: NetNs,
    earlier: Option<Pod>,
    slot: u32,
    /// The Pod's interface and what its other end should be.
    interface: (u32, Option<u32>),
    sockets: Sockets,
}

impl Inside {
    /// The cookie of the namespace.
    pub(super) fn cookie(&self) -> u64 {
        self.netns.cookie()
    }

    /// Whether it is known to have nothing open from before it became strict.
    pub(super) fn settled(&self) -> bool {
        self.earlier.is_some_and(|earlier| earlier.flags & (pod::STRICT | pod::UNSETTLED) == pod::STRICT)
    }
}

impl Ground<'_> {
    /// Enters a Pod's namespace once: looks whether it is the Pod's and opens the listeners.
    pub(super) fn enter(&self, pods: &mut Pods, spec: &PodSpec) -> Result<Inside, DatapathError> {
        flags(spec)?;
        let ip6 = families(spec).1;
        let slots = &mut pods.slots;
        let (netns, made) = NetNs::visit(&spec.netns, |cookie| {
            let interface = inner(spec)?;
            let earlier = self.maps.pods.get(&cookie)?.filter(|p| p.flags & pod::PASS == 0);
            let slot = slots.take(cookie)?;
            let wanted = earlier.map_or(Ports::default(), |p| Ports { out4: p.out_port, out6: p.out_port6 });
            match listeners::open(slot, ip6, wanted) {
                Ok(sockets) => Ok((earlier, slot, interface, sockets)),
                Err(source) => {
                    if earlier.is_none() {
                        slots.free(cookie);
                    }
                    Err(DatapathError::Listen { uid: spec.uid.clone(), source })
                }
            }
        })?;
        let (earlier, slot, interface, sockets) = made.inspect_err(|error| {
            // Any other error may mean that the namespace is not the Pod's.
            if matches!(error, DatapathError::Listen { .. }) {
                self.close(spec, &netns);
            }
        })?;
        Ok(Inside { netns, earlier, slot, interface, sockets })
    }

    /// Enrols a Pod (again); on failure a Pod that was not known before leaves nothing behind but, if it is strict, what
    /// closes it.
    pub(super) fn enroll(
        &self,
        pods: &mut Pods,
        spec: &PodSpec,
        inside: Inside,
    ) -> Result<Sockets, DatapathError> {
        let (ip4, ip6) = families(spec);
        let Inside { netns, earlier, slot, interface, sockets } = inside;
        let flags = flags_after(spec, earlier.map_or(0, |earlier| earlier.flags))?;
        let cookie = netns.cookie();
        let outer = outer(spec, interface);
        let entry = |ifindex: u32, ports: Ports| Pod {
            cookie,
            ip4: ip4.map_or(NONE, |a| encode(a.into())),
            ip6: ip6.map_or(NONE, |a| encode(a.into())),
            slot,
            subject: spec.subject.0,
            flags,
            ifindex,
            out_port: ports.out4,
            out_port6: ports.out6,
            pad: [0; 2],
        };
        let known = outer.as_ref().copied().unwrap_or_default();
        let done = outer.and_then(|ifindex| {
            let entry = entry(ifindex, sockets.ports);
            Ok((self.install(spec, &entry, &netns, &sockets)?, entry, sockets))
        });
        match done {
            Ok((attachments, entry, mut sockets)) => {
                let stale =
                    earlier.iter().flat_map(addresses).filter(|a| !addresses(&entry).any(|b| b == *a));
                for address in stale {
                    self.maps.pod_addrs.delete(&address)?;
                }
                let _reserved = sockets.v6.as_mut().and_then(|v6| v6.reserved.take());
                let enrolment =
                    Enrolment { spec: spec.clone(), entry, netns: Arc::new(netns), attachments, _reserved };
                pods.passed.remove(&spec.uid);
                pods.enrolled.insert(spec.uid.clone(), enrolment);
                Ok(sockets)
            }
            Err(error) => {
                // A Pod that an earlier enrolment already covers stays as it was: closed, not open.
                if earlier.is_none() {
                    pods.slots.free(cookie);
                    let undone =
                        self.forget(&entry(known, Ports::default())).and_then(|()| self.unpin(&spec.uid));
                    if let Err(undone) = undone {
                        tracing::warn!(uid = %spec.uid, error = %undone, "a failed enrolment left something behind");
                    }
                    self.close(spec, &netns);
                }
                Err(error)
            }
        }
    }

    fn install(
        &self,
        spec: &PodSpec,
        entry: &Pod,
        netns: &NetNs,
        sockets: &Sockets,
    ) -> Result<Vec<Attachment>, DatapathError> {
        for (kind, port, socket) in slots(sockets) {
            let key = ListenerKey { slot: entry.slot, kind, shard: 0, port };
            self.maps.listeners.set(&key, &socket.cast_unsigned())?;
        }
        self.maps.veths.set(&entry.ifindex, entry)?;
        for address in addresses(entry) {
            self.maps.pod_addrs.set(&address, entry)?;
        }
        let interface = format!("interface {}", entry.ifindex);
        let record = Record::new(self.bpffs, entry.ifindex, &spec.uid);
        let packets = |name, way, pin| {
            let packets =
                Packets { hook: self.hook, way, record: record.clone(), pin: self.pin(pin, &spec.uid) };
            Attachment::packets(self.programs.get(name)?, packets, &interface)
        };
        let attachments = vec![
            packets(program::FROM_POD, Way::In, PINS[0])?,
            packets(program::TO_POD, Way::Out, PINS[1])?,
            self.lookup(spec, netns)?,
        ];
        // Last: from here on the Pod's connects are answered at all.
        self.maps.pods.set(&entry.cookie, entry)?;
        Ok(attachments)
    }

    fn lookup(&self, spec: &PodSpec, netns: &NetNs) -> Result<Attachment, DatapathError> {
        let pin = self.pin(PINS[2], &spec.uid);
        let ends = Place {
            kind: LinkKind::Netns,
            attach_type: bpf_attach_type::BPF_SK_LOOKUP,
            target: Target::Fd(netns.as_fd()),
            id: netns.inode(),
            pin: &pin,
        };
        let shown = format!("network namespace {}", netns.path().display());
        Attachment::link(self.programs.get(program::SK_LOOKUP)?, &ends, &shown)
    }

    /// Refuses the TCP connections that come in to a strict Pod which cannot be enrolled: it may run already. The program
    /// lets none to an address that it does not know, so that this needs room in no map.
    fn close(&self, spec: &PodSpec, netns: &NetNs) {
        if spec.mode != Mode::Strict {
            return;
        }
        // Its pin holds it. A later enrolment takes it over; a Pod that is removed loses it.
        if let Err(error) = self.lookup(spec, netns) {
            tracing::error!(uid = %spec.uid, %error, "a strict Pod that cannot be enrolled cannot be closed either");
        }
    }

    /// Writes an entry again, after a change of subject or mode.
    pub(super) fn rewrite(&self, entry: &Pod) -> Result<(), DatapathError> {
        self.maps.veths.set(&entry.ifindex, entry)?;
        for address in addresses(entry) {
            self.maps.pod_addrs.set(&address, entry)?;
        }
        self.maps.pods.set(&entry.cookie, entry)
    }

    /// Deletes every map entry of a Pod; `PODS` first, so that its connects are refused from the beginning.
    pub(super) fn forget(&self, entry: &Pod) -> Result<(), DatapathError> {
        self.maps.pods.delete(&entry.cookie)?;
        for address in addresses(entry) {
            // Another Pod may have the address, or the interface's index, by now.
            if self.maps.pod_addrs.get(&address)?.is_some_and(|p| p.cookie == entry.cookie) {
                self.maps.pod_addrs.delete(&address)?;
            }
        }
        if self.maps.veths.get(&entry.ifindex)?.is_some_and(|p| p.cookie == entry.cookie) {
            self.maps.veths.delete(&entry.ifindex)?;
        }
        for key in self.maps.listeners.keys()?.into_iter().filter(|k| k.slot == entry.slot) {
            self.maps.listeners.delete(&key)?;
        }
        let own = |a: &Addr| addresses(entry).any(|b| b == *a);
        for flow in self.maps.flows.keys()?.into_iter().filter(|f| own(&f.src) || own(&f.dst)) {
            self.maps.flows.delete(&flow)?;
        }
        Ok(())
    }

    /// Removes the pins and filters of a Pod, and with them what is attached.
    pub(super) fn unpin(&self, uid: &WorkloadUid) -> Result<(), DatapathError> {
        for record in Record::all(self.bpffs)?.iter().filter(|record| record.uid == *uid) {
            record.remove()?;
        }
        for name in PINS {
            let path = self.pin(name, uid);
            super::attach::unpin(&path).map_err(|source| DatapathError::Pin { path, source })?;
        }
        Ok(())
    }

    fn pin(&self, name: &str, uid: &WorkloadUid) -> PathBuf {
        links(self.bpffs).join(format!("{name}-{}", escape(&uid.0)))
    }
}

/// The sockets and their keys' kinds and ports.
fn slots(sockets: &Sockets) -> Vec<(u8, u16, i32)> {
    let mut all = vec![
        (listener::OUT4, sockets.ports.out4, sockets.out4.as_raw_fd()),
        (listener::IN4, 0, sockets.in4.as_raw_fd()),
        (listener::TUN4, 0, sockets.tunnel4.as_raw_fd()),
    ];
    if let Some(v6) = &sockets.v6 {
        all.extend(sockets.ports.out6.map(|port| (listener::OUT6, port, v6.out.as_raw_fd())));
        all.push((listener::IN6, 0, v6.inbound.as_raw_fd()));
        all.push((listener::TUN6, 0, v6.tunnel.as_raw_fd()));
    }
    all
}

/// The flags of a Pod's entry. Who has no subject yet is held.
pub(super) fn flags(spec: &PodSpec) -> Result<u32, DatapathError> {
    let open = spec.fail_mode == FailMode::Open;
    let held = if spec.subject == SubjectId::UNKNOWN { pod::HELD } else { 0 };
    match spec.mode {
        Mode::Disabled => Ok(pod::PASS),
        Mode::Strict if open => Err(DatapathError::OpenStrict { uid: spec.uid.clone() }),
        Mode::Strict => Ok(pod::STRICT | held),
        Mode::Permissive => Ok(pod::PERMISSIVE | held | if open { pod::FAIL_OPEN } else { 0 }),
    }
}

/// The flags of a Pod's entry that had the flags `before`; 0 where it had no entry.
pub(super) fn flags_after(spec: &PodSpec, before: u32) -> Result<u32, DatapathError> {
    let flags = flags(spec)?;
    let settled = flags & pod::STRICT == 0 || before & (pod::STRICT | pod::UNSETTLED) == pod::STRICT;
    Ok(if settled { flags } else { flags | pod::UNSETTLED })
}

fn families(spec: &PodSpec) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let all = || spec.addresses.iter().map(IpAddr::to_canonical);
    let v4 = all().find_map(|a| if let IpAddr::V4(a) = a { Some(a) } else { None });
    let v6 = all().find_map(|a| if let IpAddr::V6(a) = a { Some(a) } else { None });
    (v4, v6)
}

/// The Pod's interface and what it names as its other end, looked for in the calling thread's namespace. Checks that
/// this holds the Pod's addresses: another process may just be passing through a namespace that was found by its
/// process.
fn inner(spec: &PodSpec) -> Result<(u32, Option<u32>), DatapathError> {
    let failed = |source| DatapathError::Netlink { call: "the Pod's addresses and interface", source };
    let held = netlink::addresses().map_err(failed)?;
    let mut first = None;
    for address in &spec.addresses {
        let holder = held.iter().find(|(_, a)| a.to_canonical() == address.to_canonical());
        let Some((index, _)) = holder else {
            return Err(DatapathError::Address { path: spec.netns.clone(), address: *address });
        };
        first.get_or_insert(*index);
    }
    let inner = first.ok_or_else(|| DatapathError::NoAddress { uid: spec.uid.clone() })?;
    Ok((inner, netlink::peer_of(inner).map_err(failed)?))
}

/// The host-side veth of the Pod's interface. Indexes are per namespace: only an interface that points back is the
/// other end.
fn outer(spec: &PodSpec, (inner, outer): (u32, Option<u32>)) -> Result<u32, DatapathError> {
    let failed = |source| DatapathError::Netlink { call: "the host-side interface", source };
    match outer {
        Some(outer) if netlink::peer_of(outer).map_err(failed)? == Some(inner) => Ok(outer),
        _ => Err(DatapathError::NoVeth { path: spec.netns.clone(), interface: inner }),
    }
}

/// A UID as part of a pin's name: a bpffs takes no dots, and a UID is what somebody else wrote.
pub(super) fn escape(uid: &str) -> String {
    let mut out = String::with_capacity(uid.len());
    for byte in uid.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02x}"));
        }
    }
    out
}

/// The UID in a pin's name.
pub(super) fn unescape(name: &str) -> Option<WorkloadUid> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok().map(|uid| WorkloadUid::from(uid.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_uid_makes_a_pin_name_and_comes_back() {
        for uid in ["5e0b9c4e-1f2a-4c1d-9a3b-0123456789ab", "a.b/../c", "ü%", ""] {
            let name = escape(uid);
            assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'%'), "{name}");
            assert_eq!(unescape(&name).expect("uid").0.as_ref(), uid);
        }
        assert_eq!(unescape("%zz"), None);
    }

    #[test]
    fn strict_never_fails_open() {
        let spec = |mode, fail_mode| PodSpec {
            uid: "a".into(),
            subject: SubjectId(300),
            mode,
            fail_mode,
            addresses: Vec::new(),
            netns: PathBuf::new(),
        };
        assert!(matches!(flags(&spec(Mode::Strict, FailMode::Open)), Err(DatapathError::OpenStrict { .. })));
        let open = flags(&spec(Mode::Permissive, FailMode::Open)).expect("flags");
        assert_eq!(open, pod::PERMISSIVE | pod::FAIL_OPEN);
        assert_eq!(flags(&spec(Mode::Strict, FailMode::Closed)).expect("flags"), pod::STRICT);
        let held = PodSpec { subject: SubjectId::UNKNOWN, ..spec(Mode::Strict, FailMode::Closed) };
        assert_eq!(flags(&held).expect("flags"), pod::STRICT | pod::HELD);
    }

    #[test]
    fn who_became_strict_is_unsettled_until_it_is_noted() {
        let spec = |mode| PodSpec {
            uid: "a".into(),
            subject: SubjectId(300),
            mode,
            fail_mode: FailMode::Closed,
            addresses: Vec::new(),
            netns: PathBuf::new(),
        };
        let after = |mode, before| flags_after(&spec(mode), before).expect("flags");
        let unsettled = pod::STRICT | pod::UNSETTLED;
        for (before, strict) in [
            (0, unsettled),
            (pod::PASS, unsettled),
            (pod::PERMISSIVE, unsettled),
            (unsettled, unsettled),
            (unsettled | pod::HELD, unsettled),
            (pod::STRICT, pod::STRICT),
            (pod::STRICT | pod::HELD, pod::STRICT),
        ] {
            assert_eq!(after(Mode::Strict, before), strict, "{before}");
            assert_eq!(after(Mode::Permissive, before), pod::PERMISSIVE, "{before}");
        }
    }
}
