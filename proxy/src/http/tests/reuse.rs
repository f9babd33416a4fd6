//! Upstreams that break, kept connections, callers that go, timeouts, drain.

use super::*;

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

async fn one_exchange(rig: &mut Rig) -> Peer {
    rig.client.send(GET).await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    rig.client.head().await;
    rig.end().await;
    upstream
}

#[tokio::test]
async fn bad_answers_are_502() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        "HTTP/1.1 99 OK\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
        "SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "HTTP/1.1 200",
        "",
    ] {
        let mut rig = Rig::new(Side::Outbound);
        rig.client.send(GET).await;
        let mut upstream = rig.upstream().await;
        upstream.head().await;
        upstream.send(answer).await;
        drop(upstream);
        let head = rig.client.head().await;
        assert!(head.starts_with("HTTP/1.1 502 "), "{answer:?}: {head}");
        let end = rig.end().await;
        assert_eq!((end.status, end.verdict), (502, Verdict::Error), "{answer:?}");
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_never_ends_cleanly() {
    for (answer, whole) in [
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "0\r\n\r\n"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", "abcde"),
    ] {
        let mut rig = Rig::new(Side::Inbound);
        rig.client.send(GET).await;
        let mut upstream = rig.upstream().await;
        upstream.head().await;
        upstream.send(answer).await;
        drop(upstream);
        let got = rig.client.rest().await;
        assert!(!got.ends_with(whole), "{got}");
        let end = rig.end().await;
        assert_eq!(end.verdict, Verdict::Error, "{answer:?}");
    }
}

#[tokio::test]
async fn a_body_that_ends_with_the_upstream_is_chunked_for_the_caller() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send(GET).await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    upstream.send("HTTP/1.1 200 OK\r\n\r\nabc").await;
    drop(upstream);
    assert!(rig.client.head().await.contains("transfer-encoding: chunked"));
    assert_eq!(rig.client.read_until("0\r\n\r\n").await, "3\r\nabc\r\n0\r\n\r\n");
    // The caller's connection goes on, with a new upstream.
    one_exchange(&mut rig).await;
}

#[tokio::test]
async fn a_kept_upstream_that_closed_is_replaced() {
    let mut rig = Rig::new(Side::Outbound);
    drop(one_exchange(&mut rig).await);
    one_exchange(&mut rig).await;
}

#[tokio::test]
async fn a_kept_upstream_that_closes_on_the_request_is_tried_once_more() {
    let mut rig = Rig::new(Side::Outbound);
    let mut upstream = one_exchange(&mut rig).await;
    rig.client.send(GET).await;
    upstream.head().await;
    drop(upstream);
    let mut second = rig.upstream().await;
    second.head().await;
    second.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert!(rig.client.head().await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_request_that_may_have_had_an_effect_is_not_sent_twice() {
    for request in [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        "PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
    ] {
        let mut rig = Rig::new(Side::Outbound);
        let mut upstream = one_exchange(&mut rig).await;
        rig.client.send(request).await;
        upstream.head().await;
        drop(upstream);
        assert!(rig.client.head().await.starts_with("HTTP/1.1 502 "), "{request}");
        assert!(rig.upstreams.try_recv().is_err(), "{request}");
    }
}

#[tokio::test]
async fn a_caller_that_goes_cancels_the_upstream() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send(GET).await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    drop(std::mem::replace(&mut rig.client, Peer::new(duplex(1).0)));
    assert_eq!(upstream.rest().await, "");
    let end = rig.end().await;
    assert_eq!((end.status, end.reason), (0, Reason::PeerReset));
}

#[tokio::test]
async fn a_cut_connection_still_reports() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send(GET).await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    rig.task.abort();
    assert_eq!(rig.end().await.reason, Reason::Revoked);
    assert_eq!(upstream.rest().await, "");
}

#[tokio::test]
async fn an_unreachable_upstream_is_503() {
    let plan = Plan { unreachable: true, ..Plan::default() };
    let mut rig = Rig::with(Side::Outbound, plan, Limits::default());
    rig.client.send(GET).await;
    assert!(rig.client.head().await.starts_with("HTTP/1.1 503 "));
    assert_eq!(rig.end().await.reason, Reason::ConnectFailure);
}

