//! The packet programs, packet by packet: every row of the table runs in IPv4 and in IPv6.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::Ebpf;
use weft_bpf_tests::{
    load,
    packet::{Body, Packet},
    tables::{FAMILIES, Family, Maps, OWN, PEER, own_pod},
    test_run::{DROP, PASS, run},
};
use weft_ebpf_common::{
    FlowSeen, Pod, Tuple, addr,
    codes::{event, info, map, outcome, pod, program, proto, reason, stat, subject, verdict},
};

const FROM: &str = program::FROM_POD;
const TO: &str = program::TO_POD;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// A Pod behind interface 1, of this mode, and another one here or on another node.
fn world(own_flags: u32, peer_flags: u32) -> Ebpf {
    let mut bpf = load(&[FROM, TO]).unwrap();
    let mut maps = Maps(&mut bpf);
    maps.set(map::VETHS, 1_u32, own_pod(own_flags)).unwrap();
    let strict = if own_flags & pod::STRICT != 0 { info::STRICT } else { 0 };
    maps.describe_both(|family| family.own, OWN, info::LOCAL | strict).unwrap();
    maps.describe_both(|family| family.peer, PEER, peer_flags).unwrap();
    bpf
}

/// Runs a packet of each family, and expects the same answer of both.
fn expect(bpf: &mut Ebpf, hook: &str, want: u32, packet: impl Fn(&Family) -> Packet) {
    for family in &FAMILIES {
        let packet = packet(family);
        assert_eq!(run(bpf, hook, &packet.frame()).unwrap(), want, "{hook} {packet:?}");
    }
}

fn udp(sport: u16, dport: u16) -> Body {
    Body::Udp(sport, dport)
}

#[test]
fn a_forged_source_never_leaves() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL);
    expect(&mut bpf, FROM, DROP, |family| Packet::new(family.peer, family.world, udp(1, 2)));
    expect(&mut bpf, FROM, DROP, |family| Packet::new(family.world, family.peer, Body::Tcp(1, 2, ACK)));
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.own, family.world, udp(1, 2)));
    let mut maps = Maps(&mut bpf);
    assert_eq!(maps.stat(stat::SPOOFED).unwrap(), 4);
    let events = maps.events().unwrap();
    assert_eq!(events.len(), 4);
    assert!(events.iter().all(|told| told.reason == reason::INVALID_SOURCE
        && told.kind == event::TC_FROM
        && told.verdict == outcome::DENIED
        && told.src_subject == OWN));
    assert_eq!(maps.counts().unwrap().iter().map(|(_, count)| count).sum::<u64>(), 4);
}

/// What belongs to a connection is not judged, and yet comes from the Pod's own address alone: the unspecified one stands
/// for the family that a Pod has not.
#[test]
fn segments_of_a_connection_come_from_the_pods_own_address() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL);
    let ack = |from: IpAddr, to: IpAddr| Packet::new(from, to, Body::Tcp(1, 80, ACK));
    expect(&mut bpf, FROM, PASS, |family| ack(family.own, family.peer));
    expect(&mut bpf, FROM, DROP, |family| ack(family.world, family.peer));
    let pod = own_pod(pod::PERMISSIVE);
    Maps(&mut bpf).set(map::VETHS, 1_u32, Pod { ip4: addr::NONE, ip6: addr::NONE, ..pod }).unwrap();
    expect(&mut bpf, FROM, DROP, |family| {
        let unspecified = match family.own {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        ack(unspecified, family.peer)
    });
    expect(&mut bpf, FROM, DROP, |family| ack(family.own, family.peer));
    assert_eq!(Maps(&mut bpf).stat(stat::SPOOFED).unwrap(), 6);
    expect(&mut bpf, TO, DROP, |family| {
        let loopback =
            if family.own.is_ipv4() { IpAddr::from([127, 0, 0, 6]) } else { Ipv6Addr::LOCALHOST.into() };
        ack(loopback, family.own)
    });
    expect(&mut bpf, TO, PASS, |family| ack(family.world, family.own));
}

#[test]
fn loopback_from_outside_never_enters() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL);
    expect(&mut bpf, TO, DROP, |family| {
        let loopback =
            if family.own.is_ipv4() { IpAddr::from([127, 0, 0, 6]) } else { Ipv6Addr::LOCALHOST.into() };
        Packet::new(loopback, family.own, Body::Tcp(1, 80, SYN))
    });
    assert_eq!(Maps(&mut bpf).stat(stat::MARTIAN).unwrap(), 2);
}

