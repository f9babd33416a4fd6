//! A peer that misbehaves, played by the test: it goes away, says nothing, or never answers.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use http::{Request, Response};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use weft_core::{
    Workload,
    flow::{FlowRecord, Reason},
};

use super::support::{Mesh, Node, Pod, is_reset, soon};
use crate::ProxyConfig;

pub(super) type Server = Connection<TlsStream<TcpStream>, Bytes>;

pub(super) struct Ghost {
    pub(super) workload: Workload,
    pub(super) listener: TcpListener,
    acceptor: TlsAcceptor,
}

/// A client's node, the client, and a peer without a proxy.
pub(super) fn stage(change: impl FnOnce(&mut ProxyConfig)) -> (Mesh, Node, Pod, Ghost) {
    let mesh = Mesh::new();
    let node = mesh.node_with("node-a", change);
    let client = mesh.pod(&node, "client");
    let ghost = Ghost::new(&mesh, "web");
    (mesh, node, client, ghost)
}

impl Ghost {
    pub(super) fn new(mesh: &Mesh, account: &str) -> Self {
        let (workload, listener) = mesh.ghost(account);
        listener.set_nonblocking(true).expect("set");
        let credentials = Mesh::credentials(&mesh.ca, &workload.identity);
        let acceptor = TlsAcceptor::from(credentials.server_config());
        let listener = TcpListener::from_std(listener).expect("a listener");
        Self { workload, listener, acceptor }
    }

    pub(super) fn app(&self) -> std::net::SocketAddr {
        (self.workload.addresses[0], 8080).into()
    }

    pub(super) async fn accept(&self) -> Server {
        let (socket, _) = soon("a tunnel", self.listener.accept()).await.expect("a connection");
        self.serve(socket).await
    }

    pub(super) async fn serve(&self, socket: TcpStream) -> Server {
        let tls = soon("TLS", self.acceptor.accept(socket)).await.expect("TLS");
        soon("HTTP/2", h2::server::handshake(tls)).await.expect("HTTP/2")
    }
}

pub(super) async fn next(server: &mut Server) -> (Request<h2::RecvStream>, SendResponse<Bytes>) {
    soon("a CONNECT", server.accept()).await.expect("a CONNECT").expect("a CONNECT")
}

fn took_long(limit: Duration) -> impl Fn(&FlowRecord) -> bool {
    move |record| record.reason == Reason::Timeout && record.duration >= limit
}

#[tokio::test]
async fn a_connect_that_was_not_processed_goes_to_another_tunnel() {
    let (_mesh, _node, client, ghost) = stage(|_| {});
    let _stream = client.dial(ghost.app()).await;
    let mut first = ghost.accept().await;
    // Says goodbye before it has looked at any stream.
    first.abrupt_shutdown(h2::Reason::NO_ERROR);
    while soon("the goodbye", first.accept()).await.is_some_and(|r| r.is_ok()) {}
    drop(first);
    let mut second = ghost.accept().await;
    let (request, mut respond) = next(&mut second).await;
    assert_eq!(request.method(), http::Method::CONNECT);
    respond.send_response(Response::new(()), false).expect("answered");
}

#[tokio::test]
async fn a_refused_connect_is_sent_again_and_a_reset_one_is_not() {
    let (_mesh, node, client, ghost) = stage(|_| {});
    let mut stream = client.dial(ghost.app()).await;
    let mut first = ghost.accept().await;
    let (_, mut respond) = next(&mut first).await;
    respond.send_reset(h2::Reason::REFUSED_STREAM);
    let again = async {
        // The old connection is moved on, so that its frames go out.
        tokio::select! {
            server = ghost.accept() => server,
            _ = first.accept() => panic!("the refused CONNECT came again on the same tunnel"),
        }
    };
    let mut second = again.await;
    let (_, mut respond) = next(&mut second).await;
    respond.send_reset(h2::Reason::INTERNAL_ERROR);
    let refused = async {
        tokio::select! {
            () = is_reset(&mut stream) => {}
            more = second.accept() => panic!("it came again: {more:?}"),
            _ = ghost.accept() => panic!("it came again on another tunnel"),
        }
    };
    refused.await;
    node.records.find("the failure", |r| r.reason == Reason::PeerReset).await;
}

