//! Heads and bodies of HTTP/1 requests and responses; what is forwarded must be what was judged.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weft_proxy::http::fuzzing::http1(bytes));
