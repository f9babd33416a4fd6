//! Which policies select which Pods.

use std::collections::BTreeMap;

use weft_api::{convert::authorization::Target, values::Selector};
use weft_core::{NamespacedName, WorkloadUid};

use super::{Entry, Finding, Good, Report, build::Scope, lookup::Lookup, pods::Draft, services::Known};
use crate::objects::{Kind, ObjectKey};

/// The policies of a namespace that select each Pod, sorted, in the drafts' order; and on each policy whether its
/// Services exist.
pub(super) fn attach(
    scope: Scope<'_>,
    pods: &[Draft],
    lookup: &Lookup<'_>,
    services: &BTreeMap<NamespacedName, Known>,
    reports: &mut BTreeMap<ObjectKey, Report>,
) -> Vec<Vec<NamespacedName>> {
    let mut selected: Vec<Vec<NamespacedName>> = vec![Vec::new(); pods.len()];
    // The drafts are in the order of their uids.
    let number_of = |uid: &WorkloadUid| pods.binary_search_by(|pod| pod.template.uid.cmp(uid)).ok();
    let mut select = |key: &ObjectKey, targets: &[Target]| {
        let name = NamespacedName::new(&key.namespace, &key.name);
        let mut mark = |number: usize| {
            // Objects come one after the other, so a policy that is there already stands last.
            if let Some(list) = selected.get_mut(number)
                && list.last() != Some(&name)
            {
                list.push(name.clone());
            }
        };
        for target in targets {
            match target {
                Target::Pods(selector) => {
                    for number in lookup.candidates(&selector.match_labels) {
                        if pods.get(*number).is_some_and(|p| selector.matches(&p.template.labels)) {
                            mark(*number);
                        }
                    }
                }
                Target::Service(service) => {
                    let known = services.get(&NamespacedName::new(&key.namespace, service));
                    for number in known.into_iter().flat_map(|s| &s.pods).filter_map(number_of) {
                        mark(number);
                    }
                }
            }
        }
    };
    for (key, entry) in scope.entries(Kind::AuthorizationPolicy) {
        match (&entry.good, &entry.guarded) {
            // Without a good form it is named, but never sent: whoever judges a Pod with a policy that is not there
            // denies.
            (Some(Good::Policy(_, targets)), _) | (None, Some(targets)) => select(key, targets),
            (None, None) => select(key, &[Target::Pods(Selector::default())]),
            _ => {}
        }
        if let Some(report) = reports.get_mut(key) {
            report.resolved = resolved(key, entry, |name| services.contains_key(name));
        }
    }
    for policies in &mut selected {
        policies.sort();
    }
    selected
}

/// Whether the Services exist to which a policy or TrafficPolicy refers; `None` for other objects.
pub(super) fn resolved(
    key: &ObjectKey,
    entry: &Entry,
    exists: impl Fn(&NamespacedName) -> bool,
) -> Option<Finding> {
    let named: Vec<&str> = match (&entry.good, &entry.guarded) {
        (Some(Good::Policy(_, targets)), _) => services_of(targets).collect(),
        (Some(Good::Traffic(names)), _) => names.iter().map(String::as_str).collect(),
        (None, Some(targets)) if key.kind == Kind::AuthorizationPolicy => services_of(targets).collect(),
        _ => return None,
    };
    let missing = named.into_iter().find(|name| !exists(&NamespacedName::new(&key.namespace, name)));
    Some(match missing {
        None => Finding::ok("ResolvedRefs", ""),
        Some(name) => Finding::bad(
            "TargetNotFound",
            format!(
                "{key}: spec.targetRefs: there is no Service {}/{name}; it selects nothing by it",
                key.namespace
            ),
        ),
    })
}

/// What becomes of the Pods of a policy that was never good.
pub(super) fn guard_message(key: &ObjectKey, entry: &Entry) -> String {
    let whose = match &entry.guarded {
        Some(_) => "the enrolled Pods that its targetRefs select".to_owned(),
        None => {
            format!("every enrolled Pod of namespace {}, since its targetRefs cannot be read", key.namespace)
        }
    };
    format!("no good form of it is known, so everything is denied to {whose}; correct it or remove it")
}

fn services_of(targets: &[Target]) -> impl Iterator<Item = &str> {
    targets.iter().filter_map(|t| match t {
        Target::Service(name) => Some(name.as_str()),
        Target::Pods(_) => None,
    })
}
