//! The head of a request (RFC 9112 section 3), read strictly, and written again as it was judged.

use std::mem::MaybeUninit;

use bytes::{BufMut, Bytes, BytesMut};
use weft_core::{http::HttpRequest, route::HeaderChanges};

use super::{
    super::message::{self, Host, Known, Malformed},
    body::Length,
    fields::{Fields, MAX_FIELDS, put_field},
};

/// A request as it is judged and forwarded.
#[derive(Debug)]
pub(crate) struct RequestHead {
    pub(crate) method: String,
    /// Normalised.
    pub(crate) path: String,
    pub(crate) query: Option<String>,
    /// Lower case, without port; empty where a HTTP/1.0 request names none.
    pub(crate) host: String,
    pub(crate) fields: Fields,
    /// HTTP/1.1, not HTTP/1.0.
    pub(crate) http11: bool,
    pub(crate) body: Length,
    /// Whether the caller wants the connection to stay.
    pub(crate) keep_alive: bool,
    /// The protocol to change to, where one is asked for that is not HTTP again.
    pub(crate) upgrade: Option<Bytes>,
    trailers_wanted: bool,
}

impl RequestHead {
    /// Reads a complete head, which [`super::scan::HeadScan`] has passed.
    pub(crate) fn parse(raw: &Bytes) -> Result<Self, Malformed> {
        let mut headers = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut []);
        match request.parse_with_uninit_headers(raw, &mut headers) {
            Ok(httparse::Status::Complete(length)) if length == raw.len() => {}
            Ok(_) => return Err(Malformed("the head is incomplete")),
            Err(error) => return Err(Malformed(explain(error))),
        }
        let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version)
        else {
            return Err(Malformed("the head is incomplete"));
        };
        let http11 = version == 1;
        let mut fields = Fields::new(raw, request.headers);
        message::check_method(method)?;
        let host = host(&fields, http11)?;
        let target = origin_form(target, host.as_ref())?;
        let target = message::target(method, target)?;
        let body = match fields.framing()? {
            None => Length::None,
            Some(Some(length)) => Length::Known(length),
            Some(None) if http11 => Length::Chunked,
            Some(None) => return Err(Malformed("Transfer-Encoding in HTTP/1.0")),
        };
        let closes = fields.connection_has(b"close");
        let keep_alive = !closes && (http11 || fields.connection_has(b"keep-alive"));
        // An upgrade beside a body would make it a matter of opinion where the body ends.
        let upgrade = if http11 && fields.connection_has(b"upgrade") && !body.is_some() {
            wanted_upgrade(&fields)
        } else {
            None
        };
        let trailers_wanted = fields
            .values(Known::Te)
            .any(|value| message::list(value).any(|coding| coding.eq_ignore_ascii_case(b"trailers")));
        fields.drop_hop_by_hop()?;
        fields.drop_known(Known::Ours);
        Ok(Self {
            method: method.to_owned(),
            path: target.path.into_owned(),
            query: target.query.map(str::to_owned),
            host: host.map(|host| host.name).unwrap_or_default(),
            fields,
            http11,
            body,
            keep_alive,
            upgrade,
            trailers_wanted,
        })
    }

    /// Asks something about the request as policy and routes see it.
    pub(crate) fn ask<T>(&self, question: impl FnOnce(&HttpRequest<'_>) -> T) -> T {
        let query = self.query.as_deref().unwrap_or_default();
        let header = |name: &str| self.fields.joined(name);
        question(&HttpRequest {
            method: &self.method,
            path: &self.path,
            query,
            host: &self.host,
            header: &header,
        })
    }

    /// Writes the head for the upstream.
    pub(crate) fn encode(&self, changes: &HeaderChanges, out: &mut BytesMut) {
        out.reserve(256 + self.path.len() + self.query.as_ref().map_or(0, String::len));
        out.put_slice(self.method.as_bytes());
        out.put_u8(b' ');
        out.put_slice(self.path.as_bytes());
        if let Some(query) = &self.query {
            out.put_u8(b'?');
            out.put_slice(query.as_bytes());
        }
        out.put_slice(if self.http11 { b" HTTP/1.1\r\n" } else { b" HTTP/1.0\r\n" });
        self.fields.encode(changes, out);
        self.body.encode(out);
        if let Some(upgrade) = &self.upgrade {
            put_field(out, b"connection", b"upgrade");
            put_field(out, b"upgrade", upgrade);
        } else if !self.http11 {
            put_field(out, b"connection", b"close");
        } else if self.trailers_wanted {
            put_field(out, b"connection", b"te");
            put_field(out, b"te", b"trailers");
        }
        out.put_slice(b"\r\n");
    }

    /// Whether sending it a second time is as good as once (RFC 9110 section 9.2.2), and possible.
    pub(crate) fn may_retry(&self) -> bool {
        !self.body.is_some()
            && self.upgrade.is_none()
            && matches!(self.method.as_str(), "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
    }
}

fn host(fields: &Fields, http11: bool) -> Result<Option<Host>, Malformed> {
    let mut hosts = fields.values(Known::Host);
    match (hosts.next(), hosts.next()) {
        (Some(_), Some(_)) => Err(Malformed("more than one Host")),
        (Some(host), None) => Host::parse(host).map(Some),
        (None, _) if http11 => Err(Malformed("no Host")),
        (None, _) => Ok(None),
    }
}

/// The path of an absolute target whose authority is the `Host`; any other target as it is.
fn origin_form<'a>(target: &'a str, host: Option<&Host>) -> Result<&'a str, Malformed> {
    if target.starts_with('/') || target == "*" {
        return Ok(target);
    }
    let (scheme, rest) = target.split_once("://").ok_or(Malformed("the target is not a path"))?;
    let port = match scheme {
        _ if scheme.eq_ignore_ascii_case("http") => 80,
        _ if scheme.eq_ignore_ascii_case("https") => 443,
        _ => return Err(Malformed("the target's scheme is not HTTP")),
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let named = Host::parse(authority.as_bytes())?;
    if !host.is_some_and(|host| host.same(&named, port)) {
        return Err(Malformed("the target's host is not the Host"));
    }
    match path {
        "" => Ok("/"),
        _ if path.starts_with('/') => Ok(path),
        _ => Err(Malformed("the target is not a path")),
    }
}

fn wanted_upgrade(fields: &Fields) -> Option<Bytes> {
    let mut wanted = fields.values(Known::Upgrade);
    let (Some(value), None) = (wanted.next(), wanted.next()) else { return None };
    let fits = |token: &[u8]| {
        token.iter().all(|b| message::is_token_byte(*b) || *b == b'/') && !message::upgrade_refused(token)
    };
    let mut tokens = message::list(value).peekable();
    (tokens.peek().is_some() && tokens.all(fits)).then(|| Bytes::copy_from_slice(value))
}

/// What httparse did not like.
pub(super) fn explain(error: httparse::Error) -> &'static str {
    match error {
        httparse::Error::HeaderName => "invalid field name",
        httparse::Error::HeaderValue => "invalid field value",
        httparse::Error::NewLine => "invalid line end",
        httparse::Error::Status => "invalid status",
        httparse::Error::Token => "invalid first line",
        httparse::Error::TooManyHeaders => "too many fields",
        httparse::Error::Version => "not HTTP/1.0 or HTTP/1.1",
    }
}
