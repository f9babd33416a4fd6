//! Path normalisation: idempotent, and without anything that two servers could read differently.
#![no_main]

use weft_core::http::normalize_path;

libfuzzer_sys::fuzz_target!(|path: &str| {
    let Ok(normal) = normalize_path(path) else { return };
    assert_eq!(normalize_path(&normal).as_deref(), Ok(&*normal));
    if normal != "*" {
        assert!(normal.starts_with('/') && !normal.contains("//") && !normal.contains('\\'));
        assert!(normal.split('/').all(|segment| !matches!(segment, "." | "..")));
        let lower = normal.to_ascii_lowercase();
        assert!(["%2f", "%5c", "%00", "%2e"].iter().all(|escape| !lower.contains(escape)));
    }
});
