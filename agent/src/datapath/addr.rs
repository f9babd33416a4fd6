//! Addresses between `std` and the maps' form.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use weft_ebpf_common::{Addr, addr};

/// The maps' form: network order, IPv4 mapped.
pub(super) fn encode(address: IpAddr) -> Addr {
    match address.to_canonical() {
        IpAddr::V4(a) => addr::v4(a.octets()),
        IpAddr::V6(a) => a.octets(),
    }
}

/// Back; a mapped address is IPv4.
pub(super) fn decode(address: Addr) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(address)).to_canonical()
}

/// Back, with a port.
pub(super) fn socket(address: Addr, port: u16) -> SocketAddr {
    SocketAddr::new(decode(address), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_there_and_back() {
        for text in ["10.1.2.3", "fd00::1", "0.0.0.0", "::", "::1"] {
            let address: IpAddr = text.parse().expect("address");
            assert_eq!(decode(encode(address)), address, "{text}");
        }
        assert_eq!(
            encode("::ffff:10.0.0.1".parse().expect("mapped")),
            encode("10.0.0.1".parse().expect("v4"))
        );
    }
}