#[test]
fn a_syn_beside_the_proxy_never_leaves() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL);
    for family in &FAMILIES {
        Maps(&mut bpf).describe(family.service, 0, info::SERVICE).unwrap();
        Maps(&mut bpf).describe_range(family.own, 16, 0, info::MESH_RANGE).unwrap();
    }
    expect(&mut bpf, FROM, DROP, |family| Packet::new(family.own, family.peer, Body::Tcp(1, 80, SYN)));
    expect(&mut bpf, FROM, DROP, |family| Packet::new(family.own, family.service, Body::Tcp(1, 80, SYN)));
    expect(&mut bpf, FROM, DROP, |family| {
        let nobody = match family.own {
            IpAddr::V4(ip) => IpAddr::from([ip.octets()[0], ip.octets()[1], 200, 200]),
            IpAddr::V6(ip) => {
                IpAddr::from([&ip.octets()[..15], &[200]].concat().first_chunk::<16>().copied().unwrap())
            }
        };
        Packet::new(family.own, nobody, Body::Tcp(1, 80, SYN))
    });
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.own, family.world, Body::Tcp(1, 80, SYN)));
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.own, family.peer, Body::Tcp(1, 80, ACK)));
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.own, family.peer, Body::Tcp(1, 80, SYN | ACK)));
    assert_eq!(Maps(&mut bpf).stat(stat::BYPASS_SYN).unwrap(), 6);
}

#[test]
fn udp_follows_the_rows_and_replies_pass() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL | info::POLICED);
    Maps(&mut bpf).row(OWN, PEER, 53, proto::UDP, verdict::ALLOW).unwrap();
    // Nobody may call this Pod, but for replies.
    Maps(&mut bpf).describe_both(|family| family.own, OWN, info::LOCAL | info::POLICED).unwrap();
    expect(&mut bpf, TO, DROP, |family| Packet::new(family.peer, family.own, udp(53, 4_000)));
    expect(&mut bpf, FROM, DROP, |family| Packet::new(family.own, family.peer, udp(4_000, 54)));
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.own, family.peer, udp(4_000, 53)));
    expect(&mut bpf, TO, PASS, |family| Packet::new(family.peer, family.own, udp(53, 4_000)));
    expect(&mut bpf, TO, DROP, |family| Packet::new(family.peer, family.own, udp(53, 4_001)));
    assert_eq!(Maps(&mut bpf).stat(stat::NON_TCP_DENIED).unwrap(), 6);
}

#[test]
fn the_directions_of_a_flow_have_rights_of_their_own() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL | info::POLICED);
    Maps(&mut bpf).describe_both(|family| family.own, OWN, info::LOCAL | info::POLICED).unwrap();
    // Either end calls the other one, so that the row is read both ways round.
    let calls = [(OWN, PEER, FROM, TO), (PEER, OWN, TO, FROM)];
    for (port, (src, dst, there, back)) in (53..).zip(calls) {
        let from_own = |way: &str, family: &Family, ours: u16, theirs: u16| match way == FROM {
            true => Packet::new(family.own, family.peer, udp(ours, theirs)),
            false => Packet::new(family.peer, family.own, udp(theirs, ours)),
        };
        let (ours, theirs) = if src == OWN { (4_000, port) } else { (port, 4_000) };
        let packet = |way: &'static str| move |family: &Family| from_own(way, family, ours, theirs);
        Maps(&mut bpf).row(src, dst, port, proto::UDP, verdict::ALLOW).unwrap();
        Maps(&mut bpf).events().unwrap();
        for _ in 0..3 {
            expect(&mut bpf, there, PASS, packet(there));
            expect(&mut bpf, back, PASS, packet(back));
        }
        assert_eq!(Maps(&mut bpf).events().unwrap().len(), FAMILIES.len(), "only the first is told of");
        Maps(&mut bpf).row(src, dst, port, proto::UDP, verdict::DENY).unwrap();
        expect(&mut bpf, there, DROP, packet(there));
        expect(&mut bpf, back, PASS, packet(back));
    }
    assert_eq!(Maps(&mut bpf).rows::<Tuple, FlowSeen>(map::FLOW_PAIRS).unwrap(), 2 * FAMILIES.len());
}

#[test]
fn replies_from_outside_the_mesh_pass_a_strict_pod() {
    let mut bpf = world(pod::STRICT, info::LOCAL);
    expect(&mut bpf, TO, DROP, |family| Packet::new(family.world, family.own, udp(53, 4_000)));
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.own, family.world, udp(4_000, 53)));
    expect(&mut bpf, TO, PASS, |family| Packet::new(family.world, family.own, udp(53, 4_000)));
}

