//! One table of messages that must never be forwarded, over HTTP/1 and, where the case exists there, HTTP/2.

use tokio::io::AsyncWriteExt;

use super::*;
use crate::http::PREFACE;

struct Case {
    name: &'static str,
    /// A whole HTTP/1 request; empty where the case does not exist.
    h1: &'static str,
    /// The fields of a HTTP/2 request; empty where the case does not exist.
    h2: &'static [(&'static str, &'static str)],
}

const fn case(name: &'static str, h1: &'static str, h2: &'static [(&'static str, &'static str)]) -> Case {
    Case { name, h1, h2 }
}

macro_rules! h2 {
    ($($name:literal: $value:expr),* $(,)?) => {
        &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "web"), $(($name, $value)),*]
    };
}

macro_rules! path {
    ($path:literal) => {
        &[(":method", "GET"), (":scheme", "http"), (":path", $path), (":authority", "web")]
    };
}

const CASES: &[Case] = &[
    case(
        "length and chunked",
        "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        h2!("content-length": "5", "transfer-encoding": "chunked"),
    ),
    case(
        "two lengths that differ",
        "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        h2!("content-length": "5", "content-length": "6"),
    ),
    case(
        "two lengths that agree",
        "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        h2!("content-length": "0", "content-length": "0"),
    ),
    case(
        "a list of lengths",
        "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5, 5\r\n\r\nhello",
        h2!("content-length": "5, 5"),
    ),
    case(
        "a signed length",
        "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: +5\r\n\r\nhello",
        h2!("content-length": "+5"),
    ),
    case(
        "a huge length",
        "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 99999999999999999999\r\n\r\n",
        h2!("content-length": "99999999999999999999"),
    ),
    case(
        "chunked, but not only",
        "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        &[],
    ),
    case(
        "chunked, with a vertical tab",
        "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        &[],
    ),
    case(
        "unknown coding",
        "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        h2!("transfer-encoding": "x"),
    ),
    case(
        "two codings",
        "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        &[],
    ),
    case(
        "chunked in HTTP/1.0",
        "POST / HTTP/1.0\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        &[],
    ),
    case("two hosts", "GET / HTTP/1.1\r\nHost: web\r\nHost: admin\r\n\r\n", h2!("host": "admin")),
    case(
        "the same host twice",
        "GET / HTTP/1.1\r\nHost: web\r\nHost: web\r\n\r\n",
        h2!("host": "web", "host": "web"),
    ),
    case("no host", "GET / HTTP/1.1\r\n\r\n", &[(":method", "GET"), (":scheme", "http"), (":path", "/")]),
    case(
        "an empty host",
        "GET / HTTP/1.1\r\nHost:\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/"), ("host", "")],
    ),
    case(
        "a host with a user",
        "GET / HTTP/1.1\r\nHost: a@web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a@web")],
    ),
    case(
        "a host with a path",
        "GET / HTTP/1.1\r\nHost: web/admin\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "web/admin")],
    ),
    case("a list of hosts", "GET / HTTP/1.1\r\nHost: web, admin\r\n\r\n", h2!("host": "web, admin")),
    case("another host in the target", "GET http://admin/ HTTP/1.1\r\nHost: web\r\n\r\n", &[]),
    case("another port in the target", "GET http://web:81/ HTTP/1.1\r\nHost: web\r\n\r\n", &[]),
    case(
        "another scheme in the target",
        "GET ftp://web/ HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "ftp"), (":path", "/"), (":authority", "web")],
    ),
    case("a folded field", "GET / HTTP/1.1\r\nHost: web\r\nX-A: b\r\n c\r\n\r\n", &[]),
    case("a folded first field", "GET / HTTP/1.1\r\n Host: web\r\nHost: web\r\n\r\n", &[]),
    case("a bare LF", "GET / HTTP/1.1\r\nHost: web\nX-A: b\r\n\r\n", h2!("x-a": "b\nc")),
    case("only bare LFs", "GET / HTTP/1.1\nHost: web\n\n", &[]),
    case("a bare CR", "GET / HTTP/1.1\r\nHost: web\r\nX-A: b\rc\r\n\r\n", h2!("x-a": "b\rc")),
    case("a NUL", "GET / HTTP/1.1\r\nHost: web\r\nX-A: b\0c\r\n\r\n", h2!("x-a": "b\0c")),
    case("a control byte", "GET / HTTP/1.1\r\nHost: web\r\nX-A: \x01\r\n\r\n", h2!("x-a": "\x01")),
    case("white space before the colon", "GET / HTTP/1.1\r\nHost : web\r\n\r\n", h2!("x-a ": "b")),
    case("no name", "GET / HTTP/1.1\r\nHost: web\r\n: b\r\n\r\n", h2!("": "b")),
    case("a name in upper case", "", h2!("X-A": "b")),
    case("a line without colon", "GET / HTTP/1.1\r\nHost: web\r\nX-A\r\n\r\n", &[]),
    case(
        "a method in lower case",
        "get / HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "get"), (":scheme", "http"), (":path", "/"), (":authority", "web")],
    ),
    case(
        "a method with a bracket",
        "GE(T / HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GE(T"), (":scheme", "http"), (":path", "/"), (":authority", "web")],
    ),
    case(
        "CONNECT",
        "CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\n\r\n",
        &[(":method", "CONNECT"), (":authority", "web:80")],
    ),
    case(
        "CONNECT with a path",
        "CONNECT / HTTP/1.1\r\nHost: web\r\n\r\n",
        &[
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "http"),
            (":path", "/"),
            (":authority", "web"),
        ],
    ),
    case("two spaces", "GET  / HTTP/1.1\r\nHost: web\r\n\r\n", &[]),
    case("no version", "GET /\r\nHost: web\r\n\r\n", &[]),
    case("another version", "GET / HTTP/1.2\r\nHost: web\r\n\r\n", &[]),
    case(
        "a relative path",
        "GET admin HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "admin"), (":authority", "web")],
    ),
    case("a fragment", "GET /a#b HTTP/1.1\r\nHost: web\r\n\r\n", &[]),
    case(
        "a byte beyond ASCII in the path",
        "GET /\u{e9} HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/\u{e9}"), (":authority", "web")],
    ),
    case(
        "a backslash",
        "GET /a\\..\\admin HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/a\\..\\admin"), (":authority", "web")],
    ),
    case(
        "an encoded slash",
        "GET /a%2Fadmin HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/a%2Fadmin"), (":authority", "web")],
    ),
    case(
        "an encoded backslash",
        "GET /a%5cadmin HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/a%5cadmin"), (":authority", "web")],
    ),
    case(
        "an encoded NUL",
        "GET /a%00 HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/a%00"), (":authority", "web")],
    ),
    case(
        "a broken escape",
        "GET /a%2 HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/a%2"), (":authority", "web")],
    ),
    case(
        "an asterisk to GET",
        "GET * HTTP/1.1\r\nHost: web\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "*"), (":authority", "web")],
    ),
    case(
        "Connection names the host",
        "GET / HTTP/1.1\r\nHost: web\r\nConnection: host\r\n\r\n",
        h2!("connection": "host"),
    ),
    case(
        "Connection names the length",
        "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 1\r\nConnection: content-length\r\n\r\na",
        h2!("connection": "close"),
    ),
    case("a folded value", "GET / HTTP/1.1\r\nHost: web\r\nX-A: b\r\n\tc\r\n\r\n", h2!("x-a": "b\r\n c")),
    case("a folded host", "GET / HTTP/1.1\r\nHost: web\r\n admin\r\n\r\n", h2!("host": "web\r\n admin")),
    case("a bare CR in the first line", "GET /\r HTTP/1.1\r\nHost: web\r\n\r\n", path!("/\r")),
    case("a bare LF in the first line", "GET /\n HTTP/1.1\r\nHost: web\r\n\r\n", path!("/\n")),
    case("white space in the path", "GET /a b HTTP/1.1\r\nHost: web\r\n\r\n", path!("/a b")),
    case("an empty path", "GET  HTTP/1.1\r\nHost: web\r\n\r\n", path!("")),
    case(
        "a host with an impossible port",
        "GET / HTTP/1.1\r\nHost: web:99999\r\n\r\n",
        &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "web:99999")],
    ),
    case("chunked alone", "", h2!("transfer-encoding": "chunked")),
    case("no method", "", &[(":scheme", "http"), (":path", "/"), (":authority", "web")]),
    case("no path", "", &[(":method", "GET"), (":scheme", "http"), (":authority", "web")]),
    case("a pseudo field of answers", "", h2!(":status": "200")),
    case("an unknown pseudo field", "", h2!(":host": "web")),
    case("a pseudo field after others", "", h2!("x-a": "b", ":authority": "admin")),
    case("keep-alive", "", h2!("keep-alive": "1")),
    case("upgrade", "", h2!("upgrade": "h2c")),
    case("proxy-connection", "", h2!("proxy-connection": "close")),
    case("h2c settings", "", h2!("http2-settings": "AAMAAABk")),
    case("te other than trailers", "", h2!("te": "gzip")),
    case("a pseudo field twice", "", h2!(":path": "/admin")),
    case("not HTTP", "\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03", &[]),
    case("a broken preface", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", &[]),
];

