//! Which policies select which Pods.

use std::collections::BTreeMap;

use weft_api::convert::authorization::Target;
use weft_core::NamespacedName;

use super::{Entry, Finding, Good, Index, Report, pods::Draft, services::Known};
use crate::objects::{Kind, ObjectKey};

/// Writes on each Pod the policies that select it, and on each policy and TrafficPolicy whether its Services exist.
pub(super) fn attach(
    index: &Index,
    pods: &mut [Draft],
    services: &BTreeMap<NamespacedName, Known>,
    reports: &mut BTreeMap<ObjectKey, Report>,
) {
    for (key, entry) in &index.entries {
        let mut missing = Vec::new();
        match &entry.good {
            Some(Good::Policy(_, targets)) => {
                select(key, pods, |pod| selects(key, targets, pod, services));
                missing.extend(services_of(targets));
            }
            Some(Good::Traffic(names)) => missing.extend(names.iter().map(String::as_str)),
            // Named, but never sent: whoever judges a Pod with a policy that is not there denies.
            None if key.kind == Kind::AuthorizationPolicy => match &entry.guarded {
                Some(targets) => {
                    select(key, pods, |pod| selects(key, targets, pod, services));
                    missing.extend(services_of(targets));
                }
                None => {
                    select(key, pods, |_| true);
                    continue;
                }
            },
            _ => continue,
        }
        missing.retain(|name| !services.contains_key(&NamespacedName::new(&key.namespace, name)));
        if let Some(report) = reports.get_mut(key) {
            report.resolved = Some(match missing.first() {
                None => Finding::ok("ResolvedRefs", ""),
                Some(name) => Finding::bad(
                    "TargetNotFound",
                    format!(
                        "{key}: spec.targetRefs: there is no Service {}/{name}; it selects nothing by it",
                        key.namespace
                    ),
                ),
            });
        }
    }
    for pod in pods {
        pod.workload.policies.sort();
    }
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

fn select(key: &ObjectKey, pods: &mut [Draft], selected: impl Fn(&Draft) -> bool) {
    let name = NamespacedName::new(&key.namespace, &key.name);
    for pod in pods.iter_mut().filter(|p| p.workload.name.namespace == name.namespace) {
        if selected(pod) {
            pod.workload.policies.push(name.clone());
        }
    }
}

fn selects(
    key: &ObjectKey,
    targets: &[Target],
    pod: &Draft,
    services: &BTreeMap<NamespacedName, Known>,
) -> bool {
    targets.iter().any(|target| match target {
        Target::Pods(selector) => selector.matches(&pod.workload.labels),
        Target::Service(name) => services
            .get(&NamespacedName::new(&key.namespace, name))
            .is_some_and(|s| s.pods.contains(&pod.workload.uid)),
    })
}

fn services_of(targets: &[Target]) -> impl Iterator<Item = &str> {
    targets.iter().filter_map(|t| match t {
        Target::Service(name) => Some(name.as_str()),
        Target::Pods(_) => None,
    })
}
