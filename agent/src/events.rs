//! From the kernel's ring to the flows.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use weft_core::{NamespacedName, flow::Reporter};
use weft_runtime::DrainWatcher;

use crate::{
    datapath::{EventStream, Hook, KernelEvent, KernelVerdict},
    flow::{Enricher, KernelFlow, enrich},
};

/// How often redirected connections that the proxy never spoke of are looked for.
const EXPIRY: Duration = Duration::from_secs(1);
/// Events taken before others get a turn.
const BURST: usize = 256;

/// Forwards events until the drain begins; the next agent reads the ring then.
///
/// # Errors
/// When the ring cannot be read.
pub async fn run(
    mut events: EventStream,
    enricher: Arc<Enricher>,
    policies: watch::Receiver<Arc<Vec<NamespacedName>>>,
    drain: DrainWatcher,
) -> io::Result<()> {
    let draining = drain.draining();
    tokio::pin!(draining);
    let mut expiry = tokio::time::interval(EXPIRY);
    loop {
        tokio::select! {
            () = &mut draining => return Ok(()),
            _ = expiry.tick() => enricher.expire(Instant::now()),
            first = events.next() => {
                let policies = policies.borrow().clone();
                let clock = Clock::now();
                let more = std::iter::from_fn(|| events.another()).take(BURST);
                enricher.kernel(std::iter::once(first?).chain(more).map(|event| flow(&event, &policies, &clock)));
                tokio::task::yield_now().await;
            }
        }
    }
}

/// An event in the mesh's terms.
fn flow(event: &KernelEvent, policies: &[NamespacedName], clock: &Clock) -> KernelFlow {
    let policy = event.policy.checked_sub(1).and_then(|i| policies.get(usize::try_from(i).ok()?)).cloned();
    KernelFlow {
        time: clock.wall(event.ktime),
        connection: event.cookie,
        cgroup: event.cgroup,
        reporter: match event.hook {
            Hook::Connect | Hook::FromPod | Hook::UnknownNetns => Reporter::KernelSource,
            Hook::Inbound | Hook::ToPod => Reporter::KernelDestination,
        },
        verdict: match event.verdict {
            KernelVerdict::Forwarded => enrich::KernelVerdict::Forwarded,
            KernelVerdict::Denied => enrich::KernelVerdict::Denied,
            KernelVerdict::Redirected => enrich::KernelVerdict::Redirected,
        },
        reason: event.reason,
        source: event.source,
        destination: event.destination,
        protocol: event.protocol,
        source_subject: event.source_subject,
        destination_subject: event.destination_subject,
        policy,
    }
}

/// The time of day and the monotonic clock, read together.
struct Clock {
    wall: SystemTime,
    monotonic: Duration,
}

impl Clock {
    fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u32::try_from(now.tv_nsec));
        let monotonic = Duration::new(seconds.unwrap_or(0), nanoseconds.unwrap_or(0));
        Self { wall: SystemTime::now(), monotonic }
    }

    /// The time of day for a reading of the monotonic clock, in nanoseconds.
    fn wall(&self, ktime: u64) -> SystemTime {
        let then = Duration::from_nanos(ktime);
        let wall = match self.monotonic.checked_sub(then) {
            Some(ago) => self.wall.checked_sub(ago),
            // The record came in after the clock was read.
            None => self.wall.checked_add(then.saturating_sub(self.monotonic)),
        };
        wall.unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_core::{SubjectId, flow::Reason};

    #[test]
    fn events_keep_their_meaning() {
        let event = KernelEvent {
            ktime: 0,
            cookie: 7,
            netns: 1,
            source: "10.0.0.1:4000".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
            protocol: 6,
            hook: Hook::Inbound,
            verdict: KernelVerdict::Denied,
            reason: Reason::PolicyDenyRule,
            source_subject: SubjectId(300),
            destination_subject: SubjectId(301),
            policy: 2,
            pid: 1,
            cgroup: 9,
        };
        let policies = [NamespacedName::new("shop", "a"), NamespacedName::new("shop", "b")];
        let clock = Clock::now();
        let flow = flow(&event, &policies, &clock);
        assert_eq!(flow.policy, Some(policies[1].clone()));
        assert_eq!(flow.reporter, Reporter::KernelDestination);
        assert_eq!((flow.connection, flow.cgroup), (7, 9));
        let past = super::flow(&KernelEvent { policy: 3, ..event }, &policies, &clock);
        assert_eq!(past.policy, None);
    }

    #[test]
    fn the_monotonic_clock_is_read_as_time_of_day() {
        let clock = Clock::now();
        let nanos = u64::try_from(clock.monotonic.as_nanos()).unwrap();
        assert_eq!(clock.wall(nanos), clock.wall);
        let second = Duration::from_secs(1);
        assert_eq!(clock.wall(nanos - 1_000_000_000), clock.wall - second);
        assert_eq!(clock.wall(nanos + 1_000_000_000), clock.wall + second);
        // What a forged time would make of it.
        assert!(clock.wall(u64::MAX) >= clock.wall);
    }
}
