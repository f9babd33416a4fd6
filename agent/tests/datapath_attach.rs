//! Attachments that others tamper with, the ways to attach, and the end of it all. Needs root.

#![allow(clippy::expect_used, reason = "a test that cannot set itself up has to end")]

#[allow(dead_code, reason = "each file of tests uses a part")]
#[path = "datapath/world.rs"]
mod world;

use std::{
    collections::HashSet,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use weft_agent::datapath::{
    AddressInfo, AttachmentStatus, Datapath, DatapathConfig, DatapathError, LoadReport, Tables, VethHook,
};
use weft_core::SubjectId;
use world::{PodHost, World, bpf, tc, until};

const SUBJECT: SubjectId = SubjectId(300);
const LIMIT: Duration = Duration::from_secs(5);

/// Tables in which the Pods may not talk, and `10.99.0.9` is one of another node.
fn silent(pods: &[&PodHost]) -> Tables {
    let info = AddressInfo {
        subject: SUBJECT,
        enrolled: true,
        local: true,
        strict: true,
        policed: true,
        ..AddressInfo::default()
    };
    let addresses = pods.iter().flat_map(|p| &p.addresses).map(|a| (*a, info));
    let remote = AddressInfo { enrolled: true, strict: true, ..AddressInfo::default() };
    let addresses = addresses.chain([("10.99.0.9".parse().expect("address"), remote)]).collect();
    Tables { addresses, ..Tables::default() }
}

fn load(world: &World, veth_hook: VethHook) -> (Datapath, LoadReport) {
    Datapath::load(DatapathConfig { veth_hook, ..world.config() }).expect("load")
}

/// The datagrams that the hooks dropped so far.
fn dropped(datapath: &Datapath) -> u64 {
    let stats = datapath.stats().expect("stats");
    stats.into_iter().find(|(name, _)| *name == "non_tcp_denied").expect("the total").1
}

/// Sends a datagram from one Pod to the other; true where it arrives, false where a hook dropped it.
fn arrives(datapath: &Datapath, from: &PodHost, to: &PodHost) -> bool {
    let address = SocketAddr::new(to.addresses[0], 0);
    let server = to.inside(move || UdpSocket::bind(address)).expect("bind");
    server.set_nonblocking(true).expect("non-blocking");
    let target = server.local_addr().expect("address");
    let before = dropped(datapath);
    from.inside(move || UdpSocket::bind("0.0.0.0:0")?.send_to(b"x", target)).expect("sent");
    until(LIMIT, "the datagram", || match server.recv(&mut [0; 8]) {
        Ok(_) => Some(true),
        Err(_) => (dropped(datapath) > before).then_some(false),
    })
}

/// One look at the attachments: everything is healthy; the ones that had to be repaired.
fn repaired(datapath: &Datapath) -> Vec<AttachmentStatus> {
    let began = Instant::now();
    let statuses = datapath.check();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(statuses.len() % 3, 1, "seven and three for each Pod: {statuses:?}");
    assert!(statuses.iter().all(|s| s.healthy && s.id != 0), "{statuses:?}");
    statuses.into_iter().filter(|s| s.problem.is_some()).collect()
}

fn names(statuses: &[AttachmentStatus]) -> Vec<&'static str> {
    let mut names: Vec<_> = statuses.iter().map(|s| s.program).collect();
    names.sort_unstable();
    names
}

#[test]
fn a_detached_cgroup_link_is_attached_again() {
    World::run(|world| {
        let pod = world.pod();
        let (datapath, _) = load(world, VethHook::Automatic);
        datapath.reconcile(&silent(&[&pod])).expect("tables");
        let enrolled = datapath.enroll(&pod.spec(SUBJECT)).expect("enrol");
        assert_eq!(bpf::connect_hooks(world.cgroup()), 1);
        bpf::detach(&world.pin("connect4"));
        assert_eq!(bpf::connect_hooks(world.cgroup()), 0);
        let statuses = repaired(&datapath);
        assert_eq!(names(&statuses), ["weft_connect4"]);
        assert_eq!((statuses[0].repairs, bpf::connect_hooks(world.cgroup())), (1, 1));
        assert_eq!(statuses[0].problem.as_deref(), Some("the link was detached"));
        pod.inside(|| TcpStream::connect("10.99.0.9:80")).expect("steered again");
        until(LIMIT, "the connection at the proxy", || enrolled.listeners.outbound[0].accept().ok());
        assert!(repaired(&datapath).is_empty(), "and that was all");

        bpf::detach(&world.pin(&format!("sk_lookup-{}", pod.uid)));
        assert_eq!(names(&repaired(&datapath)), ["weft_sk_lookup"]);
        pod.inside(|| TcpStream::connect("10.99.0.9:80")).expect("steered again");
    });
}

