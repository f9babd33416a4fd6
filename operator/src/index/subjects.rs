//! Numbers for policy subjects.

use std::collections::{HashMap, HashSet, hash_map::Entry};

use sha2::{Digest, Sha256};
use weft_core::{
    NamespacedName, Policy, SpiffeId, SubjectId,
    policy::PortRef,
    workload::{FailMode, Mode},
};

use super::{Good, build::Scope, pods::Draft};

/// Numbers above this one are left to classes of addresses outside the mesh.
const LAST: u32 = 0x7fff_ffff;

/// The subjects of a namespace's Pods. No other namespace has the same: the SPIFFE id names the namespace.
#[derive(Debug, Default)]
pub(super) struct Subjects {
    /// Each once: the number that it wants, and everything that makes it, in this order.
    distinct: Vec<(u32, String)>,
    /// The number that each of them has.
    numbers: Vec<SubjectId>,
    /// For each Pod, in the drafts' order, which of them it is.
    places: Vec<usize>,
}

impl Subjects {
    /// Those of the drafts, without numbers yet.
    ///
    /// A subject is everything by which verdicts can differ: the SPIFFE id, the policies that select the Pod, its
    /// modes, and the ports that those policies call by name.
    pub(super) fn new(pods: &[Draft], scope: Scope<'_>) -> Self {
        let called = calling(scope);
        let mut known: HashMap<Parts<'_>, usize> = HashMap::new();
        // Written out and hashed once per subject, not per Pod.
        let mut found: Vec<(u32, String, usize)> = Vec::new();
        let of_pods: Vec<usize> = (pods.iter())
            .map(|pod| match known.entry(Parts::of(pod, &called)) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    let (text, place) = (new.key().describe(), found.len());
                    found.push((hash(&text), text, place));
                    *new.insert(place)
                }
            })
            .collect();
        found.sort();
        let mut sorted = vec![0; found.len()];
        for (new, (_, _, old)) in found.iter().enumerate() {
            if let Some(place) = sorted.get_mut(*old) {
                *place = new;
            }
        }
        let places = of_pods.into_iter().filter_map(|old| sorted.get(old).copied()).collect();
        let distinct: Vec<_> = found.into_iter().map(|(number, text, _)| (number, text)).collect();
        Self { numbers: vec![SubjectId::UNKNOWN; distinct.len()], distinct, places }
    }

    /// Takes the place of the ones before; true where they are not the same, so that numbers must be given anew.
    pub(super) fn replace(&mut self, new: Self) -> bool {
        if self.distinct == new.distinct {
            self.places = new.places;
            return false;
        }
        *self = new;
        true
    }

    /// The number of each Pod's subject, in the drafts' order.
    pub(super) fn of_pods(&self) -> impl Iterator<Item = SubjectId> {
        let number = |place: &usize| self.numbers.get(*place).copied().unwrap_or(SubjectId::UNKNOWN);
        self.places.iter().map(number)
    }

    /// Writes them down.
    pub(super) fn give<'p>(&self, pods: impl Iterator<Item = &'p mut SubjectId>) {
        for (subject, number) in pods.zip(self.of_pods()) {
            *subject = number;
        }
    }
}

/// Gives the subjects of all namespaces their numbers: the same for every operator that sees the same Pods.
pub(super) fn number<'s>(all: impl Iterator<Item = &'s mut Subjects>) {
    let mut wanted: Vec<(u32, &str, &mut SubjectId)> = Vec::new();
    for subjects in all {
        let each = subjects.distinct.iter().zip(&mut subjects.numbers);
        wanted.extend(each.map(|((number, text), subject)| (*number, text.as_str(), subject)));
    }
    wanted.sort_unstable_by_key(|(number, text, _)| (*number, *text));
    let mut taken = HashSet::with_capacity(wanted.len());
    for (mut number, _, subject) in wanted {
        while !taken.insert(number) {
            number = if number == LAST { SubjectId::FIRST } else { number + 1 };
        }
        *subject = SubjectId(number);
    }
}

/// The ports that a policy calls by name.
pub(super) fn called_ports(policy: &Policy) -> impl Iterator<Item = &str> {
    policy.rules.iter().flat_map(|rule| &rule.ports).filter_map(|port| match port {
        PortRef::Name(name) => Some(&**name),
        _ => None,
    })
}

/// The policies that call ports by name, which few do, and those names.
fn calling(scope: Scope<'_>) -> HashMap<&NamespacedName, Vec<&str>> {
    let mut calling = HashMap::new();
    for (_, good) in scope.good() {
        let Good::Policy(policy, _) = good else { continue };
        let names: Vec<&str> = called_ports(policy).collect();
        if !names.is_empty() {
            calling.insert(&policy.name, names);
        }
    }
    calling
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
