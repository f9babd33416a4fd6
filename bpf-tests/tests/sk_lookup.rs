//! The listener choice, with real sockets in a real namespace: every test in IPv4 and in IPv6. Clients bind to an
//! address that is not the Pod's, so that they come "from outside" without a second namespace.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener},
};

use aya::Ebpf;
use weft_bpf_tests::{
    attach::attach_sk_lookup,
    load,
    netns::Netns,
    tables::{FAMILIES, Family, Maps, OWN, PEER, SLOT, addr, own_pod},
};
use weft_ebpf_common::{
    Pod, addr as ranges,
    codes::{TUNNEL_PORT, info, listener, map, outcome, pod, program, proto, reason, stat, subject, verdict},
};

const APP: u16 = 8_080;

/// A Pod's namespace with an application and the proxy's listeners, in both families.
struct World {
    bpf: Ebpf,
    netns: Netns,
    app: [TcpListener; 2],
    inbound: [TcpListener; 2],
    tunnel: [TcpListener; 2],
    out: [TcpListener; 2],
}

impl World {
    fn new(flags: u32, own_flags: u32) -> Self {
        let addresses: Vec<_> =
            FAMILIES.iter().flat_map(|family| [family.own, family.peer, family.world]).collect();
        let netns = Netns::new(&addresses).unwrap();
        let mut bpf = load(&[program::SK_LOOKUP]).unwrap();
        attach_sk_lookup(&mut bpf, &netns).unwrap();
        let pair = |port: u16, own: bool| {
            netns
                .run(|| {
                    let bind = |family: &Family, loopback: IpAddr| {
                        TcpListener::bind((if own { family.own } else { loopback }, port))
                    };
                    let six = IpAddr::from(std::net::Ipv6Addr::LOCALHOST);
                    Ok([bind(&FAMILIES[0], IpAddr::from([127, 0, 0, 1]))?, bind(&FAMILIES[1], six)?])
                })
                .unwrap()
        };
        let mut world = Self {
            bpf,
            app: pair(APP, true),
            inbound: pair(0, false),
            tunnel: pair(0, false),
            out: pair(0, false),
            netns,
        };
        let row = Pod {
            cookie: world.netns.cookie(),
            out_port: port(&world.out[0]),
            out_port6: [port(&world.out[1]), 1],
            ..own_pod(flags)
        };
        let mut maps = Maps(&mut world.bpf);
        for family in &FAMILIES {
            maps.set(map::POD_ADDRS, addr(family.own), row).unwrap();
            maps.describe(family.own, OWN, info::ENROLLED | info::LOCAL | own_flags).unwrap();
        }
        for (index, kinds) in
            [[listener::IN4, listener::TUN4, listener::OUT4], [listener::IN6, listener::TUN6, listener::OUT6]]
                .into_iter()
                .enumerate()
        {
            maps.listener(kinds[0], 0, &world.inbound[index]).unwrap();
            maps.listener(kinds[1], 0, &world.tunnel[index]).unwrap();
            maps.listener(kinds[2], port(&world.out[index]), &world.out[index]).unwrap();
        }
        world
    }

