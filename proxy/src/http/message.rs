//! What HTTP/1 and HTTP/2 share: which header means what, how a target and a host are checked, header changes.

use std::borrow::Cow;

use weft_core::{http::normalize_path, route::HeaderChanges};

/// A message that is refused, never interpreted. The text is safe to show to a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

/// What a header's name means to a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    ContentLength,
    TransferEncoding,
    Host,
    Connection,
    /// `keep-alive`, `proxy-connection`: about one connection only.
    HopByHop,
    Te,
    Trailer,
    Upgrade,
    Expect,
    /// `http2-settings` of RFC 7540 section 3.2.1.
    Http2Settings,
    /// Names that only a proxy of the mesh may write: what anybody else sends is dropped.
    Ours,
    Other,
}

/// Sorts a header name, in any case.
pub(crate) fn classify(name: &[u8]) -> Known {
    // The longest name below.
    const LONGEST: usize = "x-forwarded-client-cert".len();
    let mut lower = [0u8; LONGEST];
    // Frameworks in CGI's manner take `_` for `-`: a look-alike of our own names must not get through.
    let mut look_alike = false;
    for (to, from) in lower.iter_mut().zip(name) {
        *to = if *from == b'_' {
            look_alike = true;
            b'-'
        } else {
            from.to_ascii_lowercase()
        };
    }
    if lower.starts_with(b"weft-") {
        return Known::Ours;
    }
    let Some(lower) = lower.get(..name.len()) else { return Known::Other };
    match lower {
        b"forwarded" | b"baggage" | b"x-forwarded-client-cert" => Known::Ours,
        _ if look_alike => Known::Other,
        b"content-length" => Known::ContentLength,
        b"transfer-encoding" => Known::TransferEncoding,
        b"host" => Known::Host,
        b"connection" => Known::Connection,
        b"keep-alive" | b"proxy-connection" => Known::HopByHop,
        b"te" => Known::Te,
        b"trailer" => Known::Trailer,
        b"upgrade" => Known::Upgrade,
        b"expect" => Known::Expect,
        b"http2-settings" => Known::Http2Settings,
        _ => Known::Other,
    }
}

/// Whether a byte may stand in a token (RFC 9110 section 5.6.2).
pub(crate) fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Checks a method. Lower-case letters are refused too: methods are case-sensitive, but not every server thinks so,
/// and a rule about `POST` must not be passed by `post`.
pub(crate) fn check_method(method: &str) -> Result<(), Malformed> {
    const LONGEST: usize = 32;
    let fits = |byte: u8| is_token_byte(byte) && !byte.is_ascii_lowercase();
    if method.is_empty() || method.len() > LONGEST || !method.bytes().all(fits) {
        return Err(Malformed("invalid method"));
    }
    match method {
        "CONNECT" => Err(Malformed("CONNECT is not served here")),
        "PRI" => Err(Malformed("invalid method")),
        _ => Ok(()),
    }
}

/// A request target as it is judged and forwarded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target<'a> {
    /// Normalised; `*` for `OPTIONS *`.
    pub(crate) path: Cow<'a, str>,
    /// What follows the first `?`.
    pub(crate) query: Option<&'a str>,
}

/// Checks and normalises path and query.
pub(crate) fn target<'a>(method: &str, raw: &'a str) -> Result<Target<'a>, Malformed> {
    if raw == "*" {
        return match method {
            "OPTIONS" => Ok(Target { path: Cow::Borrowed(raw), query: None }),
            _ => Err(Malformed("the target * is for OPTIONS only")),
        };
    }
    if !raw.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
        return Err(Malformed("invalid byte in the target"));
    }
    let (path, query) = match raw.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (raw, None),
    };
    if !path.starts_with('/') {
        return Err(Malformed("the target is not a path"));
    }
    let path = normalize_path(path).map_err(|refused| Malformed(refused.0))?;
    // What is forwarded must read back as what was judged, whatever normalisation yields.
    if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic() && !b"?#\\".contains(&b)) {
        return Err(Malformed("invalid path"));
    }
    Ok(Target { path, query })
}

/// Host and port of a `Host` field or an `:authority`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// Lower case, without port and without a final dot; brackets stay around an IPv6 address.
    pub(crate) name: String,
    /// The port, where given.
    pub(crate) port: Option<u16>,
}

