//! The head of a response (RFC 9112 section 4), read as strictly as a request's.

use std::mem::MaybeUninit;

use bytes::{BufMut, Bytes, BytesMut};
use weft_core::route::HeaderChanges;

use super::{
    super::message::{Known, Malformed, list, upgrade_refused},
    body::Length,
    fields::{Fields, MAX_FIELDS, put_field},
    request::explain,
};

/// A response as it is forwarded.
#[derive(Debug)]
pub(crate) struct ResponseHead {
    pub(crate) status: u16,
    reason: Bytes,
    pub(crate) fields: Fields,
    pub(crate) body: Length,
    /// A length to announce although no body follows: HEAD and 304.
    announced: Option<u64>,
    /// Whether the upstream keeps its connection after the body.
    pub(crate) keep_alive: bool,
    upgrade: Option<Bytes>,
}

impl ResponseHead {
    /// Reads a complete head; `method` is that of the request which it answers.
    pub(crate) fn parse(raw: &Bytes, method: &str) -> Result<Self, Malformed> {
        let mut headers = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut response = httparse::Response::new(&mut []);
        let config = httparse::ParserConfig::default();
        match config.parse_response_with_uninit_headers(&mut response, raw, &mut headers) {
            Ok(httparse::Status::Complete(length)) if length == raw.len() => {}
            Ok(_) => return Err(Malformed("the head is incomplete")),
            Err(error) => return Err(Malformed(explain(error))),
        }
        let (Some(status), Some(version)) = (response.code, response.version) else {
            return Err(Malformed("the head is incomplete"));
        };
        if !(100..=599).contains(&status) {
            return Err(Malformed("invalid status"));
        }
        let reason = response.reason.map(|reason| raw.slice_ref(reason.as_bytes())).unwrap_or_default();
        let mut fields = Fields::new(raw, response.headers);
        let framing = fields.framing()?;
        let without_body = method == "HEAD" || matches!(status, 100..=199 | 204 | 304);
        let body = match framing {
            _ if without_body => Length::None,
            None => Length::UntilClose,
            Some(Some(length)) => Length::Known(length),
            Some(None) => Length::Chunked,
        };
        let announced = match framing {
            Some(length) if method == "HEAD" || status == 304 => length,
            _ => None,
        };
        let keep_alive = version == 1 && !fields.connection_has(b"close") && body != Length::UntilClose;
        let upgrade = match status {
            101 => fields.values(Known::Upgrade).next().map(Bytes::copy_from_slice),
            _ => None,
        };
        fields.drop_hop_by_hop()?;
        Ok(Self { status, reason, fields, body, announced, keep_alive, upgrade })
    }

    /// Whether a 101 changes to a protocol that was asked for.
    pub(crate) fn upgrades_to(&self, wanted: Option<&Bytes>) -> bool {
        let (Some(wanted), Some(chosen)) = (wanted, &self.upgrade) else { return false };
        !upgrade_refused(chosen) && list(wanted).any(|token| token.eq_ignore_ascii_case(chosen))
    }

    /// Writes the head for the caller, with the body framed as `body` says.
    pub(crate) fn encode(
        &self,
        changes: &HeaderChanges,
        body: Length,
        connection: &[u8],
        out: &mut BytesMut,
    ) {
        out.reserve(256);
        out.put_slice(b"HTTP/1.1 ");
        put_status(out, self.status);
        out.put_u8(b' ');
        out.put_slice(&self.reason);
        out.put_slice(b"\r\n");
        self.fields.encode(changes, out);
        match self.announced {
            Some(length) => Length::Known(length).encode(out),
            None => body.encode(out),
        }
        if let Some(upgrade) = &self.upgrade {
            put_field(out, b"connection", b"upgrade");
            put_field(out, b"upgrade", upgrade);
        } else if !connection.is_empty() {
            put_field(out, b"connection", connection);
        }
        out.put_slice(b"\r\n");
    }
}

/// Writes three digits.
pub(crate) fn put_status(out: &mut BytesMut, status: u16) {
    let digit = |n: u16| b'0' + (n % 10) as u8;
    out.put_slice(&[digit(status / 100), digit(status / 10), digit(status)]);
}
