//! The event ring and the counters, as typed values.

use std::{
    net::SocketAddr,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use aya::maps::{Map, MapData, RingBuf};
use tokio::{
    io::unix::AsyncFd,
    time::{Duration, Instant, sleep_until},
};
use weft_core::{SubjectId, flow::Reason};
use weft_ebpf_common::{
    Event,
    codes::{direction, event, map, outcome, stat},
};

use super::{
    DatapathConfig, addr,
    error::DatapathError,
    maps::{Maps, pin_path},
    probe,
};

/// How long the first record of a row waits for others. The kernel wakes a reader only where it has read everything, so
/// this bounds the wake-ups, of which there would be one for each connection.
const GATHER: Duration = Duration::from_millis(10);

/// Which hook saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hook {
    /// A connect of an application.
    Connect,
    /// A connection arriving at a Pod.
    Inbound,
    /// A packet leaving a Pod.
    FromPod,
    /// A packet arriving at a Pod.
    ToPod,
    /// A connect from a network namespace that the agent does not know.
    UnknownNetns,
}

/// What the kernel did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KernelVerdict {
    /// Let it pass without the proxy.
    Forwarded,
    /// Refused it.
    Denied,
    /// Sent it to the proxy, whose record has the same socket cookie.
    Redirected,
}

/// A record of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelEvent {
    /// When, in nanoseconds of the monotonic clock.
    pub ktime: u64,
    /// The socket's cookie, 0 where there is none.
    pub cookie: u64,
    /// The cookie of the Pod's network namespace, 0 where it is not known.
    pub netns: u64,
    /// The client; port 0 where none is bound yet.
    pub source: SocketAddr,
    /// What was dialled.
    pub destination: SocketAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Which hook saw it.
    pub hook: Hook,
    /// What became of it.
    pub verdict: KernelVerdict,
    /// Why.
    pub reason: Reason,
    /// The client's subject.
    pub source_subject: SubjectId,
    /// The server's subject.
    pub destination_subject: SubjectId,
    /// The policy that decided: an index into [`super::Tables::policies`] plus one, 0 where none did.
    pub policy: u32,
    /// The caller's process, 0 where there is none.
    pub pid: u32,
    /// The caller's cgroup id, 0 where there is none.
    pub cgroup: u64,
}

/// What a counter counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CounterKey {
    /// The client's subject.
    pub source: SubjectId,
    /// The server's subject.
    pub destination: SubjectId,
    /// Why.
    pub reason: Reason,
    /// What became of it.
    pub verdict: KernelVerdict,
    /// True where it was counted at the server's side.
    pub inbound: bool,
    /// IP protocol number.
    pub protocol: u8,
}

/// The order of `weft_ebpf_common::codes::reason`.
const REASONS: [Reason; 20] = [
    Reason::None,
    Reason::PolicyDenied,
    Reason::PolicyDenyRule,
    Reason::PlaintextRefused,
    Reason::InvalidSource,
    Reason::ProxyBypassed,
    Reason::TunnelPortDialled,
    Reason::UnknownPeer,
    Reason::IdentityMismatch,
    Reason::TlsFailure,
    Reason::NoEndpoint,
    Reason::ConnectFailure,
    Reason::ProtocolError,
    Reason::NoCredentials,
    Reason::LimitReached,
    Reason::Revoked,
    Reason::Unsupported,
    Reason::Draining,
    Reason::Timeout,
    Reason::PeerReset,
];

fn reason(code: u8) -> Option<Reason> {
    REASONS.get(usize::from(code)).copied()
}

fn verdict(code: u8) -> Option<KernelVerdict> {
    match code {
        outcome::FORWARDED => Some(KernelVerdict::Forwarded),
        outcome::DENIED => Some(KernelVerdict::Denied),
        outcome::REDIRECTED => Some(KernelVerdict::Redirected),
        _ => None,
    }
}

impl KernelEvent {
    /// Reads a record; `None` for bytes that are none.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let raw = bytes.first_chunk::<{ size_of::<Event>() }>()?;
        // SAFETY: Event is repr(C) of integers: every bit pattern is a value; the buffer has its size.
        let raw: Event = unsafe { raw.as_ptr().cast::<Event>().read_unaligned() };
        let hook = match raw.kind {
            event::CONNECT => Hook::Connect,
            event::SK_LOOKUP => Hook::Inbound,
            event::TC_FROM => Hook::FromPod,
            event::TC_TO => Hook::ToPod,
            event::UNKNOWN_NETNS => Hook::UnknownNetns,
            _ => return None,
        };
        Some(Self {
            ktime: raw.ktime,
            cookie: raw.cookie,
            netns: raw.netns,
            source: addr::socket(raw.src, raw.sport),
            destination: addr::socket(raw.dst, raw.dport),
            protocol: raw.proto,
            hook,
            verdict: verdict(raw.verdict)?,
            reason: reason(raw.reason)?,
            source_subject: SubjectId(raw.src_subject),
            destination_subject: SubjectId(raw.dst_subject),
            policy: raw.policy,
            pid: raw.pid,
            cgroup: raw.cgroup,
        })
    }
}