#[test]
fn a_row_for_the_world_opens_a_port() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL);
    Maps(&mut bpf).describe_both(|family| family.own, OWN, info::LOCAL | info::POLICED).unwrap();
    Maps(&mut bpf).row(subject::WORLD, OWN, 53, proto::UDP, verdict::ALLOW).unwrap();
    expect(&mut bpf, TO, PASS, |family| Packet::new(family.world, family.own, udp(1, 53)));
    expect(&mut bpf, TO, DROP, |family| Packet::new(family.world, family.own, udp(1, 54)));
    // The class of a policy's CIDR is a subject of its own.
    for family in &FAMILIES {
        Maps(&mut bpf).describe_range(family.world, 24, 900, info::CIDR).unwrap();
    }
    expect(&mut bpf, TO, DROP, |family| Packet::new(family.world, family.own, udp(2, 53)));
    Maps(&mut bpf).row(900, OWN, 0, 0, verdict::ALLOW).unwrap();
    expect(&mut bpf, TO, PASS, |family| Packet::new(family.world, family.own, udp(3, 53)));
}

#[test]
fn plaintext_between_nodes_needs_a_rule_that_says_so() {
    let mut bpf = world(pod::STRICT, info::STRICT | info::POLICED);
    Maps(&mut bpf)
        .describe_both(|family| family.own, OWN, info::LOCAL | info::STRICT | info::POLICED)
        .unwrap();
    for (port, says) in [(53, verdict::ALLOW), (54, verdict::ALLOW_PLAINTEXT), (55, verdict::PROXY)] {
        let want = if says == verdict::ALLOW_PLAINTEXT { PASS } else { DROP };
        Maps(&mut bpf).row(OWN, PEER, port, proto::UDP, says).unwrap();
        Maps(&mut bpf).row(PEER, OWN, port, proto::UDP, says).unwrap();
        expect(&mut bpf, FROM, want, |family| Packet::new(family.own, family.peer, udp(port + 1_000, port)));
        expect(&mut bpf, TO, want, |family| Packet::new(family.peer, family.own, udp(port + 2_000, port)));
    }
    let events = Maps(&mut bpf).events().unwrap();
    assert!(events.iter().any(|told| told.reason == reason::PLAINTEXT_REFUSED && told.policy == 7));
}

#[test]
fn without_strict_plaintext_crosses_nodes() {
    let mut bpf = world(pod::PERMISSIVE, 0);
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.own, family.peer, udp(1, 53)));
    expect(&mut bpf, TO, PASS, |family| Packet::new(family.peer, family.own, udp(2, 53)));
}

#[test]
fn fragments_follow_their_first_one() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL | info::POLICED);
    Maps(&mut bpf).row(OWN, PEER, 53, proto::UDP, verdict::ALLOW).unwrap();
    let part = |family: &Family, port, offset, more| {
        Packet::new(family.own, family.peer, udp(4_000, port)).fragment(offset, more)
    };
    expect(&mut bpf, FROM, DROP, |family| part(family, 53, 16, false));
    expect(&mut bpf, FROM, DROP, |family| part(family, 54, 0, true));
    expect(&mut bpf, FROM, DROP, |family| part(family, 54, 16, false));
    expect(&mut bpf, FROM, PASS, |family| part(family, 53, 0, true));
    expect(&mut bpf, FROM, PASS, |family| part(family, 53, 16, false));
    assert_eq!(Maps(&mut bpf).stat(stat::FRAG_DROPPED).unwrap(), 4);
    // What one hook let pass, the other one has not judged.
    expect(&mut bpf, TO, DROP, |family| {
        Packet::new(family.own, family.own, udp(4_000, 53)).fragment(16, false)
    });
}

#[test]
fn extension_headers_hide_nothing() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL | info::POLICED);
    Maps(&mut bpf).row(OWN, PEER, 53, proto::UDP, verdict::ALLOW).unwrap();
    let six = &FAMILIES[1];
    let packet = |port, count| Packet::new(six.own, six.peer, udp(4_000, port)).extensions(count).frame();
    for (port, count, want) in [(53, 1, PASS), (53, 8, PASS), (53, 9, DROP), (54, 1, DROP), (54, 8, DROP)] {
        assert_eq!(run(&bpf, FROM, &packet(port, count)).unwrap(), want, "port {port}, {count} headers");
    }
    for hidden in [50, 51, 59, 135] {
        let frame = Packet::new(six.own, six.world, Body::Other(hidden)).frame();
        assert_eq!(run(&bpf, FROM, &frame).unwrap(), DROP, "next header {hidden}");
    }
    assert_eq!(Maps(&mut bpf).stat(stat::EXT_HDR_DROPPED).unwrap(), 5);
}

