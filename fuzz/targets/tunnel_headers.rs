//! The headers of a CONNECT, as lines `name: value`.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|b| *b == b'\n').take(64) {
        let Some(colon) = line.iter().position(|b| *b == b':') else { continue };
        let (name, value) = line.split_at(colon);
        let Ok(name) = HeaderName::from_bytes(name) else { continue };
        let Ok(value) = HeaderValue::from_bytes(value[1..].trim_ascii()) else { continue };
        headers.append(name, value);
    }
    let (source, _) = weft_proxy::tunnel::headers::fuzz(&headers);
    for text in [&source.node, &source.namespace, &source.owner_kind, &source.owner, &source.pod] {
        assert!(text.len() <= 253);
        assert!(text.chars().all(|c| c.is_ascii_alphanumeric() || "-._:/".contains(c)));
    }
});