impl Host {
    /// Checks an authority without user information (RFC 3986 section 3.2.2, RFC 9110 section 4.2.4).
    pub(crate) fn parse(raw: &[u8]) -> Result<Self, Malformed> {
        const INVALID: Malformed = Malformed("invalid host");
        const LONGEST: usize = 261;
        if raw.is_empty() || raw.len() > LONGEST {
            return Err(INVALID);
        }
        let raw = std::str::from_utf8(raw).map_err(|_| INVALID)?;
        let (name, rest) = if raw.starts_with('[') {
            let end = raw.find(']').ok_or(INVALID)?;
            let (name, rest) = raw.split_at(end + 1);
            let inside = name.get(1..end).ok_or(INVALID)?;
            inside.parse::<std::net::Ipv6Addr>().map_err(|_| INVALID)?;
            (name, rest)
        } else {
            let end = raw.find(':').unwrap_or(raw.len());
            let (name, rest) = raw.split_at(end);
            let fits = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+;=".contains(&b);
            if name.is_empty() || !name.bytes().all(fits) {
                return Err(INVALID);
            }
            (name, rest)
        };
        let port = match rest.strip_prefix(':') {
            Some(digits) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
                Some(digits.parse().map_err(|_| INVALID)?)
            }
            None if rest.is_empty() => None,
            _ => return Err(INVALID),
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if name.is_empty() { Err(INVALID) } else { Ok(Self { name, port }) }
    }

    /// Whether both name the same; `default` is the port that is meant where none is given.
    pub(crate) fn same(&self, other: &Self, default: u16) -> bool {
        self.name == other.name && self.port.unwrap_or(default) == other.port.unwrap_or(default)
    }
}

/// A decimal length without sign, space or list (RFC 9110 section 8.6).
pub(crate) fn content_length(value: &[u8]) -> Result<u64, Malformed> {
    const INVALID: Malformed = Malformed("invalid Content-Length");
    // 18 digits always fit in 63 bits.
    if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
        return Err(INVALID);
    }
    std::str::from_utf8(value).ok().and_then(|digits| digits.parse().ok()).ok_or(INVALID)
}

/// The elements of a comma-separated list, trimmed, without the empty ones.
pub(crate) fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}

/// Whether an upgrade leads to something that must be judged request by request (HTTP) or hides it (TLS).
pub(crate) fn upgrade_refused(token: &[u8]) -> bool {
    [&b"h2"[..], b"h3", b"http", b"tls"]
        .iter()
        .any(|prefix| token.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix)))
}

/// Whether a content type is gRPC's.
pub(crate) fn is_grpc(content_type: &[u8]) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    content_type.get(..GRPC.len()).is_some_and(|start| start.eq_ignore_ascii_case(GRPC))
        && matches!(content_type.get(GRPC.len()), None | Some(b'+' | b';' | b' ' | b'-'))
}

/// Whether a header change names something that a route may change: never the framing, never our own names.
pub(crate) fn may_change(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(is_token_byte)
        && matches!(classify(name.as_bytes()), Known::Other | Known::Host)
}

/// Whether a value can be written into a head.
pub(crate) fn valid_value(value: &str) -> bool {
    value.bytes().all(|b| b == b'\t' || (b >= b' ' && b != 0x7f))
}

/// Replaced by a route, but never taken away or doubled: a request has exactly one.
const HOST: &[u8] = b"host";

/// Whether the changes take this name away or replace it.
pub(crate) fn replaced(changes: &HeaderChanges, name: &[u8]) -> bool {
    let same = |other: &str| other.as_bytes().eq_ignore_ascii_case(name) && may_change(other);
    let host = name.eq_ignore_ascii_case(HOST);
    (!host && changes.remove.iter().any(|other| same(other)))
        || changes.set.iter().any(|(other, _)| same(other))
}

/// The fields that the changes add, set ones first.
pub(crate) fn added(changes: &HeaderChanges) -> impl Iterator<Item = (&str, &str)> {
    let add = changes.add.iter().filter(|(name, _)| !name.as_bytes().eq_ignore_ascii_case(HOST));
    let pairs = changes.set.iter().chain(add);
    pairs
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .filter(|(name, value)| may_change(name) && valid_value(value))
}
