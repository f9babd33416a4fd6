//! What is not TCP towards a Service: its address becomes an endpoint's after the Pod's interface, the last place
//! where anything is judged on this node. Every row of the tables runs in IPv4 and in IPv6.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::net::IpAddr;

use aya::Ebpf;
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use weft_bpf_tests::{
    load,
    packet::{Body, Packet},
    tables::{FAMILIES, Maps, OWN, own_pod},
    test_run::{DROP, PASS, run},
};
use weft_core::{
    NamespacedName,
    policy::kernel,
    testing::{
        NODE,
        generate::{Balanced, CALLERS, VIPS, balanced},
    },
    workload::Mode,
};
use weft_ebpf_common::{
    Pod,
    codes::{event, info, map, outcome, pod, program, proto, reason, stat, subject, verdict},
};

#[path = "shared/rows.rs"]
mod rows;

/// The number of the Service's rows.
const ROWS: u32 = 0xc000_0007;

/// A Pod behind interface 1, of this mode, and a Service with these flags.
fn world(own_flags: u32, service_flags: u32) -> Ebpf {
    let mut bpf = load(&[program::FROM_POD, program::TO_POD]).unwrap();
    let mut maps = Maps(&mut bpf);
    maps.set(map::VETHS, 1_u32, own_pod(own_flags)).unwrap();
    for family in &FAMILIES {
        maps.describe(family.own, OWN, info::ENROLLED | info::LOCAL).unwrap();
        maps.describe(family.service, ROWS, info::SERVICE | service_flags).unwrap();
    }
    bpf
}

/// Sends this from the Pod to the Service, in each family, and expects the same answer.
fn expect(bpf: &Ebpf, want: u32, body: &Body) {
    for family in &FAMILIES {
        let frame = Packet::new(family.own, family.service, body.clone()).frame();
        assert_eq!(run(bpf, program::FROM_POD, &frame).unwrap(), want, "{body:?} to {}", family.service);
    }
}

const DNS: Body = Body::Udp(4_000, 53);

#[test]
fn a_service_outside_the_mesh_takes_everything() {
    for (own, flags) in [(pod::STRICT, 0), (pod::PERMISSIVE, 0), (pod::STRICT, info::STRICT)] {
        let mut bpf = world(own, flags);
        for body in [DNS, Body::Icmp(8, 128, 7), Body::Sctp(4_000, 53)] {
            expect(&bpf, PASS, &body);
        }
        // Its answers come back under its own address.
        for family in &FAMILIES {
            let frame = Packet::new(family.service, family.own, Body::Udp(53, 4_000)).frame();
            assert_eq!(run(&bpf, program::TO_POD, &frame).unwrap(), PASS);
        }
        assert_eq!(Maps(&mut bpf).stat(stat::NON_TCP_DENIED).unwrap(), 0);
    }
}

#[test]
fn strict_on_either_side_refuses_what_no_row_allows_in_plaintext() {
    let guarded = info::POLICED;
    for (own, flags) in [
        (pod::STRICT, guarded),
        (pod::STRICT, guarded | info::STRICT),
        (pod::PERMISSIVE, guarded | info::STRICT),
    ] {
        let mut bpf = world(own, flags);
        for body in [DNS, Body::Icmp(8, 128, 7), Body::Sctp(4_000, 53), Body::Other(47)] {
            expect(&bpf, DROP, &body);
        }
        let mut maps = Maps(&mut bpf);
        assert_eq!(maps.stat(stat::NON_TCP_DENIED).unwrap(), 8);
        let told = maps.events().unwrap();
        assert_eq!(told.len(), 8);
        assert!(told.iter().all(|told| (told.kind, told.verdict) == (event::TC_FROM, outcome::DENIED)
            && told.reason == reason::PLAINTEXT_REFUSED
            && (told.src_subject, told.dst_subject) == (OWN, subject::UNKNOWN)));
        assert!(maps.counts().unwrap().iter().all(|(key, _)| key.dst == subject::UNKNOWN));
    }
    expect(&world(pod::PERMISSIVE, guarded), PASS, &DNS);
}

#[test]
fn only_the_row_of_the_very_port_and_caller_counts() {
    let mut bpf = world(pod::STRICT, info::POLICED | info::STRICT);
    let mut maps = Maps(&mut bpf);
    let rows = [
        (OWN, 53, proto::UDP, verdict::ALLOW_PLAINTEXT),
        (OWN, 54, proto::UDP, verdict::ALLOW),
        (OWN, 55, proto::UDP, verdict::DENY),
        (OWN, 56, proto::UDP, verdict::PROXY),
        (OWN + 1, 57, proto::UDP, verdict::ALLOW_PLAINTEXT),
        (OWN, 58, proto::TCP, verdict::ALLOW_PLAINTEXT),
        (OWN, 0, proto::UDP, verdict::ALLOW_PLAINTEXT),
        (OWN, 0, 0, verdict::ALLOW_PLAINTEXT),
    ];
    for (src, port, proto, verdict) in rows {
        maps.row(src, ROWS, port, proto, verdict).unwrap();
    }
    expect(&bpf, PASS, &DNS);
    for port in 54..=58 {
        expect(&bpf, DROP, &Body::Udp(4_000, port));
    }
    let told = Maps(&mut bpf).events().unwrap();
    let of = |port| told.iter().find(|told| told.dport == port).unwrap();
    assert_eq!((of(53).verdict, of(53).policy), (outcome::FORWARDED, 7));
    assert_eq!((of(54).reason, of(54).policy), (reason::PLAINTEXT_REFUSED, 7));
    assert_eq!((of(55).reason, of(55).policy), (reason::POLICY_DENY_RULE, 7));
    assert_eq!((of(57).reason, of(57).policy), (reason::PLAINTEXT_REFUSED, 0));
}

