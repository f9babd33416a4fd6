//! A capture on the wire between the nodes: an AF_PACKET socket in the node's namespace, written as pcap, and what
//! the evidence needs to read from it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, IoSliceMut, Write as _},
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow};
use nix::sys::{
    socket::{
        AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt, socket,
        sockopt,
    },
    time::TimeVal,
};

use crate::{lab::net, wait};

/// A capture that runs.
#[derive(Debug)]
pub struct Capture {
    path: PathBuf,
    netns: PathBuf,
    interface: String,
    packets_before: u64,
    seen: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Capture {
    /// Starts to record every packet of `interface` in the namespace at `netns` into `path`.
    ///
    /// # Errors
    /// When the socket cannot be opened (it needs CAP_NET_RAW) or there is no such interface.
    pub fn start(netns: &Path, interface: &str, path: &Path) -> Result<Self> {
        let name = interface.to_owned();
        let (socket, index) = net::within(netns, move || {
            let socket =
                socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
                    .context("open a packet socket; is this root with CAP_NET_RAW?")?;
            setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20))?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))?;
            let index =
                nix::net::if_::if_nametoindex(name.as_str()).with_context(|| format!("find {name}"))?;
            Ok((socket, index as usize))
        })?;
        let file = BufWriter::new(File::create(path).with_context(|| format!("write {}", path.display()))?);
        let (seen, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let packets_before = net::packets(netns, interface)?;
        let (counter, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || record(&socket, index, file, &counter, &stopped))?;
        Ok(Self {
            path: path.into(),
            netns: netns.into(),
            interface: interface.into(),
            packets_before,
            seen,
            stop,
            thread: Some(thread),
        })
    }

    /// Ends it, once it holds every packet that the interface counted, and reads it.
    ///
    /// # Errors
    /// When packets were lost: then it proves nothing.
    pub fn finish(mut self) -> Result<Trace> {
        wait::until(Duration::from_secs(5), "the capture to hold what the interface counted", || {
            let passed = net::packets(&self.netns, &self.interface)?.saturating_sub(self.packets_before);
            let seen = self.seen.load(Ordering::Acquire);
            (seen >= passed).then_some(()).with_context(|| format!("{seen} of {passed} packets"))
        })?;
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.take().context("the capture ended twice")?;
        thread.join().map_err(|_| anyhow!("the capture's thread panicked"))??;
        Trace::read(&self.path)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn record(
    socket: &OwnedFd,
    index: usize,
    mut file: BufWriter<File>,
    seen: &AtomicU64,
    stop: &AtomicBool,
) -> Result<()> {
    // pcap, microseconds, Ethernet.
    file.write_all(&[0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 1, 0, 0, 0])?;
    let mut buffer = vec![0; 1 << 18];
    loop {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let (length, from) =
            match recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut parts, None, MsgFlags::empty()) {
                Ok(message) => (message.bytes, message.address),
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {
                    if stop.load(Ordering::Acquire) {
                        file.flush()?;
                        return Ok(());
                    }
                    continue;
                }
                Err(error) => return Err(error).context("read the packet socket"),
            };
        if from.map(|address| address.ifindex()) != Some(index) {
            continue;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        for field in [now.as_secs() as u32, now.subsec_micros(), length as u32, length as u32] {
            file.write_all(&field.to_le_bytes())?;
        }
        file.write_all(&buffer[..length])?;
        seen.fetch_add(1, Ordering::Release);
    }
}

/// A TCP packet of a trace.
struct Segment<'a> {
    flow: (IpAddr, u16, IpAddr, u16),
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

/// A finished capture.
#[derive(Debug)]
pub struct Trace {
    /// Where the pcap is.
    pub path: PathBuf,
    packets: Vec<Vec<u8>>,
}

impl Trace {
    /// Reads a pcap that [`Capture`] wrote.
    ///
    /// # Errors
    /// When it is cut short.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path)?;
        let mut rest = bytes.get(24..).context("a pcap without a header")?;
        let mut packets = Vec::new();
        while !rest.is_empty() {
            let length = rest.get(8..12).and_then(|field| field.try_into().ok()).map(u32::from_le_bytes);
            let length = length.context("a pcap that is cut short")? as usize;
            packets.push(rest.get(16..16 + length).context("a pcap that is cut short")?.to_vec());
            rest = &rest[16 + length..];
        }
        Ok(Self { path: path.into(), packets })
    }

    /// How many packets it holds.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// How many packets hold `needle`, plus streams in which it only appears across packets.
    pub fn find(&self, needle: &[u8]) -> usize {
        let holds = |hay: &[u8]| hay.windows(needle.len()).any(|window| window == needle);
        let packets = self.packets.iter().filter(|packet| holds(packet)).count();
        if packets > 0 {
            return packets;
        }
        self.streams(|_| true).values().filter(|stream| holds(stream)).count()
    }

    /// Bytes of application data inside TLS records on that port (lengths from the record headers), and how many
    /// streams carried them.
    pub fn tls_bytes(&self, port: u16) -> (u64, usize) {
        let streams = self.streams(|(_, source, _, destination)| *source == port || *destination == port);
        let bytes: Vec<u64> = streams.values().map(|stream| application_data(stream)).collect();
        (bytes.iter().sum(), bytes.iter().filter(|bytes| **bytes > 0).count())
    }

    /// Bytes of TCP payload on streams that touch a port.
    pub fn tcp_bytes(&self, port: u16) -> u64 {
        let streams = self.streams(|(_, source, _, destination)| *source == port || *destination == port);
        streams.values().map(|stream| stream.len() as u64).sum()
    }

    /// The payload of each TCP direction, in sequence order, each byte once.
    fn streams(&self, wanted: impl Fn(&(IpAddr, u16, IpAddr, u16)) -> bool) -> BTreeMap<String, Vec<u8>> {
        let mut segments: BTreeMap<(IpAddr, u16, IpAddr, u16), Vec<Segment<'_>>> = BTreeMap::new();
        for segment in self.packets.iter().filter_map(|packet| tcp(packet)) {
            if wanted(&segment.flow) {
                segments.entry(segment.flow).or_default().push(segment);
            }
        }
        let mut out = BTreeMap::new();
        for (flow, list) in segments {
            // A source port may be used again: each SYN begins a stream.
            let (mut number, mut next, mut stream) = (0, None, Vec::new());
            for segment in list {
                if segment.syn {
                    out.insert(format!("{flow:?}#{number}"), std::mem::take(&mut stream));
                    number += 1;
                    next = Some(segment.sequence.wrapping_add(1));
                    continue;
                }
                let expected = *next.get_or_insert(segment.sequence);
                let behind = expected.wrapping_sub(segment.sequence) as usize;
                let fresh =
                    if behind < 1 << 30 { segment.payload.get(behind..) } else { Some(segment.payload) };
                if let Some(fresh) = fresh {
                    stream.extend_from_slice(fresh);
                    next = Some(segment.sequence.wrapping_add(segment.payload.len() as u32));
                }
            }
            out.insert(format!("{flow:?}#{number}"), stream);
        }
        out
    }
}