#[tokio::test]
async fn http1_refuses() {
    for case in CASES.iter().filter(|case| !case.h1.is_empty()) {
        // One byte of Latin-1 in the table is one byte on the wire.
        let bytes: Vec<u8> = case.h1.chars().map(|c| c as u8).collect();
        for side in [Side::Outbound, Side::Inbound] {
            let mut rig = Rig::new(side);
            rig.client.send(&bytes).await;
            let answer = rig.client.rest().await;
            assert!(answer.starts_with("HTTP/1.1 400 "), "{}: {answer}", case.name);
            assert_eq!(answer.matches("HTTP/1.1 400 ").count(), 1, "{}: {answer}", case.name);
            assert!(answer.contains("connection: close\r\n"), "{}: {answer}", case.name);
            let end = rig.end().await;
            assert_eq!((end.status, end.reason), (400, Reason::ProtocolError), "{}", case.name);
            assert_eq!(end.verdict, Verdict::Error, "{}", case.name);
            assert!(rig.upstreams.try_recv().is_err(), "{}: it reached an upstream", case.name);
        }
    }
}

#[tokio::test]
async fn http1_refuses_large_heads() {
    let many = "X-A: b\r\n".repeat(101);
    let long = format!("X-A: {}\r\n", "b".repeat(65 * 1024));
    for fields in [many, long] {
        let mut rig = Rig::new(Side::Inbound);
        let (mut read, mut write) = tokio::io::split(rig.client.io);
        let request = format!("GET / HTTP/1.1\r\nHost: web\r\n{fields}\r\n");
        let send = async { write.write_all(request.as_bytes()).await };
        let mut answer = Vec::new();
        let (_, read) = soon(async { tokio::join!(send, read.read_to_end(&mut answer)) }).await;
        read.expect("an answer");
        assert!(answer.starts_with(b"HTTP/1.1 400 "));
        assert!(rig.upstreams.try_recv().is_err());
    }
}

