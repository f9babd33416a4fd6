//! Records of a tunnel's peer: what they carry, and what is none.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weft_proxy::tls::record::fuzzing::records(bytes));
