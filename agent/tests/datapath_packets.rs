//! What passes beside the proxy and what does when there is none; the programs' debug lines. Needs root.

#![allow(clippy::expect_used, reason = "a test that cannot set itself up has to end")]

#[allow(dead_code, reason = "each file of tests uses a part")]
#[path = "datapath/world.rs"]
mod world;

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};
use weft_agent::datapath::{AddressInfo, Datapath, DatapathConfig, PodSpec, Tables};
use weft_core::{
    SubjectId,
    policy::kernel::{Row, RowVerdict},
    workload::{FailMode, Mode},
};
use world::{PodHost, World, bpf, until};

const CLIENT: SubjectId = SubjectId(300);
const SERVER: SubjectId = SubjectId(301);
const LIMIT: Duration = Duration::from_secs(5);

/// Tables with the two Pods, in which the client may use the server's UDP port or may not.
fn udp(client: &PodHost, server: &PodHost, port: u16, verdict: RowVerdict) -> Tables {
    let entry = |subject, policed| AddressInfo {
        subject,
        policed,
        enrolled: true,
        local: true,
        strict: true,
        ..AddressInfo::default()
    };
    let of = |pod: &PodHost, info| pod.addresses.iter().map(|a| (*a, info)).collect::<Vec<_>>();
    // Nobody may call the client: whatever reaches it is an answer.
    let addresses = of(client, entry(CLIENT, true)).into_iter().chain(of(server, entry(SERVER, true)));
    let row = Row { source: CLIENT, destination: SERVER, port, protocol: 17, verdict, policy: 1 };
    Tables { addresses: addresses.collect(), rows: vec![row], ..Tables::default() }
}

fn total(datapath: &Datapath, wanted: &str) -> u64 {
    let stats = datapath.stats().expect("stats");
    stats.into_iter().find(|(name, _)| *name == wanted).expect("the total").1
}

/// Sends a datagram; true where the receiver gets it, false where a hook dropped it.
fn passes(datapath: &Datapath, from: &UdpSocket, to: &UdpSocket) -> bool {
    let before = total(datapath, "non_tcp_denied");
    from.send_to(b"x", to.local_addr().expect("address")).expect("sent");
    until(LIMIT, "the datagram", || match to.recv(&mut [0; 8]) {
        Ok(_) => Some(true),
        Err(_) => (total(datapath, "non_tcp_denied") > before).then_some(false),
    })
}

#[test]
fn a_udp_flow_ends_with_its_permission() {
    World::run(|world| {
        let (client, server) = (world.pod(), world.pod());
        let (datapath, _) = Datapath::load(world.config()).expect("load");
        let enrol = |pod: &PodHost, subject| datapath.enroll(&pod.spec(subject)).expect("enrol");
        let _enrolled = (enrol(&client, CLIENT), enrol(&server, SERVER));
        for index in [0, 1] {
            let socket = |pod: &PodHost| {
                let address = SocketAddr::new(pod.addresses[index], 0);
                let socket = pod.inside(move || UdpSocket::bind(address)).expect("bind");
                socket.set_nonblocking(true).expect("non-blocking");
                socket
            };
            let (caller, called) = (socket(&client), socket(&server));
            let port = called.local_addr().expect("address").port();
            datapath.reconcile(&udp(&client, &server, port, RowVerdict::Allow)).expect("tables");
            assert!(!passes(&datapath, &called, &caller), "nobody has asked");
            assert!(passes(&datapath, &caller, &called), "allowed");
            assert!(passes(&datapath, &called, &caller), "the answer to it");

            let began = Instant::now();
            datapath.reconcile(&udp(&client, &server, port, RowVerdict::Deny)).expect("tables");
            assert!(!passes(&datapath, &caller, &called), "judged anew");
            assert!(passes(&datapath, &called, &caller), "the noted flow still lets answers in");
            let ended = datapath.revoke(|c| {
                (c.pod, c.client, c.server, c.protocol)
                    == (
                        Some(&server.uid),
                        caller.local_addr().expect("address"),
                        called.local_addr().expect("address"),
                        17,
                    )
            });
            assert_eq!(ended.expect("revoke"), 1, "the noted flow");
            assert!(!passes(&datapath, &called, &caller), "no answers any more");
            assert!(!passes(&datapath, &caller, &called));
            let took = began.elapsed();
            println!("a UDP flow was cut {took:?} after the change began");
            assert!(took < Duration::from_secs(1), "{took:?}");
        }
    });
}

