//! Numbers for policy subjects.

use std::collections::{BTreeMap, HashMap, HashSet};

use sha2::{Digest, Sha256};
use weft_core::{SubjectId, Workload, policy::PortRef};

use super::{Index, pods::Draft};

/// Numbers above this one are left to classes of addresses outside the mesh.
const LAST: u32 = 0x7fff_ffff;

/// Gives each Pod the number of its subject: the same for every operator that sees the same Pods.
///
/// A subject is everything by which verdicts can differ: the SPIFFE id, the policies that select the Pod, its modes,
/// and the ports that those policies call by name.
pub(super) fn number(pods: &mut [Draft], index: &Index) {
    let names: Vec<String> = pods.iter().map(|p| describe(&p.workload, index)).collect();
    let wanted: BTreeMap<(u32, &str), ()> = names.iter().map(|n| ((hash(n), n.as_str()), ())).collect();
    let mut taken = HashSet::new();
    let mut numbers: HashMap<&str, SubjectId> = HashMap::new();
    for (number, name) in wanted.into_keys() {
        let mut number = number;
        while !taken.insert(number) {
            number = if number == LAST { SubjectId::FIRST } else { number + 1 };
        }
        numbers.insert(name, SubjectId(number));
    }
    for (pod, name) in pods.iter_mut().zip(&names) {
        pod.workload.subject = numbers.get(name.as_str()).copied().unwrap_or_default();
    }
}

fn describe(w: &Workload, index: &Index) -> String {
    let mut text = format!("{}\n{:?}\n{:?}\n", w.identity, w.mode, w.fail_mode);
    for name in &w.policies {
        text.push_str(&format!("{name}\n"));
        for rule in index.policy(name).into_iter().flat_map(|p| &p.rules) {
            for port in &rule.ports {
                if let PortRef::Name(port) = port {
                    text.push_str(&format!("  {port}={:?}\n", w.named_ports.get(port)));
                }
            }
        }
    }
    text
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
