//! The parsers of HTTP/1, open to the fuzzer.

use bytes::{Bytes, BytesMut};
use weft_core::route::HeaderChanges;

use super::h1::{
    body::{Decoder, Length, Piece},
    request::RequestHead,
    response::ResponseHead,
    scan::HeadScan,
};

const MAX_HEAD: usize = 64 * 1024;

/// Reads a request with its body, and the same bytes as a response with its body.
///
/// # Panics
/// When a request that was accepted is read differently once it was written for the upstream: then what is judged and
/// what is forwarded are not the same.
pub fn http1(bytes: &[u8]) {
    if let Some((head, rest)) = split(bytes) {
        if let Ok(request) = RequestHead::parse(&head) {
            let again = forwarded(&request);
            let Ok(second) = RequestHead::parse(&again) else {
                panic!("what is forwarded is refused: {:?}", again.as_ref());
            };
            let seen = |r: &RequestHead| {
                let fields: Vec<_> = ["authorization", "cookie", "x-user", "content-type"]
                    .iter()
                    .map(|name| r.fields.joined(name))
                    .collect();
                (r.method.clone(), r.path.clone(), r.query.clone(), r.host.clone(), fields)
            };
            assert_eq!(seen(&request), seen(&second));
            assert_eq!(request.body, second.body);
            body(request.body, rest);
        }
        for method in ["GET", "HEAD"] {
            if let Ok(response) = ResponseHead::parse(&head, method) {
                response.encode(&HeaderChanges::default(), response.body, b"", &mut BytesMut::new());
                body(response.body, rest);
            }
        }
    }
}

fn split(bytes: &[u8]) -> Option<(Bytes, &[u8])> {
    // In two reads: the scan goes on where it stopped.
    let mut scan = HeadScan::default();
    let half = bytes.len() / 2;
    let end = match scan.advance(bytes.get(..half)?, MAX_HEAD).ok()? {
        Some(end) => end,
        None => scan.advance(bytes, MAX_HEAD).ok()??,
    };
    let (head, rest) = bytes.split_at_checked(end)?;
    Some((Bytes::copy_from_slice(head), rest))
}

fn forwarded(request: &RequestHead) -> Bytes {
    let mut out = BytesMut::new();
    request.encode(&HeaderChanges::default(), &mut out);
    out.freeze()
}

/// Takes the body once whole and once byte by byte; both must give the same.
fn body(length: Length, bytes: &[u8]) {
    let whole = collect(length, [bytes].into_iter());
    let single = collect(length, bytes.chunks(1));
    if let (Some(whole), Some(single)) = (whole, single) {
        assert_eq!(whole, single);
    }
}

/// The body's bytes; `None` where it is refused or not complete.
fn collect<'a>(length: Length, reads: impl Iterator<Item = &'a [u8]>) -> Option<Vec<u8>> {
    let mut decoder = Decoder::new(length);
    let (mut buf, mut data) = (BytesMut::new(), Vec::new());
    let mut reads = reads.fuse();
    loop {
        let ended = match reads.next() {
            Some(read) => {
                buf.extend_from_slice(read);
                false
            }
            None => true,
        };
        loop {
            match decoder.next(&mut buf, ended).ok()? {
                Piece::Data(piece) => data.extend_from_slice(&piece),
                Piece::End(_) => return Some(data),
                Piece::More if ended => return None,
                Piece::More => break,
            }
        }
    }
}