fn application_data(mut stream: &[u8]) -> u64 {
    let mut total = 0;
    while let [kind @ 20..=23, 3, 1 | 3, high, low, rest @ ..] = stream {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if *kind == 23 {
            total += length as u64;
        }
        let Some(after) = rest.get(length..) else { break };
        stream = after;
    }
    total
}

fn tcp(packet: &[u8]) -> Option<Segment<'_>> {
    let ether = u16::from_be_bytes(packet.get(12..14)?.try_into().ok()?);
    let ip = packet.get(14..)?;
    let (source, destination, tcp): (IpAddr, IpAddr, &[u8]) = match ether {
        0x0800 => {
            let header = usize::from(ip.first()? & 0xf) * 4;
            let total = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
            (*ip.get(9)? == 6).then_some(())?;
            let address = |at: usize| ip.get(at..at + 4)?.try_into().ok().map(|a: [u8; 4]| IpAddr::from(a));
            // A packet larger than 64 KiB (BIG TCP) has no total length.
            let end = if total == 0 { ip.len() } else { total };
            (address(12)?, address(16)?, ip.get(header..end)?)
        }
        0x86dd => {
            (*ip.get(6)? == 6).then_some(())?;
            let length = usize::from(u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?));
            let address = |at: usize| ip.get(at..at + 16)?.try_into().ok().map(|a: [u8; 16]| IpAddr::from(a));
            let end = if length == 0 { ip.len() } else { 40 + length };
            (address(8)?, address(24)?, ip.get(40..end)?)
        }
        _ => return None,
    };
    let port = |at: usize| tcp.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes);
    Some(Segment {
        flow: (source, port(0)?, destination, port(2)?),
        sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
        syn: tcp.get(13)? & 2 != 0,
        payload: tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(source: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 12];
        out.extend_from_slice(&[8, 0, 0x45, 0]);
        out.extend_from_slice(&(40 + payload.len() as u16).to_be_bytes());
        out.extend_from_slice(&[0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        out.extend_from_slice(&source.to_be_bytes());
        out.extend_from_slice(&15008u16.to_be_bytes());
        out.extend_from_slice(&sequence.to_be_bytes());
        out.extend_from_slice(&[0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(payload);
        out
    }

    #[test]
    fn finds_across_packets_and_counts_records_once() {
        let record = [&[23, 3, 3, 0, 4][..], b"abcd"].concat();
        let trace = Trace {
            path: PathBuf::new(),
            packets: vec![
                packet(1, 99, 2, b""),
                packet(1, 100, 16, &record[..6]),
                packet(1, 100, 16, &record[..6]),
                packet(1, 106, 16, &record[6..]),
            ],
        };
        assert_eq!(trace.tls_bytes(15008), (4, 1));
        assert_eq!(trace.find(b"abcd"), 1);
        assert_eq!(trace.find(b"abce"), 0);
        assert_eq!(trace.tcp_bytes(15008), 9);
    }
}
