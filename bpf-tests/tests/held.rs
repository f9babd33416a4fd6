//! A Pod of the mesh that nobody has described yet: what it may do, and what reaches it. Every test in IPv4 and in IPv6.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener},
    process::Command,
    time::Duration,
};

use aya::{Ebpf, maps::Array};
use socket2::{Domain, Socket, Type};
use weft_bpf_tests::{
    enrolled::Enrolled,
    load,
    packet::{Body, Packet},
    tables::{FAMILIES, Family, Maps, OWN, PEER, own_pod},
    test_run::{DROP, PASS, run},
};
use weft_ebpf_common::{
    Config, Front, FrontKey, addr as ranges,
    codes::{config, info, kind, map, outcome, pod, program, proto, reason, stat},
};

const HELD: u32 = pod::STRICT | pod::HELD;
const SYN: u8 = 2;

fn nobody(family: &Family) -> IpAddr {
    if family.own.is_ipv4() { [10, 9, 0, 77].into() } else { "fd00:9::77".parse().unwrap() }
}

#[test]
fn it_dials_what_is_outside_the_mesh_and_nothing_else() {
    let mut world = Enrolled::new(HELD).unwrap();
    // Its namespace is known to be of the mesh: it is no unknown Pod.
    let mut switches: Array<_, Config> =
        Array::try_from(world.attached.bpf.map_mut(map::CONFIG).unwrap()).unwrap();
    switches.set(0, Config { flags: config::UNKNOWN_REFUSE_ALL, generation: 1 }, 0).unwrap();
    for family in &FAMILIES {
        let mut maps = world.maps();
        maps.describe(family.peer, PEER, info::ENROLLED | info::LOCAL | info::SHORTCUT_OK).unwrap();
        maps.describe_range(family.own, 24, 0, info::MESH_RANGE).unwrap();
        for (to, service, open) in [
            (family.peer, 0, false),
            (nobody(family), 0, false),
            (family.service, info::SERVICE | info::MESHED, false),
            // Such as the API server's, or that of DNS.
            (family.service, info::SERVICE, true),
            (family.world, 0, true),
        ] {
            if service != 0 {
                world.maps().describe(to, 0, service).unwrap();
            }
            let to = SocketAddr::new(to, 80);
            let socket =
                world.netns.run(|| Ok(Socket::new(Domain::for_address(to), Type::STREAM, None)?)).unwrap();
            let error = socket.connect_timeout(&to.into(), Duration::from_secs(5)).expect_err("no way there");
            assert_eq!(error.kind() != ErrorKind::ConnectionRefused, open, "{to}: {error}");
            let told = world.maps().events().unwrap();
            if !open {
                assert_eq!(
                    (told[0].verdict, told[0].reason),
                    (outcome::DENIED, reason::UNKNOWN_PEER),
                    "{to}"
                );
            }
            // The packet hook has to know a Service's as judged.
            let marked = world.maps().meta(&socket).is_ok_and(|meta| meta.kind == kind::DIRECT);
            assert_eq!(marked, service == info::SERVICE, "{to}");
        }
    }
    assert_eq!(world.maps().stat(stat::REDIRECTED).unwrap(), 0);
}

#[test]
fn nobody_reaches_it() {
    let mut world = Enrolled::new(HELD).unwrap();
    for family in &FAMILIES {
        let client = family.peer;
        world
            .netns
            .run(|| {
                let prefix = if client.is_ipv4() { 32 } else { 128 };
                let added = Command::new("ip")
                    .args(["addr", "add", &format!("{client}/{prefix}"), "dev", "lo"])
                    .status()?;
                anyhow::ensure!(added.success(), "ip addr add");
                Ok(())
            })
            .unwrap();
        let app = world.netns.run(|| Ok(TcpListener::bind((family.own, 0))?)).unwrap();
        let to = app.local_addr().unwrap();
        // An enrolled Pod of this node that policy would let in, and somebody from outside.
        for flags in [info::ENROLLED | info::LOCAL | info::SHORTCUT_OK, 0] {
            world.maps().describe(client, PEER, flags).unwrap();
            world.maps().describe(family.own, OWN, info::ENROLLED | info::LOCAL | info::SHORTCUT_OK).unwrap();
            let dialled = world.netns.dial_from(client, to);
            assert_eq!(dialled.unwrap().expect_err("closed").kind(), ErrorKind::ConnectionRefused);
            let told = world.maps().events().unwrap();
            assert_eq!(
                told.last().map(|e| (e.verdict, e.reason)),
                Some((outcome::DENIED, reason::UNKNOWN_PEER))
            );
        }
    }
}

