//! Types that cross the kernel line, and the pure logic both sides share.
//!
//! Everything here is `no_std`: the BPF programs write these types into maps, the agent reads them back, and host
//! tests run the very functions the kernel runs. Addresses are 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`;
//! ports are in host order; there are no enums and no implicit padding in a shared struct, so that any bit pattern
//! is a value.
#![cfg_attr(not(test), no_std)]

pub mod addr;
pub mod codes;
pub mod judge;
pub mod packet;
pub mod types;

pub use addr::Addr;
pub use types::*;
