//! What is known of the node's sandboxes, from two sources that race: the runtime's events and its lists.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Sandbox, Sandboxes};

/// Most sandboxes of one node.
const LIMIT: usize = 4096;
/// How long a sandbox that an event told of may be missing in the lists: the runtime lists it when it is complete.
const GRACE: Duration = Duration::from_secs(30);

/// A sandbox in a list of the runtime.
#[derive(Debug, Clone, Copy)]
pub(super) struct Listed<'a> {
    /// Its id.
    pub(super) id: &'a str,
    /// Whether it runs.
    pub(super) ready: bool,
}

#[derive(Debug)]
struct Entry {
    sandbox: Arc<Sandbox>,
    /// The runtime was asked about it.
    asked: bool,
    added: Instant,
}

/// The sandboxes by their ids.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: HashMap<String, Entry>,
    /// Ended by an event: a list that was made before must not bring them back.
    ended: HashSet<String>,
}

impl Table {
    /// A sandbox that an event told of.
    pub(super) fn began(&mut self, sandbox: Sandbox, now: Instant) {
        self.ended.remove(&sandbox.id);
        self.insert(sandbox, false, now);
    }

    /// A sandbox that the runtime was asked about.
    pub(super) fn described(&mut self, sandbox: Sandbox, now: Instant) {
        if !self.ended.contains(&sandbox.id) {
            self.insert(sandbox, true, now);
        }
    }

    fn insert(&mut self, sandbox: Sandbox, asked: bool, now: Instant) {
        if self.entries.len() >= LIMIT && !self.entries.contains_key(&sandbox.id) {
            tracing::error!(pod = %sandbox.name, limit = LIMIT, "more sandboxes than a node may have; this one is left out");
            return;
        }
        let added = self.entries.get(&sandbox.id).map_or(now, |e| e.added);
        let before = self.entries.get(&sandbox.id).map(|e| e.sandbox.clone());
        // The same Arc for the same content: whoever compares finds nothing new.
        let sandbox = before.filter(|b| **b == sandbox).unwrap_or_else(|| Arc::new(sandbox));
        self.entries.insert(sandbox.id.clone(), Entry { sandbox, asked, added });
    }

    /// A sandbox ended.
    pub(super) fn ended(&mut self, id: &str) {
        if self.entries.remove(id).is_some() && self.ended.len() < LIMIT {
            self.ended.insert(id.to_owned());
        }
    }

    /// Takes a whole list of the runtime; the ids that it has to be asked about.
    pub(super) fn listed(&mut self, list: &[Listed<'_>], now: Instant) -> Vec<String> {
        let ready: HashSet<&str> = list.iter().filter(|l| l.ready).map(|l| l.id).collect();
        let over: HashSet<&str> = list.iter().filter(|l| !l.ready).map(|l| l.id).collect();
        self.ended.retain(|id| ready.contains(id.as_str()));
        self.entries.retain(|id, entry| {
            let young = !entry.asked && now.saturating_duration_since(entry.added) < GRACE;
            ready.contains(id.as_str()) || (young && !over.contains(id.as_str()))
        });
        let open = |id: &&str| {
            let known = self.entries.get(*id).is_some_and(|e| e.asked && e.sandbox.complete());
            !known && !self.ended.contains(*id)
        };
        ready.into_iter().filter(open).map(str::to_owned).collect()
    }

    /// The youngest sandbox of each Pod.
    pub(super) fn sandboxes(&self) -> Sandboxes {
        let mut found: Sandboxes = BTreeMap::new();
        for entry in self.entries.values() {
            let sandbox = &entry.sandbox;
            let younger = |other: &Arc<Sandbox>| {
                (other.created, other.id.as_str()) < (sandbox.created, sandbox.id.as_str())
            };
            if found.get(&sandbox.uid).is_none_or(younger) {
                found.insert(sandbox.uid.clone(), sandbox.clone());
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::tests::sandbox;

    fn ids(table: &Table) -> Vec<String> {
        let mut ids: Vec<_> = table.sandboxes().values().map(|s| s.id.clone()).collect();
        ids.sort();
        ids
    }

    fn ready(id: &str) -> Listed<'_> {
        Listed { id, ready: true }
    }

    #[test]
    fn a_list_from_before_an_event_changes_nothing() {
        let (mut table, now) = (Table::default(), Instant::now());
        assert_eq!(table.listed(&[ready("a")], now), ["a"]);
        table.described(sandbox("a", "uid-a", 1), now);
        table.began(sandbox("b", "uid-b", 2), now);
        // The list was made before b began.
        assert!(table.listed(&[ready("a")], now).is_empty());
        assert_eq!(ids(&table), ["a", "b"]);
        // Once the runtime lists it, it is asked about it.
        assert_eq!(table.listed(&[ready("a"), ready("b")], now), ["b"]);
        table.described(sandbox("b", "uid-b", 2), now);
        table.ended("a");
        // The list was made before a ended, and so was the question about it.
        assert!(table.listed(&[ready("a"), ready("b")], now).is_empty());
        table.described(sandbox("a", "uid-a", 1), now);
        assert_eq!(ids(&table), ["b"]);
        assert!(table.listed(&[Listed { id: "b", ready: false }], now).is_empty());
        assert!(ids(&table).is_empty() && table.ended.is_empty());
    }

    #[test]
    fn what_the_runtime_never_lists_is_forgotten() {
        let (mut table, now) = (Table::default(), Instant::now());
        table.began(sandbox("a", "uid-a", 1), now);
        table.listed(&[], now + GRACE / 2);
        assert_eq!(ids(&table), ["a"]);
        table.listed(&[], now + GRACE);
        assert!(ids(&table).is_empty());
    }

    #[test]
    fn the_youngest_sandbox_of_a_pod_counts() {
        let (mut table, now) = (Table::default(), Instant::now());
        table.described(sandbox("new", "uid-a", 2), now);
        table.described(sandbox("old", "uid-a", 1), now);
        assert_eq!(ids(&table), ["new"]);
        table.ended("new");
        assert_eq!(ids(&table), ["old"]);
    }

    #[test]
    fn an_incomplete_description_is_asked_for_again() {
        let (mut table, now) = (Table::default(), Instant::now());
        let bare = Sandbox { addresses: Vec::new(), ..sandbox("a", "uid-a", 1) };
        table.described(bare, now);
        assert_eq!(table.listed(&[ready("a")], now), ["a"]);
        table.described(sandbox("a", "uid-a", 1), now);
        let first = table.sandboxes();
        table.described(sandbox("a", "uid-a", 1), now);
        let uid = weft_core::WorkloadUid::from("uid-a");
        assert!(Arc::ptr_eq(&first[&uid], &table.sandboxes()[&uid]));
    }

    #[test]
    fn a_node_holds_only_so_many() {
        let (mut table, now) = (Table::default(), Instant::now());
        for i in 0..=LIMIT {
            table.described(sandbox(&format!("id-{i}"), &format!("uid-{i}"), 1), now);
        }
        assert_eq!(table.sandboxes().len(), LIMIT);
    }
}
