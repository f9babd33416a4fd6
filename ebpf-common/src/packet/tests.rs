use proptest::prelude::*;

use super::*;

fn ip4(proto: u8, fragment_bits: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45 + (options.len() / 4) as u8, 0, 0, 0, 0x12, 0x34, 0, 0, 64, proto, 0, 0];
    packet[6..8].copy_from_slice(&fragment_bits.to_be_bytes());
    packet.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend(options);
    packet.extend(payload);
    packet
}

fn ip6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
    packet.extend([0xfd; 16]);
    packet.extend([0xfe; 16]);
    packet.extend(payload);
    packet
}

const UDP_HEADER: [u8; 8] = [0x30, 0x39, 0, 53, 0, 8, 0, 0];

fn get(bytes: &[u8]) -> Option<Packet> {
    let ethertype = if bytes[0] >> 4 == 4 { ETH_IP4 } else { ETH_IP6 };
    parse(&bytes, 0, ethertype)
}

#[test]
fn ports_are_found_behind_extension_headers() {
    assert_eq!(get(&ip4(UDP, 0, &[], &UDP_HEADER)).map(|p| (p.sport, p.dport)), Some((12_345, 53)));
    let mut payload = vec![60, 0, 0, 0, 0, 0, 0, 0, UDP, 1];
    payload.extend([0; 14]);
    payload.extend(UDP_HEADER);
    assert_eq!(get(&ip6(0, &payload)).map(|p| (p.proto, p.dport)), Some((UDP, 53)));
}

#[test]
fn hiding_headers_are_refused() {
    for hidden in [50, 51, 59, 135, 253] {
        assert_eq!(get(&ip6(hidden, &[0; 64])), None, "{hidden}");
    }
    assert_eq!(get(&ip6(43, &[UDP, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])), None, "segments left");
    assert_eq!(get(&ip4(UDP, 0, &[131, 4, 0, 0], &UDP_HEADER)), None, "source route");
    assert!(get(&ip4(2, 0, &[0x94, 4, 0, 0], &[0x16; 8])).is_some(), "IGMP router alert");
}

#[test]
fn at_most_eight_extension_headers() {
    for (count, passes) in [(8, true), (9, false)] {
        let mut payload = Vec::new();
        for left in (0..count).rev() {
            payload.extend([if left == 0 { UDP } else { 60 }, 0, 0, 0, 0, 0, 0, 0]);
        }
        payload.extend(UDP_HEADER);
        assert_eq!(get(&ip6(60, &payload)).is_some(), passes, "{count}");
    }
}

#[test]
fn fragments_are_told_apart() {
    let first = get(&ip4(UDP, 0x2000, &[], &UDP_HEADER)).expect("first");
    assert_eq!((first.fragment, first.fragment_id, first.dport), (fragment::FIRST, 0x1234, 53));
    let later = get(&ip4(UDP, 0x0010, &[], &[])).expect("later");
    assert_eq!((later.fragment, later.fragment_id, later.dport), (fragment::LATER, 0x1234, 0));
    assert_eq!(get(&ip4(TCP, 1, &[], &[0; 20])), None, "rewrites the flags");

    let header = |bits: u16| {
        [vec![UDP, 0], bits.to_be_bytes().to_vec(), vec![0, 0, 0, 9], UDP_HEADER.to_vec()].concat()
    };
    assert_eq!(get(&ip6(44, &header(0))).map(|p| (p.fragment, p.dport)), Some((fragment::NONE, 53)));
    assert_eq!(get(&ip6(44, &header(1))).map(|p| (p.fragment, p.dport)), Some((fragment::FIRST, 53)));
    assert_eq!(get(&ip6(44, &header(16))).map(|p| (p.fragment, p.fragment_id)), Some((fragment::LATER, 9)));
}

