//! HTTP/1 from end to end.

use super::*;

const GET: &str = "GET /a?b=c HTTP/1.1\r\nHost: Web.Shop:8080\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[tokio::test]
async fn forwards_what_was_judged() {
    let mut rig = Rig::new(Side::Outbound);
    rig.client
        .send(
            "GET http://web.shop:80/a?b=c%2Fd HTTP/1.1\r\nHost: Web.Shop\r\nX-Tenant: blue\r\nConnection: X-Drop, keep-alive\r\n\
             X-Drop: 1\r\nKeep-Alive: 5\r\nForwarded: for=1\r\nBaggage: a=b\r\nX_Forwarded_Client_Cert: x\r\n\
             Weft-Flow-Id: forged\r\nWEFT_ANY: x\r\nTE: trailers\r\nX-Kept: \x09 v \r\n\r\n",
        )
        .await;
    let mut upstream = rig.upstream().await;
    let head = upstream.head().await;
    assert_eq!(
        head,
        "GET /a?b=c%2Fd HTTP/1.1\r\nHost: Web.Shop\r\nX-Tenant: blue\r\nX-Kept: v\r\nconnection: te\r\nte: trailers\r\n\r\n"
    );
    upstream.send(OK).await;
    assert_eq!(rig.client.head().await, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n");
    assert_eq!(rig.client.exactly(2).await, b"ok");
    let end = rig.end().await;
    assert_eq!((end.method.as_str(), end.host.as_str(), end.path.as_str()), ("GET", "web.shop", "/a"));
    assert_eq!((end.query.as_str(), end.protocol, end.status), ("b=c%2Fd", "HTTP/1.1", 200));
    assert_eq!((end.sent, end.received, end.reason), (0, 2, Reason::None));
    assert_eq!(end.verdict, Verdict::Forwarded);
    assert!(end.target.is_some());
    assert_eq!(*rig.handler.judged.lock(), ["GET web.shop /a?b=c%2Fd blue"]);
}

#[tokio::test]
async fn a_header_that_connection_drops_is_not_judged() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send("GET / HTTP/1.1\r\nHost: web\r\nX-Tenant: blue\r\nConnection: x-tenant\r\n\r\n").await;
    let head = rig.upstream().await.head().await;
    assert!(!head.contains("Tenant"), "{head}");
    assert_eq!(*rig.handler.judged.lock(), ["GET web /? "]);
}

#[tokio::test]
async fn judges_each_request_of_a_connection() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send(GET).await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    upstream.send(OK).await;
    rig.client.head().await;
    rig.client.exactly(2).await;
    rig.client.send("GET /admin HTTP/1.1\r\nHost: web\r\n\r\n").await;
    let denied = rig.client.read_until("flow: flow-7\n").await;
    assert!(denied.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{denied}");
    assert!(
        denied.contains("\r\nweft-flow-id: flow-7\r\n") && denied.contains("\r\nx-why: policy\r\n"),
        "{denied}"
    );
    assert!(!denied.contains("shop/web") && !denied.contains("connection:"), "{denied}");
    // The refusal cost neither the caller's connection nor the upstream's.
    rig.client.send(GET).await;
    assert!(upstream.head().await.starts_with("GET /a?b=c HTTP/1.1\r\n"));
    upstream.send(OK).await;
    rig.client.head().await;
    assert_eq!(rig.end().await.verdict, Verdict::Forwarded);
    let end = rig.end().await;
    assert_eq!((end.verdict, end.reason, end.status), (Verdict::Denied, Reason::PolicyDenied, 403));
    assert!(end.policy.is_some());
    assert_eq!(rig.end().await.status, 200);
}