#[tokio::test]
async fn timeouts_are_504_408_and_closes() {
    let short = Duration::from_millis(30);
    let plan = Plan { timeout: Some(short), ..Plan::default() };
    let mut rig = Rig::with(Side::Outbound, plan, Limits::default());
    rig.client.send(GET).await;
    let _silent = rig.upstream().await;
    assert!(rig.client.rest().await.starts_with("HTTP/1.1 504 "));
    assert_eq!(rig.end().await.reason, Reason::Timeout);

    let limits = Limits { stall_timeout: short, ..Limits::default() };
    let mut rig = Rig::with(Side::Inbound, Plan::default(), limits);
    rig.client.send(GET).await;
    let _silent = rig.upstream().await;
    assert!(rig.client.rest().await.starts_with("HTTP/1.1 504 "));

    let limits = Limits { head_timeout: short, ..Limits::default() };
    let mut rig = Rig::with(Side::Inbound, Plan::default(), limits.clone());
    rig.client.send("GET / HTTP/1.1\r\n").await;
    assert!(rig.client.rest().await.starts_with("HTTP/1.1 408 "));
    let mut silent = Rig::with(Side::Inbound, Plan::default(), limits);
    assert_eq!(silent.client.rest().await, "");
    assert_eq!(silent.end().await.reason, Reason::Timeout);

    let limits = Limits { idle_timeout: short, ..Limits::default() };
    let mut rig = Rig::with(Side::Inbound, Plan::default(), limits);
    one_exchange(&mut rig).await;
    assert_eq!(rig.client.rest().await, "");
    assert!(rig.ended.try_recv().is_err(), "an idle end is no request");
}

#[tokio::test]
async fn drain_finishes_the_request_and_closes() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send(GET).await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    let Rig { mut client, drain, .. } = rig;
    let tasks = Tasks::new();
    let (began, drained) = (tokio::sync::oneshot::channel(), Duration::from_secs(5));
    tasks.spawn("drain", async move {
        let _ = began.0.send(());
        drain.drain(drained).await;
    });
    began.1.await.expect("the drain begins");
    tokio::task::yield_now().await;
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let answer = client.rest().await;
    assert_eq!(answer, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok");
}

#[tokio::test]
async fn a_stream_that_is_no_longer_allowed_is_cut() {
    let get = |tenant| format!("GET /events HTTP/1.1\r\nHost: a\r\nX-Tenant: {tenant}\r\n");
    let upgrade = "Connection: upgrade\r\nUpgrade: websocket\r\n";
    let switched = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    let events = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n";
    for (more, answer, status) in [("", events, 200), (upgrade, switched, 101), ("", "", 0)] {
        let mut rig = Rig::new(Side::Inbound);
        rig.client.send(format!("{}{more}\r\n", get("blue"))).await;
        let mut upstream = rig.upstream().await;
        upstream.head().await;
        upstream.send(answer).await;
        let seen = if answer.is_empty() { String::new() } else { rig.client.head().await };
        // A change that leaves it alone, and one that does not.
        rig.handler.revoke("green");
        rig.handler.revoke("blue");
        let rest = rig.client.rest().await;
        assert!(!rest.ends_with("0\r\n\r\n"), "{seen:?} {rest:?}");
        assert_eq!(upstream.rest().await, "", "the application sees the end too");
        let end = rig.end().await;
        assert_eq!((end.status, end.verdict, end.reason), (status, Verdict::Denied, Reason::Revoked));
    }
}

#[tokio::test]
async fn a_stream_that_is_still_allowed_goes_on() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send("GET /events HTTP/1.1\r\nHost: a\r\nX-Tenant: blue\r\n\r\n").await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n").await;
    rig.client.read_until("one\r\n").await;
    rig.handler.revoke("green");
    upstream.send("3\r\ntwo\r\n0\r\n\r\n").await;
    rig.client.read_until("two\r\n0\r\n\r\n").await;
    assert_eq!(rig.end().await.reason, Reason::None);
}

#[tokio::test]
async fn local_answers_name_the_flow() {
    let brief = Duration::from_millis(20);
    let impatient = Limits { head_timeout: brief, ..Limits::default() };
    let slow = Plan { timeout: Some(brief), ..Plan::default() };
    let unreachable = Plan { unreachable: true, ..Plan::default() };
    for (status, request, plan, limits) in [
        (400, "GET / HTTP/1.1\r\n\r\n", Plan::default(), Limits::default()),
        (408, "GET / HTTP/1.1\r\n", Plan::default(), impatient),
        (502, GET, Plan::default(), Limits::default()),
        (503, GET, unreachable, Limits::default()),
        (504, GET, slow, Limits::default()),
    ] {
        let mut rig = Rig::with(Side::Outbound, plan, limits);
        rig.client.send(request).await;
        // Held where the answer is waited for in vain.
        let _upstream = match status {
            502 | 504 => Some(rig.upstream().await),
            _ => None,
        };
        let _upstream = _upstream.filter(|_| status == 504);
        let answer = rig.client.head().await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(answer.contains("\r\nweft-flow-id: flow-9\r\n"), "{answer}");
    }
}
