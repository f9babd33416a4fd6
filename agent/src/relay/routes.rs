//! The node's routes with the MTU of each, as the kernel's tables tell them.

use std::{
    collections::HashMap,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
};

use weft_proto::weft_relay::Route;

/// Most routes that are told, and most lines that are read for them.
const MAX_ROUTES: usize = 64;
const MAX_LINES: usize = 4096;

/// Routes to networks, default routes first; those to single Pods are left out.
pub(super) fn all() -> Vec<Route> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let mut found = four(&read("/proc/net/route"));
    found.extend(six(&read("/proc/net/ipv6_route")));
    found.sort_by_key(|(destination, _)| !destination.ends_with("/0"));
    let mut mtus = HashMap::new();
    let routes = found.into_iter().filter_map(|(destination, interface)| {
        let mtu = *mtus.entry(interface.clone()).or_insert_with(|| mtu(&interface));
        Some(Route { destination, interface, mtu: mtu? })
    });
    routes.take(MAX_ROUTES).collect()
}

fn mtu(interface: &str) -> Option<u32> {
    if interface.is_empty() || interface.contains('/') || interface.starts_with('.') {
        return None;
    }
    fs::read_to_string(format!("/sys/class/net/{interface}/mtu")).ok()?.trim().parse().ok()
}

/// `/proc/net/route`: interface, destination, ..., mask in the eighth column; both in the machine's byte order.
fn four(table: &str) -> Vec<(String, String)> {
    let row = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let address = |at: usize| u32::from_str_radix(columns.get(at)?, 16).ok().map(u32::to_ne_bytes);
        let mask = u32::from_be_bytes(address(7)?);
        let destination = Ipv4Addr::from(address(1)?);
        (mask != u32::MAX).then(|| (format!("{destination}/{}", mask.leading_ones()), columns[0].to_owned()))
    };
    table.lines().skip(1).take(MAX_LINES).filter_map(row).collect()
}

/// `/proc/net/ipv6_route`: destination, its prefix length, ..., interface last. Also holds what is no way to others.
fn six(table: &str) -> Vec<(String, String)> {
    let row = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let address = Ipv6Addr::from(u128::from_str_radix(columns.first()?, 16).ok()?);
        let prefix = u8::from_str_radix(columns.get(1)?, 16).ok()?;
        let interface = *columns.last()?;
        let away =
            interface != "lo" && prefix < 128 && !address.is_multicast() && !address.is_unicast_link_local();
        away.then(|| (format!("{address}/{prefix}"), interface.to_owned()))
    };
    table.lines().take(MAX_LINES).filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_read() {
        let table = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
                     cni0\t00001A0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n\
                     veth1\t05001A0A\t00000000\t0001\t0\t0\t0\tFFFFFFFF\n\
                     eth0\t00000000\t0100630A\t0003\t0\t0\t0\t00000000\n\
                     bad\tx\n";
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(four(table), [pair("10.26.0.0/24", "cni0"), pair("0.0.0.0/0", "eth0")]);
        let zero = "0".repeat(32);
        let line = |destination: &str, prefix: &str, interface: &str| {
            format!("{destination} {prefix} {zero} 00 {zero} 00000400 1 0 3 {interface}\n")
        };
        let table = line(&zero, "00", "lo")
            + &line(&zero, "00", "eth1")
            + &line("fd000000000000000000000000000000", "40", "eth0")
            + &line("fe800000000000000000000000000000", "40", "eth0")
            + &line("ff000000000000000000000000000000", "08", "eth0");
        assert_eq!(six(&table), [pair("::/0", "eth1"), pair("fd00::/64", "eth0")]);
        assert!(four("").is_empty() && six("nothing\n").is_empty());
    }
}
