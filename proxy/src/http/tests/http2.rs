//! HTTP/2 from end to end, with the h2 crate as caller and as upstream.

use std::future::poll_fn;

use bytes::Bytes;
use h2::{
    Reason as Code, RecvStream,
    client::SendRequest,
    server::{Connection, SendResponse},
};
use http::{HeaderMap, Request, Response};

use super::*;

struct H2 {
    rig: Rig,
    caller: SendRequest<Bytes>,
    tasks: Tasks,
}

impl H2 {
    async fn new(side: Side) -> Self {
        Self::with(Rig::new(side)).await
    }

    async fn with(mut rig: Rig) -> Self {
        let io = std::mem::replace(&mut rig.client, Peer::new(duplex(1).0)).io;
        let (caller, connection) = soon(h2::client::handshake(io)).await.expect("a handshake");
        let tasks = Tasks::new();
        tasks.spawn("caller", async move {
            // Its end is seen by the streams.
            let _ = connection.await;
        });
        Self { rig, caller, tasks }
    }

    /// The upstream's streams, as they come; its connection is moved by a task of its own.
    async fn upstream(&mut self) -> mpsc::UnboundedReceiver<(Request<RecvStream>, SendResponse<Bytes>)> {
        let io = self.rig.upstream().await.io;
        let (streams_in, streams) = mpsc::unbounded_channel();
        self.tasks.spawn("upstream", async move {
            let Ok(mut connection): Result<Connection<_, Bytes>, _> = h2::server::handshake(io).await else {
                return;
            };
            while let Some(Ok(stream)) = connection.accept().await {
                let _ = streams_in.send(stream);
            }
        });
        streams
    }

    async fn caller(&self) -> SendRequest<Bytes> {
        soon(self.caller.clone().ready()).await.expect("room for a stream")
    }
}

fn get(path: &str) -> Request<()> {
    Request::builder().uri(format!("http://Web.Shop{path}")).body(()).expect("a request")
}

async fn text(body: &mut RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(data) = soon(body.data()).await {
        let data = data.expect("data");
        body.flow_control().release_capacity(data.len()).expect("capacity");
        all.extend_from_slice(&data);
    }
    all
}

#[tokio::test]
async fn streams_are_judged_one_by_one_and_share_an_upstream() {
    let mut h2 = H2::new(Side::Outbound).await;
    let mut request = get("/1?q");
    let headers = request.headers_mut();
    for (name, value) in
        [("forwarded", "for=1"), ("baggage", "a"), ("weft-flow-id", "x"), ("x-tenant", "blue")]
    {
        headers.insert(name, value.parse().expect("a value"));
    }
    let (first, _) = h2.caller().await.send_request(request, true).expect("sent");
    let (denied, _) = h2.caller().await.send_request(get("/admin"), true).expect("sent");
    let (third, _) = h2.caller().await.send_request(get("/3"), true).expect("sent");
    let denied = soon(denied).await.expect("an answer");
    assert_eq!(denied.status(), 403);
    assert_eq!(denied.headers()["weft-flow-id"], "flow-7");
    let body = text(&mut denied.into_body()).await;
    assert!(String::from_utf8_lossy(&body).contains("flow-7"));
    let mut upstream = h2.upstream().await;
    for path in ["/1?q", "/3"] {
        let (request, mut respond) = soon(upstream.recv()).await.expect("a stream");
        assert_eq!(request.uri().path_and_query().expect("a path").as_str(), path);
        assert_eq!(request.uri().authority().expect("an authority").as_str(), "Web.Shop");
        for gone in ["forwarded", "baggage", "weft-flow-id", "host"] {
            assert!(!request.headers().contains_key(gone), "{gone}");
        }
        respond.send_response(Response::new(()), true).expect("answered");
    }
    assert_eq!(soon(first).await.expect("an answer").status(), 200);
    assert_eq!(soon(third).await.expect("an answer").status(), 200);
    assert!(h2.rig.upstreams.try_recv().is_err(), "one connection is enough");
    let mut judged = h2.rig.handler.judged.lock().clone();
    judged.sort();
    assert_eq!(judged, ["GET web.shop /1?q blue", "GET web.shop /3? ", "GET web.shop /admin? "]);
    let mut statuses = Vec::new();
    for _ in 0..3 {
        let end = h2.rig.end().await;
        assert_eq!(end.protocol, "HTTP/2");
        statuses.push(end.status);
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 403]);
}

