use super::*;
use crate::flow::convert::tests::{request, stored};

fn filled(capacity: usize, count: u16) -> FlowStore {
    let store = FlowStore::new(capacity);
    for status in 0..count {
        store.push(stored(request("/", status)));
    }
    store
}

fn statuses(batch: &Batch) -> Vec<u16> {
    let status = |(_, entry): &(u64, Entry)| match entry {
        Entry::Flow(flow) => flow.record.http.as_ref().map(|h| h.status),
        Entry::Lost { .. } => None,
    };
    batch.entries.iter().filter_map(status).collect()
}

#[test]
fn sizes_are_powers_of_two() {
    for (asked, given) in [(0, 16), (16, 16), (17, 32), (8192, 8192), (usize::MAX, 1 << 20)] {
        assert_eq!(FlowStore::new(asked).totals().capacity, given, "{asked}");
    }
}

#[test]
fn a_slow_reader_learns_how_much_it_missed() {
    let store = filled(16, 10);
    let batch = store.read(0, 4);
    assert_eq!((statuses(&batch), batch.lost, batch.next), (vec![0, 1, 2, 3], 0, 4));
    for status in 10..30 {
        store.push(stored(request("/", status)));
    }
    let batch = store.read(batch.next, 100);
    assert_eq!(batch.lost, 10);
    assert_eq!(statuses(&batch), (14..30).collect::<Vec<_>>());
    let totals = store.totals();
    assert_eq!((totals.seen, totals.held, totals.lost_readers), (30, 16, 10));
    assert!(store.read(batch.next, 100).entries.is_empty());
}

#[test]
fn what_the_kernel_lost_is_an_entry() {
    let store = filled(16, 1);
    store.lost_in_kernel(0, SystemTime::now());
    store.lost_in_kernel(7, SystemTime::now());
    let batch = store.read(0, 10);
    assert!(matches!(batch.entries[1].1, Entry::Lost { source: LossSource::Kernel, count: 7, .. }));
    let totals = store.totals();
    assert_eq!((totals.lost_kernel, totals.seen, totals.held), (7, 1, 1));
}

#[test]
fn held_counts_flows_only() {
    let store = filled(16, 0);
    for _ in 0..20 {
        store.lost_in_kernel(1, SystemTime::now());
        store.push(stored(request("/", 200)));
    }
    assert_eq!(store.totals().held, 8);
    assert_eq!(store.totals().seen, 20);
}

#[test]
fn resizing_keeps_the_newest() {
    let store = filled(32, 40);
    store.resize(16);
    assert_eq!(statuses(&store.read(24, 100)), (24..40).collect::<Vec<_>>());
    store.resize(64);
    assert_eq!(store.totals().held, 16);
    store.push(stored(request("/", 40)));
    let batch = store.read(0, 100);
    assert_eq!(statuses(&batch), (24..41).collect::<Vec<_>>());
}

#[test]
fn reading_back_is_newest_first() {
    let store = filled(16, 20);
    let entries = store.read_back(20, 3);
    assert_eq!(entries.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [19, 18, 17]);
    assert_eq!(store.read_back(20, 100).len(), 16);
    assert!(store.read_back(4, 100).is_empty());
}

#[test]
fn counts_are_exact_under_threads() {
    let store = FlowStore::new(16);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..1000 {
                    store.push(stored(request("/", 200)));
                }
            });
        }
    });
    assert_eq!(store.totals().seen, 4000);
    assert_eq!(store.bounds(), (3984, 4000));
}