/// Reads a record of the ring, for the fuzzer.
#[cfg(feature = "fuzzing")]
pub fn fuzz(bytes: &[u8]) -> Option<KernelEvent> {
    KernelEvent::parse(bytes)
}

/// The ring's reader; there is one at a time.
#[derive(Debug)]
pub struct EventStream {
    ring: AsyncFd<Ring>,
    taken: Arc<AtomicBool>,
    state: Reading,
}

#[derive(Debug, Clone, Copy)]
enum Reading {
    /// Everything was read.
    Done,
    /// There is something, to be read from then on.
    From(Instant),
    /// Until there is nothing left.
    Now,
}

struct Ring(RingBuf<MapData>);

impl Ring {
    fn read(&mut self) -> Option<KernelEvent> {
        while let Some(item) = self.0.next() {
            let event = KernelEvent::parse(&item);
            if let Some(event) = event.filter(|event| !probe::dialled(event.destination.ip())) {
                return Some(event);
            }
        }
        None
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl EventStream {
    /// Opens the ring; `taken` says that a reader exists. Needs a tokio runtime around.
    pub(super) fn open(config: &DatapathConfig, taken: &Arc<AtomicBool>) -> Result<Self, DatapathError> {
        if taken.swap(true, Ordering::AcqRel) {
            return Err(DatapathError::Events { reason: "it has a reader already".into() });
        }
        let open = || -> Result<AsyncFd<Ring>, Box<dyn std::error::Error>> {
            let data = MapData::from_pin(pin_path(&config.bpffs, map::EVENTS))?;
            let ring = RingBuf::try_from(Map::RingBuf(data))?;
            // SAFETY: the descriptor belongs to the ring's map, which the AsyncFd owns and nothing replaces.
            Ok(unsafe { AsyncFd::register_with_interest(Ring(ring), tokio::io::Interest::READABLE) }?)
        };
        match open() {
            Ok(ring) => Ok(Self { ring, taken: taken.clone(), state: Reading::Done }),
            Err(error) => {
                taken.store(false, Ordering::Release);
                Err(DatapathError::Events { reason: error.to_string() })
            }
        }
    }

    /// The next record. Records that cannot be read are skipped. Safe to cancel.
    ///
    /// # Errors
    /// When the ring cannot be waited for.
    pub async fn next(&mut self) -> std::io::Result<KernelEvent> {
        loop {
            let mut guard = self.ring.readable_mut().await?;
            if let Reading::Done = self.state {
                self.state = Reading::From(Instant::now() + GATHER);
            }
            if let Reading::From(due) = self.state {
                sleep_until(due).await;
                self.state = Reading::Now;
            }
            if let Some(event) = guard.get_inner_mut().read() {
                return Ok(event);
            }
            guard.clear_ready();
            self.state = Reading::Done;
        }
    }

    /// A record that need not be waited for, after one that was.
    pub fn another(&mut self) -> Option<KernelEvent> {
        matches!(self.state, Reading::Now).then(|| self.ring.get_mut().read()).flatten()
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.taken.store(false, Ordering::Release);
    }
}

/// Every counter.
pub(super) fn counters(maps: &Maps) -> Result<Vec<(CounterKey, u64)>, DatapathError> {
    let typed = |(key, count): (weft_ebpf_common::CountKey, u64)| {
        let key = CounterKey {
            source: SubjectId(key.src),
            destination: SubjectId(key.dst),
            reason: reason(key.reason)?,
            verdict: verdict(key.verdict)?,
            inbound: key.dir == direction::IN,
            protocol: key.proto,
        };
        Some((key, count))
    };
    Ok(maps.counts.sums()?.into_iter().filter_map(typed).collect())
}

/// Every named total.
pub(super) fn stats(maps: &Maps) -> Result<Vec<(&'static str, u64)>, DatapathError> {
    let mut totals = Vec::with_capacity(stat::NAMES.len());
    for (index, name) in (0..).zip(stat::NAMES) {
        totals.push((name, maps.stats.sum(&index)?.unwrap_or(0)));
    }
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reasons_keep_their_order() {
        for (code, reason) in (0_u8..).zip(REASONS) {
            assert_eq!(reason as u8, code, "{reason:?}");
        }
    }

    #[test]
    fn short_and_unknown_records_are_skipped() {
        assert_eq!(KernelEvent::parse(&[0; 10]), None);
        assert_eq!(KernelEvent::parse(&[0xff; size_of::<Event>()]), None);
    }
}
