//! What only the proxy may say of a caller or of the mesh: an application that says it is not heard.

use super::*;
use crate::http::PREFACE;

use super::abuse::{frame, literals};

/// Names, as HTTP/1 may spell them; HTTP/2 has them in lower case.
const NAMES: &[&str] = &[
    "Forwarded",
    "forwarded",
    "FORWARDED",
    "Baggage",
    "X-Forwarded-Client-Cert",
    "x_forwarded_client_cert",
    "X-Forwarded_Client-Cert",
    "Weft-Flow-Id",
    "weft-connection",
    "WEFT_ANY",
    "weft-",
];

/// A name that passes, to see that others do.
const KEPT: &str = "x-kept";

#[tokio::test]
async fn http1_requests_and_trailers_lose_them() {
    for name in NAMES {
        for side in [Side::Outbound, Side::Inbound] {
            let mut rig = Rig::new(side);
            let request = format!(
                "POST / HTTP/1.1\r\nHost: web\r\n{name}: forged\r\n{KEPT}: 1\r\n{name}: twice\r\n\
                 Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n{name}: forged\r\n{KEPT}: 2\r\n\r\n"
            );
            rig.client.send(request).await;
            let mut upstream = rig.upstream().await;
            let head = upstream.head().await;
            let trailers = upstream.head().await;
            for part in [&head, &trailers] {
                assert!(!part.to_ascii_lowercase().contains(&name.to_ascii_lowercase()), "{name}: {part}");
                assert!(part.contains(KEPT), "{name}: {part}");
            }
        }
    }
}

#[tokio::test]
async fn http1_answers_of_applications_lose_them() {
    for name in NAMES {
        let mut rig = Rig::new(Side::Inbound);
        rig.client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        let mut upstream = rig.upstream().await;
        upstream.head().await;
        upstream
            .send(format!("HTTP/1.1 200 OK\r\n{name}: forged\r\n{KEPT}: 1\r\nContent-Length: 0\r\n\r\n"))
            .await;
        let head = rig.client.head().await;
        assert!(!head.to_ascii_lowercase().contains(&name.to_ascii_lowercase()), "{name}: {head}");
        assert!(head.contains(KEPT), "{name}: {head}");
    }
}

#[tokio::test]
async fn http2_requests_and_trailers_lose_them() {
    for name in NAMES {
        let name = name.to_ascii_lowercase();
        for side in [Side::Outbound, Side::Inbound] {
            let mut rig = Rig::new(side);
            rig.client.send(PREFACE).await;
            rig.client.send(frame(4, 0, 0, &[])).await;
            let fields = [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", "/"),
                (":authority", "web"),
                (&*name, "forged"),
                (KEPT, "1"),
                (&*name, "twice"),
            ];
            rig.client.send(frame(1, 4, 1, &literals(&fields))).await;
            rig.client.send(frame(1, 4 | 1, 1, &literals(&[(&*name, "forged"), (KEPT, "2")]))).await;
            let io = rig.upstream().await.io;
            let mut connection = soon(h2::server::handshake(io)).await.expect("a handshake");
            let (request, _respond) = soon(connection.accept()).await.expect("a stream").expect("a stream");
            assert!(!request.headers().contains_key(&*name), "{name}: {:?}", request.headers());
            assert!(request.headers().contains_key(KEPT));
            let mut body = request.into_body();
            let trailers = soon(async {
                tokio::select! {
                    trailers = async { while body.data().await.is_some() {} body.trailers().await } => trailers,
                    _ = async { while connection.accept().await.is_some() {} std::future::pending::<()>().await } => unreachable!(),
                }
            });
            let trailers = trailers.await.expect("trailers").expect("trailers");
            assert!(!trailers.contains_key(&*name) && trailers.contains_key(KEPT), "{name}: {trailers:?}");
        }
    }
}
