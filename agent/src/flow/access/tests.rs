use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncBufReadExt as _, BufReader, DuplexStream, Lines};
use weft_core::{SubjectId, flow::Reason};
use weft_runtime::drain;

use super::*;
use crate::flow::convert::tests::{request, stored};

fn of(record: FlowRecord) -> Arc<StoredFlow> {
    Arc::new(stored(record))
}

fn text_of(record: FlowRecord) -> String {
    let mut out = String::new();
    line(&stored(record), &Format::Text, &mut out);
    out
}

#[test]
fn a_request_as_text() {
    assert_eq!(
        text_of(request("/catalog?q=1", 200)),
        "2023-11-14T22:13:20Z shop/client (shop/client) -> shop/web:8080 (shop/web) FORWARDED by shop/web-callers \
         mtls(X25519MLKEM768) GET /catalog?q=1 200 5.00ms [proxy-destination]\n"
    );
    assert!(text_of(request("/", 403)).contains("DENIED policy-denied by shop/web-callers"));
}

#[test]
fn an_address_that_nobody_described() {
    let mut record =
        FlowRecord { http: None, tls: Tls::None, policy: None, service: None, ..request("/", 200) };
    record.destination = Peer {
        address: "[fd00::1]:443".parse().unwrap(),
        pod: None,
        owner: None,
        identity: None,
        subject: SubjectId::UNKNOWN,
    };
    let line = text_of(record);
    assert!(line.contains("-> [fd00::1]:443 FORWARDED plaintext tcp 10B out 20B in 5.00ms"), "{line}");
}

#[test]
fn a_connection_to_a_service_whose_requests_are_logged_themselves() {
    let mut record =
        FlowRecord { http: None, tls: Tls::None, policy: None, sent: 0, received: 0, ..request("/", 200) };
    record.destination.pod = None;
    let line = text_of(record);
    assert!(line.contains("-> shop/web:80 (service) FORWARDED plaintext tcp closed 5.00ms"), "{line}");
}

#[test]
fn what_a_peer_sends_stays_within_its_line() {
    let line = text_of(request("/a\n\u{1b}[31m\u{202e}b", 200));
    assert!(line.contains(r"/a\u{a}\u{1b}[31m\u{202e}b"), "{line}");
    assert_eq!(line.matches('\n').count(), 1);
    assert!(text_of(request(&format!("/{}", "x".repeat(100_000)), 200)).len() < MAX_FIELD + 300);
}

#[test]
fn a_request_as_json() {
    let mut out = String::new();
    line(&stored(request("/a\nb", 403)), &Format::Json { node: "node-b".into() }, &mut out);
    assert_eq!(out.matches('\n').count(), 1, "{out}");
    let object: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(object["node"], "node-b");
    assert_eq!((&object["verdict"], &object["reason"]), (&"DENIED".into(), &"policy-denied".into()));
    assert_eq!(object["source"]["identity"], "spiffe://cluster.local/ns/shop/sa/client");
    assert_eq!(
        (&object["http"]["status"], &object["http"]["url"]),
        (&403.into(), &"http://web.shop/a\nb".into())
    );
    assert_eq!(object["service"], "shop/web:80");
}

#[test]
fn which_flows_are_logged() {
    let good = stored(request("/", 200));
    let refused = stored(request("/", 403));
    let opening = stored(FlowRecord { opening: true, http: None, ..request("/", 200) });
    let kernel = stored(FlowRecord { opening: true, reporter: Reporter::KernelSource, ..request("/", 200) });
    let broken = stored(FlowRecord { verdict: Verdict::Error, reason: Reason::Timeout, ..request("/", 504) });
    let chosen = |level| [&good, &refused, &opening, &kernel, &broken].map(|f| wanted(f, level));
    assert_eq!(chosen(Level::Off), [false; 5]);
    assert_eq!(chosen(Level::Errors), [false, true, false, false, true]);
    assert_eq!(chosen(Level::All), [true, true, false, true, true]);
}

fn lines(from: DuplexStream) -> Lines<BufReader<DuplexStream>> {
    BufReader::new(from).lines()
}

#[tokio::test]
async fn the_rest_is_written_at_the_end() {
    let (to, from) = tokio::io::duplex(64);
    let (trigger, drain) = drain::channel();
    let dropped = Counter::default();
    let log = AccessLog::start(Format::Text, to, dropped.clone(), &Tasks::new(), drain);
    for n in 0..10 {
        log.offer(&of(request(&format!("/{n}"), 200)), Level::All);
        log.offer(&of(request("/not", 200)), Level::Errors);
    }
    trigger.drain(Duration::from_secs(10)).await;
    let mut lines = lines(from);
    for n in 0..10 {
        let line = lines.next_line().await.unwrap().unwrap();
        assert!(line.contains(&format!("GET /{n} 200")), "{line}");
    }
    assert_eq!(lines.next_line().await.unwrap(), None);
    assert_eq!(dropped.get(), 0);
}

#[tokio::test]
async fn nobody_waits_for_a_reader_that_stalls() {
    let (to, from) = tokio::io::duplex(16);
    let (_trigger, drain) = drain::channel();
    let dropped = Counter::default();
    let log = AccessLog::start(Format::Text, to, dropped.clone(), &Tasks::new(), drain);
    let flow = of(request("/", 200));
    // Nothing runs meanwhile in this single thread: what exceeds the queue is dropped.
    for _ in 0..QUEUE + 7 {
        log.offer(&flow, Level::All);
    }
    assert_eq!(dropped.get(), 7);
    assert!(lines(from).next_line().await.unwrap().is_some());
}

struct Closed;

impl AsyncWrite for Closed {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn after_an_error_flows_are_counted_as_dropped() {
    let (_trigger, drain) = drain::channel();
    let dropped = Counter::default();
    let tasks = Tasks::new();
    let log = AccessLog::start(Format::Text, Closed, dropped.clone(), &tasks, drain);
    let flow = of(request("/", 200));
    log.offer(&flow, Level::All);
    log.queue.closed().await;
    log.offer(&flow, Level::All);
    assert_eq!(dropped.get(), 1);
}
