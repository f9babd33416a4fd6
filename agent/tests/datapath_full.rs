//! What becomes of Pods when a map is full. Needs root.

#![allow(clippy::expect_used, reason = "a test that cannot set itself up has to end")]

#[allow(dead_code, reason = "each file of tests uses a part")]
#[path = "datapath/world.rs"]
mod world;

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use weft_agent::datapath::{AddressInfo, Datapath, PodSpec, Tables};
use weft_core::{
    SubjectId,
    workload::{FailMode, Mode},
};
use world::{PodHost, World, until};

const SOON: Duration = Duration::from_secs(10);
const SUBJECT: SubjectId = SubjectId(300);
/// What the node itself, a Pod outside the mesh and one in it need; Pods have two addresses.
const ROOM: [(&str, u32); 3] = [("PODS", 3), ("VETHS", 1), ("POD_ADDRS", 2)];

fn spec(pod: &PodHost, mode: Mode) -> PodSpec {
    PodSpec { mode, fail_mode: FailMode::Closed, ..pod.spec(SUBJECT) }
}

/// An application that serves at all addresses of its Pod.
struct Served {
    pod: PodHost,
    _listeners: Vec<TcpListener>,
    at: Vec<SocketAddr>,
}

impl Served {
    fn new(pod: PodHost) -> Self {
        let listen = |address: &IpAddr| pod.inside(|| TcpListener::bind((*address, 0))).expect("bind");
        let listeners: Vec<_> = pod.addresses.iter().map(listen).collect();
        let at = listeners.iter().map(|l| l.local_addr().expect("address")).collect();
        Self { pod, _listeners: listeners, at }
    }

    /// What another Pod gets that calls it, by each address.
    fn called(&self, from: &PodHost) -> Vec<Result<(), ErrorKind>> {
        let call = |to: &SocketAddr| {
            let connect = || TcpStream::connect_timeout(to, Duration::from_secs(5));
            from.inside(connect).map(drop).map_err(|error: io::Error| error.kind())
        };
        self.at.iter().map(call).collect()
    }

    /// Waits until it takes calls; the kernel takes a moment over the end of a link.
    fn opened(&self, from: &PodHost) {
        until(SOON, "an open Pod", || (self.called(from) == open()).then_some(()));
    }
}

fn open() -> Vec<Result<(), ErrorKind>> {
    vec![Ok(()); 2]
}

fn closed() -> Vec<Result<(), ErrorKind>> {
    vec![Err(ErrorKind::ConnectionRefused); 2]
}

#[test]
fn a_strict_pod_without_room_is_named_and_closed_until_there_is_some() {
    for (map, entries) in ROOM {
        World::run(|world| {
            let (first, outside) = (world.pod(), world.pod());
            let (strict, permissive) = (Served::new(world.pod()), Served::new(world.pod()));
            let mut config = world.config();
            config.map_sizes.insert(map.into(), entries);
            let full = |result: Result<(), String>| {
                let said = result.expect_err("there is no room");
                assert!(said.contains(map) && said.contains("--map-size"), "{said}");
            };
            {
                let (datapath, _) = Datapath::load(config.clone()).expect("load");
                let enroll =
                    |pod: &PodSpec| datapath.enroll(pod).map(drop).map_err(|error| error.to_string());
                datapath.pass(&outside.uid, &outside.netns).expect("outside the mesh");
                datapath.enroll(&spec(&first, Mode::Strict)).expect("the first");
                // The application runs already, as where a namespace becomes strict.
                assert_eq!(strict.called(&outside), open());
                for _ in 0..2 {
                    full(enroll(&spec(&strict.pod, Mode::Strict)));
                    assert_eq!(strict.called(&outside), closed(), "{map}");
                }
                full(enroll(&spec(&permissive.pod, Mode::Permissive)));
                permissive.opened(&outside);
            }
            // The agent's end opens nothing, nor does the start of the next.
            assert_eq!(strict.called(&outside), closed(), "{map}");
            let (datapath, _) = Datapath::load(config).expect("load");
            datapath.pass(&outside.uid, &outside.netns).expect("outside the mesh");
            datapath.enroll(&spec(&first, Mode::Strict)).expect("the first");
            full(datapath.enroll(&spec(&strict.pod, Mode::Strict)).map(drop).map_err(|e| e.to_string()));
            assert_eq!(strict.called(&outside), closed(), "{map}");

            datapath.remove(&first.uid).expect("room");
            let enrolled = datapath.enroll(&spec(&strict.pod, Mode::Strict)).expect("there is room");
            let info =
                AddressInfo { subject: SUBJECT, enrolled: true, local: true, ..AddressInfo::default() };
            let addresses = strict.pod.addresses.iter().map(|a| (*a, info)).collect();
            datapath.reconcile(&Tables { addresses, ..Tables::default() }).expect("tables");
            assert!(!enrolled.settled, "what was open from before is still to be ended");
            // One that leaves the mesh is open again, whether it was enrolled or only closed.
            datapath.remove(&strict.pod.uid).expect("removed");
            datapath.enroll(&spec(&first, Mode::Strict)).expect("the first");
            strict.opened(&outside);
            full(datapath.enroll(&spec(&strict.pod, Mode::Strict)).map(drop).map_err(|e| e.to_string()));
            assert_eq!(strict.called(&outside), closed(), "{map}");
            datapath.remove(&strict.pod.uid).expect("removed");
            strict.opened(&outside);
        });
    }
}
