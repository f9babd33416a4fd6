//! The ring of flows: a fixed number of entries; a reader that falls behind learns how many it missed.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::watch;
use weft_core::{Workload, flow::FlowRecord};

/// Smallest ring, in entries.
const MIN_CAPACITY: usize = 16;
/// Largest ring, in entries; keeps a mistaken setting from taking the node's memory.
const MAX_CAPACITY: usize = 1 << 20;

/// A record with what the state knew of its two ends when it was made.
#[derive(Debug, Clone)]
pub struct StoredFlow {
    /// The record.
    pub record: FlowRecord,
    /// The client's Pod.
    pub source: Option<Arc<Workload>>,
    /// The server's Pod.
    pub destination: Option<Arc<Workload>>,
    /// True where the kernel handed the connection to the proxy and the proxy said nothing of it.
    pub redirected: bool,
    /// The cgroup of the process that dialled, 0 where the kernel did not see it.
    pub cgroup: u64,
}

/// Where events were lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LossSource {
    /// The kernel's ring was full.
    Kernel,
    /// This ring came round before the reader did.
    Ring,
}

/// What the ring holds.
#[derive(Debug, Clone)]
pub enum Entry {
    /// A flow.
    Flow(Arc<StoredFlow>),
    /// A gap: `count` events were lost at `source` before this point.
    Lost {
        /// Where.
        source: LossSource,
        /// How many.
        count: u64,
        /// When it was noticed.
        time: SystemTime,
    },
}

/// Totals since the start; exact, whatever the ring has dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Flows put in.
    pub seen: u64,
    /// Flows that the ring still holds.
    pub held: u64,
    /// Entries the ring has room for.
    pub capacity: u64,
    /// Events lost in the kernel's ring.
    pub lost_kernel: u64,
    /// Entries that some reader missed, counted once per reader.
    pub lost_readers: u64,
}

/// What a reader gets at once.
#[derive(Debug, Default)]
pub struct Batch {
    /// Entries with their positions, oldest first.
    pub entries: Vec<(u64, Entry)>,
    /// How many entries were overwritten before this reader came to them.
    pub lost: u64,
    /// Where to read on.
    pub next: u64,
}

/// The store. Cheap to clone; writers never wait for readers.
#[derive(Debug, Clone)]
pub struct FlowStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ring: Mutex<Ring>,
    written: watch::Sender<u64>,
    started: Instant,
    id: u64,
}

#[derive(Debug)]
struct Ring {
    slots: Vec<Option<Entry>>,
    /// Entries ever written; the next one goes to `written & mask`.
    written: u64,
    seen: u64,
    held: u64,
    lost_kernel: u64,
    lost_readers: u64,
}

impl FlowStore {
    /// A store for `capacity` entries, rounded up to a power of two between 16 and 1,048,576.
    pub fn new(capacity: usize) -> Self {
        let slots = vec![None; rounded(capacity)];
        let ring = Ring { slots, written: 0, seen: 0, held: 0, lost_kernel: 0, lost_readers: 0 };
        Self {
            shared: Arc::new(Shared {
                ring: Mutex::new(ring),
                written: watch::Sender::new(0),
                started: Instant::now(),
                id: rand::random(),
            }),
        }
    }

    /// Puts a flow in.
    pub fn push(&self, flow: impl Into<Arc<StoredFlow>>) {
        let flow = flow.into();
        let written = {
            let mut ring = self.shared.ring.lock();
            ring.seen += 1;
            ring.held += 1;
            ring.put(Entry::Flow(flow))
        };
        self.tell(written);
    }

    /// Wakes those who watch. Most of the time nobody does, and what is watched is only that it changes.
    fn tell(&self, written: u64) {
        if self.shared.written.receiver_count() > 0 {
            self.shared.written.send_replace(written);
        }
    }

