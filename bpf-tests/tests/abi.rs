//! The built object and user space mean the same bytes: sizes and offsets from the object's BTF against the Rust
//! types, and numbers against the names they stand for.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{collections::HashMap, mem::offset_of};

use aya_obj::{Object, generated::bpf_map_type};
use weft_bpf_tests::object;
use weft_core::flow::Reason;
use weft_ebpf_common::{
    AddrInfo, Config, CountKey, Event, FlowSeen, FragKey, Front, FrontKey, ListenerKey, OrigDst, Pod,
    PolicyKey, PolicyVal, Probe, SkMeta, Tuple, VipKey,
    codes::{map, program, reason, stat, subject},
};

/// Name and byte offset of each member, in order.
type Members = Vec<(String, u32)>;

/// The structs of a BTF blob by name: size, members. The format is the kernel's Documentation/bpf/btf.rst.
struct Structs(HashMap<String, (u32, Members)>);

impl Structs {
    fn of_object() -> Self {
        let bytes = object().unwrap();
        let btf =
            Object::parse(&bytes).unwrap().btf.expect("the object has no BTF; link it with --btf").to_bytes();
        let word = |at: usize| u32::from_le_bytes(*btf[at..].first_chunk().unwrap());
        let header = word(4) as usize;
        let (types, types_end) = (header + word(8) as usize, header + (word(8) + word(12)) as usize);
        let strings = header + word(16) as usize;
        let name = |offset: u32| {
            let bytes = &btf[strings + offset as usize..];
            String::from_utf8_lossy(bytes.split(|&byte| byte == 0).next().unwrap()).into_owned()
        };
        let mut structs = HashMap::new();
        let mut at = types;
        while at < types_end {
            let (info, size) = (word(at + 4), word(at + 8));
            let (kind, count, bitfields) = (info >> 24 & 31, (info & 0xffff) as usize, info >> 31 == 1);
            if kind == 4 {
                let members = (0..count).map(|index| at + 12 + index * 12).map(|member| {
                    let offset = word(member + 8);
                    (name(word(member)), if bitfields { offset & 0xff_ffff } else { offset } / 8)
                });
                structs.insert(name(word(at)), (size, members.collect()));
            }
            at += 12
                + match kind {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    4 | 5 | 15 | 19 => count * 12,
                    6 | 13 => count * 8,
                    _ => 0,
                };
        }
        Self(structs)
    }
}

macro_rules! agree {
    ($structs:expr, $type:ty { $($field:ident),+ $(,)? }) => {{
        let name = stringify!($type);
        let (size, members) = $structs.0.get(name).unwrap_or_else(|| panic!("no struct {name} in the object's BTF"));
        assert_eq!(*size as usize, size_of::<$type>(), "size of {name}");
        let want = vec![$((stringify!($field).to_owned(), offset_of!($type, $field) as u32)),+];
        let mut seen = members.clone();
        seen.sort_by_key(|(_, offset)| *offset);
        assert_eq!(seen, want, "members of {name}");
    }};
}

#[test]
fn sizes_and_offsets_agree() {
    let structs = Structs::of_object();
    agree!(structs, Pod { cookie, ip4, ip6, slot, subject, flags, ifindex, out_port, out_port6, pad });
    agree!(structs, AddrInfo { subject, flags });
    agree!(structs, SkMeta { kind, family, port, subject, addr, cookie, netns });
    agree!(structs, FlowSeen { forth, back });
    agree!(structs, Tuple { netns, src, dst, sport, dport, proto });
    agree!(structs, OrigDst { addr, cookie, subject, port, family, pad });
    agree!(structs, ListenerKey { slot, kind, shard, port });
    agree!(structs, VipKey { subject, port, pad, addr });
    agree!(structs, PolicyKey { src, dst, port, proto, pad });
    agree!(structs, PolicyVal { verdict, pad, policy });
    agree!(structs, FragKey { src, dst, id, proto, hook, pad });
    agree!(structs, Probe { seen, cgroup });
    agree!(structs, FrontKey { addr, port, proto, pad });
    agree!(structs, Front { subject, flags, port, pad });
    agree!(structs, CountKey { src, dst, reason, dir, verdict, proto });
    agree!(structs, Config { flags, generation });
    agree!(
        structs,
        Event {
            ktime,
            cookie,
            netns,
            cgroup,
            src,
            dst,
            sport,
            dport,
            proto,
            kind,
            verdict,
            reason,
            src_subject,
            dst_subject,
            policy,
            pid,
        }
    );
}

