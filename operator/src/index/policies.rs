//! Which policies select which Pods.

use std::collections::BTreeMap;

use weft_api::convert::authorization::Target;
use weft_core::NamespacedName;

use super::{Finding, Good, Index, Report, pods::Draft, services::Known};
use crate::objects::ObjectKey;

/// Writes on each Pod the policies that select it, and on each policy and TrafficPolicy whether its Services exist.
pub(super) fn attach(
    index: &Index,
    pods: &mut [Draft],
    services: &BTreeMap<NamespacedName, Known>,
    reports: &mut BTreeMap<ObjectKey, Report>,
) {
    for (key, good) in index.good() {
        let mut missing = Vec::new();
        match good {
            Good::Policy(policy, targets) => {
                for pod in pods.iter_mut().filter(|p| p.workload.name.namespace == policy.name.namespace) {
                    let selected = targets.iter().any(|target| match target {
                        Target::Pods(selector) => selector.matches(&pod.workload.labels),
                        Target::Service(name) => services
                            .get(&NamespacedName::new(&key.namespace, name))
                            .is_some_and(|s| s.pods.contains(&pod.workload.uid)),
                    });
                    if selected {
                        pod.workload.policies.push(policy.name.clone());
                    }
                }
                missing.extend(targets.iter().filter_map(|t| match t {
                    Target::Service(name) => Some(name.as_str()),
                    Target::Pods(_) => None,
                }));
            }
            Good::Traffic(names) => missing.extend(names.iter().map(String::as_str)),
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
