//! Servers.

use std::{
    fmt,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Args;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;

/// Where to listen: every address of both families.
#[derive(Debug, Clone, Args)]
pub struct Listen {
    /// The port.
    #[arg(long)]
    pub(super) port: u16,
}

/// A checksum that depends on every byte's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checksum {
    hash: u64,
    word: u64,
    filled: u32,
    length: u64,
}

impl Default for Checksum {
    fn default() -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, word: 0, filled: 0, length: 0 }
    }
}

impl Checksum {
    /// Takes bytes in, in any portions.
    pub fn add(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        let mut rest = bytes;
        while self.filled != 0 && !rest.is_empty() {
            self.byte(rest[0]);
            rest = &rest[1..];
        }
        let (words, tail) = rest.as_chunks::<8>();
        for word in words {
            self.mix(u64::from_le_bytes(*word));
        }
        for byte in tail {
            self.byte(*byte);
        }
    }

    fn byte(&mut self, byte: u8) {
        self.word |= u64::from(byte) << (8 * self.filled);
        self.filled += 1;
        if self.filled == 8 {
            self.mix(self.word);
            (self.word, self.filled) = (0, 0);
        }
    }

    fn mix(&mut self, word: u64) {
        self.hash = (self.hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(27);
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", (self.hash ^ self.word).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.length)
    }
}

/// The part of the test stream that begins at `at`: 64 KiB, or what is left of `total`.
pub fn block(at: u64, total: u64) -> Vec<u8> {
    let mut block = vec![0; (total - at).min(1 << 16) as usize];
    let mut state = at ^ 0x9e37_79b9_7f4a_7c15;
    for chunk in block.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bytes = (state ^ (state >> 29)).to_le_bytes();
        let length = chunk.len();
        chunk.copy_from_slice(&bytes[..length]);
    }
    block
}

impl Listen {
    fn each(&self, serve: fn(TcpStream) -> Result<()>) -> Result<Value> {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, self.port)).context("listen")?;
        loop {
            let (stream, peer) = listener.accept().context("accept")?;
            super::say(&format!("peer {peer}"));
            thread::Builder::new().stack_size(1 << 17).spawn(move || serve(stream))?;
        }
    }

    pub(super) fn banner(self) -> Result<Value> {
        self.each(|stream| {
            stream.set_nodelay(true)?;
            let mut out = &stream;
            out.write_all(b"220 echo ready\r\n")?;
            let mut lines = BufReader::new(&stream);
            let mut line = Vec::new();
            loop {
                line.clear();
                if lines.by_ref().take(65_536).read_until(b'\n', &mut line)? == 0 {
                    return Ok(());
                }
                out.write_all(&line)?;
            }
        })
    }

    pub(super) fn resets(self) -> Result<Value> {
        self.each(|mut stream| {
            stream.write_all(b"220 for now\r\n")?;
            // Its first byte is the sign to go.
            stream.read_exact(&mut [0])?;
            reset(stream)
        })
    }

    pub(super) fn hears(self) -> Result<Value> {
        self.each(|mut stream| {
            stream.write_all(b"220 listening\r\n")?;
            match drain(&mut stream) {
                Ok((total, _)) => super::say(&format!("end after {total}")),
                Err(error) => super::say(&format!("broken: {}", super::calls::kind_of(&error))),
            }
            Ok(())
        })
    }

    pub(super) fn sink(self) -> Result<Value> {
        self.each(|mut stream| {
            let (total, sum) = drain(&mut stream)?;
            stream.write_all(format!("{total} {sum}\n").as_bytes())?;
            Ok(())
        })
    }

    pub(super) fn farewell(self) -> Result<Value> {
        self.each(|mut stream| {
            stream.write_all(b"farewell\n")?;
            stream.shutdown(Shutdown::Write)?;
            match drain(&mut stream) {
                Ok((total, sum)) => super::say(&format!("got {total} {sum}")),
                Err(error) => super::say(&format!("broken {error:#}")),
            }
            Ok(())
        })
    }

    pub(super) fn source(self) -> Result<Value> {
        self.each(|mut stream| {
            let mut wanted = [0; 8];
            stream.read_exact(&mut wanted)?;
            let total = u64::from_be_bytes(wanted);
            let mut sent = 0;
            while sent < total {
                let block = block(sent, total);
                stream.write_all(&block)?;
                sent += block.len() as u64;
                if sent.is_multiple_of(1 << 22) {
                    super::say(&format!("sent {sent}"));
                }
            }
            Ok(())
        })
    }

    pub(super) fn udp_echo(self) -> Result<Value> {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, self.port)).context("listen")?;
        let mut buffer = [0; 2048];
        loop {
            let (n, peer) = socket.recv_from(&mut buffer)?;
            // Refused by the kernel's policy, or by an ICMP error of an earlier answer: the next one may pass.
            let _ = socket.send_to(&buffer[..n], peer);
        }
    }

    pub(super) fn udp_pour(self) -> Result<Value> {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, self.port)).context("listen")?;
        let (_, peer) = socket.recv_from(&mut [0; 2048])?;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(30) {
            let _ = socket.send_to(b"more", peer);
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Value::Null)
    }
}

/// Closes a connection by a RST.
pub(super) fn reset(stream: TcpStream) -> Result<()> {
    let now = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream, sockopt::Linger, &now).context("set SO_LINGER")?;
    drop(stream);
    Ok(())
}

/// Reads to the end: how many bytes, and their checksum.
fn drain(stream: &mut TcpStream) -> Result<(u64, Checksum)> {
    let (mut sum, mut total) = (Checksum::default(), 0_u64);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok((total, sum));
        }
        sum.add(&buffer[..n]);
        total += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_depends_on_order_not_on_portions() {
        let data = block(0, 1000);
        let (mut whole, mut parts, mut swapped) =
            (Checksum::default(), Checksum::default(), Checksum::default());
        whole.add(&data);
        for part in data.chunks(7) {
            parts.add(part);
        }
        swapped.add(&data[8..]);
        swapped.add(&data[..8]);
        assert_eq!(whole, parts);
        assert_ne!(whole.to_string(), swapped.to_string());
    }
}
