//! Frames of a tunnel's peer, in both roles, cut anywhere.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weft_proxy::hbone::fuzzing::frames(bytes));