    fn maps(&mut self) -> Maps<'_> {
        Maps(&mut self.bpf)
    }

    /// Connects and says where it arrived.
    fn dial(&self, from: IpAddr, to: SocketAddr) -> Arrived {
        let client = match self.netns.dial_from(from, to).unwrap() {
            Ok(client) => client,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{from} to {to}: {error}");
                return Arrived::Nowhere;
            }
        };
        let port = client.local_addr().unwrap().as_socket().unwrap().port();
        let index = usize::from(to.is_ipv6());
        let all = [
            (&self.app, Arrived::App),
            (&self.inbound, Arrived::Inbound),
            (&self.tunnel, Arrived::Tunnel),
            (&self.out, Arrived::Out),
        ];
        // The handshake is over, so the connection is in one of the queues by now.
        for (listeners, arrived) in all {
            listeners[index].set_nonblocking(true).unwrap();
            if let Ok((_, peer)) = listeners[index].accept() {
                assert_eq!(peer.port(), port);
                return arrived;
            }
        }
        panic!("{from} to {to}: connected, but to nothing of ours");
    }

    fn expect(&self, want: Arrived, ends: impl Fn(&Family) -> (IpAddr, SocketAddr)) {
        for family in &FAMILIES {
            let (from, to) = ends(family);
            assert_eq!(self.dial(from, to), want, "{from} to {to}");
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrived {
    App,
    Inbound,
    Tunnel,
    Out,
    Nowhere,
}

fn port(listener: &TcpListener) -> u16 {
    listener.local_addr().unwrap().port()
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

#[test]
fn outgoing_connections_reach_the_proxy_at_every_address_of_the_spread() {
    let mut world = World::new(pod::STRICT, 0);
    let out = port(&world.out[0]);
    for spread in [0, 1, ranges::REDIRECT_SPREAD - 1] {
        let to = SocketAddr::from((ranges::redirect4(SLOT, spread), out));
        assert_eq!(world.dial([127, 0, 0, 1].into(), to), Arrived::Out);
    }
    let six = FAMILIES[1];
    assert_eq!(world.dial(six.own, at(six.own, port(&world.out[1]))), Arrived::Out, "IPv6: the own address");
    // Another Pod's number, or another port, leads nowhere.
    let to = SocketAddr::from((ranges::redirect4(SLOT + 1, 0), out));
    assert_eq!(world.dial([127, 0, 0, 1].into(), to), Arrived::Nowhere);
    assert_eq!(world.maps().stat(stat::NO_LISTENER).unwrap(), 1);
}

#[test]
fn the_pod_calls_itself_without_the_proxy() {
    let world = World::new(pod::STRICT, info::POLICED | info::STRICT);
    world.expect(Arrived::App, |family| (family.own, at(family.own, APP)));
    world.expect(Arrived::App, |family| {
        (
            if family.own.is_ipv4() { [127, 0, 0, 6].into() } else { std::net::Ipv6Addr::LOCALHOST.into() },
            at(family.own, APP),
        )
    });
}

#[test]
fn tunnels_reach_the_proxy_whoever_calls() {
    let world = World::new(pod::STRICT, info::POLICED | info::STRICT);
    world.expect(Arrived::Tunnel, |family| (family.world, at(family.own, TUNNEL_PORT)));
    world.expect(Arrived::Tunnel, |family| (family.peer, at(family.own, TUNNEL_PORT)));
}

#[test]
fn strict_refuses_plaintext_before_accept() {
    let mut world = World::new(pod::STRICT, info::STRICT);
    world.expect(Arrived::Nowhere, |family| (family.world, at(family.own, APP)));
    assert_eq!(world.maps().stat(stat::PLAINTEXT_REFUSED).unwrap(), 2);
    let told = world.maps().events().unwrap();
    assert_eq!(told.len(), 2);
    assert!(told.iter().all(|told| told.reason == reason::PLAINTEXT_REFUSED
        && told.verdict == outcome::DENIED
        && told.src_subject == subject::WORLD
        && told.dport == APP));
    // A Pod of another node that calls without a tunnel proves nothing by its address.
    world.maps().describe_both(|family| family.peer, PEER, 0).unwrap();
    world.expect(Arrived::Nowhere, |family| (family.peer, at(family.own, APP)));
}

#[test]
fn a_row_opens_a_port_of_a_strict_pod_to_the_world() {
    let mut world = World::new(pod::STRICT, info::STRICT | info::POLICED);
    world.maps().row(subject::WORLD, OWN, APP, proto::TCP, verdict::ALLOW).unwrap();
    world.expect(Arrived::Inbound, |family| (family.world, at(family.own, APP)));
    world.expect(Arrived::Nowhere, |family| (family.world, at(family.own, APP + 1)));
}

#[test]
fn permissive_plaintext_goes_through_the_proxy_as_policy_says() {
    let mut world = World::new(pod::PERMISSIVE, 0);
    world.expect(Arrived::Inbound, |family| (family.world, at(family.own, APP)));
    world.maps().describe_both(|family| family.own, OWN, info::LOCAL | info::POLICED).unwrap();
    world.expect(Arrived::Nowhere, |family| (family.world, at(family.own, APP)));
    for family in &FAMILIES {
        world.maps().describe_range(family.world, 24, 900, info::CIDR).unwrap();
    }
    world.maps().row(900, OWN, APP, proto::TCP, verdict::PROXY).unwrap();
    world.expect(Arrived::Inbound, |family| (family.world, at(family.own, APP)));
    assert_eq!(world.maps().stat(stat::STEERED).unwrap(), 4);
    assert_eq!(world.maps().stat(stat::DENIED_INBOUND).unwrap(), 2);
}

#[test]
fn a_local_pod_is_known_by_its_address_and_takes_the_short_cut() {
    let mut world = World::new(pod::STRICT, info::STRICT | info::SHORTCUT_OK);
    world.maps().describe_both(|family| family.peer, PEER, info::LOCAL).unwrap();
    world.expect(Arrived::App, |family| (family.peer, at(family.own, APP)));
    assert_eq!(world.maps().stat(stat::PASSED_KERNEL).unwrap(), 2);
    assert!(world.maps().counts().unwrap().iter().any(|(key, count)| {
        (key.src, key.dst, key.verdict, *count) == (PEER, OWN, outcome::FORWARDED, 2)
    }));

    let policed = info::LOCAL | info::STRICT | info::SHORTCUT_OK | info::POLICED;
    world.maps().describe_both(|family| family.own, OWN, policed).unwrap();
    world.expect(Arrived::Nowhere, |family| (family.peer, at(family.own, APP)));
    world.maps().row(PEER, OWN, APP, proto::TCP, verdict::PROXY).unwrap();
    world.expect(Arrived::Inbound, |family| (family.peer, at(family.own, APP)));

    // No short cut (same-node mTLS): plaintext does not enter, not even from here.
    world.maps().row(PEER, OWN, APP, proto::TCP, verdict::ALLOW).unwrap();
    world.maps().describe_both(|family| family.own, OWN, policed & !info::SHORTCUT_OK).unwrap();
    world.expect(Arrived::Nowhere, |family| (family.peer, at(family.own, APP)));
}

#[test]
fn without_the_proxy_closed_refuses_and_open_lets_pass() {
    for (flags, want) in
        [(pod::PERMISSIVE, Arrived::Nowhere), (pod::PERMISSIVE | pod::FAIL_OPEN, Arrived::App)]
    {
        let mut world = World::new(flags, 0);
        // The kernel empties the slot of a socket that is closed.
        world.inbound = world
            .netns
            .run(|| Ok([TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("[::1]:0")?]))
            .unwrap();
        world.expect(want, |family| (family.world, at(family.own, APP)));
    }
}

#[test]
fn a_listener_is_replaced_without_a_gap() {
    let mut world = World::new(pod::PERMISSIVE, 0);
    for family in &FAMILIES {
        let index = usize::from(family.own.is_ipv6());
        let kind = [listener::IN4, listener::IN6][index];
        let new = world.netns.run(|| Ok(TcpListener::bind((family.own, 0))?)).unwrap();
        world.maps().listener(kind, 0, &new).unwrap();
        world.inbound[index] = new;
        assert_eq!(world.dial(family.world, at(family.own, APP)), Arrived::Inbound);
    }
}

#[test]
fn an_address_that_is_not_the_pods_answers_nothing() {
    let world = World::new(pod::PERMISSIVE, 0);
    let twins = world
        .netns
        .run(|| {
            Ok([TcpListener::bind((FAMILIES[0].world, APP))?, TcpListener::bind((FAMILIES[1].world, APP))?])
        })
        .unwrap();
    world.expect(Arrived::Nowhere, |family| (family.peer, at(family.world, APP)));
    drop(twins);
}

#[test]
fn a_pod_outside_the_mesh_is_left_alone() {
    let world = World::new(pod::PASS, 0);
    world.expect(Arrived::App, |family| (family.world, at(family.own, APP)));
}
