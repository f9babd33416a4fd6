//! Connections from before a Pod's enrolment, among those that are the proxy's. Needs root.

#![allow(clippy::expect_used, reason = "a test that cannot set itself up has to end")]

#[allow(dead_code, reason = "each file of tests uses a part")]
#[path = "datapath/world.rs"]
mod world;

use std::{
    collections::{BTreeSet, HashSet},
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
    time::Duration,
};

use weft_agent::datapath::{AddressInfo, Datapath, Enrolled, PodSpec, Tables};
use weft_core::{
    SubjectId, WorkloadUid,
    workload::{FailMode, Mode},
};
use weft_proxy::Family;
use world::{PodHost, World};

const SUBJECT: SubjectId = SubjectId(300);

/// Both ends of a connection.
struct Pair(TcpStream, TcpStream);

impl Pair {
    /// A connection from one Pod to another's address.
    fn new(from: &PodHost, to: &PodHost, address: IpAddr) -> Self {
        let listener = to.inside(move || TcpListener::bind((address, 0))).expect("bind");
        let target = listener.local_addr().expect("address");
        let client = from.inside(move || TcpStream::connect(target)).expect("connect");
        let (server, _) = listener.accept().expect("accept");
        // Who is called is known by its listener.
        std::mem::forget(listener);
        Self(client, server)
    }

    /// Whether bytes still pass, both ways.
    fn lives(&mut self) -> bool {
        let mut pass = |backwards: bool| {
            let (from, to) = if backwards { (&mut self.1, &mut self.0) } else { (&mut self.0, &mut self.1) };
            to.set_read_timeout(Some(Duration::from_secs(5)))?;
            from.write_all(b"x")?;
            to.read_exact(&mut [0])
        };
        pass(false).and_then(|()| pass(true)).is_ok()
    }
}

fn spec(pod: &PodHost, mode: Mode) -> PodSpec {
    PodSpec { mode, fail_mode: FailMode::Closed, ..pod.spec(SUBJECT) }
}

fn only(pod: &PodHost) -> HashSet<WorkloadUid> {
    HashSet::from([pod.uid.clone()])
}

#[test]
fn what_is_asked_for_ends_and_nothing_else() {
    World::run(|world| {
        let (pod, outside, other) = (world.pod(), world.pod(), world.pod());
        for index in [0, 1] {
            let address = |pod: &PodHost| pod.addresses[index];
            let mut incoming = Pair::new(&outside, &pod, address(&pod));
            let mut outgoing = Pair::new(&pod, &outside, address(&outside));
            let mut within = Pair::new(&pod, &pod, address(&pod));
            let loopback = if index == 0 { "127.0.0.1" } else { "::1" };
            let mut looped = Pair::new(&pod, &pod, loopback.parse().expect("address"));
            let mut foreign = Pair::new(&outside, &other, address(&other));

            let (datapath, _) = Datapath::load(world.config()).expect("load");
            datapath.pass(&outside.uid, &outside.netns).expect("outside the mesh");
            let enrolled = datapath.enroll(&spec(&pod, Mode::Strict)).expect("enrol");
            assert!(!enrolled.settled, "nobody had enrolled it");
            datapath.enroll(&spec(&other, Mode::Strict)).expect("enrol");
            datapath.reconcile(&Tables::default()).expect("tables");

            assert_eq!(datapath.end_earlier(&only(&pod), |_| false).expect("end"), 0);
            assert_eq!(datapath.end_earlier(&HashSet::new(), |_| true).expect("end"), 0);
            assert!(incoming.lives() && outgoing.lives());
            let ends = |pair: &Pair| {
                let [client, server] = [pair.0.local_addr(), pair.0.peer_addr()].map(|a| a.expect("address"));
                (client, server)
            };
            let expected = [
                (Some(pod.uid.clone()), ends(&incoming).0, ends(&incoming).1),
                (None, ends(&outgoing).0, ends(&outgoing).1),
            ];
            let mut asked = Vec::new();
            let ended = datapath.end_earlier(&only(&pod), |c| {
                assert!(c.earlier && c.protocol == 6);
                asked.push((c.pod.cloned(), c.client, c.server));
                true
            });
            assert_eq!(ended.expect("end"), 2, "{asked:?}");
            assert!(expected.iter().all(|one| asked.contains(one)), "{asked:?}");
            for stream in [&mut incoming.0, &mut outgoing.1] {
                let error = stream.read(&mut [0]).expect_err("reset");
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            }
            assert!(within.lives() && looped.lives(), "what stays within the Pod");
            assert!(foreign.lives(), "another Pod's");
            drop(enrolled);
            Datapath::uninstall(world.bpffs()).expect("uninstall");
        }
    });
}

/// A connection from outside that the proxy's listener takes, marked as the proxy marks it.
fn taken(enrolled: &Enrolled, from: &PodHost, target: SocketAddr) -> Pair {
    let mut listeners = enrolled.listeners.inbound.iter();
    let listener = listeners.find(|l| l.local_addr().is_ok_and(|a| a.is_ipv4() == target.is_ipv4()));
    let listener = listener.expect("a listener").try_clone().expect("clone");
    listener.set_nonblocking(false).expect("blocking");
    let client = from.inside(move || TcpStream::connect(target)).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    listener.set_nonblocking(true).expect("non-blocking");
    let server = marked(enrolled, server);
    Pair(client, server)
}

fn marked(enrolled: &Enrolled, socket: TcpStream) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        socket.set_nonblocking(true).expect("non-blocking");
        let socket = tokio::net::TcpStream::from_std(socket).expect("tokio");
        enrolled.net.accepted(&socket);
        let socket = socket.into_std().expect("std");
        socket.set_nonblocking(false).expect("blocking");
        socket
    })
}

