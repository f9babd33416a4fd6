//! Both ends over real TLS, against each other and against the h2 library.

use std::{sync::LazyLock, time::Duration};

use bytes::Bytes;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
    task::AbortHandle,
};
use weft_runtime::Tasks;

use super::*;
use crate::tls::tests::{Configs, sockets, usual};

mod answers;
mod differential;
mod fairness;
mod floods;
mod interop;

const SETTINGS: Settings = Settings { window: 256 * 1024, streams: 100, frame: 64 * 1024 };
/// Longer than anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

static CONFIGS: LazyLock<Configs> = LazyLock::new(usual);

type Ready = (TcpStream, crate::tls::Established);

async fn pair() -> (Ready, Ready) {
    let (client, server) = sockets().await;
    tokio::join!(dialled(client), accepted(server))
}

async fn dialled(mut tcp: TcpStream) -> Ready {
    let name = ServerName::try_from("test").unwrap();
    let mut tls = crate::tls::connect(&mut tcp, CONFIGS.client.clone(), name).await.unwrap();
    // The other end's handshake is waited for before there is a connection that sends it.
    tcp.write_all(&std::mem::take(&mut tls.unsent)).await.unwrap();
    (tcp, tls)
}

async fn accepted(mut tcp: TcpStream) -> Ready {
    let tls = crate::tls::accept(&mut tcp, CONFIGS.server.clone()).await.unwrap();
    (tcp, tls)
}

/// A client of the TLS library, and our server's end.
async fn stranger() -> (tokio_rustls::client::TlsStream<TcpStream>, Ready) {
    let (client, server) = sockets().await;
    let name = ServerName::try_from("test").unwrap();
    let connector = tokio_rustls::TlsConnector::from(CONFIGS.client.clone());
    let (client, server) = tokio::join!(connector.connect(name, client), accepted(server));
    (client.unwrap(), server)
}

/// A task and what it gives.
struct Job<T> {
    task: AbortHandle,
    end: oneshot::Receiver<T>,
}

impl<T> Job<T> {
    async fn end(self) -> T {
        soon(self.end).await.expect("the task did not panic")
    }
}

fn start<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Job<T> {
    let (send, end) = oneshot::channel();
    let task = Tasks::new().spawn("test", async move {
        let _ = send.send(work.await);
    });
    Job { task, end }
}

struct Ends {
    opener: Opener,
    requests: Requests,
    client: Control,
    server: Control,
    driven: [Job<Result<(), Error>>; 2],
}

async fn ends() -> Ends {
    let ((socket, tls), (peer, peer_tls)) = pair().await;
    let (opener, client, one) = Connection::client(socket, tls, SETTINGS);
    let (requests, server, two) = Connection::server(peer, peer_tls, SETTINGS);
    Ends { opener, requests, client, server, driven: [start(one), start(two)] }
}

fn authority() -> SocketAddr {
    "10.0.0.1:80".parse().unwrap()
}

fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("baggage", "a=b".parse().unwrap());
    headers
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

async fn open(ends: &mut Ends) -> (Stream, Stream) {
    let opening = ends.opener.open(authority(), &headers()).unwrap();
    let request = soon(ends.requests.next()).await.unwrap();
    assert_eq!(request.method, Method::CONNECT);
    assert_eq!(request.authority.as_deref(), Some("10.0.0.1:80"));
    assert_eq!(request.headers.get("baggage").unwrap(), "a=b");
    let server = request.accept().unwrap();
    let (status, client) = soon(opening.answer()).await.unwrap();
    assert_eq!(status, StatusCode::OK);
    (client, server)
}

#[tokio::test]
async fn bytes_pass_both_ways_and_ends_are_passed_on() {
    let mut ends = ends().await;
    let (mut client, mut server) = open(&mut ends).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    soon(server.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "question");
    server.write_all(b"answer").await.unwrap();
    server.shutdown().await.unwrap();
    text.clear();
    soon(client.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "answer");
    soon(ends.client.ping()).await.unwrap();
    drop((client, server));
    // With nobody left to open streams it ends in order, at both ends.
    drop(ends.opener);
    assert!(soon(ends.requests.next()).await.is_none());
    let [one, two] = ends.driven;
    assert_eq!(one.end().await, Ok(()));
    assert_eq!(two.end().await, Ok(()));
}