#[test]
fn what_keeps_ip_working_always_passes() {
    let mut bpf = world(pod::STRICT, info::POLICED | info::STRICT);
    Maps(&mut bpf)
        .describe_both(|family| family.own, OWN, info::LOCAL | info::POLICED | info::STRICT)
        .unwrap();
    // Unreachable and packet too big; from anybody.
    for (type4, type6) in [(3, 1), (11, 3), (12, 4), (3, 2)] {
        expect(&mut bpf, TO, PASS, |family| {
            Packet::new(family.world, family.own, Body::Icmp(type4, type6, 0))
        });
        expect(&mut bpf, FROM, PASS, |family| {
            Packet::new(family.own, family.peer, Body::Icmp(type4, type6, 0))
        });
    }
    let six = &FAMILIES[1];
    let local: IpAddr = "fe80::1".parse().unwrap();
    let all: IpAddr = "ff02::1".parse().unwrap();
    for kind in [130, 131, 132, 133, 134, 135, 136, 143] {
        for src in [local, Ipv6Addr::UNSPECIFIED.into(), six.own] {
            let frame = Packet::new(src, all, Body::Icmp(0, kind, 0)).frame();
            assert_eq!(run(&bpf, FROM, &frame).unwrap(), PASS, "leaves: {kind} from {src}");
        }
        let frame = Packet::new(local, six.own, Body::Icmp(0, kind, 0)).frame();
        assert_eq!(run(&bpf, TO, &frame).unwrap(), PASS, "enters: {kind}");
    }
    // The same sources carry nothing else.
    let frame = Packet::new(local, six.peer, udp(1, 53)).frame();
    assert_eq!(run(&bpf, FROM, &frame).unwrap(), DROP);
}

#[test]
fn an_echo_is_judged_and_its_reply_passes() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL);
    Maps(&mut bpf).describe_both(|family| family.own, OWN, info::LOCAL | info::POLICED).unwrap();
    expect(&mut bpf, TO, DROP, |family| Packet::new(family.peer, family.own, Body::Icmp(8, 128, 7)));
    expect(&mut bpf, TO, DROP, |family| Packet::new(family.peer, family.own, Body::Icmp(0, 129, 7)));
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.own, family.peer, Body::Icmp(8, 128, 7)));
    expect(&mut bpf, TO, PASS, |family| Packet::new(family.peer, family.own, Body::Icmp(0, 129, 7)));
    expect(&mut bpf, TO, DROP, |family| Packet::new(family.peer, family.own, Body::Icmp(0, 129, 8)));
}

#[test]
fn headers_cut_short_are_dropped() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL);
    for keep in [0, 1, 3] {
        expect(&mut bpf, FROM, DROP, |family| Packet::new(family.own, family.world, udp(1, 2)).cut(keep));
        expect(&mut bpf, FROM, DROP, |family| {
            Packet::new(family.own, family.world, Body::Tcp(1, 2, SYN)).cut(keep)
        });
        expect(&mut bpf, TO, DROP, |family| Packet::new(family.peer, family.own, udp(1, 2)).cut(keep));
    }
}

#[test]
fn protocols_without_ports_need_a_row_for_all_of_them() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL | info::POLICED);
    for protocol in [47, 4, 200] {
        expect(&mut bpf, FROM, DROP, |family| Packet::new(family.own, family.peer, Body::Other(protocol)));
    }
    Maps(&mut bpf).row(OWN, PEER, 0, 0, verdict::ALLOW).unwrap();
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.own, family.peer, Body::Other(47)));
}

#[test]
fn a_pod_outside_the_mesh_and_an_unknown_interface_pass() {
    let mut bpf = world(pod::PASS, info::LOCAL | info::POLICED);
    expect(&mut bpf, FROM, PASS, |family| Packet::new(family.world, family.peer, Body::Tcp(1, 2, SYN)));
    Maps(&mut bpf).delete::<u32, weft_ebpf_common::Pod>(map::VETHS, 1).unwrap();
    expect(&mut bpf, TO, PASS, |family| Packet::new(family.world, family.own, udp(1, 2)));
}

#[test]
fn an_address_nobody_described_takes_nothing() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL);
    for family in &FAMILIES {
        let key = weft_bpf_tests::tables::addr(family.own);
        Maps(&mut bpf).delete::<_, weft_ebpf_common::AddrInfo>(map::ADDRS, key).unwrap();
    }
    expect(&mut bpf, TO, DROP, |family| Packet::new(family.peer, family.own, udp(1, 2)));
}

#[test]
fn a_full_ring_loses_records_and_no_counts() {
    let mut bpf = world(pod::PERMISSIVE, info::LOCAL);
    let frame = Packet::new(FAMILIES[0].world, FAMILIES[0].peer, udp(1, 2)).frame();
    let packets = 15_000;
    for _ in 0..packets {
        assert_eq!(run(&bpf, FROM, &frame).unwrap(), DROP);
    }
    let mut maps = Maps(&mut bpf);
    let lost = maps.stat(stat::RING_LOST).unwrap();
    assert!(lost > 0, "the ring took everything; send more");
    assert_eq!(maps.events().unwrap().len() as u64 + lost, packets);
    assert_eq!(maps.stat(stat::SPOOFED).unwrap(), packets);
    assert_eq!(maps.counts().unwrap().iter().map(|(_, count)| count).sum::<u64>(), packets);
}
