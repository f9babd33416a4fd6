//! HTTP as policy and routes see it: the normalised path, host, headers, and how they match.

use std::borrow::Cow;

use crate::{
    policy::HttpRule,
    route::{HttpMatch, PathMatch, ValueMatch},
};

/// A request, as policy and routes look at it.
#[derive(Clone, Copy)]
pub struct HttpRequest<'a> {
    /// The method as received (methods are case-sensitive, RFC 9110 section 9.1).
    pub method: &'a str,
    /// The path after [`normalize_path`], without the query.
    pub path: &'a str,
    /// The query without `?`, empty where there is none.
    pub query: &'a str,
    /// The host, lower case, without port.
    pub host: &'a str,
    /// Looks a header up by its lower-case name; several values are joined with `,` (RFC 9110 section 5.3).
    pub header: &'a dyn Fn(&str) -> Option<String>,
}

/// A path that is refused, never interpreted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the path is refused: {0}")]
pub struct InvalidPath(pub &'static str);

/// Normalises a path: percent-encoded unreserved characters are decoded (RFC 3986 section 6.2.2.2), other escapes
/// written in upper case, `//` collapsed, `.` and `..` resolved. A path that is already normal is borrowed.
///
/// # Errors
/// For what two servers could read differently: `%2F`, `%5C`, `%00`, a broken escape, `\`, control or non-ASCII
/// characters, `#`, `..` above the root, and anything that begins with neither `/` nor is `*`.
pub fn normalize_path(path: &str) -> Result<Cow<'_, str>, InvalidPath> {
    if path == "*" {
        return Ok(path.into());
    }
    if !path.starts_with('/') {
        return Err(InvalidPath("it does not begin with '/'"));
    }
    let decoded = decode(path)?;
    if is_normal(&decoded) {
        return Ok(decoded);
    }
    let mut segments: Vec<&str> = Vec::new();
    let mut directory = false;
    for segment in decoded.split('/') {
        directory = matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
            ".." => {
                segments.pop().ok_or(InvalidPath("'..' leads above the root"))?;
            }
            other => segments.push(other),
        }
    }
    let mut normal = String::with_capacity(decoded.len());
    for segment in &segments {
        normal.push('/');
        normal.push_str(segment);
    }
    if directory || normal.is_empty() {
        normal.push('/');
    }
    Ok(normal.into())
}

fn is_normal(path: &str) -> bool {
    path.split('/').skip(1).collect::<Vec<_>>().split_last().is_none_or(|(last, rest)| {
        !matches!(*last, "." | "..") && rest.iter().all(|s| !matches!(*s, "" | "." | ".."))
    })
}

fn decode(path: &str) -> Result<Cow<'_, str>, InvalidPath> {
    let bytes = path.as_bytes();
    for &byte in bytes {
        match byte {
            b'\\' => return Err(InvalidPath("it holds a backslash")),
            b'#' | b'?' => return Err(InvalidPath("it holds '#' or '?'")),
            0x21..=0x7e => {}
            _ => return Err(InvalidPath("it holds a control, space or non-ASCII character")),
        }
    }
    if !bytes.contains(&b'%') {
        return Ok(path.into());
    }
    let mut out = String::with_capacity(path.len());
    let mut rest = bytes;
    while let [byte, tail @ ..] = rest {
        if *byte != b'%' {
            out.push(char::from(*byte));
            rest = tail;
            continue;
        }
        let value = escaped(tail).ok_or(InvalidPath("it holds a broken escape"))?;
        let tail = &tail[2..];
        match value {
            b'/' | b'\\' | 0 => return Err(InvalidPath("it holds an encoded '/', '\\' or NUL")),
            b'-' | b'.' | b'_' | b'~' => out.push(char::from(value)),
            v if v.is_ascii_alphanumeric() => out.push(char::from(v)),
            v => out.push_str(&format!("%{v:02X}")),
        }
        rest = tail;
    }
    Ok(out.into())
}

