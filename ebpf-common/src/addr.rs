//! Addresses as the maps hold them, and the ranges that have a meaning of their own.

/// An address in network order; IPv4 as `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2).
pub type Addr = [u8; 16];

/// The unspecified IPv6 address; stands for "none" in [`crate::Pod`].
pub const NONE: Addr = [0; 16];

/// `::1`.
pub const LOOPBACK6: Addr = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// How many loopback /16s outgoing connections are spread over (`127.64.0.0/16` and the ones after it), because one
/// destination address alone caps a Pod at one range of source ports.
pub const REDIRECT_SPREAD: u32 = 32;

/// How many of them are used for the node's own network, where each needs a listener of its own. A power of two.
pub const HOST_SPREAD: u32 = 4;

/// The proxy dials applications from `127.0.0.6` to `127.0.0.13` (and from `::1`).
pub const DIAL_FIRST: u8 = 6;
/// The last of the proxy's dialling addresses: see [`DIAL_FIRST`].
pub const DIAL_LAST: u8 = 13;

/// An IPv4 address in the form of the maps.
#[inline(always)]
pub const fn v4(octets: [u8; 4]) -> Addr {
    from_words([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), u32::from_ne_bytes(octets)])
}

/// True for an IPv4 address in its mapped form.
#[inline(always)]
pub fn is_v4(addr: &Addr) -> bool {
    let [high, middle, low, _] = words(addr);
    high == 0 && middle == 0 && low == u32::from_ne_bytes([0, 0, 0xff, 0xff])
}

/// True where both are the same address. Word by word, because BPF has no `memcmp`.
#[inline(always)]
pub fn same(a: &Addr, b: &Addr) -> bool {
    let (a, b) = (words(a), words(b));
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

/// The address as four words in memory order.
#[inline(always)]
pub const fn words(addr: &Addr) -> [u32; 4] {
    // SAFETY: both are sixteen bytes of integers. Byte-wise assembly would cost the BPF programs a shift per byte.
    unsafe { core::mem::transmute::<Addr, [u32; 4]>(*addr) }
}

/// The address as two numbers, of an order that is the same everywhere on a machine and means nothing else.
#[inline(always)]
pub const fn halves(addr: &Addr) -> [u64; 2] {
    // SAFETY: both are sixteen bytes of integers.
    unsafe { core::mem::transmute::<Addr, [u64; 2]>(*addr) }
}

/// The address of four words in memory order (network order bytes), as the kernel's contexts hold them.
#[inline(always)]
pub const fn from_words(words: [u32; 4]) -> Addr {
    // SAFETY: as in `words`.
    unsafe { core::mem::transmute::<[u32; 4], Addr>(words) }
}

/// True for `0.0.0.0` and `::`, which a connect takes for loopback.
#[inline(always)]
pub fn is_unspecified(addr: &Addr) -> bool {
    let [high, middle, low, last] = words(addr);
    last == 0 && ((high | middle | low) == 0 || is_v4(addr))
}

/// True for `127.0.0.0/8` (mapped too) and `::1`.
#[inline(always)]
pub fn is_loopback(addr: &Addr) -> bool {
    (is_v4(addr) && addr[12] == 127) || same(addr, &LOOPBACK6)
}

/// True for `127.64.0.0/10`, where redirected IPv4 connections go.
#[inline(always)]
pub fn is_redirect_range(addr: &Addr) -> bool {
    is_v4(addr) && addr[12] == 127 && addr[13] & 0xc0 == 64
}

/// True for the addresses the proxy dials applications from.
#[inline(always)]
pub fn is_dial_source(addr: &Addr) -> bool {
    is_v4(addr)
        && addr[12] == 127
        && addr[13] == 0
        && addr[14] == 0
        && addr[15] >= DIAL_FIRST
        && addr[15] <= DIAL_LAST
}

/// True for `fe80::/10`.
#[inline(always)]
pub fn is_link_local6(addr: &Addr) -> bool {
    addr[0] == 0xfe && addr[1] & 0xc0 == 0x80
}

/// True for multicast and IPv4 broadcast.
#[inline(always)]
pub fn is_multicast(addr: &Addr) -> bool {
    if is_v4(addr) {
        addr[12] >= 224 && addr[12] < 240 || words(addr)[3] == u32::MAX
    } else {
        addr[0] == 0xff
    }
}

/// Where an outgoing IPv4 connection of the Pod with this slot is sent; `spread` is any number.
#[inline(always)]
pub fn redirect4(slot: u32, spread: u32) -> [u8; 4] {
    [127, 64 + (spread % REDIRECT_SPREAD) as u8, (slot >> 8) as u8, slot as u8]
}

/// The slot that an address of [`redirect4`] carries.
#[inline(always)]
pub fn redirect_slot(addr: &Addr) -> u32 {
    (addr[14] as u32) << 8 | addr[15] as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert!(
            is_loopback(&v4([127, 0, 0, 6])) && is_loopback(&LOOPBACK6) && !is_loopback(&v4([10, 0, 0, 1]))
        );
        assert!(is_unspecified(&NONE) && is_unspecified(&v4([0; 4])) && !is_unspecified(&LOOPBACK6));
        assert!(is_redirect_range(&v4([127, 127, 0, 1])) && !is_redirect_range(&v4([127, 128, 0, 1])));
        assert!(is_dial_source(&v4([127, 0, 0, 13])) && !is_dial_source(&v4([127, 0, 0, 1])));
        assert!(
            is_multicast(&v4([224, 0, 0, 1])) && is_multicast(&v4([255; 4])) && !is_multicast(&v4([10; 4]))
        );
        let mut all = NONE;
        all[0] = 0xff;
        assert!(is_multicast(&all));
    }

    #[test]
    fn slots_survive_the_way_through_an_address() {
        for slot in [0, 1, 255, 256, 65_535] {
            for spread in [0, 31, 32, u32::MAX] {
                let addr = v4(redirect4(slot, spread));
                assert!(is_redirect_range(&addr), "{addr:?}");
                assert_eq!(redirect_slot(&addr), slot);
            }
        }
    }

    #[test]
    fn words_round_trip() {
        let addr = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
        assert_eq!(from_words(words(&addr)), addr);
    }
}
