//! The head of a HTTP/2 request (RFC 9113 section 8.3), checked and written again as it was judged.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri,
    header::{HOST, TE},
    request::Parts,
    uri::{Authority, PathAndQuery, Scheme},
};
use weft_core::{http::HttpRequest, route::HeaderChanges};

use super::super::{
    h1::fields::MAX_FIELDS,
    message::{self, Host, Known, Malformed, classify},
};

/// A request as it is judged and forwarded.
#[derive(Debug, Clone)]
pub(crate) struct RequestHead {
    pub(crate) method: Method,
    /// Normalised.
    pub(crate) path: String,
    pub(crate) query: Option<String>,
    /// Lower case, without port.
    pub(crate) host: String,
    pub(crate) headers: HeaderMap,
    pub(crate) grpc: bool,
    authority: Authority,
    scheme: Scheme,
}

impl RequestHead {
    /// Checks a head. The h2 crate has already refused upper-case names, connection-specific fields and a body
    /// that contradicts its length; such a stream is reset and never seen here.
    pub(crate) fn parse(parts: Parts) -> Result<Self, Malformed> {
        let Parts { method, uri, mut headers, .. } = parts;
        message::check_method(method.as_str())?;
        if headers.len() > MAX_FIELDS {
            return Err(Malformed("too many fields"));
        }
        let uri = uri.into_parts();
        let scheme = match uri.scheme {
            Some(scheme) if scheme == Scheme::HTTP || scheme == Scheme::HTTPS => scheme,
            _ => return Err(Malformed("the scheme is not HTTP")),
        };
        let authority = authority(uri.authority, &headers, &scheme)?;
        let host = Host::parse(authority.as_str().as_bytes())?.name;
        let raw = uri.path_and_query.as_ref().map_or("", PathAndQuery::as_str);
        let target = message::target(method.as_str(), raw)?;
        let (path, query) = (target.path.into_owned(), target.query.map(str::to_owned));
        check_fields(&mut headers)?;
        let grpc = headers.get("content-type").is_some_and(|value| message::is_grpc(value.as_bytes()));
        Ok(Self { method, path, query, host, headers, grpc, authority, scheme })
    }

    /// Asks something about the request as policy and routes see it.
    pub(crate) fn ask<T>(&self, question: impl FnOnce(&HttpRequest<'_>) -> T) -> T {
        let query = self.query.as_deref().unwrap_or_default();
        let header = |name: &str| self.joined(name);
        question(&HttpRequest {
            method: self.method.as_str(),
            path: &self.path,
            query,
            host: &self.host,
            header: &header,
        })
    }

    /// The values of a name, joined.
    fn joined(&self, name: &str) -> Option<String> {
        let separator = if name.eq_ignore_ascii_case("cookie") { "; " } else { "," };
        if name.eq_ignore_ascii_case("host") {
            return Some(self.authority.as_str().to_owned());
        }
        let mut all: Option<String> = None;
        for value in self.headers.get_all(name) {
            let value = String::from_utf8_lossy(value.as_bytes());
            match &mut all {
                Some(all) => {
                    all.push_str(separator);
                    all.push_str(&value);
                }
                None => all = Some(value.into_owned()),
            }
        }
        all
    }

    /// The request for the upstream.
    pub(crate) fn into_request(mut self, changes: &HeaderChanges) -> Result<Request<()>, Malformed> {
        const INVALID: Malformed = Malformed("the request cannot be written");
        apply(&mut self.headers, changes);
        let authority = match self.headers.remove(HOST) {
            Some(host) => Authority::try_from(host.as_bytes()).map_err(|_| INVALID)?,
            None => self.authority,
        };
        let target = match &self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path,
        };
        let uri = Uri::builder().scheme(self.scheme).authority(authority).path_and_query(target);
        let mut request = Request::new(());
        *request.method_mut() = self.method;
        *request.uri_mut() = uri.build().map_err(|_| INVALID)?;
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = self.headers;
        Ok(request)
    }
}

/// `:authority`, or `Host` in its place; both only where they say the same.
fn authority(
    authority: Option<Authority>,
    headers: &HeaderMap,
    scheme: &Scheme,
) -> Result<Authority, Malformed> {
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Malformed("more than one Host"));
    }
    let default = if *scheme == Scheme::HTTPS { 443 } else { 80 };
    match (authority, host) {
        (None, None) => Err(Malformed("no Host")),
        (Some(authority), None) => Ok(authority),
        (None, Some(host)) => Authority::try_from(host.as_bytes()).map_err(|_| Malformed("invalid host")),
        (Some(authority), Some(host)) => {
            let (named, host) = (Host::parse(authority.as_str().as_bytes())?, Host::parse(host.as_bytes())?);
            if named.same(&host, default) { Ok(authority) } else { Err(Malformed("more than one Host")) }
        }
    }
}

/// Refuses what does not belong into HTTP/2 (RFC 9113 section 8.2.2) and takes our own names away.
fn check_fields(headers: &mut HeaderMap) -> Result<(), Malformed> {
    let mut lengths = headers.get_all("content-length").iter();
    if let Some(length) = lengths.next() {
        message::content_length(length.as_bytes())?;
    }
    if lengths.next().is_some() {
        return Err(Malformed("more than one Content-Length"));
    }
    if headers.get_all(TE).iter().any(|te| te != "trailers") {
        return Err(Malformed("TE other than trailers"));
    }
    let mut taken = Vec::new();
    for name in headers.keys() {
        match classify(name.as_str().as_bytes()) {
            Known::Connection
            | Known::TransferEncoding
            | Known::Upgrade
            | Known::HopByHop
            | Known::Http2Settings => return Err(Malformed("a field that belongs to HTTP/1")),
            Known::Ours | Known::Host => taken.push(name.clone()),
            _ => {}
        }
    }
    for name in taken {
        headers.remove(name);
    }
    Ok(())
}

/// Changes headers as a route says; a changed `host` stays in the map.
pub(crate) fn apply(headers: &mut HeaderMap, changes: &HeaderChanges) {
    for name in changes.remove.iter().filter(|name| message::may_change(name)) {
        headers.remove(name.as_str());
    }
    for (name, _) in changes.set.iter().filter(|(name, _)| message::may_change(name)) {
        headers.remove(name.as_str());
    }
    for (name, value) in message::added(changes) {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value))
        {
            headers.append(name, value);
        }
    }
}

/// Takes what an application may not say of the mesh, and what ends at a hop, from a response.
pub(crate) fn strip_response(headers: &mut HeaderMap, from_application: bool) {
    let taken = |name: &&HeaderName| match classify(name.as_str().as_bytes()) {
        Known::Connection | Known::TransferEncoding | Known::Upgrade | Known::HopByHop => true,
        Known::Ours => from_application,
        _ => false,
    };
    let names: Vec<_> = headers.keys().filter(taken).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}
