//! The packet programs at a real interface: whose SYN may leave a Pod. The mark is on the socket, which the packet
//! takes along through the namespaces.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{
    net::{SocketAddr, TcpListener},
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    programs::{Program, TcAttachType},
};
use socket2::{Domain, Socket, Type};
use weft_bpf_tests::{
    load,
    netns::Netns,
    tables::{FAMILIES, Family, Maps, OWN, PEER, own_pod},
};
use weft_ebpf_common::{
    SkMeta,
    codes::{info, kind, map, pod, program, stat},
};

/// A Pod joined with a host that has the other Pod's addresses.
fn world() -> (Ebpf, Netns, Netns) {
    let (inside, host) = (Netns::new(&[]).unwrap(), Netns::new(&[]).unwrap());
    let pairs = FAMILIES.map(|family| (family.own, family.peer));
    inside.join(&host, &pairs).unwrap();
    let mut bpf = load(&[program::FROM_POD, program::TO_POD]).unwrap();
    let ifindex = host
        .run(|| {
            for (name, way) in
                [(program::FROM_POD, TcAttachType::Ingress), (program::TO_POD, TcAttachType::Egress)]
            {
                let Some(Program::SchedClassifier(program)) = bpf.program_mut(name) else {
                    anyhow::bail!("no packet program {name}");
                };
                program.attach("host0", way)?;
            }
            Ok(nix::net::if_::if_nametoindex("host0")?)
        })
        .unwrap();
    let mut maps = Maps(&mut bpf);
    maps.set(map::VETHS, ifindex, own_pod(pod::STRICT)).unwrap();
    maps.describe_both(|family| family.own, OWN, info::LOCAL | info::STRICT).unwrap();
    maps.describe_both(|family| family.peer, PEER, info::LOCAL | info::STRICT).unwrap();
    (bpf, inside, host)
}

fn socket(inside: &Netns, family: &Family) -> Socket {
    inside
        .run(|| Ok(Socket::new(Domain::for_address(SocketAddr::new(family.own, 0)), Type::STREAM, None)?))
        .unwrap()
}

#[test]
fn only_marked_sockets_open_connections_into_the_mesh() {
    let (mut bpf, inside, host) = world();
    for family in &FAMILIES {
        let listener = host.run(|| Ok(TcpListener::bind((family.peer, 0))?)).unwrap();
        let to = listener.local_addr().unwrap();
        for kind in [kind::PROXY, kind::DIRECT] {
            let socket = socket(&inside, family);
            Maps(&mut bpf).set_meta(&socket, SkMeta { kind, ..SkMeta::default() }).unwrap();
            socket.connect_timeout(&to.into(), Duration::from_secs(10)).unwrap();
            assert_eq!(listener.accept().unwrap().1.ip(), family.own);
        }
        let before = Maps(&mut bpf).stat(stat::BYPASS_SYN).unwrap();
        let plain = socket(&inside, family);
        plain.set_nonblocking(true).unwrap();
        // It is under way, or its packet was dropped on the spot: either is no connection.
        let _ = plain.connect(&to.into());
        let deadline = Instant::now() + Duration::from_secs(10);
        while Maps(&mut bpf).stat(stat::BYPASS_SYN).unwrap() == before {
            assert!(Instant::now() < deadline, "no SYN was dropped");
            std::thread::yield_now();
        }
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err());
    }
}
