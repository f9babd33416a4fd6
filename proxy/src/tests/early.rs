//! What an application says before its connection is answered.

use std::io::Write as _;

use bytes::Bytes;
use http::Response;
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use weft_core::{flow::Reason, service::AppProtocol};

use super::{
    goaway::{Ghost, Server, next, stage},
    support::{Mesh, Pod, address, endpoint, is_reset, soon},
};

/// Dials, and says this before the proxy has accepted.
fn dial_saying(client: &Pod, address: std::net::SocketAddr, words: &[u8]) -> TcpStream {
    let stream = client.dial_unaccepted(address);
    let said = (&*SockRef::from(&stream)).write(words).expect("room in the socket");
    assert_eq!(said, words.len());
    stream
}

/// What comes of a CONNECT's body until there is this much.
async fn heard(server: &mut Server, body: &mut h2::RecvStream, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < length {
        let data = tokio::select! {
            data = soon("data", body.data()) => data.expect("more").expect("data"),
            _ = server.accept() => panic!("another CONNECT, or the end"),
        };
        body.flow_control().release_capacity(data.len()).expect("credit");
        all.extend_from_slice(&data);
    }
    all
}

#[tokio::test]
async fn it_comes_before_the_answer_and_once() {
    let (_mesh, node, client, ghost) = stage(|_| {});
    // More than goes along at once: the rest follows the answer.
    let words: Vec<u8> = (0..10_000_u32).map(|n| n as u8).collect();
    let mut stream = dial_saying(&client, ghost.app(), &words);
    let mut server = ghost.accept().await;
    let (request, mut respond) = next(&mut server).await;
    let mut body = request.into_body();
    let first = heard(&mut server, &mut body, 4096).await;
    assert_eq!(first, words[..4096], "before any answer");
    let mut answer = respond.send_response(Response::new(()), false).expect("answered");
    let rest = heard(&mut server, &mut body, words.len() - 4096).await;
    assert_eq!(rest, words[4096..]);
    stream.write_all(b"more").await.expect("written");
    stream.shutdown().await.expect("ended");
    assert_eq!(heard(&mut server, &mut body, 4).await, b"more");
    answer.send_data(Bytes::from_static(b"well"), true).expect("the stream is open");
    let mut back = Vec::new();
    tokio::select! {
        read = soon("the answer", stream.read_to_end(&mut back)) => assert_eq!(read.expect("an end"), 4),
        _ = server.accept() => panic!("another CONNECT, or the end"),
    }
    node.records.find("all bytes", |r| r.sent == 10_004 && r.received == 4).await;
}

#[tokio::test]
async fn a_refused_stream_takes_it_to_another_tunnel() {
    let (_mesh, _node, client, ghost) = stage(|_| {});
    let _stream = dial_saying(&client, ghost.app(), b"hello");
    let mut first = ghost.accept().await;
    let (_, mut respond) = next(&mut first).await;
    respond.send_reset(h2::Reason::REFUSED_STREAM);
    let mut second = tokio::select! {
        server = ghost.accept() => server,
        _ = first.accept() => panic!("the refused CONNECT came again on the same tunnel"),
    };
    let (request, _respond) = next(&mut second).await;
    assert_eq!(heard(&mut second, &mut request.into_body(), 5).await, b"hello");
}

#[tokio::test]
async fn a_tunnel_that_breaks_may_have_passed_it_on() {
    let (_mesh, node, client, ghost) = stage(|_| {});
    let mut stream = dial_saying(&client, ghost.app(), b"hello");
    let mut server = ghost.accept().await;
    let (request, _respond) = next(&mut server).await;
    heard(&mut server, &mut request.into_body(), 5).await;
    drop(server);
    tokio::select! {
        () = is_reset(&mut stream) => {}
        _ = ghost.accept() => panic!("it was said again"),
    }
    node.records.find("the failure", |r| r.reason == Reason::PeerReset).await;
}

/// A Service of two peers, and which of them was dialled first.
async fn two(mesh: &Mesh, client: &Pod, ghosts: &[Ghost; 2]) -> (TcpStream, usize, Server) {
    let endpoints = ghosts.iter().map(|g| endpoint(g.workload.addresses[0], &g.workload.uid, 8080)).collect();
    let service = mesh.service_of(address(), "pair", AppProtocol::Tcp, endpoints);
    let stream = dial_saying(client, service, b"hello");
    let (chosen, server) = tokio::select! {
        server = ghosts[0].accept() => (0, server),
        server = ghosts[1].accept() => (1, server),
    };
    (stream, chosen, server)
}

#[tokio::test]
async fn another_endpoint_hears_it_where_the_first_could_not() {
    let (mesh, _node, client, web) = stage(|_| {});
    let ghosts = [web, Ghost::new(&mesh, "other")];
    let (_stream, chosen, mut server) = two(&mesh, &client, &ghosts).await;
    let (_, mut respond) = next(&mut server).await;
    let unavailable = Response::builder().status(503).body(()).expect("an answer");
    respond.send_response(unavailable, true).expect("answered");
    let mut second = tokio::select! {
        server = ghosts[1 - chosen].accept() => server,
        _ = server.accept() => panic!("the same endpoint was asked again"),
    };
    let (request, _respond) = next(&mut second).await;
    assert_eq!(heard(&mut second, &mut request.into_body(), 5).await, b"hello");
}

#[tokio::test]
async fn no_other_endpoint_hears_it_where_the_first_may_have() {
    let (mesh, _node, client, web) = stage(|_| {});
    let ghosts = [web, Ghost::new(&mesh, "other")];
    let (mut stream, chosen, mut server) = two(&mesh, &client, &ghosts).await;
    let (_request, mut respond) = next(&mut server).await;
    respond.send_reset(h2::Reason::INTERNAL_ERROR);
    tokio::select! {
        () = is_reset(&mut stream) => {}
        _ = ghosts[1 - chosen].accept() => panic!("it was said again"),
        _ = server.accept() => panic!("it was said again"),
    }
}

#[tokio::test]
async fn an_application_that_is_gone_asks_nobody() {
    let (_mesh, node, client, ghost) = stage(|_| {});
    let stream = client.dial(ghost.app()).await;
    let (socket, _) = soon("a tunnel", ghost.listener.accept()).await.expect("a connection");
    stream.set_zero_linger().expect("set");
    drop(stream);
    let mut server = ghost.serve(socket).await;
    tokio::select! {
        _record = node.records.find("the end", |r| r.reason == Reason::PeerReset) => {}
        asked = server.accept() => panic!("a CONNECT for nobody: {asked:?}"),
    }
}
