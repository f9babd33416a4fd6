//! The hooks of the cgroup, with real sockets in a real namespace: every test in IPv4 and in IPv6.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    time::Duration,
};

use anyhow::Result;
use socket2::{Domain, Socket, Type};
use weft_bpf_tests::{
    enrolled::Enrolled as World,
    netns::Netns,
    tables::{FAMILIES, Family, OWN, PEER, addr},
};
use weft_ebpf_common::{
    SkMeta, VipKey, addr as ranges,
    codes::{
        TUNNEL_PORT, VIP_NO_ENDPOINT, config, event, info, kind, map, outcome, pod, proto, reason, stat,
        verdict,
    },
};

fn refused<T>(result: &std::io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == ErrorKind::ConnectionRefused)
}

#[test]
fn a_connect_to_a_service_reaches_the_proxy_and_nobody_notices() {
    let mut world = World::new(pod::PERMISSIVE).unwrap();
    for family in &FAMILIES {
        let dialled = SocketAddr::new(family.service, 8_080);
        let stream = world.dial(dialled).unwrap();
        let (accepted, peer) = world.listener(family).accept().unwrap();
        assert_eq!(stream.peer_addr().unwrap(), dialled, "the peer is what was dialled");
        assert_eq!(stream.local_addr().unwrap().ip(), family.own, "the own address is the Pod's");
        assert!(peer.ip().is_loopback() || peer.ip() == family.own, "{peer}");

        let cookie = world.netns.cookie();
        let meta = world.maps().meta(&accepted).unwrap();
        assert_eq!((meta.kind, meta.addr, meta.port), (kind::ACCEPTED_OUT, addr(family.service), 8_080));
        assert_eq!((meta.subject, meta.netns), (OWN, cookie));
        assert_eq!(meta.family, if family.own.is_ipv4() { 4 } else { 6 });
        let told = world.maps().events().unwrap();
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!((told[0].kind, told[0].verdict, told[0].reason), (event::CONNECT, outcome::REDIRECTED, 0));
        assert_eq!((told[0].cookie, told[0].dst, told[0].dport), (meta.cookie, addr(family.service), 8_080));
        assert_eq!(told[0].pid, std::process::id());
    }
    assert_eq!(world.maps().stat(stat::REDIRECTED).unwrap(), 2);
    assert_eq!(
        world.maps().rows::<weft_ebpf_common::Tuple, weft_ebpf_common::OrigDst>(map::ORIG_DST).unwrap(),
        0
    );
}

#[test]
fn a_v4_connect_of_a_v6_socket_is_the_same() {
    let mut world = World::new(pod::PERMISSIVE).unwrap();
    let IpAddr::V4(service) = FAMILIES[0].service else { unreachable!("the first family is IPv4") };
    let IpAddr::V4(own) = FAMILIES[0].own else { unreachable!("the first family is IPv4") };
    let dialled = SocketAddr::new(service.to_ipv6_mapped().into(), 8_080);
    let stream = world.dial(dialled).unwrap();
    let (accepted, _) = world.out[0].accept().unwrap();
    assert_eq!(stream.peer_addr().unwrap(), dialled);
    assert_eq!(stream.local_addr().unwrap().ip(), IpAddr::from(own.to_ipv6_mapped()));
    let meta = world.maps().meta(&accepted).unwrap();
    assert_eq!((meta.kind, meta.addr, meta.port), (kind::ACCEPTED_OUT, addr(FAMILIES[0].service), 8_080));
}

#[test]
fn a_socket_bound_to_the_pods_address_or_to_a_device_is_redirected_too() {
    let mut world = World::new(pod::PERMISSIVE).unwrap();
    for family in &FAMILIES {
        let dialled = SocketAddr::new(family.service, 8_080);
        for device in [false, true] {
            let stream = world
                .netns
                .run(|| {
                    let socket = Socket::new(Domain::for_address(dialled), Type::STREAM, None)?;
                    if device {
                        socket.bind_device(Some(b"lo"))?;
                    } else {
                        socket.bind(&SocketAddr::new(family.own, 0).into())?;
                    }
                    socket.connect_timeout(&dialled.into(), Duration::from_secs(5))?;
                    Ok(TcpStream::from(socket))
                })
                .unwrap();
            let (accepted, _) = world.listener(family).accept().unwrap();
            assert_eq!(world.maps().meta(&accepted).unwrap().addr, addr(family.service), "{stream:?}");
        }
    }
}