#[tokio::test]
async fn one_path_is_judged_and_forwarded() {
    for disguise in ["//admin", "/./admin", "/x/../admin", "/%61dmin", "/x/%2e%2e/admin", "/x/.%2E//admin"] {
        let mut rig = Rig::new(Side::Inbound);
        rig.client.send(format!("GET {disguise} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        assert!(rig.client.head().await.starts_with("HTTP/1.1 403 "), "{disguise}");
    }
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send("GET /x/..//%61?u=%2F/../ HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(rig.upstream().await.head().await.starts_with("GET /a?u=%2F/../ HTTP/1.1\r\n"));
    assert_eq!(*rig.handler.judged.lock(), ["GET a /a?u=%2F/../ "]);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let mut rig = Rig::new(Side::Outbound);
    rig.client.send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /admin HTTP/1.1\r\nHost: a\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut upstream = rig.upstream().await;
    assert!(upstream.head().await.starts_with("GET /1 "));
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1").await;
    assert!(rig.client.head().await.starts_with("HTTP/1.1 200 "));
    assert_eq!(rig.client.exactly(1).await, b"1");
    assert!(rig.client.read_until("flow-7\n").await.starts_with("HTTP/1.1 403 "));
    assert!(upstream.head().await.starts_with("GET /3 "));
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n3").await;
    rig.client.head().await;
    assert_eq!(rig.client.exactly(1).await, b"3");
}

#[tokio::test]
async fn chunks_and_trailers_pass_both_ways() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client
        .send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n5;x=\"y\"\r\nhello\r\n")
        .await;
    rig.client.send("0\r\nX-Sum: 1\r\nHost: evil\r\nWeft-A: b\r\n\r\n").await;
    let mut upstream = rig.upstream().await;
    assert_eq!(upstream.head().await, "POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: chunked\r\n\r\n");
    assert_eq!(upstream.read_until("0\r\nX-Sum: 1\r\n\r\n").await, "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n");
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-end\r\n\r\n3\r\nabc\r\n0\r\nx-end: 1\r\n\r\n").await;
    let head = rig.client.head().await;
    assert!(head.contains("transfer-encoding: chunked\r\n") && head.contains("Trailer: x-end\r\n"), "{head}");
    assert_eq!(rig.client.read_until("x-end: 1\r\n\r\n").await, "3\r\nabc\r\n0\r\nx-end: 1\r\n\r\n");
    let end = rig.end().await;
    assert_eq!((end.sent, end.received), (5, 3));
}

#[tokio::test]
async fn bad_chunks_are_refused() {
    let long = format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(300));
    for body in [
        "x\r\n",
        "-1\r\n",
        " 1\r\na\r\n",
        "1 \r\na\r\n",
        "1\na\r\n",
        "1\r\nab\r\n",
        "1\r\na\n0\r\n\r\n",
        "0x1\r\na\r\n",
        "fffffffffffffffff\r\n",
        "0\r\n x: y\r\n\r\n",
        "0\r\nx: y\n\r\n",
        ";a\r\n",
        "\r\n",
        "1\r\r\n",
        long.as_str(),
    ] {
        let mut rig = Rig::new(Side::Inbound);
        rig.client
            .send(format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}"))
            .await;
        let answer = rig.client.rest().await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{body:?}: {answer}");
        assert_eq!(rig.end().await.reason, Reason::ProtocolError, "{body:?}");
    }
}

#[tokio::test]
async fn expect_continue_passes() {
    let mut rig = Rig::new(Side::Outbound);
    rig.client.send("PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n").await;
    let mut upstream = rig.upstream().await;
    assert!(upstream.head().await.contains("Expect: 100-continue\r\n"));
    upstream.send("HTTP/1.1 100 Continue\r\n\r\n").await;
    assert_eq!(rig.client.head().await, "HTTP/1.1 100 Continue\r\n\r\n");
    rig.client.send("body").await;
    assert_eq!(upstream.exactly(4).await, b"body");
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(rig.client.head().await, "HTTP/1.1 204 No Content\r\n\r\n");
    let end = rig.end().await;
    assert_eq!((end.status, end.sent), (204, 4));
}

