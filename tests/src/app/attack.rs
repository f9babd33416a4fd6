//! What an attacker in a Pod tries.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};
use serde_json::{Value, json};

use super::calls::kind_of;
use crate::http;

/// A forged SYN.
#[derive(Debug, Clone, Args)]
pub struct Forge {
    /// The source that it claims, `address:port`.
    #[arg(long)]
    from: SocketAddr,
    /// Where it goes.
    #[arg(long)]
    to: SocketAddr,
    /// How many.
    #[arg(long, default_value_t = 1)]
    count: u32,
}

impl Forge {
    pub(super) fn run(self) -> Result<Value> {
        let (family, packet) = match (self.from, self.to) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => (AddressFamily::Inet, syn4(from, to)),
            (SocketAddr::V6(from), SocketAddr::V6(to)) => (AddressFamily::Inet6, syn6(from, to)),
            _ => anyhow::bail!("--from and --to must be of one family"),
        };
        let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
            .context("open a raw socket")?;
        for _ in 0..self.count {
            let sent = match self.to {
                SocketAddr::V4(to) => {
                    let to = SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0));
                    sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty())
                }
                SocketAddr::V6(to) => {
                    let to = SockaddrIn6::from(SocketAddrV6::new(*to.ip(), 0, 0, 0));
                    sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty())
                }
            };
            ensure!(sent.context("send a forged packet")? == packet.len(), "sent a part of the packet");
        }
        Ok(json!({"sent": self.count}))
    }
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn syn(from: u16, to: u16, pseudo: &[u8]) -> Vec<u8> {
    let mut tcp = Vec::from(from.to_be_bytes());
    tcp.extend_from_slice(&to.to_be_bytes());
    tcp.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    let sum = checksum(&[pseudo, &tcp]);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    tcp
}

fn syn4(from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let (source, destination) = (from.ip().octets(), to.ip().octets());
    let pseudo = [&source[..], &destination, &[0, 6, 0, 20]].concat();
    let tcp = syn(from.port(), to.port(), &pseudo);
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0];
    packet.extend_from_slice(&source);
    packet.extend_from_slice(&destination);
    let sum = checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend_from_slice(&tcp);
    packet
}

fn syn6(from: SocketAddrV6, to: SocketAddrV6) -> Vec<u8> {
    let (source, destination) = (from.ip().octets(), to.ip().octets());
    let pseudo = [&source[..], &destination, &[0, 0, 0, 20, 0, 0, 0, 6]].concat();
    let tcp = syn(from.port(), to.port(), &pseudo);
    let mut packet = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
    packet.extend_from_slice(&source);
    packet.extend_from_slice(&destination);
    packet.extend_from_slice(&tcp);
    packet
}

/// The shape of garbage.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Shape {
    /// Bytes without any form.
    Noise,
    /// The head of a TLS record that never goes on.
    HalfTls,
    /// An HTTP/2 preface, then noise.
    Preface,
    /// Nothing at all.
    Silence,
}

/// Connections with garbage on them.
#[derive(Debug, Clone, Args)]
pub struct Garbage {
    /// `address:port`.
    #[arg(long)]
    to: String,
    /// Connections of each shape.
    #[arg(long, default_value_t = 20)]
    count: u32,
    /// Milliseconds to wait for the other side's end.
    #[arg(long, default_value_t = 3000)]
    timeout_ms: u64,
    /// Which shape.
    #[arg(long, value_enum, default_value = "noise")]
    shape: Shape,
}

impl Garbage {
    pub(super) fn run(self) -> Result<Value> {
        let (mut refused, mut closed, mut open, mut answered) = (0, 0, 0, 0_u64);
        let start = Instant::now();
        for number in 0..self.count {
            let Ok(mut stream) = http::dial(&self.to, Duration::from_millis(self.timeout_ms)) else {
                refused += 1;
                continue;
            };
            let noise = super::server::block(u64::from(number) * 7, u64::from(number) * 7 + 900);
            let bytes: Vec<u8> = match self.shape {
                Shape::Noise => noise,
                Shape::HalfTls => vec![22, 3, 1, 0x40, 0, 1],
                Shape::Preface => [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), noise].concat(),
                Shape::Silence => Vec::new(),
            };
            let _ = stream.write_all(&bytes);
            let mut buffer = [0; 1024];
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) => {
                        closed += 1;
                        break;
                    }
                    Ok(n) => answered += n as u64,
                    Err(error) => {
                        match kind_of(&error.into()).as_str() {
                            "WouldBlock" | "TimedOut" => open += 1,
                            _ => closed += 1,
                        }
                        break;
                    }
                }
            }
        }
        Ok(json!({
            "refused": refused,
            "closed": closed,
            "open": open,
            "answered_bytes": answered,
            "elapsed_ms": start.elapsed().as_millis() as u64,
        }))
    }
}