#[test]
fn a_denied_connect_is_refused_at_once() {
    let mut world = World::new(pod::PERMISSIVE).unwrap();
    world.maps().describe_both(|family| family.peer, PEER, info::POLICED).unwrap();
    world.maps().row(OWN, PEER, 80, proto::TCP, verdict::PROXY).unwrap();
    for family in &FAMILIES {
        assert!(refused(&world.dial(SocketAddr::new(family.peer, 81))));
        let told = world.maps().events().unwrap();
        assert_eq!(told.len(), 1);
        assert_eq!(
            (told[0].verdict, told[0].reason, told[0].src_subject, told[0].dst_subject, told[0].dport),
            (outcome::DENIED, reason::POLICY_DENIED, OWN, PEER, 81)
        );
        let _stream = world.dial(SocketAddr::new(family.peer, 80)).unwrap();
        world.listener(family).accept().unwrap();
        world.maps().events().unwrap();

        let key = VipKey { subject: OWN, port: 80, pad: 0, addr: addr(family.service) };
        world.maps().set(map::VIP_DENIED, key, 9_u32).unwrap();
        assert!(refused(&world.dial(SocketAddr::new(family.service, 80))));
        let told = world.maps().events().unwrap();
        assert_eq!((told[0].reason, told[0].policy), (reason::POLICY_DENY_RULE, 9));
        world.maps().set(map::VIP_DENIED, key, VIP_NO_ENDPOINT).unwrap();
        assert!(refused(&world.dial(SocketAddr::new(family.service, 80))));
        let told = world.maps().events().unwrap();
        assert_eq!((told[0].reason, told[0].policy), (reason::NO_ENDPOINT, 0));
    }
    assert_eq!(world.maps().stat(stat::DENIED_CONNECT).unwrap(), 6);
}

#[test]
fn the_tunnel_port_and_the_redirect_range_are_not_for_applications() {
    let mut world = World::new(pod::PERMISSIVE).unwrap();
    for family in &FAMILIES {
        assert!(refused(&world.dial(SocketAddr::new(family.service, TUNNEL_PORT))));
    }
    assert_eq!(world.maps().stat(stat::TUNNEL_DIALLED).unwrap(), 2);
    let port = world.out[0].local_addr().unwrap().port();
    let target = ranges::redirect4(weft_bpf_tests::tables::SLOT, 3);
    assert!(refused(&world.dial(SocketAddr::from((target, port)))));
}

#[test]
fn the_own_addresses_and_loopback_are_left_alone() {
    let mut world = World::new(pod::STRICT).unwrap();
    for family in &FAMILIES {
        let loopback =
            if family.own.is_ipv4() { IpAddr::from([127, 0, 0, 1]) } else { Ipv6Addr::LOCALHOST.into() };
        for ip in [loopback, family.own] {
            let app = world.netns.run(|| Ok(TcpListener::bind((ip, 0))?)).unwrap();
            let stream = world.dial(app.local_addr().unwrap()).unwrap();
            let (_, peer) = app.accept().unwrap();
            assert_eq!(peer, stream.local_addr().unwrap());
            assert!(world.maps().meta(&stream).is_err());
        }
    }
    assert_eq!(world.maps().stat(stat::REDIRECTED).unwrap(), 0);
}

#[test]
fn a_kernel_path_connect_is_marked_and_not_rewritten() {
    let mut world = World::new(pod::PERMISSIVE).unwrap();
    world.maps().describe_both(|family| family.peer, PEER, info::LOCAL | info::SHORTCUT_OK).unwrap();
    for family in &FAMILIES {
        let meta = world
            .netns
            .run(|| {
                let to = SocketAddr::new(family.peer, 80);
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                // There is no way to that address from here: the hook has passed it, the routes have not.
                assert!(socket.connect(&to.into()).is_err());
                Ok(socket)
            })
            .and_then(|socket| world.maps().meta(&socket))
            .unwrap();
        assert_eq!((meta.kind, meta.addr, meta.port), (kind::DIRECT, addr(family.peer), 80));
    }
    assert_eq!(world.maps().stat(stat::PASSED_KERNEL).unwrap(), 2);
}

