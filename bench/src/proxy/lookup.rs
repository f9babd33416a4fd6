//! What the kernel's judgement of a packet costs with 100,000 rows of policy: the whole program that sees what leaves a
//! Pod, over its real maps.

use anyhow::{Result, ensure};
use weft_bpf_tests::{
    load,
    packet::{Body, Packet},
    tables::{FAMILIES, Maps, OWN, PEER, own_pod},
    test_run::{PASS, time},
};
use weft_ebpf_common::codes::{info, map, pod, program, proto, verdict};

/// Rows: of two destinations, for ports from 1 on.
const ROWS: u16 = 50_000;
/// Packets that are each seen once.
const COLD: u16 = 20_000;
/// Runs over one packet.
const HOT: u32 = 1_000_000;

/// Nanoseconds for a packet whose rows the processor has at hand, and for one whose rows it has not.
///
/// # Errors
/// When the programs do not load (run as root), or a packet is not let through.
pub(crate) fn measure() -> Result<(f64, f64)> {
    let mut bpf = load(&[program::FROM_POD])?;
    let [family, _] = FAMILIES;
    let mut maps = Maps(&mut bpf);
    maps.set(map::VETHS, 1_u32, own_pod(pod::PERMISSIVE))?;
    maps.describe(family.own, OWN, info::ENROLLED | info::LOCAL)?;
    let flags = info::ENROLLED | info::LOCAL | info::SHORTCUT_OK | info::POLICED;
    maps.describe(family.peer, PEER, flags)?;
    maps.describe(family.world, PEER + 1, flags)?;
    for port in 1..=ROWS {
        for destination in [PEER, PEER + 1] {
            maps.row(OWN, destination, port, proto::UDP, verdict::ALLOW)?;
        }
    }
    let once = |port: u16, repeat: u32| -> Result<u32> {
        let to = if port.is_multiple_of(2) { family.peer } else { family.world };
        let frame = Packet::new(family.own, to, Body::Udp(4_000, port)).frame();
        let (judged, nanoseconds) = time(&bpf, program::FROM_POD, &frame, repeat)?;
        ensure!(judged == PASS, "port {port} is refused");
        Ok(nanoseconds)
    };
    once(1, HOT / 10)?;
    let hot = once(1, HOT)?;
    // A step without a common divisor with the number of rows: neighbours in the map do not follow each other.
    let ports = (0..COLD).map(|n| (u32::from(n) * 7_919 % u32::from(ROWS)) as u16 + 1);
    let sum = ports
        .map(|port| once(port, 1))
        .try_fold(0_u64, |sum, ns| Ok::<_, anyhow::Error>(sum + u64::from(ns?)))?;
    Ok((hot.into(), sum as f64 / f64::from(COLD)))
}
