//! HTTP across the seam: routes at the source, judgement at the destination.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use weft_core::{
    NamespacedName, SubjectId,
    flow::{Reason, Reporter, Verdict},
    policy::{Action, HttpRule},
    service::AppProtocol,
};
use weft_runtime::Tasks;

use super::support::{Mesh, Pod, from_account, soon};

/// An application that answers every request with `body` and closes.
async fn app(pod: &Pod, body: &'static str) -> u16 {
    let listener = pod.listen().await;
    let port = listener.local_addr().expect("an address").port();
    Tasks::new().spawn("app", async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => break,
                }
            }
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    port
}

async fn get(mut stream: TcpStream, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut answer = String::new();
    soon("an answer", stream.read_to_string(&mut answer)).await.expect("a clean end");
    answer
}

async fn story(same_node: bool) {
    let mesh = Mesh::new();
    let a = mesh.node("node-a");
    let b = if same_node { None } else { Some(mesh.node("node-b")) };
    let there = b.as_ref().unwrap_or(&a);
    let (client, mut web) = (mesh.pod(&a, "client"), mesh.pod(there, "web"));
    let port = app(&web, "hello").await;
    let vip = mesh.service("web", AppProtocol::Http, &[(&web, port)]);
    let mut rule = from_account("client");
    rule.http = vec![HttpRule { methods: vec![Arc::from("GET")], ..HttpRule::default() }];
    mesh.police(&mut web, Action::Allow, vec![rule.clone()]);
    let answer = get(client.dial(vip).await, "/catalog").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"), "{answer}");
    for (node, reporter) in [(&a, Reporter::ProxySource), (there, Reporter::ProxyDestination)] {
        let record = node.records.find("the request", |r| r.http.is_some() && r.reporter == reporter).await;
        let http = record.http.expect("a request");
        assert_eq!(
            (http.method.as_str(), http.url.as_str(), http.status),
            ("GET", "http://web/catalog", 200)
        );
        assert_eq!(record.source.identity.as_ref(), Some(&client.workload.identity));
        assert_eq!(record.destination.pod.as_ref(), Some(&web.workload.name));
    }

    rule.http = vec![HttpRule { methods: vec![Arc::from("POST")], ..HttpRule::default() }];
    mesh.police(&mut web, Action::Allow, vec![rule]);
    let answer = get(client.dial(vip).await, "/catalog").await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("weft-flow-id: "), "{answer}");
    let denied = there.records.find("the denial", |r| r.http.is_some() && r.verdict == Verdict::Denied).await;
    assert_eq!(denied.reason, Reason::PolicyDenied);
}

#[tokio::test]
async fn requests_are_judged_at_the_other_node() {
    story(false).await;
}

#[tokio::test]
async fn requests_are_judged_on_the_same_node() {
    story(true).await;
}

async fn revocation(same_node: bool) {
    let mesh = Mesh::new();
    let a = mesh.node("node-a");
    let b = if same_node { None } else { Some(mesh.node("node-b")) };
    let there = b.as_ref().unwrap_or(&a);
    let (client, mut web) = (mesh.pod(&a, "client"), mesh.pod(there, "web"));
    let listener = web.listen().await;
    let port = listener.local_addr().expect("an address").port();
    let vip = mesh.service("web", AppProtocol::Http, &[(&web, port)]);
    let mut rule = from_account("client");
    rule.http = vec![HttpRule { methods: vec![Arc::from("GET")], ..HttpRule::default() }];
    mesh.police(&mut web, Action::Allow, vec![rule.clone()]);
    let mut caller = client.dial(vip).await;
    caller.write_all(b"GET /events HTTP/1.1\r\nhost: web\r\n\r\n").await.expect("written");
    let (mut app, _) = soon("a connection", listener.accept()).await.expect("a connection");
    app.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        .await
        .expect("written");
    let mut answer = String::new();
    while !answer.ends_with("one\r\n") {
        answer.push(char::from(soon("an event", caller.read_u8()).await.expect("an event")));
    }
    // The connection as a whole stays a matter of its requests: only the request is no longer allowed.
    let changed = std::time::Instant::now();
    rule.http = vec![HttpRule { methods: vec![Arc::from("POST")], ..HttpRule::default() }];
    mesh.police(&mut web, Action::Allow, vec![rule]);
    let mut rest = Vec::new();
    // A reset and an end without the last chunk both tell the caller that it was cut.
    let _ = soon("the cut", caller.read_to_end(&mut rest)).await;
    assert!(changed.elapsed().as_secs() < 1, "{:?}", changed.elapsed());
    assert_eq!(String::from_utf8_lossy(&rest), "", "nothing may follow");
    let record = there
        .records
        .find("the revocation", |r| r.http.is_some() && r.reporter == Reporter::ProxyDestination)
        .await;
    assert_eq!((record.reason, record.verdict), (Reason::Revoked, Verdict::Denied));
}

#[tokio::test]
async fn a_request_under_way_is_cut_at_the_other_node() {
    revocation(false).await;
}

#[tokio::test]
async fn a_request_under_way_is_cut_on_the_same_node() {
    revocation(true).await;
}

#[tokio::test]
async fn a_service_without_endpoints_answers_503() {
    let mesh = Mesh::new();
    let a = mesh.node("node-a");
    let client = mesh.pod(&a, "client");
    let vip = mesh.service("web", AppProtocol::Http, &[]);
    let answer = get(client.dial(vip).await, "/").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    let record = a.records.find("the request", |r| r.http.is_some()).await;
    assert_eq!(record.reason, Reason::NoEndpoint);
    assert_eq!(record.service, Some((NamespacedName::new("shop", "web"), 80)));
    let opened = a.records.find("the connection's opening", |r| r.opening).await;
    assert_eq!(opened.destination.subject, SubjectId::UNKNOWN, "a Service is not the world");
}
