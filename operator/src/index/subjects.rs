//! Numbers for policy subjects.

use std::collections::{HashMap, HashSet, hash_map::Entry};

use sha2::{Digest, Sha256};
use weft_core::{
    NamespacedName, SpiffeId, SubjectId,
    policy::PortRef,
    workload::{FailMode, Mode},
};

use super::{Good, Index, pods::Draft};

/// Numbers above this one are left to classes of addresses outside the mesh.
const LAST: u32 = 0x7fff_ffff;

/// Gives each Pod the number of its subject: the same for every operator that sees the same Pods.
///
/// A subject is everything by which verdicts can differ: the SPIFFE id, the policies that select the Pod, its modes,
/// and the ports that those policies call by name.
pub(super) fn number(pods: &mut [Draft], index: &Index) {
    let called = called_ports(index);
    let mut places: HashMap<Parts<'_>, usize> = HashMap::new();
    // Written out and hashed once per subject, not per Pod.
    let mut wanted: Vec<(u32, String, usize)> = Vec::new();
    let of_pods: Vec<usize> = (pods.iter())
        .map(|pod| match places.entry(Parts::of(pod, &called)) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                let (text, place) = (new.key().describe(), wanted.len());
                wanted.push((hash(&text), text, place));
                *new.insert(place)
            }
        })
        .collect();
    drop(places);
    wanted.sort();
    let mut numbers = vec![SubjectId::UNKNOWN; wanted.len()];
    let mut taken = HashSet::with_capacity(wanted.len());
    for (number, _, place) in wanted {
        let mut number = number;
        while !taken.insert(number) {
            number = if number == LAST { SubjectId::FIRST } else { number + 1 };
        }
        if let Some(subject) = numbers.get_mut(place) {
            *subject = SubjectId(number);
        }
    }
    for (pod, place) in pods.iter_mut().zip(of_pods) {
        pod.subject = numbers.get(place).copied().unwrap_or(SubjectId::UNKNOWN);
    }
}

/// The policies that call ports by name, which few do, and those names.
fn called_ports(index: &Index) -> HashMap<&NamespacedName, Vec<&str>> {
    let mut called = HashMap::new();
    for (_, good) in index.good() {
        let Good::Policy(policy, _) = good else { continue };
        let names = policy.rules.iter().flat_map(|rule| &rule.ports).filter_map(|port| match port {
            PortRef::Name(name) => Some(&**name),
            _ => None,
        });
        let names: Vec<&str> = names.collect();
        if !names.is_empty() {
            called.insert(&policy.name, names);
        }
    }
    called
}

/// What makes a subject.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Parts<'a> {
    identity: &'a SpiffeId,
    mode: Mode,
    fail_mode: FailMode,
    policies: &'a [NamespacedName],
    /// Ports that a policy calls by name: the policy's place among `policies`, the name, the number.
    ports: Vec<(usize, &'a str, Option<u16>)>,
}

impl<'a> Parts<'a> {
    fn of(pod: &'a Draft, called: &HashMap<&NamespacedName, Vec<&'a str>>) -> Self {
        let mut ports = Vec::new();
        if !called.is_empty() {
            for (place, name) in pod.policies.iter().enumerate() {
                for port in called.get(name).into_iter().flatten() {
                    ports.push((place, *port, pod.template.named_ports.get(*port).copied()));
                }
            }
        }
        Self {
            identity: &pod.template.identity,
            mode: pod.mode,
            fail_mode: pod.fail_mode,
            policies: &pod.policies,
            ports,
        }
    }

    fn describe(&self) -> String {
        let mut text = format!("{}\n{:?}\n{:?}\n", self.identity, self.mode, self.fail_mode);
        for (place, name) in self.policies.iter().enumerate() {
            text.push_str(&format!("{name}\n"));
            for (_, port, number) in self.ports.iter().filter(|(of, ..)| *of == place) {
                text.push_str(&format!("  {port}={number:?}\n"));
            }
        }
        text
    }
}

fn hash(text: &str) -> u32 {
    let digest = Sha256::digest(text);
    let number = digest.iter().take(4).fold(0u32, |n, b| n << 8 | u32::from(*b));
    SubjectId::FIRST + number % (LAST - SubjectId::FIRST + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_in_their_range() {
        for i in 0..10_000 {
            let number = hash(&format!("spiffe://a/ns/b/sa/{i}"));
            assert!((SubjectId::FIRST..=LAST).contains(&number));
        }
    }
}
