//! The packet walk of the packet hooks, over IPv4 and IPv6.
#![no_main]

use weft_ebpf_common::packet::{self, ETH_IP4, ETH_IP6, ETH_LEN};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for ethertype in [ETH_IP4, ETH_IP6] {
        for offset in [0, ETH_LEN, u32::MAX] {
            if let Some(packet) = packet::parse(&bytes, offset, ethertype) {
                assert!(packet.fragment <= packet::fragment::LATER);
            }
        }
    }
});
