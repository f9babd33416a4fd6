//! Pods to workloads.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{Container, Pod},
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use sha2::{Digest, Sha256};
use weft_api::{FieldError, labels};
use weft_core::{
    NamespacedName, SpiffeId, SubjectId, Workload, WorkloadUid,
    workload::{FailMode, Mode, Owner},
};

use super::{Finding, Good, Index, Report};
use crate::objects::{Kind, ObjectKey};

/// A Pod on its way to a [`Workload`].
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) workload: Workload,
    /// Whether it should get new connections.
    pub(super) ready: bool,
}

/// The Pods that are scheduled and not over, in a fixed order.
///
/// Pods of the host's network are left out: any of them could be any other, and host daemons are never captured.
pub(super) fn collect(index: &Index, reports: &mut BTreeMap<ObjectKey, Report>) -> Vec<Draft> {
    let zones: HashMap<&str, &Arc<str>> = (index.good())
        .filter_map(|(key, good)| match good {
            Good::Node { zone, .. } => Some((key.name.as_str(), zone)),
            _ => None,
        })
        .collect();
    let mut pods: Vec<(&ObjectKey, &Pod)> = (index.good())
        .filter_map(|(key, good)| match good {
            Good::Pod(pod) if scheduled(pod) => Some((key, &**pod)),
            _ => None,
        })
        .collect();
    // An address belongs to the youngest Pod that is not going away.
    pods.sort_by_key(|(key, pod)| {
        let meta = &pod.metadata;
        let created = meta.creation_timestamp.as_ref().map(|t| t.0);
        (meta.deletion_timestamp.is_some(), std::cmp::Reverse(created), *key)
    });
    let mut taken: HashMap<IpAddr, &ObjectKey> = HashMap::new();
    let mut drafts = Vec::with_capacity(pods.len());
    for (key, pod) in pods {
        let mut draft = draft(index, key, pod, &zones, reports);
        draft.workload.addresses.retain(|address| match taken.get(address) {
            None => {
                taken.insert(*address, key);
                true
            }
            Some(other) => {
                complain(
                    reports,
                    key,
                    &format!("status.podIPs: {address} belongs to {other}; give each Pod its own"),
                );
                false
            }
        });
        drafts.push(draft);
    }
    drafts.sort_by(|a, b| a.workload.uid.cmp(&b.workload.uid));
    drafts
}

fn scheduled(pod: &Pod) -> bool {
    let spec = pod.spec.as_ref();
    let over = pod
        .status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .is_some_and(|p| p == "Succeeded" || p == "Failed");
    let host = spec.and_then(|s| s.host_network).unwrap_or_default();
    spec.and_then(|s| s.node_name.as_deref()).is_some_and(|n| !n.is_empty()) && !over && !host
}

fn draft(
    index: &Index,
    key: &ObjectKey,
    pod: &Pod,
    zones: &HashMap<&str, &Arc<str>>,
    reports: &mut BTreeMap<ObjectKey, Report>,
) -> Draft {
    let meta = &pod.metadata;
    let spec = pod.spec.clone().unwrap_or_default();
    let name = NamespacedName::new(&key.namespace, &key.name);
    let account: Arc<str> = (spec.service_account_name.as_deref())
        .or(spec.service_account.as_deref())
        .filter(|s| !s.is_empty())
        .unwrap_or("default")
        .into();
    let node: Arc<str> = spec.node_name.as_deref().unwrap_or_default().into();
    let (mode, fail_mode) = modes(index, key, meta.labels.as_ref(), reports);
    let annotations = meta.annotations.as_ref();
    Draft {
        ready: ready(pod),
        workload: Workload {
            uid: uid(pod, &name),
            identity: SpiffeId::service_account(&index.trust_domain, &key.namespace, &account),
            service_account: account,
            subject: SubjectId::UNKNOWN,
            owner: owner(pod, &key.name),
            zone: zones.get(&*node).map_or_else(|| "".into(), |z| Arc::clone(z)),
            node,
            labels: meta.labels.clone().unwrap_or_default(),
            addresses: addresses(pod).unwrap_or_default(),
            named_ports: named_ports(&spec.containers, spec.init_containers.as_deref()),
            mode,
            fail_mode,
            policies: Vec::new(),
            network_policy: network_policy(index, key, meta.labels.as_ref()),
            netns: annotations.and_then(|a| a.get(labels::NETNS)).cloned(),
            name,
        },
    }
}

/// A Pod's label may only tighten its namespace's mode.
fn modes(
    index: &Index,
    key: &ObjectKey,
    own: Option<&BTreeMap<String, String>>,
    reports: &mut BTreeMap<ObjectKey, Report>,
) -> (Mode, FailMode) {
    let (namespace, mut fail) = index.namespace(&key.namespace);
    let own = labels::mode(own).ok().flatten();
    let mode = own.map_or(namespace, |own| own.max(namespace));
    if own.is_some_and(|own| own < namespace) {
        let message = format!(
            "metadata.labels[{}]: a Pod's label may only tighten the mode of its namespace, so {mode:?} holds; take the \
             label away, or change the namespace's",
            labels::MODE
        );
        complain(reports, key, &message);
    }
    if mode == Mode::Strict && fail == FailMode::Open {
        // The namespace is permissive and open, the Pod asks for strict.
        fail = FailMode::Closed;
        let message = format!(
            "metadata.labels[{}]: strict excludes the namespace's {}: open, so this Pod is strict and closed; take the \
             namespace's label away to say so",
            labels::MODE,
            labels::FAIL_MODE
        );
        complain(reports, key, &message);
    }
    (mode, fail)
}