#[test]
fn a_filter_that_is_gone_comes_back() {
    World::run(|world| {
        let (from, to) = (world.pod(), world.pod());
        let (datapath, _) = load(world, VethHook::Filter);
        datapath.reconcile(&silent(&[&from, &to])).expect("tables");
        let _enrolled = [&from, &to].map(|p| datapath.enroll(&p.spec(SUBJECT)).expect("enrol"));
        assert!(!arrives(&datapath, &from, &to));
        let clear = || {
            tc(&format!("filter del dev {} ingress", from.veth));
            tc(&format!("qdisc del dev {} clsact", to.veth));
        };
        clear();
        assert!(arrives(&datapath, &from, &to), "nothing judges it");
        let statuses = repaired(&datapath);
        assert_eq!(names(&statuses), ["weft_from_pod", "weft_from_pod", "weft_to_pod"]);
        assert!(statuses.iter().all(|s| s.repairs == 1), "{statuses:?}");
        assert!(!arrives(&datapath, &from, &to));
        assert!(repaired(&datapath).is_empty());
    });
}

#[test]
fn a_filter_that_others_went_before_is_first_again() {
    World::run(|world| {
        let (from, to) = (world.pod(), world.pod());
        let (datapath, _) = load(world, VethHook::Filter);
        datapath.reconcile(&silent(&[&from, &to])).expect("tables");
        let _enrolled = [&from, &to].map(|p| datapath.enroll(&p.spec(SUBJECT)).expect("enrol"));
        for round in 1..=3_u64 {
            // A program that lets everything pass ("return 0" in classic BPF).
            for pod in [&from, &to] {
                for way in ["ingress", "egress"] {
                    let filter = format!("filter add dev {} {way} prio 1 handle {round} bpf da", pod.veth);
                    world::tc_with(&filter, &["bytecode", "1,6 0 0 0,"]);
                }
            }
            assert!(arrives(&datapath, &from, &to), "somebody else's filter lets it pass");
            let statuses = repaired(&datapath);
            assert_eq!(statuses.len(), 4, "{statuses:?}");
            assert!(statuses.iter().all(|s| s.repairs == round), "{statuses:?}");
            assert!(!arrives(&datapath, &from, &to));
        }
        // Ours go, theirs and the qdisc they use stay.
        datapath.remove(&from.uid).expect("remove");
        let left = tc(&format!("filter show dev {} ingress", from.veth));
        assert!(!left.contains("weft") && left.contains("handle 0x1 "), "{left}");
    });
}

#[test]
fn a_filter_behind_another_link_becomes_a_link() {
    World::run(|world| {
        let pod = world.pod();
        let (datapath, report) = load(world, VethHook::Automatic);
        let _enrolled = datapath.enroll(&pod.spec(SUBJECT)).expect("enrol");
        assert_eq!((world.pins().len(), world.records()), (7 + 1, 1), "two filters");
        let (_, program) = *report.programs.iter().find(|(name, _)| *name == "weft_to_pod").expect("loaded");
        let foreign = bpf::foreign_link(program, &pod.veth);
        let statuses = repaired(&datapath);
        assert_eq!(names(&statuses), ["weft_from_pod"]);
        assert_eq!(world.pins().len(), 7 + 2, "one of them is a link now");
        assert!(!tc(&format!("filter show dev {} ingress", pod.veth)).contains("weft"));
        assert!(tc(&format!("filter show dev {} egress", pod.veth)).contains("weft_to_pod"));
        drop(foreign);
        assert!(repaired(&datapath).is_empty(), "it stays a link");
        datapath.remove(&pod.uid).expect("remove");
        assert_eq!((world.pins().len(), world.records()), (7, 0));
        assert!(!tc(&format!("qdisc show dev {}", pod.veth)).contains("clsact"));
    });
}

#[test]
fn each_way_to_attach_judges_hands_over_and_leaves_nothing() {
    World::run(|world| {
        for (hook, links) in [(VethHook::Filter, 1), (VethHook::Link, 3), (VethHook::Automatic, 1)] {
            let (from, to) = (world.pod(), world.pod());
            let (datapath, _) = load(world, hook);
            datapath.reconcile(&silent(&[&from, &to])).expect("tables");
            let enrolled = [&from, &to].map(|p| datapath.enroll(&p.spec(SUBJECT)).expect("enrol"));
            assert_eq!(world.pins().len(), 7 + 2 * links, "{hook:?}");
            assert!(!arrives(&datapath, &from, &to), "{hook:?}");
            let ids = |datapath: &Datapath| datapath.check().iter().map(|s| s.id).collect::<HashSet<_>>();
            let before = ids(&datapath);

            let (next, _) = load(world, hook);
            let old = datapath.check();
            assert!(old.iter().all(|s| !s.healthy && s.repairs == 0), "superseded: {old:?}");
            assert!(!arrives(&next, &from, &to), "{hook:?}: never open");
            next.reconcile(&silent(&[&from, &to])).expect("tables");
            let _again = [&from, &to].map(|p| next.enroll(&p.spec(SUBJECT)).expect("enrol"));
            drop((datapath, enrolled));
            assert!(repaired(&next).is_empty());
            assert_eq!(ids(&next), before, "{hook:?}: the same links and filters");
            for pod in [&from, &to] {
                next.remove(&pod.uid).expect("remove");
                let left = tc(&format!("qdisc show dev {}", pod.veth));
                assert!(!left.contains("clsact"), "{hook:?}: {left}");
            }
            assert_eq!((world.pins().len(), world.records()), (7, 0), "{hook:?}");
        }
    });
}

