//! Certificates that a peer shows: only the seed, which the root of this target signed, may be accepted.
#![no_main]

use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};
use weft_core::TrustDomain;

const ROOT: &[u8] = include_bytes!("../seeds/svid/root.der");
const LEAF: &[u8] = include_bytes!("../seeds/svid/leaf.der");
/// Within the life of both, in seconds since the epoch.
const NOW: u64 = 1_800_000_000;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let leaf = CertificateDer::from(bytes);
    drop(weft_identity::peer_identity(std::slice::from_ref(&leaf)));
    let Ok(domain) = TrustDomain::new("mesh.test") else { return };
    let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW));
    let accepted = weft_identity::fuzz_verify(domain, &CertificateDer::from(ROOT), &leaf, now);
    assert_eq!(accepted.is_ok(), bytes == LEAF, "{accepted:?}");
});
