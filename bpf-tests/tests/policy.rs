//! One policy, three readers: the interpreter, the rows compiled from it, and the real object over those rows.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{io::ErrorKind, net::SocketAddr};

use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use weft_bpf_tests::{
    enrolled::Enrolled,
    packet::{Body, Packet},
    tables::{FAMILIES, Family, Maps, OWN, PEER, addr},
    test_run::{PASS, run},
};
use weft_core::{
    MeshState, SubjectId,
    policy::{
        Action,
        eval::{self, Access, Caller, Outcome},
        kernel::{self, KernelPolicy, RowVerdict},
    },
    testing::{
        NODE,
        generate::{CALLERS, Case, Flow, From, SERVER, case},
        outside_subject, policy, row_verdict, state, workload,
    },
    workload::Mode,
};
use weft_ebpf_common::{
    Pod,
    codes::{info, kind, map, pod, program, proto},
};

#[path = "shared/rows.rs"]
mod rows;

const SETS: usize = 2_500;
const FLOWS: usize = 4;
/// Every so manieth set goes into the real maps.
const SAMPLE: usize = 5;

/// The interpreter's answer.
fn judge(state: &MeshState, flow: &Flow) -> Outcome {
    let pod = |name: &str| state.workload(&name.into()).unwrap();
    let caller = match flow.from {
        From::Pod(caller, _) => Caller::Authenticated(&pod(CALLERS[caller].0).identity),
        From::Outside(ip) => Caller::Unauthenticated(ip),
    };
    let access = Access { caller, destination: pod(SERVER.0), port: flow.port, protocol: flow.protocol };
    eval::judge(state, &access).outcome
}

/// The answer of the rows, read as the kernel reads them.
fn by_rows(state: &MeshState, compiled: &KernelPolicy, mode: Mode, flow: &Flow) -> Outcome {
    let source = match flow.from {
        From::Pod(caller, _) => SubjectId(CALLERS[caller].1),
        From::Outside(ip) => outside_subject(compiled, ip),
    };
    if !kernel::policed(state.workload(&SERVER.0.into()).unwrap()) {
        let open = matches!(flow.from, From::Pod(..)) || mode != Mode::Strict;
        return if open { Outcome::Allow } else { Outcome::Deny };
    }
    match row_verdict(compiled, source, SubjectId(SERVER.1), flow.port, flow.protocol) {
        RowVerdict::Allow | RowVerdict::AllowPlaintext => Outcome::Allow,
        RowVerdict::Deny => Outcome::Deny,
        RowVerdict::Proxy => Outcome::JudgeHttp,
    }
}

/// The real object, with the tables of one policy set at a time.
struct Kernel {
    world: Enrolled,
    loaded: KernelPolicy,
    sport: u16,
}

impl Kernel {
    fn new() -> Self {
        Self { world: Enrolled::new(pod::PERMISSIVE).unwrap(), loaded: KernelPolicy::default(), sport: 1_024 }
    }

    fn maps(&mut self) -> Maps<'_> {
        self.world.maps()
    }

    /// Replaces the tables by those of this set.
    fn load(&mut self, state: &MeshState, case: &Case, compiled: &KernelPolicy) {
        let old = std::mem::replace(&mut self.loaded, compiled.clone());
        let mut maps = self.maps();
        rows::remove(&mut maps, &old);
        rows::insert(&mut maps, compiled);
        let mut flags = info::LOCAL | info::SHORTCUT_OK;
        if case.mode == Mode::Strict {
            flags |= info::STRICT;
        }
        if kernel::policed(state.workload(&SERVER.0.into()).unwrap()) {
            flags |= info::POLICED;
        }
        maps.describe_both(|family| family.peer, SERVER.1, flags).unwrap();
    }

    /// Makes the Pod of the hooks one of the callers.
    fn become_caller(&mut self, caller: usize) {
        let subject = CALLERS[caller].1;
        let row = Pod { subject, ..self.world.row };
        let mut maps = self.maps();
        maps.set(map::PODS, row.cookie, row).unwrap();
        maps.set(map::VETHS, 1_u32, row).unwrap();
        maps.describe_both(|family| family.own, subject, info::LOCAL).unwrap();
    }

    /// Makes the Pod behind interface 1 the server.
    fn become_server(&mut self, mode: Mode) {
        let flags = if mode == Mode::Strict { pod::STRICT } else { pod::PERMISSIVE };
        let [four, six] = FAMILIES.map(|family| addr(family.peer));
        let row = Pod { ip4: four, ip6: six, subject: SERVER.1, flags, ifindex: 1, ..Pod::default() };
        self.maps().set(map::VETHS, 1_u32, row).unwrap();
    }

    /// Whether a packet of the flow passes: where it leaves its Pod (if it leaves one), and where it enters.
    fn packet(&mut self, mode: Mode, flow: &Flow) -> Vec<bool> {
        self.sport += 1;
        let family = family(flow);
        let body = match flow.protocol {
            proto::UDP => Body::Udp(self.sport, flow.port),
            proto::ICMP | proto::ICMP6 => Body::Icmp(8, 128, self.sport),
            other => Body::Other(other),
        };
        let src = if let From::Outside(ip) = flow.from { ip } else { family.own };
        let frame = Packet::new(src, family.peer, body).frame();
        let mut passed = Vec::new();
        if let From::Pod(caller, _) = flow.from {
            self.become_caller(caller);
            passed.push(run(&self.world.attached.bpf, program::FROM_POD, &frame).unwrap() == PASS);
        }
        self.become_server(mode);
        passed.push(run(&self.world.attached.bpf, program::TO_POD, &frame).unwrap() == PASS);
        passed
    }

    /// Connects for real: refused, past the proxy (there is no route to the server, so it ends there), or to it.
    fn connect(&mut self, caller: usize, flow: &Flow) -> Outcome {
        self.become_caller(caller);
        let family = family(flow);
        match self.world.dial(SocketAddr::new(family.peer, flow.port)) {
            Ok(_stream) => {
                let (accepted, _) = self.world.listener(family).accept().unwrap();
                let meta = self.maps().meta(&accepted).unwrap();
                assert_eq!((meta.kind, meta.addr), (kind::ACCEPTED_OUT, addr(family.peer)), "{flow:?}");
                Outcome::JudgeHttp
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Outcome::Deny,
            Err(error) if error.kind() == ErrorKind::NetworkUnreachable => Outcome::Allow,
            Err(error) => panic!("{flow:?}: {error}"),
        }
    }
}