impl PathMatch {
    /// Whether a normalised path matches. A prefix matches whole segments: `/a` matches `/a` and `/a/b`, not `/ab`.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => path == exact.as_ref(),
            Self::PathPrefix(prefix) => {
                let prefix = prefix.trim_end_matches('/');
                path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

impl ValueMatch {
    fn matches_header(&self, request: &HttpRequest<'_>) -> bool {
        (request.header)(&self.name).is_some_and(|v| v == self.value.as_ref())
    }

    /// Compares the first parameter of that name (Gateway API HTTPQueryParamMatch), both percent-decoded.
    fn matches_query(&self, request: &HttpRequest<'_>) -> bool {
        request
            .query
            .split('&')
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .find(|(name, _)| decode_query(name) == self.name.as_bytes())
            .is_some_and(|(_, value)| decode_query(value) == self.value.as_bytes())
    }
}

fn decode_query(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, mut tail)) = rest.split_first() {
        out.push(match byte {
            b'+' => b' ',
            b'%' => match escaped(tail) {
                Some(value) => {
                    tail = &tail[2..];
                    value
                }
                None => b'%',
            },
            other => other,
        });
        rest = tail;
    }
    out
}

/// The byte that two hexadecimal digits at the beginning of `text` stand for.
fn escaped(text: &[u8]) -> Option<u8> {
    let hex = |byte: &u8| char::from(*byte).to_digit(16);
    u8::try_from(hex(text.first()?)? * 16 + hex(text.get(1)?)?).ok()
}

impl HttpMatch {
    /// Whether a request matches: all parts must hold.
    pub fn matches(&self, request: &HttpRequest<'_>) -> bool {
        self.path.as_ref().is_none_or(|p| p.matches(request.path))
            && self.method.as_ref().is_none_or(|m| m.as_ref() == request.method)
            && self.headers.iter().all(|h| h.matches_header(request))
            && self.query.iter().all(|q| q.matches_query(request))
    }
}

impl HttpRule {
    /// Whether a request matches: every part that is not empty must hold.
    pub fn matches(&self, request: &HttpRequest<'_>) -> bool {
        (self.methods.is_empty() || self.methods.iter().any(|m| m.as_ref() == request.method))
            && (self.paths.is_empty() || self.paths.iter().any(|p| p.matches(request.path)))
            && (self.hosts.is_empty() || self.hosts.iter().any(|h| host_matches(h, request.host)))
            && self.headers.iter().all(|h| h.matches_header(request))
    }
}

fn host_matches(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
        None => pattern == host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_forms() {
        for (given, normal) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a/b/", "/a/b/"),
            ("//a///b", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/%61dmin", "/admin"),
            ("/%2e%2E/../x", "!"),
            ("/a/%2e%2e/b", "/b"),
            ("/caf%c3%a9", "/caf%C3%A9"),
            ("/100%25", "/100%25"),
            ("*", "*"),
            ("//", "/"),
            ("/..", "!"),
            ("/a%2Fb", "!"),
            ("/a%5cb", "!"),
            ("/a%00", "!"),
            ("/a%", "!"),
            ("/a%4", "!"),
            ("/a%zz", "!"),
            ("/a\\b", "!"),
            ("/a b", "!"),
            ("/é", "!"),
            ("/a#b", "!"),
            ("a", "!"),
            ("", "!"),
        ] {
            let got = normalize_path(given);
            assert_eq!(got.as_deref().unwrap_or("!"), normal, "{given}");
        }
    }

    proptest::proptest! {
        #[test]
        fn normalising_twice_changes_nothing(path in "/[a-z%0-9./~A-F-]{0,24}") {
            if let Ok(once) = normalize_path(&path) {
                let twice = normalize_path(&once).expect("a normal path is accepted");
                proptest::prop_assert_eq!(&twice, &once);
                proptest::prop_assert!(!once.contains("//") && !once.contains("/../") && !once.contains("/./"));
            }
        }
    }

    #[test]
    fn prefixes_go_by_segments() {
        let prefix = |p: &str| PathMatch::PathPrefix(p.into());
        assert!(prefix("/a").matches("/a") && prefix("/a").matches("/a/") && prefix("/a/").matches("/a/b"));
        assert!(!prefix("/a").matches("/ab") && prefix("/").matches("/x"));
    }

    #[test]
    fn queries_and_hosts() {
        let header = |_: &str| None;
        let request = HttpRequest {
            method: "GET",
            path: "/",
            query: "a=1&b=x%20y&a=2",
            host: "w.shop",
            header: &header,
        };
        let query = |n: &str, v: &str| ValueMatch { name: n.into(), value: v.into() }.matches_query(&request);
        assert!(query("a", "1") && !query("a", "2") && query("b", "x y") && !query("c", ""));
        assert!(
            host_matches("*.shop", "w.shop")
                && !host_matches("*.shop", ".shop")
                && !host_matches("shop", "w.shop")
        );
    }
}