/// Two streams that speak at the same time, one of them because of something that its socket brings, are heard at once.
#[tokio::test]
async fn where_many_streams_are_open_they_speak_together() {
    for (streams, together) in [(2, false), (20, true)] {
        let (mut peer, (socket, tls)) = stranger().await;
        let (mut requests, _control, server) = Connection::server(socket, tls, SETTINGS);
        let _server = start(server);
        let mut bytes = frame::PREFACE.to_vec();
        frame::settings(&mut bytes, &[]);
        let mut block = Vec::new();
        hpack::named(&mut block, hpack::index::METHOD, b"CONNECT");
        hpack::named(&mut block, hpack::index::AUTHORITY, b"10.0.0.1:80");
        for n in 0..streams {
            frame::head(&mut bytes, block.len(), frame::kind::HEADERS, frame::flag::END_HEADERS, 1 + 2 * n);
            bytes.extend_from_slice(&block);
        }
        peer.write_all(&bytes).await.unwrap();
        let mut opened = Vec::new();
        for _ in 0..streams {
            opened.push(soon(requests.next()).await.unwrap().accept().unwrap());
        }
        let mut ping = Vec::new();
        frame::ping(&mut ping, false, *b"finished");
        peer.write_all(&ping).await.unwrap();
        let mut heard = Vec::new();
        while !heard.ends_with(b"finished") {
            assert_ne!(soon(peer.read_buf(&mut heard)).await.unwrap(), 0);
        }
        let (mut first, mut second) = (opened.remove(0), opened.remove(0));
        let (tell, mut told) = sockets().await;
        let speaks = start(async move {
            told.read_u8().await.unwrap();
            second.write_all(b"too").await.unwrap();
            second
        });
        tokio::task::yield_now().await;
        // Nobody looks at a socket between these two.
        assert_eq!(tell.try_write(b"!").unwrap(), 1);
        first.write_all(b"one").await.unwrap();
        heard.clear();
        let n = soon(peer.read_buf(&mut heard)).await.unwrap();
        assert_eq!(n == 2 * (frame::HEAD + 3), together, "{n} bytes with {streams} streams");
        drop((speaks.end().await, first));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_passes_over_many_streams_at_once() {
    const SIZE: usize = 3_000_000;
    let mut ends = ends().await;
    let mut work = Vec::new();
    for seed in 0..20_u8 {
        let (mut client, mut server) = open(&mut ends).await;
        work.push(start(async move {
            let sent: Vec<u8> = (0..SIZE).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed)).collect();
            let (mut read, mut write) = tokio::io::split(&mut client);
            let mut back = Vec::new();
            let sending = async {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            };
            let (_, read) = tokio::join!(sending, read.read_to_end(&mut back));
            read.unwrap();
            assert!(back == sent, "stream {seed}");
        }));
        work.push(start(async move {
            let (mut read, mut write) = tokio::io::split(&mut server);
            tokio::io::copy(&mut read, &mut write).await.unwrap();
            write.shutdown().await.unwrap();
        }));
    }
    for work in work {
        work.end().await;
    }
}

#[tokio::test]
async fn a_reset_is_a_failure_at_the_other_end() {
    let mut ends = ends().await;
    let (mut client, mut server) = open(&mut ends).await;
    client.write_all(b"x").await.unwrap();
    client.abort();
    let error = soon(server.read_to_end(&mut Vec::new())).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    drop((client, server));
    // Dropped before its end is the same.
    let (client, mut server) = open(&mut ends).await;
    drop(client);
    assert!(soon(server.read_u8()).await.is_err());
}

#[tokio::test]
async fn refusals_carry_their_status_and_postponed_ones_say_so() {
    let mut ends = ends().await;
    let opening = ends.opener.open(authority(), &headers()).unwrap();
    soon(ends.requests.next()).await.unwrap().refuse(StatusCode::UNAUTHORIZED);
    let (status, _) = soon(opening.answer()).await.unwrap();
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let opening = ends.opener.open(authority(), &headers()).unwrap();
    soon(ends.requests.next()).await.unwrap().postpone();
    assert_eq!(soon(opening.answer()).await.err(), Some(Lost::Refused));
}

#[tokio::test]
async fn many_stalled_readers_stop_nobody() {
    let mut ends = ends().await;
    let mut stalled = Vec::new();
    for _ in 0..90 {
        let (client, mut server) = open(&mut ends).await;
        let writer = start(async move {
            // More than the stream's window: it waits until it is aborted.
            let _ = server.write_all(&vec![7; 2_000_000]).await;
        });
        stalled.push((client, writer));
    }
    let (mut client, mut server) = open(&mut ends).await;
    for _ in 0..50 {
        client.write_all(&[1; 1_000]).await.unwrap();
        let mut buffer = vec![0; 1_000];
        soon(server.read_exact(&mut buffer)).await.unwrap();
        server.write_all(&[2; 10_000]).await.unwrap();
        let mut buffer = vec![0; 10_000];
        soon(client.read_exact(&mut buffer)).await.unwrap();
    }
    for (_, writer) in stalled {
        writer.task.abort();
    }
}

#[tokio::test]
async fn a_server_that_leaves_serves_what_it_has() {
    let mut ends = ends().await;
    let (mut client, mut server) = open(&mut ends).await;
    ends.server.leave();
    // The client learns of it at the latest with the answer to this.
    soon(ends.client.ping()).await.unwrap();
    soon(ends.client.ping()).await.unwrap();
    assert_eq!(ends.opener.open(authority(), &headers()).err(), Some(Lost::Connection));
    client.write_all(b"still").await.unwrap();
    let mut buffer = [0; 5];
    soon(server.read_exact(&mut buffer)).await.unwrap();
    drop((client, server));
    let [one, two] = ends.driven;
    assert_eq!(two.end().await, Ok(()));
    let _ = one.end().await;
}

#[tokio::test]
async fn the_loss_of_the_connection_is_an_error_of_every_stream() {
    let mut ends = ends().await;
    let (mut client, server) = open(&mut ends).await;
    let opening = ends.opener.open(authority(), &headers()).unwrap();
    ends.driven[1].task.abort();
    assert!(soon(client.read_u8()).await.is_err());
    assert_eq!(soon(opening.answer()).await.err(), Some(Lost::Connection));
    assert_eq!(soon(ends.client.ping()).await.err(), Some(Lost::Connection));
    drop(server);
}
