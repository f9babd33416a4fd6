//! The header fields of a parsed head, as slices of its bytes.

use bytes::{BufMut, Bytes, BytesMut};
use weft_core::route::HeaderChanges;

use super::super::message::{self, Known, Malformed, classify};

/// The most fields of a head.
pub(crate) const MAX_FIELDS: usize = 100;

#[derive(Debug, Clone, Copy)]
struct Field {
    name: (u32, u32),
    value: (u32, u32),
    known: Known,
    dropped: bool,
}

/// One field.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FieldRef<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) value: &'a [u8],
    pub(crate) known: Known,
}

/// The fields of a head; those that end here are marked as dropped and neither judged nor forwarded.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    raw: Bytes,
    list: Vec<Field>,
}

impl Fields {
    /// Takes what httparse found in `raw`.
    pub(crate) fn new(raw: &Bytes, parsed: &[httparse::Header<'_>]) -> Self {
        let base = raw.as_ptr() as usize;
        // httparse yields slices of its input, which is `raw`; a head is far below 4 GiB.
        let span = |part: &[u8]| {
            let start = (part.as_ptr() as usize).saturating_sub(base);
            (start as u32, (start + part.len()) as u32)
        };
        let field = |header: &httparse::Header<'_>| {
            let (name, value) = (header.name.as_bytes(), header.value);
            // An empty slice may point anywhere.
            let value = if value.is_empty() { (0, 0) } else { span(value) };
            Field { name: span(name), value, known: classify(name), dropped: false }
        };
        Self { raw: raw.clone(), list: parsed.iter().map(field).collect() }
    }

    fn part(&self, (start, end): (u32, u32)) -> &[u8] {
        self.raw.get(start as usize..end as usize).unwrap_or_default()
    }

    fn field(&self, field: &Field) -> FieldRef<'_> {
        FieldRef { name: self.part(field.name), value: self.part(field.value), known: field.known }
    }

    /// All fields that are not dropped.
    pub(crate) fn iter(&self) -> impl Iterator<Item = FieldRef<'_>> {
        self.list.iter().filter(|field| !field.dropped).map(|field| self.field(field))
    }

    /// The values of a kind, dropped or not.
    pub(crate) fn values(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        self.list.iter().filter(move |field| field.known == known).map(|field| self.part(field.value))
    }

    /// Drops every field of a kind.
    pub(crate) fn drop_known(&mut self, known: Known) {
        self.list.iter_mut().filter(|field| field.known == known).for_each(|field| field.dropped = true);
    }

    /// Drops what concerns one connection only: `Connection`, everything that it names, and the like.
    ///
    /// The fields that frame or address a message may not be named: dropping them would change what was judged.
    pub(crate) fn drop_hop_by_hop(&mut self) -> Result<(), Malformed> {
        let raw = self.raw.clone();
        let part = |(start, end): (u32, u32)| raw.get(start as usize..end as usize).unwrap_or_default();
        for index in 0..self.list.len() {
            let Some(field) = self.list.get(index).copied() else { break };
            if field.known != Known::Connection {
                continue;
            }
            for option in message::list(part(field.value)) {
                match classify(option) {
                    Known::ContentLength | Known::TransferEncoding | Known::Host | Known::Connection => {
                        return Err(Malformed("Connection names a field that it may not"));
                    }
                    _ => {}
                }
                for named in &mut self.list {
                    if part(named.name).eq_ignore_ascii_case(option) {
                        named.dropped = true;
                    }
                }
            }
        }
        for field in &mut self.list {
            if matches!(
                field.known,
                Known::Connection | Known::HopByHop | Known::Te | Known::Upgrade | Known::Http2Settings
            ) {
                field.dropped = true;
            }
        }
        Ok(())
    }

    /// The body length that the fields announce: `Content-Length`, or `None` for chunked where `Transfer-Encoding`
    /// says so. The outer `Option` is empty where neither is there.
    pub(crate) fn framing(&self) -> Result<Option<Option<u64>>, Malformed> {
        let mut lengths = self.values(Known::ContentLength);
        let mut codings = self.values(Known::TransferEncoding);
        match (lengths.next(), codings.next()) {
            (Some(_), Some(_)) => Err(Malformed("Content-Length together with Transfer-Encoding")),
            (Some(length), None) => {
                if lengths.next().is_some() {
                    return Err(Malformed("more than one Content-Length"));
                }
                Ok(Some(Some(message::content_length(length)?)))
            }
            (None, Some(coding)) => {
                if codings.next().is_some() || !coding.eq_ignore_ascii_case(b"chunked") {
                    return Err(Malformed("Transfer-Encoding other than chunked"));
                }
                Ok(Some(None))
            }
            (None, None) => Ok(None),
        }
    }

    /// Whether `Connection` has this option.
    pub(crate) fn connection_has(&self, option: &[u8]) -> bool {
        self.values(Known::Connection)
            .any(|value| message::list(value).any(|found| found.eq_ignore_ascii_case(option)))
    }

    /// The values of a name that is judged and forwarded, joined.
    pub(crate) fn joined(&self, name: &str) -> Option<String> {
        let separator = if name.eq_ignore_ascii_case("cookie") { "; " } else { "," };
        let mut all: Option<String> = None;
        for field in self.iter().filter(|field| field.name.eq_ignore_ascii_case(name.as_bytes())) {
            let value = String::from_utf8_lossy(field.value);
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

    /// Writes what is forwarded, changed as a route says. Framing fields are left out: who writes the body writes
    /// them.
    pub(crate) fn encode(&self, changes: &HeaderChanges, out: &mut BytesMut) {
        let unchanged = changes.remove.is_empty() && changes.set.is_empty();
        for field in self.iter() {
            let framing = matches!(field.known, Known::ContentLength | Known::TransferEncoding);
            if !framing && (unchanged || !message::replaced(changes, field.name)) {
                put_field(out, field.name, field.value);
            }
        }
        for (name, value) in message::added(changes) {
            put_field(out, name.as_bytes(), value.as_bytes());
        }
    }
}

/// Writes one field line.
pub(crate) fn put_field(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    out.reserve(name.len() + value.len() + 4);
    out.put_slice(name);
    out.put_slice(b": ");
    out.put_slice(value);
    out.put_slice(b"\r\n");
}