fn complain(reports: &mut BTreeMap<ObjectKey, Report>, key: &ObjectKey, message: &str) {
    if let Some(report) = reports.get_mut(key)
        && report.accepted.ok
    {
        report.accepted = Finding::bad("PartlyIgnored", format!("{key}: {message}"));
    }
}

/// The Pod's addresses.
pub(super) fn addresses(pod: &Pod) -> Result<Vec<IpAddr>, FieldError> {
    let Some(status) = &pod.status else { return Ok(Vec::new()) };
    let listed = status.pod_ips.iter().flatten().map(|p| p.ip.as_str());
    let texts: Vec<&str> = if status.pod_ips.is_some() {
        listed.collect()
    } else {
        status.pod_ip.as_deref().into_iter().collect()
    };
    (texts.into_iter().enumerate())
        .map(|(i, text)| {
            let message = || format!("{text:?} is no address; write one like 10.1.0.5 or fd00::5");
            let usable =
                super::address(text).filter(|a| !a.is_loopback() && !a.is_unspecified() && !a.is_multicast());
            usable.ok_or_else(|| FieldError::new(format!("status.podIPs[{i}].ip"), message()))
        })
        .collect()
}

fn uid(pod: &Pod, name: &NamespacedName) -> WorkloadUid {
    // It becomes part of paths on the node.
    let plain =
        |u: &&str| (1..=64).contains(&u.len()) && u.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if let Some(uid) = pod.metadata.uid.as_deref().filter(plain) {
        return uid.into();
    }
    let hash: String = Sha256::digest(name.to_string()).iter().take(16).map(|b| format!("{b:02x}")).collect();
    let part = |range| hash.get(range).unwrap_or_default();
    format!("{}-{}-{}-{}-{}", part(0..8), part(8..12), part(12..16), part(16..20), part(20..32))
        .as_str()
        .into()
}

fn owner(pod: &Pod, name: &str) -> Owner {
    let labels = pod.metadata.labels.as_ref();
    let label = |key: &str| labels.and_then(|l| l.get(key)).map(String::as_str);
    let owners = pod.metadata.owner_references.as_deref().unwrap_or_default();
    let Some(owner) = owners.iter().find(|o| o.controller == Some(true)).or_else(|| owners.first()) else {
        let name = label("app.kubernetes.io/name").or_else(|| label("app")).unwrap_or(name);
        return Owner { kind: "Pod".into(), name: name.into() };
    };
    // A Deployment names its ReplicaSets after itself and the hash of the Pods' template.
    let deployment = (owner.kind == "ReplicaSet")
        .then(|| label("pod-template-hash"))
        .flatten()
        .and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-'));
    match deployment {
        Some(name) => Owner { kind: "Deployment".into(), name: name.into() },
        None => Owner { kind: owner.kind.as_str().into(), name: owner.name.as_str().into() },
    }
}

fn named_ports(containers: &[Container], init: Option<&[Container]>) -> BTreeMap<String, u16> {
    containers
        .iter()
        .chain(init.unwrap_or_default())
        .flat_map(|c| c.ports.iter().flatten())
        .filter_map(|p| Some((p.name.clone()?, u16::try_from(p.container_port).ok()?)))
        .collect()
}

fn ready(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let condition = status.and_then(|s| s.conditions.as_ref()?.iter().find(|c| c.type_ == "Ready"));
    let running = || status.and_then(|s| s.phase.as_deref()).is_none_or(|p| p == "Running");
    pod.metadata.deletion_timestamp.is_none() && condition.map_or_else(running, |c| c.status == "True")
}

fn network_policy(index: &Index, key: &ObjectKey, own: Option<&BTreeMap<String, String>>) -> bool {
    let empty = BTreeMap::new();
    let own = own.unwrap_or(&empty);
    index.good().any(|(policy, good)| match good {
        Good::NetworkPolicy(p) if policy.kind == Kind::NetworkPolicy && policy.namespace == key.namespace => {
            p.spec
                .as_ref()
                .is_some_and(|s| s.pod_selector.as_ref().is_none_or(|selector| selects(selector, own)))
        }
        _ => false,
    })
}

fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    selector.match_labels.iter().flatten().all(|(k, v)| labels.get(k) == Some(v))
        && selector.match_expressions.iter().flatten().all(|r| {
            let value = labels.get(&r.key);
            let listed = || value.is_some_and(|v| r.values.iter().flatten().any(|x| x == v));
            match r.operator.as_str() {
                "In" => listed(),
                "NotIn" => !listed(),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                // Not understood: rather treat the Pod as selected, which only turns the shortcut off.
                _ => true,
            }
        })
}