#[tokio::test]
async fn what_is_under_way_outlives_the_goodbye() {
    let (_mesh, _node, client, ghost) = stage(|_| {});
    let mut stream = client.dial(ghost.app()).await;
    let mut first = ghost.accept().await;
    let (_request, mut respond) = next(&mut first).await;
    let mut body = respond.send_response(Response::new(()), false).expect("answered");
    first.graceful_shutdown();
    // What crosses the goodbye on its way is refused, and so may be sent again.
    let mut live = std::pin::pin!(async {
        while let Some(Ok((_, mut late))) = first.accept().await {
            late.send_reset(h2::Reason::REFUSED_STREAM);
        }
    });
    let another = async {
        let _other = client.dial(ghost.app()).await;
        ghost.accept().await
    };
    tokio::select! {
        _server = another => {}
        () = &mut live => panic!("the tunnel ended under its stream"),
    }
    body.send_data(Bytes::from_static(b"still"), false).expect("the stream is open");
    let mut seen = [0; 5];
    tokio::select! {
        read = soon("a word", stream.read_exact(&mut seen)) => assert_eq!(read.expect("it goes on"), 5),
        () = &mut live => panic!("the tunnel ended under its stream"),
    }
    assert_eq!(&seen, b"still");
}

#[tokio::test]
async fn a_peer_that_answers_no_connect_is_given_up() {
    let limit = Duration::from_millis(100);
    let (_mesh, node, client, ghost) = stage(|c| c.tunnel.answer = limit);
    let mut stream = client.dial(ghost.app()).await;
    let mut server = ghost.accept().await;
    let (_request, _respond) = next(&mut server).await;
    is_reset(&mut stream).await;
    node.records.find("the timeout", took_long(limit)).await;
}

#[tokio::test]
async fn a_peer_without_a_handshake_is_given_up() {
    let limit = Duration::from_millis(100);
    let (_mesh, node, client, ghost) = stage(|c| c.tunnel.handshake = limit);
    let mut stream = client.dial(ghost.app()).await;
    let (_silent, _) = soon("a connection", ghost.listener.accept()).await.expect("a connection");
    is_reset(&mut stream).await;
    node.records.find("the timeout", took_long(limit)).await;
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_given_up() {
    let brief = Duration::from_millis(50);
    let (_mesh, node, client, ghost) =
        stage(|c| (c.tunnel.ping_interval, c.tunnel.ping_timeout) = (brief, brief));
    let mut stream = client.dial(ghost.app()).await;
    let mut server = ghost.accept().await;
    let (_request, mut respond) = next(&mut server).await;
    let _body = respond.send_response(Response::new(()), false).expect("answered");
    // Sends the answer, and from then on reads and writes nothing.
    let _ = tokio::time::timeout(Duration::from_millis(10), server.accept()).await;
    is_reset(&mut stream).await;
    node.records.find("the end", |r| r.reason == Reason::PeerReset).await;
}

#[tokio::test]
async fn a_full_queue_is_given_up() {
    let limit = Duration::from_millis(100);
    let mesh = Mesh::new();
    let node = mesh.node_with("node-a", |c| (c.tunnel.connect, c.connect_timeout) = (limit, limit));
    let client = mesh.pod(&node, "client");
    let (mut ghost, listener) = mesh.ghost("web");
    drop(listener);
    // Towards the tunnel, and towards an application outside the mesh.
    for enrolled in [true, false] {
        let port = if enrolled { mesh.tunnel_port() } else { 0 };
        let socket = super::support::new_socket(ghost.addresses[0]).expect("a socket");
        socket.set_reuseaddr(true).expect("set");
        socket.bind((ghost.addresses[0], port).into()).expect("bound");
        let full = socket.listen(0).expect("a listener");
        let address = full.local_addr().expect("an address");
        // The queue takes one; who comes then gets no answer.
        let _queued = TcpStream::connect(address).await.expect("queued");
        if !enrolled {
            ghost.mode = weft_core::workload::Mode::Disabled;
            mesh.apply(vec![weft_core::Resource::Workload(Arc::new(ghost.clone()))], vec![]);
        }
        let dialled = if enrolled { (ghost.addresses[0], 8080).into() } else { address };
        is_reset(&mut client.dial(dialled).await).await;
        node.records.find("the timeout", |r| took_long(limit)(r) && r.destination.address == dialled).await;
    }
}

#[tokio::test]
async fn an_idle_tunnel_is_closed() {
    let (_mesh, node, client, ghost) = stage(|c| c.tunnel.idle = Duration::from_millis(50));
    let stream = client.dial(ghost.app()).await;
    let mut server = ghost.accept().await;
    let (_request, respond) = next(&mut server).await;
    drop((stream, respond));
    soon("the end", async { while server.accept().await.is_some_and(|r| r.is_ok()) {} }).await;
    let pod = node.proxy.shared().pod(&client.uid).expect("the Pod");
    let pool = pod.pool();
    assert_eq!(pool.connections(), 0);
}
