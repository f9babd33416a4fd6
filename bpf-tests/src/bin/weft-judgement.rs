//! What the kernel's judgement of a packet costs with 100,000 rows of policy: the whole program that sees what leaves a
//! Pod, over its real maps, less what it costs to call it for nothing: where the rows of policy, addresses and the flow are
//! at hand of the processor, where they are not, and of the first packet of a flow, which is noted and told of. Prints
//! `{"hot_ns":...,"cold_ns":...,"first_ns":...}`. Needs root.

#![allow(clippy::print_stdout, reason = "what it prints is what it is for")]

use anyhow::{Result, ensure};
use aya::Ebpf;
use weft_bpf_tests::{
    load,
    packet::{Body, Packet},
    tables::{FAMILIES, Maps, OWN, PEER, own_pod},
    test_run::{PASS, time},
};
use weft_ebpf_common::codes::{info, map, pod, program, proto, verdict};

/// Rows: of two destinations, for ports from 1 on.
const ROWS: u16 = 50_000;
/// Packets that come one after the other, so that the rows of each are long out of the processor's reach.
const COLD: u16 = 20_000;
/// Packets that are seen again and again.
const AT_HAND: usize = 64;
/// Runs over each of them.
const REPEAT: u32 = 20_000;

fn main() -> Result<()> {
    let Times { hot, cold, first } = measure()?;
    println!(r#"{{"hot_ns":{hot:.1},"cold_ns":{cold:.1},"first_ns":{first:.1}}}"#);
    Ok(())
}

/// Nanoseconds for a packet.
struct Times {
    hot: f64,
    cold: f64,
    first: f64,
}

/// Measures.
///
/// # Errors
/// When the programs do not load (run as root), or a packet is not let through.
fn measure() -> Result<Times> {
    let mut bpf = load(&[program::FROM_POD])?;
    let [family, _] = FAMILIES;
    let frame = |port: u16| {
        let to = if port.is_multiple_of(2) { family.peer } else { family.world };
        Packet::new(family.own, to, Body::Udp(4_000, port)).frame()
    };
    // Of an interface that is no Pod's the program wants nothing.
    let frames = [frame(1)];
    let (nothing_hot, nothing_cold) =
        (hot(&bpf, &frames)?, cold(&bpf, frames.iter().cycle().take(COLD.into()))?);
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
    // A step without a common divisor with the number of rows: neighbours in the map do not follow each other.
    let ports = (0..COLD).map(|n| (u32::from(n) * 7_919 % u32::from(ROWS)) as u16 + 1);
    let frames: Vec<Vec<u8>> = ports.map(frame).collect();
    let first = cold(&bpf, frames.iter())? - nothing_cold;
    let cold = cold(&bpf, frames.iter())? - nothing_cold;
    let hot = hot(&bpf, frames.get(..AT_HAND).unwrap_or_default())? - nothing_hot;
    Ok(Times { hot, cold, first })
}

/// Nanoseconds of a run, where each of these packets comes again and again.
fn hot(bpf: &Ebpf, frames: &[Vec<u8>]) -> Result<f64> {
    let mut sum = 0.0;
    for frame in frames {
        let (judged, nanoseconds) = time(bpf, program::FROM_POD, frame, REPEAT)?;
        ensure!(judged == PASS, "a packet is refused");
        sum += f64::from(nanoseconds);
    }
    Ok(sum / frames.len() as f64)
}

/// Nanoseconds of a run, where each comes once.
fn cold<'a>(bpf: &Ebpf, frames: impl Iterator<Item = &'a Vec<u8>>) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0.0);
    for frame in frames {
        let (judged, nanoseconds) = time(bpf, program::FROM_POD, frame, 1)?;
        ensure!(judged == PASS, "a packet is refused");
        sum += f64::from(nanoseconds);
        count += 1.0;
    }
    Ok(sum / count)
}