/// What an unknown namespace gets by each of the two rules (RefuseMesh, RefuseAll): refused or not.
#[test]
fn an_unknown_namespace_is_refused_as_the_rule_says_and_told_of() {
    let mut world = World::new(pod::PERMISSIVE).unwrap();
    let stranger = Netns::new(&[]).unwrap();
    let mut dialled = 0;
    for family in &FAMILIES {
        world.maps().describe(family.peer, PEER, info::ENROLLED).unwrap();
        world.maps().describe_range(family.peer, 24, 0, info::MESH_RANGE).unwrap();
        let (nobody, outside): (IpAddr, IpAddr) = if family.own.is_ipv4() {
            ([10, 9, 0, 77].into(), [192, 0, 2, 77].into())
        } else {
            ("fd00:9::77".parse().unwrap(), "2001:db8::77".parse().unwrap())
        };
        // A Pod outside the mesh is described, and is no part of it.
        world.maps().describe(family.world, PEER + 1, 0).unwrap();
        for (to, service, refused_by) in [
            (family.peer, 0, [true, true]),
            (family.service, info::SERVICE | info::MESHED, [true, true]),
            // Such as the API server's and DNS: what comes up while no agent runs needs them.
            (family.service, info::SERVICE, [false, true]),
            (nobody, 0, [false, true]),
            (family.world, 0, [false, true]),
            (outside, 0, [false, true]),
        ] {
            if service != 0 {
                world.maps().describe(to, 0, service).unwrap();
            }
            for (flags, want) in [0, config::UNKNOWN_REFUSE_ALL].into_iter().zip(refused_by) {
                set_config(&mut world, weft_ebpf_common::Config { flags, generation: 1 });
                let to = SocketAddr::new(to, 80);
                let result =
                    stranger.run(|| Ok(TcpStream::connect_timeout(&to, Duration::from_secs(5)))).unwrap();
                // What is not refused has no route: another error.
                assert_eq!(refused(&result), want, "{to}, flags {flags}: {result:?}");
                dialled += 1;
                assert_eq!(world.maps().stat(stat::UNKNOWN_NETNS).unwrap(), dialled);
                let told = world.maps().events().unwrap();
                assert_eq!(told.len(), 1, "{told:?}");
                let told = told[0];
                let (verdict, why) = if want {
                    (outcome::DENIED, reason::UNKNOWN_PEER)
                } else {
                    (outcome::FORWARDED, reason::NONE)
                };
                assert_eq!((told.kind, told.verdict, told.reason), (event::UNKNOWN_NETNS, verdict, why));
                assert_eq!((told.netns, told.pid), (stranger.cookie(), std::process::id()));
                assert_eq!((told.dst, told.dport, told.src_subject), (addr(to.ip()), 80, 0));
            }
        }
    }
    // Its own loopback is nobody's business, whatever the rule.
    for loopback in [IpAddr::from([127, 0, 0, 1]), Ipv6Addr::LOCALHOST.into()] {
        stranger
            .run(|| {
                let listener = TcpListener::bind((loopback, 0))?;
                Ok(TcpStream::connect(listener.local_addr()?)?)
            })
            .unwrap();
    }
    assert_eq!(world.maps().stat(stat::UNKNOWN_NETNS).unwrap(), dialled);
}

fn set_config(world: &mut World, value: weft_ebpf_common::Config) {
    let mut config: aya::maps::Array<_, weft_ebpf_common::Config> =
        aya::maps::Array::try_from(world.attached.bpf.map_mut(map::CONFIG).unwrap()).unwrap();
    config.set(0, value, 0).unwrap();
}