fn family(flow: &Flow) -> &'static Family {
    &FAMILIES[usize::from(flow.is_v6())]
}

/// How often each outcome was seen: a run in which everything is refused proves nothing.
#[derive(Debug, Default)]
struct Tally {
    allow: usize,
    deny: usize,
    http: usize,
}

impl Tally {
    fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Allow => self.allow += 1,
            Outcome::Deny => self.deny += 1,
            Outcome::JudgeHttp => self.http += 1,
        }
    }

    fn total(&self) -> usize {
        self.allow + self.deny + self.http
    }
}

#[test]
fn the_interpreter_the_rows_and_the_kernel_agree() {
    let mut random = TestRunner::deterministic();
    assert_eq!(SERVER.1, PEER, "the real maps describe the server at the other Pod's addresses");
    let strategy = case(FLOWS);
    let mut kernel = Kernel::new();
    let (mut host, mut packets, mut connects) = (Tally::default(), Tally::default(), Tally::default());
    for set in 0..SETS {
        let case = strategy.new_tree(&mut random).unwrap().current();
        let state = case.mesh();
        let compiled = kernel::compile(&state, NODE);
        let wanted: Vec<_> = case.flows.iter().map(|flow| judge(&state, flow)).collect();
        for (flow, &want) in case.flows.iter().zip(&wanted) {
            host.add(want);
            let got = by_rows(&state, &compiled, case.mode, flow);
            assert_eq!(got, want, "set {set}, rows, {flow:?} of {case:#?}");
        }
        if !set.is_multiple_of(SAMPLE) {
            continue;
        }
        kernel.load(&state, &case, &compiled);
        for (flow, &want) in case.flows.iter().zip(&wanted) {
            match flow.from {
                From::Pod(caller, _) if flow.protocol == proto::TCP => {
                    connects.add(want);
                    let got = kernel.connect(caller, flow);
                    assert_eq!(got, want, "set {set}, connect, {flow:?} of {case:#?}");
                }
                // What enters by TCP from outside the mesh is the listener choice's to judge.
                From::Outside(_) if flow.protocol == proto::TCP => {}
                _ => {
                    packets.add(want);
                    // Only the proxy judges HTTP, and it carries TCP only.
                    let want = want == Outcome::Allow;
                    for got in kernel.packet(case.mode, flow) {
                        assert_eq!(got, want, "set {set}, packet, {flow:?} of {case:#?}");
                    }
                }
            }
        }
        kernel.maps().events().unwrap();
    }
    println!("host {host:?}, packets {packets:?}, connects {connects:?}");
    assert_eq!(host.total(), SETS * FLOWS);
    assert!(packets.total() >= 500 && packets.allow >= 100 && packets.deny >= 100, "{packets:?}");
    assert!(connects.total() >= 100 && connects.allow >= 10 && connects.deny >= 10);
    assert!(connects.http >= 10, "{connects:?}");
}

/// Two Pods with one service account, of which a label puts one under a policy: each has its own verdict.
#[test]
fn two_pods_of_one_account_are_judged_by_their_own_policies() {
    let (plain, canary) = (302, 303);
    let mut twin = workload("web", canary, Mode::Strict, &["p"]);
    twin.uid = "canary".into();
    let pods =
        vec![workload("caller", OWN, Mode::Permissive, &[]), workload("web", plain, Mode::Strict, &[]), twin];
    assert_eq!(pods[1].identity, pods[2].identity);
    // An ALLOW that names nobody.
    let compiled = kernel::compile(&state(pods, vec![policy("p", Action::Allow, vec![])]), NODE);

    let mut world = Enrolled::new(pod::PERMISSIVE).unwrap();
    let row = world.row;
    let mut maps = world.maps();
    rows::insert(&mut maps, &compiled);
    maps.set(map::VETHS, 1_u32, row).unwrap();
    let flags = info::LOCAL | info::SHORTCUT_OK | info::STRICT;
    maps.describe_both(|family| family.peer, plain, flags).unwrap();
    maps.describe_both(|family| family.world, canary, flags | info::POLICED).unwrap();
    for family in &FAMILIES {
        for (to, subject, allowed) in [(family.peer, plain, true), (family.world, canary, false)] {
            let dialled = world.dial(SocketAddr::new(to, 80)).unwrap_err().kind();
            let want = if allowed { ErrorKind::NetworkUnreachable } else { ErrorKind::ConnectionRefused };
            assert_eq!(dialled, want, "{to}");
            let frame = Packet::new(family.own, to, Body::Udp(4_000, 53)).frame();
            let left = run(&world.attached.bpf, program::FROM_POD, &frame).unwrap() == PASS;
            assert_eq!(left, allowed, "{to}");
            let told = world.maps().events().unwrap();
            assert!(told.len() == 2 && told.iter().all(|told| told.dst_subject == subject), "{told:?}");
        }
    }
}
