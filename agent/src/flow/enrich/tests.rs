use std::task::{Context, Poll, Waker};

use weft_proxy::connections::Entry;

use super::*;
use crate::{
    flow::{convert::tests::request, store},
    testing,
};

fn enricher() -> Enricher {
    let (sender, state) = watch::channel(Arc::new(testing::state()));
    // The value outlives its sender.
    drop(sender);
    Enricher::new(FlowStore::new(64), state, &mut Registry::default())
}

fn redirected(connection: u64, subject: u32) -> KernelFlow {
    KernelFlow {
        time: SystemTime::now(),
        connection,
        cgroup: 77,
        reporter: Reporter::KernelSource,
        verdict: KernelVerdict::Redirected,
        reason: Reason::None,
        source: "10.1.1.1:40000".parse().unwrap(),
        destination: "10.1.2.1:8080".parse().unwrap(),
        protocol: 6,
        source_subject: SubjectId(subject),
        destination_subject: SubjectId(301),
        policy: None,
    }
}

fn of_source(connection: u64) -> FlowRecord {
    FlowRecord { connection, reporter: Reporter::ProxySource, ..request("/", 200) }
}

fn flows(e: &Enricher) -> Vec<Arc<StoredFlow>> {
    let flow = |(_, entry)| match entry {
        store::Entry::Flow(flow) => Some(flow),
        store::Entry::Lost { .. } => None,
    };
    e.store().read(0, 1000).entries.into_iter().filter_map(flow).collect()
}

#[tokio::test]
async fn the_configuration_decides_what_is_logged() {
    let base = testing::state();
    let (sender, state) = watch::channel(Arc::new(base.clone()));
    let e = Enricher::new(FlowStore::new(64), state, &mut Registry::default());
    let (to, from) = tokio::io::duplex(4096);
    let (_trigger, drain) = weft_runtime::drain::channel();
    e.log(Format::Text, to, &Tasks::new(), drain);
    e.record(request("/off", 403));
    let mut config = base.config().unwrap().as_ref().clone();
    config.telemetry.access_log = weft_core::config::AccessLog::Errors;
    let mut delta = testing::delta([]);
    delta.full = false;
    delta.upserted = vec![weft_core::Resource::Config(Arc::new(config))];
    sender.send_replace(Arc::new(base.apply(&delta)));
    e.record(request("/good", 200));
    e.record(request("/refused", 403));
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(from));
    let line = lines.next_line().await.unwrap().unwrap();
    assert!(line.contains("DENIED policy-denied") && line.contains("GET /refused 403"), "{line}");
    assert_eq!(flows(&e).len(), 3);
}

#[test]
fn kernel_and_proxy_make_one_flow_in_either_order() {
    let e = enricher();
    e.kernel([redirected(1, 300)]);
    e.record(of_source(1));
    e.record(of_source(2));
    e.kernel([redirected(2, 300)]);
    e.expire(Instant::now() + JOIN_WAIT * 2);
    let flows = flows(&e);
    assert_eq!(flows.len(), 2);
    assert_eq!(flows[0].cgroup, 77);
    assert_eq!(e.counters.joined.get(), 2);
    assert_eq!((e.mismatches(), e.counters.unjoined.get()), (0, 0));
}

#[test]
fn differing_identities_are_counted_once_a_connection() {
    let e = enricher();
    // The kernel took the caller for web, the proxy for client.
    e.kernel([redirected(1, 301)]);
    e.record(of_source(1));
    e.record(of_source(1));
    assert_eq!(e.mismatches(), 1);
}

#[test]
fn differing_identities_close_the_connection_in_either_order() {
    for kernel_first in [true, false] {
        let e = enricher();
        let live = Connections::default();
        e.close_in(live.clone());
        let register = |connection| {
            live.register(Entry {
                connection: Some(connection),
                source: None,
                destination: None,
                credentials: None,
                validity: None,
                judged: None,
            })
        };
        let (mut wrong, mut right) = (register(1), register(2));
        let says = |kernel: bool| match kernel {
            // The kernel took the caller for web, the proxy for client.
            true => e.kernel([redirected(1, 301)]),
            false => e.record(of_source(1)),
        };
        says(kernel_first);
        assert_eq!(live.len(), 2, "one side alone says nothing");
        says(!kernel_first);
        e.kernel([redirected(2, 300)]);
        e.record(of_source(2));
        assert_eq!((live.len(), e.mismatches()), (1, 1));
        let cx = &mut Context::from_waker(Waker::noop());
        assert_eq!(wrong.poll_cut(cx), Poll::Ready(Reason::IdentityMismatch));
        assert_eq!(right.poll_cut(cx), Poll::Pending);
    }
}

#[test]
fn a_redirect_without_a_word_from_the_proxy_is_a_flow() {
    let e = enricher();
    e.kernel([redirected(1, 300)]);
    e.expire(Instant::now());
    assert!(flows(&e).is_empty());
    e.expire(Instant::now() + JOIN_WAIT);
    let flows = flows(&e);
    assert!(flows[0].redirected);
    assert_eq!(flows[0].record.source.identity.as_ref().unwrap().path(), "/ns/shop/sa/client");
}

#[test]
fn a_forged_address_never_takes_the_name_of_its_owner() {
    let e = enricher();
    let forged = KernelFlow {
        verdict: KernelVerdict::Denied,
        reason: Reason::InvalidSource,
        // web's address, from client's namespace.
        source: "10.1.2.1:1".parse().unwrap(),
        ..redirected(0, 300)
    };
    e.kernel([forged]);
    let flows = flows(&e);
    let source = &flows[0].record.source;
    assert_eq!(source.identity.as_ref().unwrap().path(), "/ns/shop/sa/client");
    // The only Pod of the subject that the kernel saw, not the owner of the address.
    assert_eq!(source.pod.as_ref().unwrap().name.as_ref(), "client-abc");
}

#[test]
fn names_are_completed_but_never_identities() {
    let e = enricher();
    let mut record = request("/", 200);
    record.source.pod = None;
    record.source.owner = None;
    record.source.identity = None;
    e.record(record);
    let flows = flows(&e);
    assert_eq!(flows[0].record.source.pod.as_ref().unwrap().to_string(), "shop/client-abc");
    assert_eq!(flows[0].record.source.identity, None);
}

#[test]
fn memory_is_bounded() {
    let e = enricher();
    for connection in 1..=(MAX_CONNECTIONS as u64 + 100) {
        e.kernel([redirected(connection, 300)]);
    }
    let join = e.join.lock();
    assert_eq!(join.seen.len(), MAX_CONNECTIONS);
    assert_eq!(join.waiting.len(), MAX_CONNECTIONS);
    assert_eq!(e.counters.unjoined.get(), 100);
}
