//! An answer that breaks off is never a clean end, however HTTP frames it and whichever way it goes.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use weft_core::{
    policy::{Action, HttpRule, Source},
    service::AppProtocol,
};

use super::support::{Mesh, from_account, is_reset, soon};

/// A request with the head of its answer; what follows ends with the connection.
const CASES: [(&str, &str); 3] = [
    ("GET / HTTP/1.0\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\n"),
    ("GET / HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\n"),
    (
        "GET / HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    ),
];

/// Asks, answers half, breaks; the caller must see a reset.
async fn broken(what: &str, caller: &mut TcpStream, listener: &TcpListener, case: (&str, &str)) {
    let (request, answer) = case;
    caller.write_all(request.as_bytes()).await.expect("written");
    let (mut app, _) = soon(what, listener.accept()).await.expect("a connection");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon(what, app.read_u8()).await.expect("a request"));
    }
    app.write_all(format!("{answer}part").as_bytes()).await.expect("written");
    let mut seen = Vec::new();
    while !seen.ends_with(b"part") {
        seen.push(soon(what, caller.read_u8()).await.unwrap_or_else(|e| panic!("{what}: {e}")));
    }
    app.set_zero_linger().expect("set");
    drop(app);
    is_reset(caller).await;
}

#[tokio::test]
async fn an_application_that_fails_resets_the_caller() {
    for same_node in [false, true] {
        for protocol in [AppProtocol::Http, AppProtocol::Tcp] {
            for judged in [false, true] {
                for case in CASES {
                    let mesh = Mesh::new();
                    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
                    let there = if same_node { &a } else { &b };
                    let (client, mut web) = (mesh.pod(&a, "client"), mesh.pod(there, "web"));
                    let listener = web.listen().await;
                    let port = listener.local_addr().expect("an address").port();
                    let vip = mesh.service("web", protocol, &[(&web, port)]);
                    if judged {
                        let http = vec![HttpRule { methods: vec!["GET".into()], ..HttpRule::default() }];
                        let rule = weft_core::policy::Rule { http, ..from_account("client") };
                        mesh.police(&mut web, Action::Allow, vec![rule]);
                    }
                    let what = format!("same node {same_node}, {protocol:?}, judged {judged}, {case:?}");
                    broken(&what, &mut client.dial(vip).await, &listener, case).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn a_node_that_vanishes_resets_the_caller() {
    for protocol in [AppProtocol::Http, AppProtocol::Tcp] {
        let mesh = Mesh::new();
        let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
        let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
        let listener = web.listen().await;
        let port = listener.local_addr().expect("an address").port();
        let vip = mesh.service("web", protocol, &[(&web, port)]);
        let mut caller = client.dial(vip).await;
        caller.write_all(b"GET / HTTP/1.0\r\n\r\n").await.expect("written");
        let (mut app, _) = soon("a connection", listener.accept()).await.expect("a connection");
        app.write_all(b"HTTP/1.0 200 OK\r\n\r\npart").await.expect("written");
        let mut seen = Vec::new();
        while !seen.ends_with(b"part") {
            seen.push(soon("the part", caller.read_u8()).await.expect("a byte"));
        }
        // All that it had in hand goes at once, as with its process.
        b.tasks.join(std::time::Duration::ZERO).await;
        is_reset(&mut caller).await;
    }
}

#[tokio::test]
async fn a_plain_caller_is_reset_too() {
    for case in CASES {
        let mesh = Mesh::new();
        let node = mesh.node("node-b");
        let mut web = mesh.pod(&node, "web");
        let mut rule = from_account("client");
        rule.sources = Some(vec![Source::Unauthenticated(vec![])]);
        rule.http = vec![HttpRule { methods: vec!["GET".into()], ..HttpRule::default() }];
        mesh.police(&mut web, Action::Allow, vec![rule]);
        let shared = node.proxy.shared();
        let pod = shared.pod(&web.uid).expect("the Pod");
        let (mut outside, accepted, app) = super::support::plain(&web).await;
        let client = accepted.peer_addr().expect("an address");
        let serve = crate::inbound::plain::serve(shared, pod, accepted, client, ());
        let talk = broken("plaintext", &mut outside, &app, case);
        soon("plaintext", async { tokio::join!(serve, talk) }).await;
    }
}