    /// Notes that `count` events never came out of the kernel's ring.
    pub fn lost_in_kernel(&self, count: u64, time: SystemTime) {
        if count == 0 {
            return;
        }
        let written = {
            let mut ring = self.shared.ring.lock();
            ring.lost_kernel += count;
            ring.put(Entry::Lost { source: LossSource::Kernel, count, time })
        };
        self.tell(written);
    }

    /// Gives the ring another size; the newest entries stay.
    pub fn resize(&self, capacity: usize) {
        let capacity = rounded(capacity);
        let mut ring = self.shared.ring.lock();
        if ring.slots.len() == capacity {
            return;
        }
        let kept = (ring.slots.len().min(capacity)) as u64;
        let mut slots = vec![None; capacity];
        let mut held = 0;
        for at in ring.written.saturating_sub(kept)..ring.written {
            let entry = ring.get(at);
            held += u64::from(matches!(entry, Some(Entry::Flow(_))));
            if let Some(slot) = slots.get_mut((at & (capacity as u64 - 1)) as usize) {
                *slot = entry;
            }
        }
        ring.slots = slots;
        ring.held = held;
    }

    /// The position of the oldest entry, and the one after the newest.
    pub fn bounds(&self) -> (u64, u64) {
        let ring = self.shared.ring.lock();
        (ring.oldest(), ring.written)
    }

    /// Up to `max` entries from `position` on. A position that was overwritten moves to the oldest entry, and the
    /// distance is reported and counted as lost.
    pub fn read(&self, position: u64, max: usize) -> Batch {
        let mut ring = self.shared.ring.lock();
        let oldest = ring.oldest();
        let lost = oldest.saturating_sub(position);
        ring.lost_readers += lost;
        let from = position.max(oldest);
        let to = ring.written.min(from.saturating_add(max as u64));
        let entries = (from..to).filter_map(|at| Some((at, ring.get(at)?))).collect();
        Batch { entries, lost, next: to.max(from) }
    }

    /// Entries before `position`, newest first, at most `max`; fewer where the ring does not reach back.
    pub fn read_back(&self, position: u64, max: usize) -> Vec<(u64, Entry)> {
        let ring = self.shared.ring.lock();
        let from = position.saturating_sub(max as u64).max(ring.oldest());
        (from..position).rev().filter_map(|at| Some((at, ring.get(at)?))).collect()
    }

    /// Changes with every entry that is put in after this call: what was put in before has to be read.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.shared.written.subscribe()
    }

    /// The totals.
    pub fn totals(&self) -> Totals {
        let ring = self.shared.ring.lock();
        Totals {
            seen: ring.seen,
            held: ring.held,
            capacity: ring.slots.len() as u64,
            lost_kernel: ring.lost_kernel,
            lost_readers: ring.lost_readers,
        }
    }

    /// When it began.
    pub fn started(&self) -> Instant {
        self.shared.started
    }

    /// A random number of this store: with an entry's position it names a flow for ever.
    pub fn id(&self) -> u64 {
        self.shared.id
    }
}

fn rounded(capacity: usize) -> usize {
    capacity.clamp(MIN_CAPACITY, MAX_CAPACITY).next_power_of_two()
}

impl Ring {
    fn index(&self, at: u64) -> usize {
        // The mask keeps it below the length, which is a usize.
        (at & (self.slots.len() as u64 - 1)) as usize
    }

    fn oldest(&self) -> u64 {
        self.written.saturating_sub(self.slots.len() as u64)
    }

    fn put(&mut self, entry: Entry) -> u64 {
        let index = self.index(self.written);
        if let Some(slot) = self.slots.get_mut(index)
            && let Some(Entry::Flow(_)) = slot.replace(entry)
        {
            self.held -= 1;
        }
        self.written += 1;
        self.written
    }

    fn get(&self, at: u64) -> Option<Entry> {
        self.slots.get(self.index(at)).cloned().flatten()
    }
}

#[cfg(test)]
mod tests;