#[test]
fn fragments_and_what_keeps_ip_working() {
    let mut bpf = world(pod::STRICT, info::POLICED);
    Maps(&mut bpf).row(OWN, ROWS, 53, proto::UDP, verdict::ALLOW_PLAINTEXT).unwrap();
    for family in &FAMILIES {
        let part = |port, offset, more| {
            let packet = Packet::new(family.own, family.service, Body::Udp(4_000, port));
            run(&bpf, program::FROM_POD, &packet.fragment(offset, more).frame()).unwrap()
        };
        assert_eq!([part(54, 0, true), part(54, 16, false)], [DROP, DROP]);
        assert_eq!([part(53, 0, true), part(53, 16, false)], [PASS, PASS]);
    }
    // Unreachable, packet too big.
    expect(&bpf, PASS, &Body::Icmp(3, 2, 0));
}

/// Random Services through the real object: a packet to a Service passes exactly where the same packet to each of its
/// endpoints on other nodes does.
#[test]
fn a_service_passes_what_each_of_its_endpoints_elsewhere_passes() {
    let mut random = TestRunner::deterministic();
    let strategy = balanced(4);
    let mut bpf = load(&[program::FROM_POD]).unwrap();
    let (mut passed, mut refused, mut sport) = (0, 0, 1_024);
    for set in 0..400 {
        let case = strategy.new_tree(&mut random).unwrap().current();
        let state = case.mesh();
        let compiled = kernel::compile(&state, NODE);
        let mut maps = Maps(&mut bpf);
        rows::insert(&mut maps, &compiled);
        let guarded = compiled.services.get(&NamespacedName::new("shop", "balanced"));
        let (subject, mut flags) = guarded.map_or((0, 0), |guarded| (guarded.subject.0, info::POLICED));
        if guarded.is_some_and(|guarded| guarded.strict) {
            flags |= info::STRICT;
        }
        for vip in VIPS {
            maps.describe(vip, subject, info::SERVICE | flags).unwrap();
        }
        let elsewhere: Vec<_> =
            case.pods.iter().filter(|pod| pod.mode.enrolled() && &*pod.node != NODE).collect();
        let strict = |mode: Mode| mode == Mode::Strict || case.callers == Mode::Strict;
        for pod in &elsewhere {
            let mut flags = info::ENROLLED;
            if pod.mode == Mode::Strict {
                flags |= info::STRICT;
            }
            if kernel::policed(pod) {
                flags |= info::POLICED;
            }
            maps.describe(pod.addresses[0], pod.subject.0, flags).unwrap();
        }
        let packets = case.packets.iter().flat_map(|packet| CALLERS.map(|(_, caller)| (*packet, caller)));
        for ((protocol, port), caller) in packets {
            let mode = if case.callers == Mode::Strict { pod::STRICT } else { pod::PERMISSIVE };
            let row = Pod { subject: caller, ..own_pod(mode) };
            Maps(&mut bpf).set(map::VETHS, 1_u32, row).unwrap();
            sport += 1;
            let send = |to: IpAddr, port: u16| {
                let own = FAMILIES[usize::from(to.is_ipv6())].own;
                let body =
                    if protocol == proto::UDP { Body::Udp(sport, port) } else { Body::Sctp(sport, port) };
                let frame = Packet::new(own, to, body).frame();
                run(&bpf, program::FROM_POD, &frame).unwrap() == PASS
            };
            let target = Balanced::PORTS.iter().find(|at| (at.0, at.1) == (protocol, port)).map(|at| at.2);
            let want = elsewhere
                .iter()
                .filter(|pod| strict(pod.mode))
                .all(|pod| target.is_some_and(|target| send(pod.addresses[0], target)));
            for vip in VIPS {
                assert_eq!(send(vip, port), want, "set {set}, {protocol} {port} from {caller} of {case:#?}");
            }
            if !elsewhere.is_empty() {
                *(if want { &mut passed } else { &mut refused }) += 1;
            }
        }
        let mut maps = Maps(&mut bpf);
        rows::remove(&mut maps, &compiled);
        maps.events().unwrap();
    }
    println!("{passed} passed, {refused} refused");
    assert!(passed >= 100 && refused >= 100, "{passed} passed, {refused} refused");
}
