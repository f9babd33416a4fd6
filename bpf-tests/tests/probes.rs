//! The kubelet's probes, with the packet hook at a real interface and the listener choice behind it: its sockets are
//! known by their cgroup. Every test in IPv4 and in IPv6.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd as _, AsRawFd as _},
    process::Command,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    programs::{Program, TcAttachType},
};
use socket2::{Domain, Socket, Type};
use weft_bpf_tests::{
    attach::{Cgroup, attach_sk_lookup},
    load,
    netns::Netns,
    tables::{FAMILIES, Family, Maps, OWN, addr, own_pod},
};
use weft_ebpf_common::{
    Pod, Probe, Tuple,
    codes::{
        PROBE_FRESH_NS, info, listener, map, outcome, pod, program, proto, reason, stat, subject, verdict,
    },
};

const APP: u16 = 8_080;

/// A Pod behind a veth, whose other end is the node's; the node has the addresses of `Family::peer`. Inside, the
/// addresses of `Family::world` are on loopback, for connections that meet no interface.
struct World {
    bpf: Ebpf,
    inside: Netns,
    node: Netns,
    app: [TcpListener; 2],
    inbound: [TcpListener; 2],
}

impl World {
    fn new(flags: u32, own_flags: u32) -> Self {
        let more = FAMILIES.map(|family| family.world);
        let (inside, node) = (Netns::new(&more).unwrap(), Netns::new(&[]).unwrap());
        inside.join(&node, &FAMILIES.map(|family| (family.own, family.peer))).unwrap();
        let mut bpf = load(&[program::TO_POD, program::SK_LOOKUP]).unwrap();
        attach_sk_lookup(&mut bpf, &inside).unwrap();
        let ifindex = node
            .run(|| {
                let Some(Program::SchedClassifier(program)) = bpf.program_mut(program::TO_POD) else {
                    anyhow::bail!("no packet program");
                };
                program.attach("host0", TcAttachType::Egress)?;
                Ok(nix::net::if_::if_nametoindex("host0")?)
            })
            .unwrap();
        let app = inside.run(|| Ok(FAMILIES.map(|f| TcpListener::bind((f.own, APP)).unwrap()))).unwrap();
        let inbound =
            inside.run(|| Ok([TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("[::1]:0")?])).unwrap();
        let row = Pod { cookie: inside.cookie(), ..own_pod(flags) };
        let mut maps = Maps(&mut bpf);
        maps.set(map::VETHS, ifindex, row).unwrap();
        for family in &FAMILIES {
            maps.set(map::POD_ADDRS, addr(family.own), row).unwrap();
            maps.describe(family.own, OWN, info::ENROLLED | info::LOCAL | own_flags).unwrap();
        }
        maps.listener(listener::IN4, 0, &inbound[0]).unwrap();
        maps.listener(listener::IN6, 0, &inbound[1]).unwrap();
        Self { bpf, inside, node, app, inbound }
    }

