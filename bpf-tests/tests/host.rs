//! The node's own network: Pods there are told from daemons by their cgroups, with real sockets in a real namespace.
//! Every test in IPv4 and in IPv6.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{
    fs,
    io::{self, ErrorKind},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    time::Duration,
};

use weft_bpf_tests::{
    attach::{Attached, attach_cgroup, cgroup2_mount},
    netns::Netns,
    tables::{FAMILIES, Family, Maps, OWN, PEER, SLOT, addr, own_pod},
};
use weft_ebpf_common::{
    Front, FrontKey, Pod, VipKey, addr as ranges,
    codes::{TUNNEL_PORT, cgroup, event, info, kind, map, outcome, pod, proto, reason, stat, verdict},
};

/// A child of the cgroup that this process is in; it goes back on drop.
struct Child {
    above: PathBuf,
    path: PathBuf,
}

impl Child {
    fn enter() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        let above = cgroup2_mount().unwrap().join(own);
        let path = above.join("pod");
        fs::create_dir(&path).unwrap();
        let child = Self { above, path };
        child.join(&child.path);
        child
    }

    fn join(&self, folder: &std::path::Path) {
        fs::write(folder.join("cgroup.procs"), std::process::id().to_string()).unwrap();
    }

    fn ids(&self) -> [u64; 2] {
        [&self.above, &self.path].map(|folder| fs::metadata(folder).unwrap().ino())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.join(&self.above);
        fs::remove_dir(&self.path).unwrap();
    }
}

/// A node's network with the proxy's listeners, and this process in a Pod's cgroup.
struct World {
    // First, so that it is left before the cgroup around it goes.
    child: Child,
    attached: Attached,
    netns: Netns,
    out: Vec<TcpListener>,
}

impl World {
    fn new() -> Self {
        let netns = Netns::new(&[FAMILIES[0].own, FAMILIES[1].own]).unwrap();
        let attached = attach_cgroup().unwrap();
        let out = netns
            .run(|| {
                let at =
                    |spread, port| TcpListener::bind((IpAddr::from(ranges::redirect4(SLOT, spread)), port));
                let first = at(0, 0)?;
                let port = first.local_addr()?.port();
                let mut out = vec![first];
                for spread in 1..ranges::HOST_SPREAD {
                    out.push(at(spread, port)?);
                }
                out.push(TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?);
                for listener in &out {
                    listener.set_nonblocking(true)?;
                }
                Ok(out)
            })
            .unwrap();
        let mut world = Self { child: Child::enter(), attached, netns, out };
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let row = Pod {
            cookie: world.netns.cookie(),
            out_port: port(&world.out[0]),
            out_port6: [port(world.out.last().unwrap()); 2],
            ..own_pod(pod::HOST | pod::FAIL_OPEN)
        };
        let [above, _] = world.child.ids();
        world.maps().set(map::PODS, row.cookie, row).unwrap();
        world.maps().set(map::CGROUPS, above, cgroup::PODS).unwrap();
        for family in &FAMILIES {
            let flags = info::ENROLLED | info::LOCAL | info::SHORTCUT_OK;
            world.maps().describe(family.peer, PEER, flags).unwrap();
            world.maps().describe(family.service, 0, info::SERVICE | info::MESHED).unwrap();
        }
        world
    }

    fn maps(&mut self) -> Maps<'_> {
        Maps(&mut self.attached.bpf)
    }

    fn dial(&self, to: IpAddr, port: u16) -> io::Result<TcpStream> {
        let to = SocketAddr::new(to, port);
        self.netns
            .run(|| Ok(TcpStream::connect_timeout(&to, Duration::from_secs(5))))
            .map_err(io::Error::other)?
    }

    /// What the proxy has accepted.
    fn accepted(&self) -> Option<TcpStream> {
        self.out.iter().find_map(|listener| match listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                None
            }
        })
    }

    fn redirected(&mut self) -> u64 {
        self.maps().stat(stat::REDIRECTED).unwrap()
    }

    /// Dials somebody of the mesh, and expects to be left alone: there is no route.
    fn left_alone(&mut self, family: &Family, to: IpAddr) {
        let before = self.redirected();
        let error = self.dial(to, 80).expect_err("no way there");
        assert_ne!(error.kind(), ErrorKind::ConnectionRefused, "{family:?}");
        assert_eq!(self.redirected(), before);
    }
}

#[test]
fn a_pod_is_steered_and_sees_what_it_dialled() {
    let mut world = World::new();
    for family in &FAMILIES {
        // The kernel path is for those whose addresses prove who they are: these are a whole node's.
        for to in [family.service, family.peer] {
            // Enough for every address that they are spread over.
            for _ in 0..12 {
                let stream = world.dial(to, 80).unwrap();
                let accepted = world.accepted().expect("it is there once connect says so");
                assert_eq!(stream.peer_addr().unwrap(), SocketAddr::new(to, 80));
                assert_eq!(stream.local_addr().unwrap().ip(), family.own);
                let meta = world.maps().meta(&accepted).unwrap();
                assert_eq!((meta.kind, meta.addr, meta.port), (kind::ACCEPTED_OUT, addr(to), 80));
                assert_eq!((meta.subject, meta.netns), (OWN, world.netns.cookie()));
            }
        }
        let told = world.maps().events().unwrap();
        assert!(told.iter().all(|e| (e.kind, e.verdict) == (event::CONNECT, outcome::REDIRECTED)));
        assert!(told.iter().all(|e| (e.src, e.src_subject) == (addr(family.own), OWN)));
    }
    assert_eq!(world.redirected(), 48);
}