#[tokio::test]
async fn grpc_is_refused_in_its_own_words() {
    let grpc = |path: &str| {
        let mut request = get(path);
        *request.method_mut() = http::Method::POST;
        request.headers_mut().insert("content-type", "application/grpc+proto".parse().expect("a value"));
        request
    };
    let mut h2 = H2::new(Side::Inbound).await;
    let (denied, _) = h2.caller().await.send_request(grpc("/admin.Api/Do"), false).expect("sent");
    let denied = soon(denied).await.expect("an answer");
    assert_eq!(denied.status(), 200);
    assert_eq!(denied.headers()["grpc-status"], "7");
    assert_eq!(denied.headers()["content-type"], "application/grpc");
    assert_eq!(denied.headers()["grpc-message"], "weft denied this request%0Aflow: flow-7");
    assert!(denied.body().is_end_stream());
    assert_eq!(h2.rig.end().await.verdict, Verdict::Denied);

    let plan = Plan { unreachable: true, ..Plan::default() };
    let h2 = H2::with(Rig::with(Side::Outbound, plan, Limits::default())).await;
    let (refused, _) = h2.caller().await.send_request(grpc("/a.Api/Do"), false).expect("sent");
    assert_eq!(soon(refused).await.expect("an answer").headers()["grpc-status"], "14");
}