#[test]
fn an_agent_that_prefers_filters_adopts_links_and_the_other_way_round() {
    World::run(|world| {
        let (from, to) = (world.pod(), world.pod());
        for (hook, links) in [(VethHook::Link, 3), (VethHook::Automatic, 3)] {
            let (datapath, _) = load(world, hook);
            datapath.reconcile(&silent(&[&from, &to])).expect("tables");
            let _enrolled = [&from, &to].map(|p| datapath.enroll(&p.spec(SUBJECT)).expect("enrol"));
            assert_eq!((world.pins().len(), world.records()), (7 + 2 * links, 0), "{hook:?}");
        }
        let (datapath, _) = load(world, VethHook::Automatic);
        for pod in [&from, &to] {
            datapath.remove(&pod.uid).expect("known by its pins alone");
        }
        assert_eq!(world.pins().len(), 7);
        for (hook, links) in [(VethHook::Filter, 1), (VethHook::Link, 3)] {
            let (datapath, _) = load(world, hook);
            let _enrolled = [&from, &to].map(|p| datapath.enroll(&p.spec(SUBJECT)).expect("enrol"));
            assert_eq!(world.pins().len(), 7 + 2 * links, "{hook:?}");
            assert!(!arrives(&datapath, &from, &to));
        }
        let left = tc(&format!("filter show dev {} ingress", from.veth));
        assert!(!left.contains("weft"), "the filter went when the link was there: {left}");
        let (datapath, _) = load(world, VethHook::Link);
        for pod in [&from, &to] {
            datapath.remove(&pod.uid).expect("known by its pins alone");
        }
        assert_eq!((world.pins().len(), world.records()), (7, 0));
    });
}

#[test]
fn uninstalling_a_live_node_leaves_nothing() {
    World::run(|world| {
        let (from, to, linked) = (world.pod(), world.pod(), world.pod());
        let (links, _) = load(world, VethHook::Link);
        let one = links.enroll(&linked.spec(SUBJECT)).expect("enrol");
        let (datapath, _) = load(world, VethHook::Automatic);
        datapath.reconcile(&silent(&[&from, &to])).expect("tables");
        let others = [&from, &to, &linked].map(|p| datapath.enroll(&p.spec(SUBJECT)).expect("enrol"));
        assert!(!arrives(&datapath, &from, &to));
        let address = SocketAddr::new(to.addresses[0], 0);
        let server = to.inside(move || TcpListener::bind(address)).expect("bind");
        let target = server.local_addr().expect("address");
        assert!(from.inside(move || TcpStream::connect(target)).is_err(), "policy refuses it");

        // The agents still run, with every link open.
        Datapath::uninstall(world.bpffs()).expect("uninstall");
        assert_eq!((world.pins().len(), world.records()), (0, 0));
        assert!(!world.bpffs().join("maps").exists());
        assert_eq!(bpf::connect_hooks(world.cgroup()), 0);
        for pod in [&from, &to, &linked] {
            assert!(!tc(&format!("qdisc show dev {}", pod.veth)).contains("clsact"));
            assert!(!tc(&format!("filter show dev {} ingress", pod.veth)).contains("weft"));
            assert_eq!(bpf::packet_hooks(&pod.veth), 0);
        }
        from.inside(move || TcpStream::connect(target)).expect("untouched");
        assert!(arrives(&datapath, &from, &to), "untouched");
        assert!(matches!(datapath.enroll(&from.spec(SUBJECT)), Err(DatapathError::Superseded)));
        assert!(datapath.check().iter().all(|s| !s.healthy && s.repairs == 0), "nothing is put back");
        assert_eq!((world.pins().len(), bpf::connect_hooks(world.cgroup())), (0, 0));
        drop((links, datapath, one, others));

        // A node that was installed anew begins from nothing.
        let (_again, report) = load(world, VethHook::Automatic);
        assert!(!report.adopted_links && report.adopted_maps.is_empty());
    });
}
