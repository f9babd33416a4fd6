//! Finds Pods by namespace, label and address without asking each of them.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use super::pods::Draft;

/// The drafts of a build, by what selectors ask for. Numbers are places in the list of drafts.
#[derive(Debug)]
pub(super) struct Lookup<'a> {
    namespaces: HashMap<&'a str, Vec<usize>>,
    labels: HashMap<(&'a str, &'a str, &'a str), Vec<usize>>,
    addresses: HashMap<IpAddr, usize>,
}

impl<'a> Lookup<'a> {
    pub(super) fn new(pods: &'a [Draft]) -> Self {
        let mut lookup =
            Self { namespaces: HashMap::new(), labels: HashMap::new(), addresses: HashMap::new() };
        for (number, pod) in pods.iter().enumerate() {
            let namespace: &str = &pod.template.name.namespace;
            lookup.namespaces.entry(namespace).or_default().push(number);
            for (key, value) in &pod.template.labels {
                lookup.labels.entry((namespace, key, value)).or_default().push(number);
            }
            lookup.addresses.extend(pod.addresses.iter().map(|address| (*address, number)));
        }
        lookup
    }

    /// The Pods of a namespace.
    fn namespace(&self, namespace: &str) -> &[usize] {
        self.namespaces.get(namespace).map_or(&[], Vec::as_slice)
    }

    /// Pods of the namespace among which are all that have every one of these labels: the fewest that are known.
    pub(super) fn candidates<'s>(
        &'s self,
        namespace: &'s str,
        labels: &'s BTreeMap<String, String>,
    ) -> &'s [usize] {
        let mut fewest: Option<&[usize]> = None;
        for (key, value) in labels {
            let having = self.labels.get(&(namespace, &**key, &**value)).map_or(&[][..], Vec::as_slice);
            if fewest.is_none_or(|fewest| having.len() < fewest.len()) {
                fewest = Some(having);
            }
        }
        fewest.unwrap_or_else(|| self.namespace(namespace))
    }

    /// The Pod that has an address.
    pub(super) fn at(&self, address: IpAddr) -> Option<usize> {
        self.addresses.get(&address).copied()
    }
}