#[test]
fn what_is_outside_the_mesh_is_nobodys_business() {
    let mut world = World::new();
    for family in &FAMILIES {
        world.maps().describe(family.service, 0, info::SERVICE).unwrap();
        world.maps().describe_range(family.world, 24, 0, info::MESH_RANGE).unwrap();
        for to in [family.service, family.world] {
            world.left_alone(family, to);
        }
        let loopback: IpAddr =
            if family.own.is_ipv4() { [127, 0, 0, 1].into() } else { Ipv6Addr::LOCALHOST.into() };
        let app = world.netns.run(|| Ok(TcpListener::bind((loopback, 0))?)).unwrap();
        let to = app.local_addr().unwrap();
        world.dial(to.ip(), to.port()).unwrap();
    }
    assert_eq!(world.redirected(), 0);
}

#[test]
fn daemons_and_agents_are_never_steered() {
    let mut world = World::new();
    let [above, own] = world.child.ids();
    for family in &FAMILIES {
        world.maps().set(map::CGROUPS, own, cgroup::AGENT).unwrap();
        world.left_alone(family, family.peer);
        world.maps().delete::<u64, u32>(map::CGROUPS, own).unwrap();
        // Nobody below the kubelet's cgroup is a daemon; without it everybody is.
        world.maps().delete::<u64, u32>(map::CGROUPS, above).unwrap();
        world.left_alone(family, family.peer);
        world.maps().set(map::CGROUPS, above, cgroup::PODS).unwrap();
        world.dial(family.peer, 80).unwrap();
        world.accepted().unwrap();
    }
}

#[test]
fn policy_refuses_at_once_and_so_is_the_tunnel_port() {
    let mut world = World::new();
    world.maps().describe_both(|family| family.peer, PEER, info::POLICED).unwrap();
    world.maps().row(OWN, PEER, 80, proto::TCP, verdict::ALLOW).unwrap();
    for family in &FAMILIES {
        let denied = VipKey { subject: OWN, port: 81, pad: 0, addr: addr(family.service) };
        world.maps().set(map::VIP_DENIED, denied, 9_u32).unwrap();
        world.dial(family.peer, 80).unwrap();
        world.accepted().unwrap();
        world.maps().events().unwrap();
        for (to, port, why) in [
            (family.peer, 81, reason::POLICY_DENIED),
            (family.service, 81, reason::POLICY_DENY_RULE),
            (family.peer, TUNNEL_PORT, reason::TUNNEL_PORT_DIALLED),
        ] {
            let refused = world.dial(to, port).expect_err("refused");
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{to} {port}");
            let told = world.maps().events().unwrap();
            assert_eq!((told[0].verdict, told[0].reason, told[0].src_subject), (outcome::DENIED, why, OWN));
        }
    }
}

#[test]
fn without_an_agent_connections_go_as_they_are() {
    let mut world = World::new();
    world.out.clear();
    for family in &FAMILIES {
        world.left_alone(family, family.peer);
    }
    assert_eq!(world.maps().stat(stat::FAILED_OPEN).unwrap(), 2);
}

#[test]
fn a_port_of_a_node_is_the_services_behind_it() {
    let mut world = World::new();
    for (family, balanced) in
        FAMILIES.iter().zip(["203.0.113.9", "2001:db8:1::9"].map(|ip| ip.parse::<IpAddr>().unwrap()))
    {
        let service = Front { subject: 0, flags: info::SERVICE | info::MESHED, port: 80, pad: 0 };
        let key = |ip, port| FrontKey { addr: ip, port, proto: proto::TCP, pad: 0 };
        world.maps().describe(family.world, 0, info::FRONT | info::NODE).unwrap();
        world.maps().describe(balanced, 0, info::FRONT).unwrap();
        world.maps().set(map::FRONTS, key(ranges::NONE, 30_080), service).unwrap();
        world.maps().set(map::FRONTS, key(addr(balanced), 80), service).unwrap();
        // The own node's among them.
        world.maps().describe(family.own, 0, info::FRONT | info::NODE).unwrap();
        for (to, port) in [(family.world, 30_080), (family.own, 30_080), (balanced, 80)] {
            world.dial(to, port).unwrap();
            let accepted = world.accepted().unwrap();
            let meta = world.maps().meta(&accepted).unwrap();
            assert_eq!((meta.addr, meta.port), (addr(to), port), "the proxy finds the Service");
        }
        // Ports of nodes are no load balancer's, and other ports nobody's.
        let before = world.redirected();
        for (to, port) in [(balanced, 30_080), (family.world, 80), (family.world, 6_443)] {
            let error = world.dial(to, port).expect_err("no way there");
            assert_ne!(error.kind(), ErrorKind::ConnectionRefused);
        }
        assert_eq!(world.redirected(), before);
    }
}
