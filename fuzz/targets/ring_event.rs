//! Records of the kernel's event ring.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = weft_agent::datapath::fuzz_event(bytes);
});