/// Dials an application as the proxy does, for this client.
fn dial_as_proxy(
    world: &mut World,
    family: &Family,
    to: SocketAddr,
    client: Option<SocketAddr>,
) -> Result<Socket> {
    let from = if family.own.is_ipv4() { IpAddr::from([127, 0, 0, 6]) } else { Ipv6Addr::LOCALHOST.into() };
    let socket = world.netns.run(|| Ok(Socket::new(Domain::for_address(to), Type::STREAM, None)?))?;
    if let Some(client) = client {
        let meta = SkMeta {
            kind: kind::PROXY,
            family: if client.is_ipv4() { 4 } else { 6 },
            port: client.port(),
            subject: PEER,
            addr: addr(client.ip()),
            cookie: 77,
            netns: world.netns.cookie(),
        };
        world.maps().set_meta(&socket, meta)?;
    }
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
    Ok(socket)
}

#[test]
fn the_application_sees_the_real_client() {
    let mut world = World::new(pod::STRICT).unwrap();
    for family in &FAMILIES {
        for dual_stack in [false, true] {
            let bind = if dual_stack { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { family.own };
            let app = world.netns.run(|| Ok(TcpListener::bind((bind, 0))?)).unwrap();
            let to = SocketAddr::new(family.own, app.local_addr().unwrap().port());
            let client = SocketAddr::new(family.peer, 31_550);
            let _proxy = dial_as_proxy(&mut world, family, to, Some(client)).unwrap();
            let (accepted, peer) = app.accept().unwrap();
            assert_eq!((peer.ip().to_canonical(), peer.port()), (client.ip(), client.port()), "accept4");
            assert_eq!(accepted.peer_addr().unwrap(), peer, "getpeername");
            assert_eq!(accepted.local_addr().unwrap().ip().to_canonical(), family.own);
            let meta = world.maps().meta(&accepted).unwrap();
            assert_eq!((meta.kind, meta.subject, meta.cookie), (kind::ACCEPTED_IN, PEER, 77));
        }
    }
}

#[test]
fn a_client_that_is_not_known_is_not_shown_as_loopback() {
    let mut world = World::new(pod::STRICT).unwrap();
    let family = &FAMILIES[0];
    let app = world.netns.run(|| Ok(TcpListener::bind((family.own, 0))?)).unwrap();
    let to = app.local_addr().unwrap();
    let _stranger = dial_as_proxy(&mut world, family, to, None).unwrap();
    let (_, peer) = app.accept().unwrap();
    assert_eq!(peer, SocketAddr::from(([0, 0, 0, 0], 0)));
    assert!(world.maps().stat(stat::CLIENT_MISS).unwrap() >= 1);
}

#[test]
fn without_a_listener_closed_refuses_and_open_lets_pass() {
    for (flags, closed) in [(pod::PERMISSIVE, true), (pod::PERMISSIVE | pod::FAIL_OPEN, false)] {
        let mut world = World::new(flags).unwrap();
        // The proxy is gone: its sockets are closed, and the kernel empties the slots.
        world.out = [TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("[::1]:0").unwrap()];
        for family in &FAMILIES {
            let result = world.dial(SocketAddr::new(family.service, 80));
            assert_eq!(refused(&result), closed, "{family:?}");
        }
        assert_eq!(world.maps().stat(stat::FAILED_OPEN).unwrap(), if closed { 0 } else { 2 });
    }
}

#[test]
fn a_reconnect_forgets_what_was_dialled_before() {
    let mut world = World::new(pod::PERMISSIVE).unwrap();
    for family in &FAMILIES {
        let app = world.netns.run(|| Ok(TcpListener::bind((family.own, 0))?)).unwrap();
        let stream = world.dial(SocketAddr::new(family.service, 80)).unwrap();
        world.listener(family).accept().unwrap();
        let socket = Socket::from(stream);
        // SAFETY: a zeroed address of family AF_UNSPEC, as long as told.
        let done = unsafe {
            let unspec: libc::sockaddr = std::mem::zeroed();
            libc::connect(socket.as_raw_fd(), &raw const unspec, size_of::<libc::sockaddr>() as u32)
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        let to = app.local_addr().unwrap();
        socket.connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
        assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(to));
        assert!(world.maps().meta(&socket).is_err());
    }
}
