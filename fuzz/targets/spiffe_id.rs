//! SPIFFE ids and trust domains.
#![no_main]

use weft_core::{SpiffeId, TrustDomain};

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.as_str(), text);
        assert!(text.len() <= 2048 && TrustDomain::new(id.trust_domain()).is_ok());
    }
    drop(TrustDomain::new(text));
});