#[tokio::test]
async fn http2_refuses() {
    for case in CASES.iter().filter(|case| !case.h2.is_empty()) {
        for side in [Side::Outbound, Side::Inbound] {
            let mut rig = Rig::new(side);
            rig.client.send(PREFACE).await;
            rig.client.send(frame(4, 0, 0, &[])).await;
            rig.client.send(frame(1, 4 | 1, 1, &literals(case.h2))).await;
            let answered = first_answer(&mut rig.client).await;
            assert!(rig.upstreams.try_recv().is_err(), "{}: it reached an upstream", case.name);
            // Whether we refuse it or the library does: somebody hears of it.
            let end = rig.end().await;
            let status = if answered == Answer::Headers { 400 } else { 0 };
            assert_eq!(
                (end.status, end.reason),
                (status, Reason::ProtocolError),
                "{}: {answered:?}",
                case.name
            );
            assert_eq!((end.verdict, end.protocol), (Verdict::Error, "HTTP/2"), "{}", case.name);
        }
    }
}

/// What breaks the connection as a whole.
#[tokio::test]
async fn http2_connections_that_break_the_protocol_are_recorded() {
    let settings = frame(4, 0, 0, &[]);
    for (name, bytes) in [
        ("settings of a wrong length", frame(4, 0, 0, &[0])),
        ("a frame that is too long", [&settings[..], &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat()),
        ("data on stream 0", [&settings[..], &frame(0, 0, 0, b"x")].concat()),
        ("data on an idle stream", [&settings[..], &frame(0, 0, 1, b"x")].concat()),
        ("an even stream", [&settings[..], &frame(1, 4 | 1, 2, &literals(h2!()))].concat()),
        ("headers that do not decode", [&settings[..], &frame(1, 4 | 1, 1, &[0xff; 9])].concat()),
        ("a window that overflows", [&settings[..], &frame(8, 0, 0, &[0x7f, 0xff, 0xff, 0xff])].concat()),
        ("a window of nothing", [&settings[..], &frame(8, 0, 0, &[0; 4])].concat()),
        ("a ping of a wrong length", [&settings[..], &frame(6, 0, 0, &[0])].concat()),
        ("a continuation of nothing", [&settings[..], &frame(9, 4, 1, &[])].concat()),
        ("a push", [&settings[..], &frame(5, 4, 1, &[0, 0, 0, 2])].concat()),
    ] {
        for side in [Side::Outbound, Side::Inbound] {
            let mut rig = Rig::new(side);
            rig.client.send(PREFACE).await;
            rig.client.send(&bytes).await;
            let end = rig.end().await;
            assert_eq!((end.status, end.reason), (0, Reason::ProtocolError), "{name}");
            assert_eq!((end.verdict, end.protocol), (Verdict::Error, "HTTP/2"), "{name}");
            assert!(rig.upstreams.try_recv().is_err(), "{name}: it reached an upstream");
        }
    }
}

#[tokio::test]
async fn http2_streams_beyond_the_limit_are_refused_and_recorded() {
    let limits = Limits { max_streams: 1, ..Limits::default() };
    let mut rig = Rig::with(Side::Inbound, Plan::default(), limits);
    rig.client.send(PREFACE).await;
    rig.client.send(frame(4, 0, 0, &[])).await;
    rig.client.send(frame(1, 4, 1, &literals(h2!()))).await;
    let _upstream = rig.upstream().await;
    rig.client.send(frame(1, 4 | 1, 3, &literals(h2!()))).await;
    assert_eq!(first_answer(&mut rig.client).await, Answer::Reset);
    let end = rig.end().await;
    assert_eq!((end.status, end.reason), (0, Reason::LimitReached));
}

#[tokio::test]
async fn http2_accepts_the_plain_case() {
    let mut rig = Rig::new(Side::Inbound);
    rig.client.send(PREFACE).await;
    rig.client.send(frame(4, 0, 0, &[])).await;
    rig.client.send(frame(1, 4 | 1, 1, &literals(h2!("te": "trailers", "host": "WEB")))).await;
    rig.upstream().await;
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Headers,
    Reset,
    GoAway,
}

async fn first_answer(client: &mut Peer) -> Answer {
    loop {
        let head = client.exactly(9).await;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        client.exactly(length).await;
        match head[3] {
            1 => return Answer::Headers,
            3 => return Answer::Reset,
            7 => return Answer::GoAway,
            _ => {}
        }
    }
}

/// A frame (RFC 9113 section 4.1).
pub(super) fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = vec![0, length[0], length[1], kind, flags, 0, 0, 0, stream];
    frame.extend_from_slice(payload);
    frame
}

/// A header block of literals that are not indexed (RFC 7541 section 6.2.2).
pub(super) fn literals(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for part in [name, value] {
            block.push(u8::try_from(part.len()).expect("short"));
            block.extend_from_slice(part.as_bytes());
        }
    }
    block
}