#[test]
fn maps_have_the_types_and_sizes_that_user_space_takes_them_for() {
    use bpf_map_type::{
        BPF_MAP_TYPE_ARRAY as ARRAY, BPF_MAP_TYPE_HASH as HASH, BPF_MAP_TYPE_LPM_TRIE as LPM_TRIE,
        BPF_MAP_TYPE_LRU_HASH as LRU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY as PERCPU_ARRAY,
        BPF_MAP_TYPE_PERCPU_HASH as PERCPU_HASH, BPF_MAP_TYPE_RINGBUF as RINGBUF,
        BPF_MAP_TYPE_SK_STORAGE as SK_STORAGE, BPF_MAP_TYPE_SOCKHASH as SOCKHASH,
    };
    let want: [(&str, bpf_map_type, usize, usize); 21] = [
        (map::PODS, HASH, 8, size_of::<Pod>()),
        (map::VETHS, HASH, 4, size_of::<Pod>()),
        (map::POD_ADDRS, HASH, 16, size_of::<Pod>()),
        (map::SK_META, SK_STORAGE, 4, size_of::<SkMeta>()),
        (map::ORIG_DST, LRU_HASH, size_of::<Tuple>(), size_of::<OrigDst>()),
        (map::CLIENT_OF, LRU_HASH, size_of::<Tuple>(), size_of::<OrigDst>()),
        (map::LISTENERS, SOCKHASH, size_of::<ListenerKey>(), 4),
        (map::ADDRS, HASH, 16, size_of::<AddrInfo>()),
        (map::CIDRS, LPM_TRIE, 20, size_of::<AddrInfo>()),
        (map::VIP_DENIED, HASH, size_of::<VipKey>(), 4),
        (map::POLICY, HASH, size_of::<PolicyKey>(), size_of::<PolicyVal>()),
        (map::FLOW_PAIRS, LRU_HASH, size_of::<Tuple>(), size_of::<FlowSeen>()),
        (map::FRAGS, LRU_HASH, size_of::<FragKey>(), 8),
        (map::COUNTS, PERCPU_HASH, size_of::<CountKey>(), 8),
        (map::STATS, PERCPU_ARRAY, 4, 8),
        (map::CONFIG, ARRAY, 4, size_of::<Config>()),
        (map::EVENTS, RINGBUF, 0, 0),
        (map::KUBELETS, HASH, 8, 4),
        (map::PROBES, LRU_HASH, size_of::<Tuple>(), size_of::<Probe>()),
        (map::FRONTS, HASH, size_of::<FrontKey>(), size_of::<Front>()),
        (map::CGROUPS, HASH, 8, 4),
    ];
    let bytes = object().unwrap();
    let object = Object::parse(&bytes).unwrap();
    assert_eq!(want.map(|(name, ..)| name), map::ALL);
    for (name, kind, key, value) in want {
        assert!(name.len() <= 15, "{name} is longer than the kernel keeps");
        let found = object.maps.get(name).unwrap_or_else(|| panic!("no map {name}"));
        let seen = (found.map_type(), found.key_size() as usize, found.value_size() as usize);
        assert_eq!(seen, (kind as u32, key, value), "{name}");
    }
    assert_eq!(object.maps[map::STATS].max_entries(), stat::COUNT);
}

#[test]
fn the_object_has_every_program_and_no_other() {
    let bytes = object().unwrap();
    let object = Object::parse(&bytes).unwrap();
    let mut seen: Vec<_> = object.programs.keys().map(String::as_str).collect();
    let mut want = program::ALL.to_vec();
    seen.sort_unstable();
    want.sort_unstable();
    assert_eq!(seen, want);
}

#[test]
fn reasons_and_subjects_are_numbered_as_in_core() {
    let reasons = [
        (Reason::None, reason::NONE),
        (Reason::PolicyDenied, reason::POLICY_DENIED),
        (Reason::PolicyDenyRule, reason::POLICY_DENY_RULE),
        (Reason::PlaintextRefused, reason::PLAINTEXT_REFUSED),
        (Reason::InvalidSource, reason::INVALID_SOURCE),
        (Reason::ProxyBypassed, reason::PROXY_BYPASSED),
        (Reason::TunnelPortDialled, reason::TUNNEL_PORT_DIALLED),
        (Reason::UnknownPeer, reason::UNKNOWN_PEER),
        (Reason::IdentityMismatch, reason::IDENTITY_MISMATCH),
        (Reason::TlsFailure, reason::TLS_FAILURE),
        (Reason::NoEndpoint, reason::NO_ENDPOINT),
        (Reason::ConnectFailure, reason::CONNECT_FAILURE),
        (Reason::ProtocolError, reason::PROTOCOL_ERROR),
        (Reason::NoCredentials, reason::NO_CREDENTIALS),
        (Reason::LimitReached, reason::LIMIT_REACHED),
        (Reason::Revoked, reason::REVOKED),
        (Reason::Unsupported, reason::UNSUPPORTED),
        (Reason::Draining, reason::DRAINING),
        (Reason::Timeout, reason::TIMEOUT),
        (Reason::PeerReset, reason::PEER_RESET),
    ];
    for (name, number) in reasons {
        assert_eq!(name as u8, number, "{name:?}");
    }
    use weft_core::SubjectId;
    assert_eq!(
        [SubjectId::UNKNOWN.0, SubjectId::HOST.0, SubjectId::WORLD.0],
        [subject::UNKNOWN, subject::HOST, subject::WORLD]
    );
}
