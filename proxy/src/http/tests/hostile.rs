//! Arbitrary bytes: nothing panics, and what is forwarded reads back as what was judged.

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::http::{
    h1::{
        body::{Decoder, Length, Piece},
        request::RequestHead,
        response::ResponseHead,
        scan::HeadScan,
    },
    message,
};

const MAX: usize = 64 * 1024;

fn parse(bytes: &[u8]) -> Option<RequestHead> {
    let end = HeadScan::default().advance(bytes, MAX).ok()??;
    RequestHead::parse(&Bytes::copy_from_slice(&bytes[..end])).ok()
}

/// Requests that are nearly right, and pieces that are nearly a request.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let method = prop::sample::select(vec!["GET", "POST", "OPTIONS", "get", "CONNECT", "PRI", ""]);
    let target = prop_oneof![
        "[/a-zA-Z0-9.%?=&;~_-]{1,24}",
        "/[ -~]{0,24}",
        "(/|//|/\\./|/\\.\\./|/%2e%2E/|/%2F|/%41|/a){1,6}(\\?[!-~]{0,8})?",
        "http://web(:80)?/[a-z/.]{0,8}",
        Just("*".to_owned()),
    ];
    let version = prop::sample::select(vec!["HTTP/1.1", "HTTP/1.0", "HTTP/2.0"]);
    let name = prop_oneof![
        prop::sample::select(vec![
            "Host",
            "Connection",
            "Content-Length",
            "Transfer-Encoding",
            "Upgrade",
            "TE",
            "Weft-A",
            "Forwarded",
            "Keep-Alive",
            "X-Tenant",
            "x_forwarded_client_cert",
            "HTTP2-Settings",
        ])
        .prop_map(str::to_owned),
        "[!-~]{1,8}",
    ];
    let value = prop_oneof![
        prop::sample::select(vec![
            "web",
            "chunked",
            "5",
            "0",
            "close",
            "upgrade, x-tenant",
            "websocket",
            "h2c",
            ""
        ])
        .prop_map(str::to_owned),
        "[ -~\t]{0,16}",
        "\\PC{0,8}",
    ];
    let end = prop::sample::select(vec!["\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r", "\r\n "]);
    let fields = prop::collection::vec((name, value, end), 0..6);
    (method, target, version, any::<bool>(), fields).prop_map(|(method, target, version, host, fields)| {
        let mut text = format!("{method} {target} {version}\r\n");
        if host {
            text.push_str("Host: web\r\n");
        }
        for (name, value, end) in fields {
            text.push_str(&format!("{name}: {value}{end}"));
        }
        text.push_str("\r\n");
        text.into_bytes()
    })
}

proptest! {
    #[test]
    fn what_is_forwarded_reads_back_as_what_was_judged(bytes in request()) {
        let Some(judged) = parse(&bytes) else { return Ok(()) };
        let mut out = BytesMut::new();
        judged.encode(&HeaderChanges::default(), &mut out);
        let again = parse(&out);
        prop_assert!(again.is_some(), "{:?} became {:?}", bytes.escape_ascii().to_string(), out);
        let again = again.expect("checked");
        prop_assert_eq!(&again.method, &judged.method);
        prop_assert_eq!(&again.path, &judged.path);
        prop_assert_eq!(&again.query, &judged.query);
        prop_assert_eq!(&again.host, &judged.host);
        prop_assert_eq!(again.body, judged.body);
        prop_assert_eq!(&again.upgrade, &judged.upgrade);
        for field in judged.fields.iter() {
            let name = std::str::from_utf8(field.name).expect("a token");
            prop_assert_eq!(again.fields.joined(name), judged.fields.joined(name), "{}", name);
            prop_assert!(field.known != message::Known::Ours);
        }
    }

    #[test]
    fn a_head_in_pieces_is_the_same_head(bytes in request(), cut in 1usize..40) {
        let whole = HeadScan::default().advance(&bytes, MAX);
        let mut scan = HeadScan::default();
        let mut last = Ok(None);
        let mut end = 0;
        while end < bytes.len() && matches!(last, Ok(None)) {
            end = (end + cut).min(bytes.len());
            last = scan.advance(&bytes[..end], MAX);
        }
        prop_assert_eq!(last, whole);
    }

    #[test]
    fn heads_of_arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        parse(&bytes);
        let raw = Bytes::from(bytes);
        // Without the scan before it, too.
        let _ = RequestHead::parse(&raw);
        let _ = ResponseHead::parse(&raw, "GET");
        let _ = message::Host::parse(&raw);
        let _ = message::content_length(&raw);
    }

    #[test]
    fn chunks_in_pieces_are_the_same_body(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8),
        cut in 1usize..30,
    ) {
        let mut wire = Vec::new();
        for chunk in &chunks {
            wire.extend_from_slice(format!("{:X};ext=1\r\n", chunk.len()).as_bytes());
            wire.extend_from_slice(chunk);
            wire.extend_from_slice(b"\r\n");
        }
        wire.extend_from_slice(b"0\r\nA: b\r\n\r\nnext");
        let mut decoder = Decoder::new(Length::Chunked);
        let mut buf = BytesMut::new();
        let mut rest = &wire[..];
        let mut body = Vec::new();
        let trailers = loop {
            match decoder.next(&mut buf, rest.is_empty()).expect("a good body") {
                Piece::Data(data) => body.extend_from_slice(&data),
                Piece::End(trailers) => break trailers,
                Piece::More => {
                    let (piece, left) = rest.split_at(cut.min(rest.len()));
                    buf.extend_from_slice(piece);
                    rest = left;
                }
            }
        };
        prop_assert_eq!(body, chunks.concat());
        prop_assert_eq!(trailers.joined("a"), Some("b".to_owned()));
        prop_assert_eq!([&buf[..], rest].concat(), b"next");
    }

    #[test]
    fn bodies_of_arbitrary_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..200), length in 0u64..100) {
        for length in [Length::Chunked, Length::Known(length), Length::UntilClose, Length::None] {
            let mut decoder = Decoder::new(length);
            let mut buf = BytesMut::from(&bytes[..]);
            let mut pieces = 0;
            while let Ok(Piece::Data(data)) = decoder.next(&mut buf, true) {
                prop_assert!(!data.is_empty());
                pieces += 1;
                prop_assert!(pieces <= bytes.len());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A whole connection fed with garbage, with and without a preface: it ends, and nothing of it is forwarded
    /// under a path that was not judged.
    #[test]
    fn connections_survive_garbage(
        preface in any::<bool>(),
        start in prop_oneof![request(), Just(Vec::new())],
        garbage in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let _inside = runtime.enter();
        runtime.block_on(async {
            let mut rig = Rig::new(Side::Inbound);
            let mut bytes = if preface { crate::http::PREFACE.to_vec() } else { Vec::new() };
            bytes.extend_from_slice(&start);
            bytes.extend_from_slice(&garbage);
            rig.client.send(&bytes).await;
            rig.client.io.shutdown().await.expect("a half-close");
            let drain = async { while rig.client.io.read_buf(&mut rig.client.buf).await.is_ok_and(|n| n > 0) {} };
            soon(drain).await;
        });
    }
}
