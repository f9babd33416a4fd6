//! Answers that the proxy gives itself.

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use weft_core::flow::Reason;

use super::{
    h1::{fields::put_field, response::put_status},
    message::{Malformed, may_change, valid_value},
};
use crate::l7::{ConnectError, LocalReply};

/// A message that is not well formed.
pub(crate) fn malformed(problem: Malformed) -> LocalReply {
    plain(400, Reason::ProtocolError, format!("weft refused this request: {problem}"))
}

/// A failure; its flow id is filled in when it is sent.
pub(crate) fn plain(status: u16, reason: Reason, message: impl Into<String>) -> LocalReply {
    LocalReply {
        status,
        reason,
        flow_id: String::new(),
        policy: None,
        reveal_policy: false,
        headers: Vec::new(),
        message: message.into(),
    }
}

/// An upstream that could not be connected to.
pub(crate) fn connect(error: &ConnectError) -> LocalReply {
    let status = if (400..=599).contains(&error.status) { error.status } else { 503 };
    plain(status, error.reason, error.message.clone())
}

/// The time allowed ran out.
pub(crate) fn timeout() -> LocalReply {
    plain(504, Reason::Timeout, "the upstream did not answer in time")
}

/// What an upstream sent is not usable.
pub(crate) fn bad_upstream(reason: Reason, message: &'static str) -> LocalReply {
    plain(502, reason, format!("bad upstream: {message}"))
}

fn body(reply: &LocalReply) -> String {
    let mut text = reply.message.clone();
    text.push('\n');
    if !reply.flow_id.is_empty() {
        text.push_str("flow: ");
        text.push_str(&reply.flow_id);
        text.push('\n');
    }
    if let (true, Some(policy)) = (reply.reveal_policy, &reply.policy) {
        text.push_str(&format!("policy: {policy}\n"));
    }
    text
}

/// Whether a status of a reply can be sent.
fn status(reply: &LocalReply) -> u16 {
    if (200..=599).contains(&reply.status) { reply.status } else { 500 }
}

fn extra(reply: &LocalReply) -> impl Iterator<Item = (&str, &str)> {
    let pairs = reply.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let id = (!reply.flow_id.is_empty()).then_some(("weft-flow-id", reply.flow_id.as_str()));
    pairs.filter(|(name, _)| may_change(name)).chain(id).filter(|(_, value)| valid_value(value))
}

/// Writes the reply as HTTP/1.1 and returns the status and the body's length.
pub(crate) fn encode_h1(
    reply: &LocalReply,
    head_only: bool,
    connection: &[u8],
    out: &mut BytesMut,
) -> (u16, usize) {
    let (text, status) = (body(reply), status(reply));
    out.put_slice(b"HTTP/1.1 ");
    put_status(out, status);
    let reason = http::StatusCode::from_u16(status).ok().and_then(|code| code.canonical_reason());
    out.put_u8(b' ');
    out.put_slice(reason.unwrap_or_default().as_bytes());
    out.put_slice(b"\r\n");
    put_field(out, b"content-type", b"text/plain; charset=utf-8");
    // 204 and 304 have no body (RFC 9110 section 6.4.1).
    let bodiless = matches!(status, 204 | 304);
    if !bodiless {
        put_field(out, b"content-length", text.len().to_string().as_bytes());
    }
    for (name, value) in extra(reply) {
        put_field(out, name.as_bytes(), value.as_bytes());
    }
    if !connection.is_empty() {
        put_field(out, b"connection", connection);
    }
    out.put_slice(b"\r\n");
    if head_only || bodiless {
        return (status, 0);
    }
    out.put_slice(text.as_bytes());
    (status, text.len())
}

/// The reply as HTTP/2: head, and a body where there is one. For gRPC a head alone that is also the trailers.
pub(crate) fn build_h2(reply: &LocalReply, grpc: bool) -> (http::Response<()>, Bytes) {
    let text = body(reply);
    let mut response = http::Response::new(());
    let code = if grpc { 200 } else { status(reply) };
    *response.status_mut() =
        http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    for (name, value) in extra(reply) {
        put(headers, name, value);
    }
    if grpc {
        put(headers, "content-type", "application/grpc");
        put(headers, "grpc-status", grpc_status(reply.status));
        put(headers, "grpc-message", &percent_encode(text.trim_end()));
        return (response, Bytes::new());
    }
    put(headers, "content-type", "text/plain; charset=utf-8");
    if matches!(code, 204 | 304) {
        return (response, Bytes::new());
    }
    put(headers, "content-length", &text.len().to_string());
    (response, Bytes::from(text))
}

fn put(headers: &mut HeaderMap, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value)) {
        headers.append(name, value);
    }
}

/// The gRPC code that stands for a HTTP status (gRPC's http-grpc-status-mapping).
fn grpc_status(status: u16) -> &'static str {
    match status {
        400 => "13",
        401 => "16",
        403 => "7",
        404 => "12",
        429 | 502..=504 => "14",
        _ => "2",
    }
}

/// Encodes a `grpc-message` (gRPC over HTTP/2, section Responses).
fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            encoded.push(byte as char);
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