#[test]
fn control_messages_are_known_and_nothing_else_is() {
    let icmp = |kind: u8| get(&ip4(ICMP, 0, &[], &[kind, 0, 0, 0, 0, 7, 0, 0])).expect("ICMP");
    let icmp6 = |kind: u8| get(&ip6(ICMP6, &[kind, 0, 0, 0, 0, 7, 0, 0])).expect("ICMPv6");
    assert!([3, 4, 11, 12].into_iter().all(|kind| icmp(kind).control));
    assert!([0, 5, 8, 13].into_iter().all(|kind| !icmp(kind).control));
    assert!([1, 2, 130, 133, 135, 136, 143].into_iter().all(|kind| icmp6(kind).control));
    assert!([128, 129, 137, 200].into_iter().all(|kind| !icmp6(kind).control));
    assert_eq!((icmp(8).sport, icmp(8).dport, icmp(0).sport, icmp(0).dport), (7, 0, 0, 7));
    assert_eq!(icmp(8).policy_port(), 0);
}

#[test]
fn headers_cut_short_are_refused() {
    for whole in
        [ip4(TCP, 0, &[], &[0; 20]), ip6(TCP, &[0; 20]), ip6(44, &[UDP, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 2])]
    {
        let needed = (1..=whole.len()).find(|&length| get(&whole[..length]).is_some());
        assert!(needed.is_some_and(|needed| needed >= 34), "{needed:?}");
    }
}

proptest! {
    /// What is read in place is what the whole reading says; and it says so of every plain segment.
    #[test]
    fn a_plain_segment_is_read_alike(
        mut bytes in prop::collection::vec(any::<u8>(), 14..100),
        six: bool,
        plain in prop::bool::weighted(0.8),
    ) {
        if let Some(ip) = bytes.get_mut(14..).filter(|ip| plain && ip.len() >= 40) {
            ip[0] = if six { 0x60 } else { 0x45 };
            ip[if six { 6 } else { 9 }] = TCP;
            if !six {
                ip[6] &= 0x43;
                ip[7] = 0;
            }
        }
        let ethertype = if six { ETH_IP6 } else { ETH_IP4 };
        let whole = parse(&&*bytes, ETH_LEN, ethertype);
        match (plain_segment(&&*bytes, ethertype), whole) {
            (Some((src, flags)), Some(whole)) => {
                prop_assert_eq!((src, flags, TCP), (whole.src, whole.tcp_flags, whole.proto));
                prop_assert_eq!((whole.fragment, whole.control), (fragment::NONE, false));
            }
            (Some(_), None) => prop_assert!(false, "only in place"),
            (None, Some(whole)) => prop_assert!(
                whole.proto != TCP || whole.fragment != fragment::NONE || (six && bytes[14 + 6] != TCP)
            ),
            (None, None) => {}
        }
    }

    /// As above, of all that is judged.
    #[test]
    fn a_plain_packet_is_read_alike(
        mut bytes in prop::collection::vec(any::<u8>(), 14..100),
        six: bool,
        proto in prop::sample::select(vec![TCP, UDP, ICMP, ICMP6, 2, 44, 50, 60]),
    ) {
        if let Some(ip) = bytes.get_mut(14..).filter(|ip| ip.len() >= 40) {
            ip[0] = if six { 0x60 } else { 0x45 };
            ip[if six { 6 } else { 9 }] = proto;
        }
        let ethertype = if six { ETH_IP6 } else { ETH_IP4 };
        let whole = parse(&&*bytes, ETH_LEN, ethertype);
        match parse_plain(&&*bytes, ethertype) {
            Some(plain) => prop_assert_eq!(Some(plain), whole),
            None => prop_assert!(whole.is_none() || (six && ![TCP, UDP, ICMP6].contains(&bytes[14 + 6]))),
        }
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(mut bytes in prop::collection::vec(any::<u8>(), 1..200), six: bool) {
        bytes[0] = if six { 0x60 } else { 0x45 };
        let _ = get(&bytes);
    }
}