/// A connection that the proxy dials with the Pod's own address.
fn dialled(enrolled: &Enrolled, to: &PodHost, address: IpAddr) -> Pair {
    let listener = to.inside(move || TcpListener::bind((address, 0))).expect("bind");
    let target = listener.local_addr().expect("address");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let client = runtime.block_on(async {
        let socket = enrolled.net.socket(Family::of(target), None).expect("a socket");
        let stream = socket.connect(target).await.expect("connect").into_std().expect("std");
        stream.set_nonblocking(false).expect("blocking");
        stream
    });
    let (server, _) = listener.accept().expect("accept");
    Pair(client, server)
}

#[test]
fn the_proxys_connections_are_spared_whichever_agent_made_them() {
    World::run(|world| {
        let (pod, outside) = (world.pod(), world.pod());
        let (old, _) = Datapath::load(world.config()).expect("load");
        old.pass(&outside.uid, &outside.netns).expect("outside the mesh");
        let enrolled = old.enroll(&spec(&pod, Mode::Permissive)).expect("enrol");
        let info = AddressInfo { subject: SUBJECT, enrolled: true, local: true, ..AddressInfo::default() };
        let addresses = pod.addresses.iter().map(|a| (*a, info)).collect();
        old.reconcile(&Tables { addresses, ..Tables::default() }).expect("tables");
        let mut pairs = Vec::new();
        for index in [0, 1] {
            pairs.push(taken(&enrolled, &outside, SocketAddr::new(pod.addresses[index], 80)));
            pairs.push(dialled(&enrolled, &outside, outside.addresses[index]));
        }
        assert_eq!(old.end_earlier(&only(&pod), |_| true).expect("end"), 0);
        assert!(pairs.iter_mut().all(Pair::lives));

        // The next agent takes over, then the Pod becomes strict: the old one's connections are its own to end.
        let (new, _) = Datapath::load(world.config()).expect("take over");
        let again = new.enroll(&spec(&pod, Mode::Permissive)).expect("enrol");
        assert!(!again.settled);
        new.update(&pod.uid, SUBJECT, Mode::Strict, FailMode::Closed).expect("update");
        assert_eq!(new.end_earlier(&only(&pod), |_| true).expect("end"), 0);
        assert!(pairs.iter_mut().all(Pair::lives));
        new.settled(&only(&pod)).expect("noted");
        let again = new.enroll(&spec(&pod, Mode::Strict)).expect("enrol anew");
        assert!(again.settled, "an agent that comes back finds nothing from before");
    });
}

/// Strict from the enrolment on, or by a later change: whoever dies before it has ended what was open leaves that to the
/// next agent, however often; and who did it, to nobody.
#[test]
fn an_agent_that_died_before_the_reset_leaves_it_to_the_next() {
    World::run(|world| {
        for first in [Mode::Strict, Mode::Permissive] {
            let (pod, outside) = (world.pod(), world.pod());
            let mut open = Pair::new(&pod, &outside, outside.addresses[0]);
            {
                let (dies, _) = Datapath::load(world.config()).expect("load");
                dies.pass(&outside.uid, &outside.netns).expect("outside the mesh");
                dies.enroll(&spec(&pod, first)).expect("enrol");
                dies.update(&pod.uid, SUBJECT, Mode::Strict, FailMode::Closed).expect("strict");
            }
            {
                let (dies, _) = Datapath::load(world.config()).expect("load");
                assert!(!dies.enroll(&spec(&pod, Mode::Strict)).expect("enrol").settled, "{first:?}");
                let renamed = SubjectId(SUBJECT.0 + 1);
                dies.update(&pod.uid, renamed, Mode::Strict, FailMode::Closed).expect("another subject");
            }
            assert!(open.lives());
            let (ends, _) = Datapath::load(world.config()).expect("load");
            assert!(!ends.enroll(&spec(&pod, Mode::Strict)).expect("enrol").settled, "{first:?}");
            assert_eq!(ends.end_earlier(&only(&pod), |_| true).expect("end"), 1);
            assert!(!open.lives());
            ends.settled(&only(&pod)).expect("noted");
            drop(ends);
            let (next, _) = Datapath::load(world.config()).expect("load");
            assert!(next.enroll(&spec(&pod, Mode::Strict)).expect("enrol").settled, "{first:?}");
            next.remove(&pod.uid).expect("remove");
        }
    });
}

#[test]
fn the_kubelets_connections_are_spared() {
    World::run(|world| {
        let pod = world.pod();
        let (datapath, _) = Datapath::load(world.config()).expect("load");
        for address in pod.addresses.clone() {
            let listener = pod.inside(move || TcpListener::bind((address, 0))).expect("bind");
            // From the node itself.
            let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
            let mut probe = Pair(client, listener.accept().expect("accept").0);
            datapath.enroll(&spec(&pod, Mode::Strict)).expect("enrol");
            let group = world.cgroup().join("agent");
            let group = std::fs::metadata(group).expect("the cgroup of this test").ino();
            datapath.exempt(&BTreeSet::from([group])).expect("exempt");
            assert_eq!(datapath.end_earlier(&only(&pod), |_| true).expect("end"), 0);
            assert!(probe.lives());
            datapath.exempt(&BTreeSet::new()).expect("exempt");
            assert_eq!(datapath.end_earlier(&only(&pod), |_| true).expect("end"), 1);
            assert!(!probe.lives());
            datapath.remove(&pod.uid).expect("remove");
        }
    });
}
