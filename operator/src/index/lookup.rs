//! Finds Pods of a namespace by label and address without asking each of them.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use super::pods::Draft;

/// The drafts of a namespace, by what selectors ask for. Numbers are places in the list of drafts.
#[derive(Debug)]
pub(super) struct Lookup<'a> {
    all: Vec<usize>,
    labels: HashMap<(&'a str, &'a str), Vec<usize>>,
    addresses: HashMap<IpAddr, usize>,
}

impl<'a> Lookup<'a> {
    pub(super) fn new(pods: &'a [Draft]) -> Self {
        let mut lookup =
            Self { all: (0..pods.len()).collect(), labels: HashMap::new(), addresses: HashMap::new() };
        for (number, pod) in pods.iter().enumerate() {
            for (key, value) in &pod.template.labels {
                lookup.labels.entry((key, value)).or_default().push(number);
            }
            lookup.addresses.extend(pod.addresses.iter().map(|address| (*address, number)));
        }
        lookup
    }

    /// Pods among which are all that have every one of these labels: the fewest that are known.
    pub(super) fn candidates<'s>(&'s self, labels: &'s BTreeMap<String, String>) -> &'s [usize] {
        let mut fewest: &[usize] = &self.all;
        for (key, value) in labels {
            let having = self.labels.get(&(&**key, &**value)).map_or(&[][..], Vec::as_slice);
            if having.len() < fewest.len() {
                fewest = having;
            }
        }
        fewest
    }

    /// The Pod that has an address.
    pub(super) fn at(&self, address: IpAddr) -> Option<usize> {
        self.addresses.get(&address).copied()
    }
}