fn packets(flags: u32) -> Ebpf {
    let mut bpf = load(&[program::FROM_POD, program::TO_POD]).unwrap();
    let mut maps = Maps(&mut bpf);
    maps.set(map::VETHS, 1_u32, own_pod(flags)).unwrap();
    maps.describe_both(|family| family.peer, PEER, info::LOCAL).unwrap();
    bpf
}

fn expect(bpf: &Ebpf, hook: &str, want: u32, packet: impl Fn(&Family) -> Packet) {
    for family in &FAMILIES {
        let packet = packet(family);
        assert_eq!(run(bpf, hook, &packet.frame()).unwrap(), want, "{hook} {packet:?}");
    }
}

#[test]
fn its_packets_are_refused_towards_the_mesh_and_from_everybody() {
    let mut bpf = packets(HELD);
    for family in &FAMILIES {
        Maps(&mut bpf).describe(family.service, 0, info::SERVICE | info::POLICED).unwrap();
    }
    let udp = Body::Udp(4_000, 53);
    for (to, want) in [(0, DROP), (1, DROP), (2, PASS)] {
        let pick = |family: &Family| [family.peer, family.service, family.world][to];
        expect(&bpf, program::FROM_POD, want, |family| Packet::new(family.own, pick(family), udp.clone()));
    }
    expect(&bpf, program::FROM_POD, DROP, |f| Packet::new(f.own, f.peer, Body::Tcp(1, 80, SYN)));
    // The answer of whom it asked, and nobody else.
    expect(&bpf, program::TO_POD, PASS, |f| Packet::new(f.world, f.own, Body::Udp(53, 4_000)));
    expect(&bpf, program::TO_POD, DROP, |f| Packet::new(f.world, f.own, Body::Udp(53, 4_001)));
    expect(&bpf, program::TO_POD, DROP, |f| Packet::new(f.peer, f.own, Body::Udp(53, 4_000)));
    // Once described it takes and sends what its mode lets.
    Maps(&mut bpf).set(map::VETHS, 1_u32, own_pod(pod::PERMISSIVE)).unwrap();
    Maps(&mut bpf).describe_both(|family| family.own, OWN, info::LOCAL).unwrap();
    expect(&bpf, program::FROM_POD, PASS, |f| Packet::new(f.own, f.peer, Body::Udp(5_000, 53)));
    expect(&bpf, program::TO_POD, PASS, |f| Packet::new(f.peer, f.own, Body::Udp(5_001, 54)));
}

#[test]
fn ports_of_nodes_are_judged_as_the_service_behind_them() {
    let mut bpf = packets(pod::STRICT);
    let mut maps = Maps(&mut bpf);
    let guarded = info::SERVICE | info::MESHED | info::POLICED;
    for family in &FAMILIES {
        maps.describe(family.world, 0, info::FRONT | info::NODE).unwrap();
    }
    for proto in [proto::UDP, proto::TCP] {
        let key = FrontKey { addr: ranges::NONE, port: 30_053, proto, pad: 0 };
        maps.set(map::FRONTS, key, Front { subject: 0xc000_0007, flags: guarded, port: 53, pad: 0 }).unwrap();
    }
    let send = |bpf: &Ebpf, want, body: Body| {
        expect(bpf, program::FROM_POD, want, |f| Packet::new(f.own, f.world, body.clone()));
    };
    // Without a row nothing goes to another node in plaintext; the row is of the Service's own port.
    send(&bpf, DROP, Body::Udp(4_000, 30_053));
    send(&bpf, PASS, Body::Udp(4_000, 30_054));
    let allow = weft_ebpf_common::codes::verdict::ALLOW_PLAINTEXT;
    Maps(&mut bpf).row(OWN, 0xc000_0007, 53, proto::UDP, allow).unwrap();
    send(&bpf, PASS, Body::Udp(4_001, 30_053));
    // TCP has to come through the proxy.
    send(&bpf, DROP, Body::Tcp(4_000, 30_053, SYN));
    send(&bpf, PASS, Body::Tcp(4_000, 22, SYN));
}