#[tokio::test]
async fn a_large_body_comes_back_with_trailers() {
    const SIZE: usize = 4 << 20;
    let mut h2 = H2::new(Side::Inbound).await;
    let mut request = get("/echo");
    *request.method_mut() = http::Method::POST;
    let (response, mut send) = h2.caller().await.send_request(request, false).expect("sent");
    let mut upstream = h2.upstream().await;
    let (request, mut respond) = soon(upstream.recv()).await.expect("a stream");
    // The answer starts long before the request ends.
    let mut back = respond.send_response(Response::new(()), false).expect("answered");
    let mut body = request.into_body();
    h2.tasks.spawn("echo", async move {
        let _ = crate::http::h2::pump::pump(&mut body, &mut back, |_| {}).await;
    });
    h2.tasks.spawn("send", async move {
        let mut left = SIZE;
        while left > 0 {
            send.reserve_capacity(left);
            let Some(Ok(room)) = poll_fn(|cx| send.poll_capacity(cx)).await else { return };
            let part = room.min(left);
            left -= part;
            let _ = send.send_data(Bytes::from(vec![7; part]), false);
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", "1".parse().expect("a value"));
        trailers.insert("weft-x", "1".parse().expect("a value"));
        let _ = send.send_trailers(trailers);
    });
    let mut body = soon(response).await.expect("an answer").into_body();
    let got = text(&mut body).await;
    assert!(got.len() == SIZE && got.iter().all(|byte| *byte == 7));
    let trailers = soon(body.trailers()).await.expect("no reset").expect("trailers");
    assert_eq!(trailers["x-sum"], "1");
    assert!(!trailers.contains_key("weft-x"));
    let end = h2.rig.end().await;
    assert_eq!((end.sent, end.received, end.reason), (SIZE as u64, SIZE as u64, Reason::None));
}

#[tokio::test]
async fn interim_answers_pass() {
    let mut h2 = H2::new(Side::Outbound).await;
    let (mut response, _) = h2.caller().await.send_request(get("/"), true).expect("sent");
    let mut upstream = h2.upstream().await;
    let (_, mut respond) = soon(upstream.recv()).await.expect("a stream");
    let interim = Response::builder().status(103).header("link", "</a>").body(()).expect("a response");
    respond.send_informational(interim).expect("sent");
    let interim = soon(poll_fn(|cx| response.poll_informational(cx))).await.expect("one").expect("no error");
    assert_eq!(interim.status(), 103);
    respond.send_response(Response::new(()), true).expect("sent");
    assert_eq!(soon(response).await.expect("an answer").status(), 200);
}

#[tokio::test]
async fn resets_are_told_to_the_other_side() {
    let mut h2 = H2::new(Side::Inbound).await;
    let (response, _) = h2.caller().await.send_request(get("/1"), true).expect("sent");
    let mut upstream = h2.upstream().await;
    let (_, mut respond) = soon(upstream.recv()).await.expect("a stream");
    respond.send_reset(Code::REFUSED_STREAM);
    let error = soon(response).await.expect_err("a reset");
    assert_eq!(error.reason(), Some(Code::REFUSED_STREAM));

    let (response, _) = h2.caller().await.send_request(get("/2"), true).expect("sent");
    let (_, mut respond) = soon(upstream.recv()).await.expect("a stream");
    let mut body = respond.send_response(Response::new(()), false).expect("answered");
    let mut answer = soon(response).await.expect("an answer").into_body();
    body.send_reset(Code::ENHANCE_YOUR_CALM);
    let error = soon(answer.data()).await.expect("an end").expect_err("a reset");
    assert_eq!(error.reason(), Some(Code::ENHANCE_YOUR_CALM));

    let (response, mut send) = h2.caller().await.send_request(get("/3"), false).expect("sent");
    let (_request, mut respond) = soon(upstream.recv()).await.expect("a stream");
    send.send_reset(Code::CANCEL);
    drop(response);
    let code = soon(poll_fn(|cx| respond.poll_reset(cx))).await.expect("a reset");
    assert_eq!(code, Code::CANCEL);
    let mut ends = Vec::new();
    for _ in 0..3 {
        let end = h2.rig.end().await;
        ends.push((end.path, end.reason));
    }
    let gone = Reason::PeerReset;
    assert_eq!(ends, [("/1".into(), gone), ("/2".into(), gone), ("/3".into(), gone)]);
}

#[tokio::test]
async fn an_upstream_that_breaks_is_502_and_replaced() {
    let mut h2 = H2::new(Side::Outbound).await;
    let (response, _) = h2.caller().await.send_request(get("/1"), true).expect("sent");
    let mut upstream = h2.rig.upstream().await;
    upstream.exactly(24).await;
    drop(upstream);
    let status = soon(response).await.expect("an answer").status().as_u16();
    assert!((502..=503).contains(&status), "{status}");
    let (response, _) = h2.caller().await.send_request(get("/2"), true).expect("sent");
    let mut upstream = h2.upstream().await;
    let (_, mut respond) = soon(upstream.recv()).await.expect("a stream");
    respond.send_response(Response::new(()), true).expect("answered");
    assert_eq!(soon(response).await.expect("an answer").status(), 200);
}

#[tokio::test]
async fn a_flood_of_resets_ends_the_connection() {
    let limits = Limits { max_resets: 5, ..Limits::default() };
    let mut h2 = H2::with(Rig::with(Side::Inbound, Plan::default(), limits)).await;
    let mut upstream = None;
    let mut closed = false;
    for _ in 0..20 {
        let Ok(mut caller) = soon(h2.caller.clone().ready()).await else {
            closed = true;
            break;
        };
        let Ok((response, mut send)) = caller.send_request(get("/"), false) else {
            closed = true;
            break;
        };
        if upstream.is_none() {
            upstream = Some(h2.upstream().await);
        }
        send.send_reset(Code::CANCEL);
        drop(response);
        // Each is counted when it ended.
        h2.rig.end().await;
    }
    assert!(closed, "twenty resets were served with a limit of five");
}

#[tokio::test]
async fn drain_says_goaway_and_finishes_the_stream() {
    let mut h2 = H2::new(Side::Inbound).await;
    let (response, _) = h2.caller().await.send_request(get("/1"), true).expect("sent");
    let mut upstream = h2.upstream().await;
    let (_, mut respond) = soon(upstream.recv()).await.expect("a stream");
    let H2 { rig, caller, tasks } = h2;
    tasks.spawn("drain", async move {
        rig.drain.drain(Duration::from_secs(5)).await;
    });
    // The connection takes no more streams once its GOAWAY arrived.
    soon(async {
        while let Ok(mut caller) = caller.clone().ready().await {
            if caller.send_request(get("/late"), true).is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    respond.send_response(Response::new(()), true).expect("answered");
    assert_eq!(soon(response).await.expect("an answer").status(), 200);
}

#[tokio::test]
async fn a_stream_that_is_no_longer_allowed_is_reset_alone() {
    let mut h2 = H2::new(Side::Inbound).await;
    let of = |tenant: &str| {
        let mut request = get("/watch");
        request.headers_mut().insert("x-tenant", tenant.parse().expect("a value"));
        request
    };
    let (revoked, _) = h2.caller().await.send_request(of("blue"), true).expect("sent");
    let mut upstream = h2.upstream().await;
    let (_, mut revoked_there) = soon(upstream.recv()).await.expect("a stream");
    let mut sending = revoked_there.send_response(Response::new(()), false).expect("answered");
    let mut body = soon(revoked).await.expect("an answer").into_body();
    let (other, _) = h2.caller().await.send_request(of("green"), true).expect("sent");
    let (_, mut other_there) = soon(upstream.recv()).await.expect("a stream");
    h2.rig.handler.revoke("blue");
    let error = soon(body.data()).await.expect("no clean end").expect_err("a reset");
    assert_eq!(error.reason(), Some(Code::CANCEL));
    let told = soon(poll_fn(|cx| sending.poll_reset(cx))).await.expect("a reset");
    assert_eq!(told, Code::CANCEL);
    let end = h2.rig.end().await;
    assert_eq!((end.status, end.verdict, end.reason), (200, Verdict::Denied, Reason::Revoked));
    other_there.send_response(Response::new(()), true).expect("answered");
    assert_eq!(soon(other).await.expect("an answer").status(), 200);
}

#[tokio::test]
async fn local_answers_name_the_flow() {
    let unreachable = Plan { unreachable: true, ..Plan::default() };
    let h2 = H2::with(Rig::with(Side::Inbound, unreachable, Limits::default())).await;
    let (response, _) = h2.caller().await.send_request(get("/"), true).expect("sent");
    let response = soon(response).await.expect("an answer");
    assert_eq!(
        (response.status().as_u16(), &response.headers()["weft-flow-id"]),
        (503, &"flow-9".parse().expect("a value"))
    );
}

#[tokio::test]
async fn answers_that_come_together_go_on_in_few_writes() {
    const COUNT: usize = 10;
    for side in [Side::Outbound, Side::Inbound] {
        let mut h2 = H2::new(side).await;
        let mut responses = Vec::new();
        for n in 0..COUNT {
            let (response, _) = h2.caller().await.send_request(get(&format!("/{n}")), true).expect("sent");
            responses.push(response);
        }
        let mut upstream = h2.upstream().await;
        let mut waiting = Vec::new();
        for _ in 0..COUNT {
            waiting.push(soon(upstream.recv()).await.expect("a stream").1);
        }
        let before = h2.rig.writes.load(Ordering::Relaxed);
        for mut respond in waiting {
            let mut body = respond.send_response(Response::new(()), false).expect("answered");
            body.send_data(vec![7; 2_048].into(), true).expect("sent");
        }
        for response in responses {
            let mut body = soon(response).await.expect("an answer").into_body();
            assert_eq!(text(&mut body).await, [7; 2_048]);
        }
        let writes = h2.rig.writes.load(Ordering::Relaxed) - before;
        assert!(writes <= COUNT / 2, "{writes} writes for {COUNT} answers");
    }
}