#[test]
fn without_a_proxy_only_a_fail_open_pod_goes_on() {
    World::run(|world| {
        let (open, closed, outside) = (world.pod(), world.pod(), world.pod());
        let (datapath, _) = Datapath::load(world.config()).expect("load");
        datapath.pass(&outside.spec(CLIENT).uid, &outside.netns).expect("outside the mesh");
        let spec =
            |pod: &PodHost, fail_mode| PodSpec { mode: Mode::Permissive, fail_mode, ..pod.spec(CLIENT) };
        let enrolled = [(&open, FailMode::Open), (&closed, FailMode::Closed)]
            .map(|(pod, fail_mode)| datapath.enroll(&spec(pod, fail_mode)).expect("enrol"));
        // What is outside plays a Pod of the mesh on another node.
        let info = AddressInfo { subject: SERVER, enrolled: true, ..AddressInfo::default() };
        let own = AddressInfo { subject: CLIENT, enrolled: true, local: true, ..AddressInfo::default() };
        let own = [&open, &closed].into_iter().flat_map(|p| &p.addresses).map(|a| (*a, own));
        let addresses = outside.addresses.iter().map(|a| (*a, info)).chain(own).collect();
        datapath.reconcile(&Tables { addresses, ..Tables::default() }).expect("tables");

        let listen = |pod: &PodHost, index: usize| {
            let address = SocketAddr::new(pod.addresses[index], 0);
            let listener = pod.inside(move || TcpListener::bind(address)).expect("bind");
            listener.set_nonblocking(true).expect("non-blocking");
            (listener.local_addr().expect("address"), listener)
        };
        let dial = |pod: &PodHost, to: SocketAddr| {
            pod.inside(move || TcpStream::connect_timeout(&to, LIMIT)).map_err(|e| e.kind())
        };
        // While there is a proxy, it gets them all.
        for index in [0, 1] {
            let (remote, arrived) = listen(&outside, index);
            for (pod, enrolled) in [&open, &closed].into_iter().zip(&enrolled) {
                dial(pod, remote).expect("steered");
                until(LIMIT, "the proxy's connection", || enrolled.listeners.outbound[index].accept().ok());
            }
            assert!(arrived.accept().is_err_and(|e| e.kind() == ErrorKind::WouldBlock));
        }
        drop(enrolled);
        for index in [0, 1] {
            let (remote, arrived) = listen(&outside, index);
            let before = total(&datapath, "failed_open");
            dial(&open, remote).expect("passes without a proxy");
            let (_, peer) = until(LIMIT, "the connection", || arrived.accept().ok());
            assert_eq!(peer.ip(), open.addresses[index], "untouched");
            assert!(total(&datapath, "failed_open") > before, "and it is counted");
            assert_eq!(dial(&closed, remote).map(drop), Err(ErrorKind::ConnectionRefused));

            // From outside, in plaintext.
            let (at_open, opened) = listen(&open, index);
            let (at_closed, _kept) = listen(&closed, index);
            dial(&outside, at_open).expect("passes without a proxy");
            until(LIMIT, "the connection", || opened.accept().ok());
            assert_eq!(dial(&outside, at_closed).map(drop), Err(ErrorKind::ConnectionRefused));
        }
    });
}

/// Collects the programs' lines.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn taken(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "weft::bpf"
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[test]
fn debug_lines_appear_when_wanted_and_cost_nothing_otherwise() {
    let mut sizes = Vec::new();
    for bpf_log in [true, false] {
        World::run(|world| {
            let pod = world.pod();
            let (datapath, report) =
                Datapath::load(DatapathConfig { bpf_log, ..world.config() }).expect("load");
            let _enrolled = datapath.enroll(&pod.spec(CLIENT)).expect("enrol");
            let remote = AddressInfo { enrolled: true, strict: true, ..AddressInfo::default() };
            let addresses = [("10.99.0.9".parse().expect("address"), remote)].into();
            datapath.reconcile(&Tables { addresses, ..Tables::default() }).expect("tables");
            pod.inside(|| TcpStream::connect("10.99.0.9:8081")).expect("steered");
            let log = datapath.log();
            assert_eq!(log.is_some(), bpf_log);
            assert!(datapath.log().is_none(), "taken once");
            if let Some(log) = log {
                let lines = Lines::default();
                let _heard = tracing::subscriber::set_default(lines.clone());
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
                let line = runtime.block_on(async {
                    let mut log = std::pin::pin!(log.run());
                    let deadline = Instant::now() + LIMIT;
                    loop {
                        assert!(Instant::now() < deadline, "no line");
                        tokio::select! {
                            ended = &mut log => panic!("the log ended: {ended:?}"),
                            () = tokio::task::yield_now() => {}
                        }
                        if let Some(line) = lines.taken().into_iter().find(|l| l.starts_with("connect: ")) {
                            return line;
                        }
                    }
                });
                assert!(line.ends_with("port 8081 to the proxy"), "{line}");
            }
            let size = |id| bpf::translated(id);
            sizes.push(report.programs.iter().map(|(name, id)| (*name, size(*id))).collect::<Vec<_>>());
        });
    }
    let [on, off] = &sizes[..] else { panic!("two runs") };
    for ((name, on), (_, off)) in on.iter().zip(off) {
        println!("{name}: {on} bytes with lines, {off} without");
        assert!(off <= on, "{name}");
    }
    assert!(on.iter().zip(off).any(|(on, off)| off.1 < on.1), "the lines are gone, not only silent");
}