#[tokio::test]
async fn answers_without_a_body() {
    let mut rig = Rig::new(Side::Outbound);
    rig.client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n").await;
    assert_eq!(rig.client.head().await, "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n");
    rig.client.send(GET).await;
    upstream.head().await;
    upstream.send("HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n").await;
    assert_eq!(rig.client.head().await, "HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n");
    rig.client.send("HEAD /admin HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(rig.client.head().await.starts_with("HTTP/1.1 403 "));
    rig.client.send(GET).await;
    upstream.head().await;
    upstream.send(OK).await;
    assert!(rig.client.head().await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_large_body_goes_both_ways_at_once() {
    const SIZE: usize = 8 << 20;
    let mut rig = Rig::new(Side::Inbound);
    let body: Vec<u8> = (0..SIZE).map(|n| (n % 251) as u8).collect();
    let mut client = rig.client;
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {SIZE}\r\n\r\n")).await;
    let mut upstream = Peer::new(soon(rig.upstreams.recv()).await.expect("an upstream"));
    upstream.head().await;
    // The upstream answers at once and sends back what it gets: no side can hold the whole body.
    upstream.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n")).await;
    let (mut from, mut to) = tokio::io::split(upstream.io);
    let (mut read, mut write) = tokio::io::split(client.io);
    let mut back = Vec::new();
    soon(async {
        tokio::join!(
            async { write.write_all(&body).await.expect("the body goes out") },
            async { tokio::io::copy(&mut (&mut from).take(SIZE as u64), &mut to).await.expect("an echo") },
            async {
                while back.len() < SIZE {
                    assert!(read.read_buf(&mut back).await.expect("a read") > 0);
                }
            },
        )
    })
    .await;
    let at = back.windows(4).position(|part| part == b"\r\n\r\n").expect("a head") + 4;
    while back.len() < at + SIZE {
        assert!(soon(read.read_buf(&mut back)).await.expect("a read") > 0);
    }
    assert!(back[at..] == body[..]);
    let end = soon(rig.ended.recv()).await.expect("an end");
    assert_eq!((end.sent, end.received), (SIZE as u64, SIZE as u64));
}

#[tokio::test]
async fn an_early_answer_ends_the_connection_when_the_upstream_closes() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nstart").await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    upstream.send("HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    drop(upstream);
    assert!(rig.client.head().await.starts_with("HTTP/1.1 413 "));
    rig.client.send("more").await;
    assert_eq!(rig.client.rest().await, "");
    assert_eq!(rig.end().await.status, 413);
}

#[tokio::test]
async fn a_websocket_passes_after_101() {
    let mut rig = Rig::new(Side::Outbound);
    rig.client.send("GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n").await;
    let mut upstream = rig.upstream().await;
    let head = upstream.head().await;
    assert!(
        head.contains("connection: upgrade\r\nupgrade: websocket\r\n")
            && head.contains("Sec-WebSocket-Key: x"),
        "{head}"
    );
    upstream
        .send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x01\x02")
        .await;
    assert!(rig.client.head().await.contains("upgrade: websocket\r\n"));
    assert_eq!(rig.client.exactly(2).await, b"\x01\x02");
    rig.client.send(b"\0\xffping").await;
    assert_eq!(upstream.exactly(6).await, b"\0\xffping");
    rig.client.io.shutdown().await.expect("a half-close");
    assert_eq!(upstream.rest().await, "");
    upstream.send("bye").await;
    drop(upstream);
    assert_eq!(rig.client.rest().await, "bye");
    let end = rig.end().await;
    assert_eq!((end.status, end.sent, end.received), (101, 6, 5));
}

#[tokio::test]
async fn no_upgrade_leads_past_a_rule() {
    for upgrade in ["h2c", "H2C", "websocket, h2c", "TLS/1.0", "HTTP/2.0"] {
        let mut rig = Rig::new(Side::Inbound);
        rig.client
            .send(format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"))
            .await;
        let mut upstream = rig.upstream().await;
        assert_eq!(upstream.head().await, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "{upgrade}");
        upstream
            .send(format!(
                "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n\r\n"
            ))
            .await;
        assert!(rig.client.head().await.starts_with("HTTP/1.1 502 "), "{upgrade}");
    }
}

#[tokio::test]
async fn http10_is_served() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send("GET / HTTP/1.0\r\n\r\n").await;
    let mut upstream = rig.upstream().await;
    assert_eq!(upstream.head().await, "GET / HTTP/1.0\r\nconnection: close\r\n\r\n");
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n").await;
    assert_eq!(rig.client.rest().await, "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok");
}

#[tokio::test]
async fn routes_change_headers() {
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let changes = HeaderChanges {
        remove: vec!["x-old".into(), "content-length".into(), "host".into()],
        set: vec![pair("x-set", "1"), pair("transfer-encoding", "x"), pair("x-bad", "a\r\nb: c")],
        add: vec![pair("x-add", "2"), pair("Host", "b")],
    };
    let plan = Plan { request_headers: changes.clone(), response_headers: changes, ..Plan::default() };
    let mut rig = Rig::with(Side::Outbound, plan, Limits::default());
    rig.client.send("GET / HTTP/1.1\r\nHost: a\r\nX-Old: 1\r\nX-Set: 0\r\nX-Add: 1\r\n\r\n").await;
    let mut upstream = rig.upstream().await;
    assert_eq!(
        upstream.head().await,
        "GET / HTTP/1.1\r\nHost: a\r\nX-Add: 1\r\nx-set: 1\r\nx-add: 2\r\n\r\n"
    );
    upstream.send("HTTP/1.1 200 OK\r\nX-Old: 1\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(
        rig.client.head().await,
        "HTTP/1.1 200 OK\r\nx-set: 1\r\nx-add: 2\r\ncontent-length: 0\r\n\r\n"
    );
}

#[tokio::test]
async fn an_application_cannot_forge_our_answer() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send(GET).await;
    let mut upstream = rig.upstream().await;
    upstream.head().await;
    upstream.send("HTTP/1.1 403 Forbidden\r\nWeft-Flow-Id: forged\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(rig.client.head().await, "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n");
}