    fn maps(&mut self) -> Maps<'_> {
        Maps(&mut self.bpf)
    }

    /// Sockets of the node, one for each of `ports` and family, made by a process in a cgroup of its own; its id.
    fn sockets(&self, ports: &[u16]) -> (Vec<[Socket; 2]>, u64) {
        let cgroup = Cgroup::enter().unwrap();
        let make = |port: u16| {
            FAMILIES.map(|family| {
                let socket = Socket::new(Domain::for_address(at(&family)), Type::STREAM, None).unwrap();
                // As the kubelet's probes: the port is free again at once.
                socket.set_linger(Some(Duration::ZERO)).unwrap();
                socket.bind(&SocketAddr::new(family.peer, port).into()).unwrap();
                socket
            })
        };
        let made = self.node.run(|| Ok(ports.iter().map(|port| make(*port)).collect())).unwrap();
        (made, cgroup.id().unwrap())
    }

    /// Where a connection of the socket arrives.
    fn dial(&self, socket: &Socket, family: &Family) -> Arrived {
        match socket.connect_timeout(&at(family).into(), Duration::from_secs(10)) {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
                return Arrived::Nowhere;
            }
        }
        let index = usize::from(family.own.is_ipv6());
        for (listeners, arrived) in [(&self.app, Arrived::App), (&self.inbound, Arrived::Inbound)] {
            listeners[index].set_nonblocking(true).unwrap();
            if let Ok((_, peer)) = listeners[index].accept() {
                assert_eq!(peer, socket.local_addr().unwrap().as_socket().unwrap());
                return arrived;
            }
        }
        panic!("connected, but to nothing of ours");
    }

    fn expect(&self, sockets: &[Socket; 2], want: Arrived) {
        for (socket, family) in sockets.iter().zip(&FAMILIES) {
            assert_eq!(self.dial(socket, family), want, "{family:?}");
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrived {
    App,
    Inbound,
    Nowhere,
}

fn at(family: &Family) -> SocketAddr {
    SocketAddr::new(family.own, APP)
}

#[test]
fn only_the_kubelet_reaches_a_strict_pod() {
    let mut world = World::new(pod::STRICT, info::STRICT);
    let (kubelet, id) = world.sockets(&[0]);
    let (other, _) = world.sockets(&[0]);
    world.maps().set(map::KUBELETS, id, 1_u32).unwrap();
    world.expect(&other[0], Arrived::Nowhere);
    world.maps().events().unwrap();
    world.expect(&kubelet[0], Arrived::App);
    assert_eq!(world.maps().stat(stat::PROBE_PASSED).unwrap(), 2);
    assert_eq!(world.maps().stat(stat::PLAINTEXT_REFUSED).unwrap(), 2);
    let told = world.maps().events().unwrap();
    assert_eq!(told.len(), 2);
    assert!(told.iter().all(|told| (told.verdict, told.reason, told.src_subject, told.cgroup)
        == (outcome::FORWARDED, reason::NONE, subject::HOST, id)));
}

#[test]
fn neither_rules_nor_the_proxy_are_between_the_kubelet_and_a_pod() {
    for mode in [pod::STRICT, pod::PERMISSIVE] {
        let mut world = World::new(mode, info::POLICED);
        let (kubelet, id) = world.sockets(&[0, 0]);
        let (other, _) = world.sockets(&[0]);
        world.maps().set(map::KUBELETS, id, 1_u32).unwrap();
        // No row: refused. Rules about requests: the proxy's.
        world.expect(&kubelet[0], Arrived::App);
        world.maps().row(subject::WORLD, OWN, APP, proto::TCP, verdict::PROXY).unwrap();
        world.expect(&kubelet[1], Arrived::App);
        world.expect(&other[0], Arrived::Inbound);
    }
}

#[test]
fn nobody_inherits_the_kubelets_port() {
    let mut world = World::new(pod::STRICT, info::STRICT);
    let (kubelet, id) = world.sockets(&[0]);
    world.maps().set(map::KUBELETS, id, 1_u32).unwrap();
    world.expect(&kubelet[0], Arrived::App);
    let ports = kubelet[0].each_ref().map(|s| s.local_addr().unwrap().as_socket().unwrap().port());
    drop(kubelet);
    for (family, port) in FAMILIES.iter().zip(ports) {
        let socket = world
            .node
            .run(|| {
                let socket = Socket::new(Domain::for_address(at(family)), Type::STREAM, None)?;
                socket.set_reuse_address(true)?;
                socket.bind(&SocketAddr::new(family.peer, port).into())?;
                Ok(socket)
            })
            .unwrap();
        assert_eq!(world.dial(&socket, family), Arrived::Nowhere);
    }
    assert_eq!(world.maps().rows::<Tuple, Probe>(map::PROBES).unwrap(), 0);
}

#[test]
fn what_was_told_is_good_for_seconds_and_for_one_pod() {
    let mut world = World::new(pod::STRICT, info::STRICT);
    // Beside the interface, so that no packet hook takes the rows back.
    let (node, _) = world.sockets(&[0]);
    world.expect(&node[0], Arrived::Nowhere);
    let now = world.maps().events().unwrap().last().unwrap().ktime;
    let cookie = world.inside.cookie();
    for (netns, seen, want) in [
        (cookie, now, Arrived::App),
        (cookie, now - PROBE_FRESH_NS, Arrived::Nowhere),
        (cookie + 1, now, Arrived::Nowhere),
    ] {
        for family in &FAMILIES {
            let socket = world
                .inside
                .run(|| {
                    let socket = Socket::new(Domain::for_address(at(family)), Type::STREAM, None)?;
                    socket.bind(&SocketAddr::new(family.world, 0).into())?;
                    Ok(socket)
                })
                .unwrap();
            let sport = socket.local_addr().unwrap().as_socket().unwrap().port();
            let key = Tuple {
                netns,
                src: addr(family.world),
                dst: addr(family.own),
                sport,
                dport: APP,
                proto: proto::TCP.into(),
            };
            world.maps().set(map::PROBES, key, Probe { seen, cgroup: 1 }).unwrap();
            assert_eq!(world.dial(&socket, family), want, "{family:?}");
        }
    }
}

#[test]
fn what_the_node_forwards_with_its_own_address_is_not_the_kubelets() {
    let mut world = World::new(pod::STRICT, info::STRICT);
    let (_kubelet, id) = world.sockets(&[0]);
    world.maps().set(map::KUBELETS, id, 1_u32).unwrap();
    // As after masquerading: the source is the node's, the packet comes from elsewhere and has no socket here.
    let client = Netns::new(&[]).unwrap();
    let other = format!("/proc/{}/fd/{}", std::process::id(), client.as_fd().as_raw_fd());
    world
        .node
        .run(|| {
            ip(&["link", "add", "up0", "type", "veth", "peer", "name", "out0"])?;
            ip(&["link", "set", "out0", "netns", &other])?;
            ip(&["link", "set", "up0", "up"])?;
            for setting in ["ipv4/ip_forward", "ipv4/conf/up0/accept_local", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{setting}"), "1")?;
            }
            for scope in ["all", "up0"] {
                std::fs::write(format!("/proc/sys/net/ipv4/conf/{scope}/rp_filter"), "0")?;
            }
            Ok(())
        })
        .unwrap();
    let mac = world.node.run(|| link_address("up0")).unwrap();
    client
        .run(|| {
            ip(&["link", "set", "out0", "up"])?;
            for family in &FAMILIES {
                let length = if family.own.is_ipv4() { 32 } else { 128 };
                let own = format!("{}/{length}", family.peer);
                let mut add = vec!["addr", "add", &own, "dev", "out0"];
                if family.own.is_ipv6() {
                    add.push("nodad");
                }
                ip(&add)?;
                let pod = family.own.to_string();
                ip(&["route", "add", &pod, "dev", "out0"])?;
                ip(&["neigh", "replace", &pod, "lladdr", &mac, "dev", "out0"])?;
            }
            Ok(())
        })
        .unwrap();
    for (count, family) in (1..).zip(&FAMILIES) {
        let socket = client
            .run(|| {
                let socket = Socket::new(Domain::for_address(at(family)), Type::STREAM, None)?;
                socket.set_nonblocking(true)?;
                // The refusal goes to the node, whose address it is.
                let _ = socket.connect(&at(family).into());
                Ok(socket)
            })
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while world.maps().stat(stat::PLAINTEXT_REFUSED).unwrap() < count {
            assert!(Instant::now() < deadline, "{family:?}: no SYN was refused");
            std::thread::yield_now();
        }
        drop(socket);
    }
    assert_eq!(world.maps().stat(stat::PROBE_PASSED).unwrap(), 0);
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output()?;
    anyhow::ensure!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The hardware address of a link, from what `ip` prints: /sys shows another namespace.
fn link_address(name: &str) -> anyhow::Result<String> {
    let output = Command::new("ip").args(["-o", "link", "show", name]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether");
    words.nth(1).map(str::to_owned).ok_or_else(|| anyhow::anyhow!("no address of {name}: {text}"))
}
