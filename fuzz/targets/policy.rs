//! AuthorizationPolicies: YAML to the rules that are enforced.
#![no_main]

use weft_api::{AuthorizationPolicy, convert::authorization};

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(policy) = serde_yaml_ng::from_str::<AuthorizationPolicy>(text) {
        drop(authorization::convert(&policy));
    }
});
