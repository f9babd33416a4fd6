//! Pods to workloads.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::{
    api::{
        core::v1::{Container, Node, Pod, PodSpec},
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::apis::meta::v1::LabelSelector,
    jiff::Timestamp,
};
use sha2::{Digest, Sha256};
use weft_api::{FieldError, labels};
use weft_core::{
    NamespacedName, ResourceKey, SpiffeId, SubjectId, TrustDomain, Workload, WorkloadUid,
    workload::{FailMode, Mode, Owner},
};

use super::{Finding, Good, Report, build::Scope, subjects::Subjects};
use crate::objects::{Kind, ObjectKey};

/// What is read of a Pod when it comes.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// Everything that follows from the Pod alone; the rest has its default.
    pub(super) template: Arc<Workload>,
    /// What its own label asks for.
    mode: Option<Mode>,
    ready: bool,
    /// It has a node, is not over, and is not of the host's network.
    pub(super) scheduled: bool,
    pub(super) deleting: bool,
    pub(super) created: Option<Timestamp>,
}

impl Facts {
    /// Reads a Pod.
    ///
    /// # Errors
    /// For a field that is wrong.
    pub(super) fn new(trust_domain: &TrustDomain, key: &ObjectKey, pod: &Pod) -> Result<Self, FieldError> {
        let meta = &pod.metadata;
        let empty = PodSpec::default();
        let spec = pod.spec.as_ref().unwrap_or(&empty);
        let name = NamespacedName::new(&key.namespace, &key.name);
        let account: Arc<str> = (spec.service_account_name.as_deref())
            .or(spec.service_account.as_deref())
            .filter(|s| !s.is_empty())
            .unwrap_or("default")
            .into();
        let annotations = meta.annotations.as_ref();
        let template = Workload {
            uid: uid(pod, &name),
            identity: SpiffeId::service_account(trust_domain, &key.namespace, &account),
            service_account: account,
            subject: SubjectId::UNKNOWN,
            owner: owner(pod, &key.name),
            zone: "".into(),
            node: spec.node_name.as_deref().unwrap_or_default().into(),
            labels: meta.labels.clone().unwrap_or_default(),
            addresses: addresses(pod)?,
            named_ports: named_ports(&spec.containers, spec.init_containers.as_deref()),
            mode: Mode::default(),
            fail_mode: FailMode::default(),
            policies: Vec::new(),
            network_policy: false,
            netns: annotations.and_then(|a| a.get(labels::NETNS)).cloned(),
            host_addresses: Vec::new(),
            name,
        };
        Ok(Self {
            template: Arc::new(template),
            mode: labels::mode(meta.labels.as_ref())?,
            ready: ready(pod),
            scheduled: scheduled(pod),
            deleting: meta.deletion_timestamp.is_some(),
            created: meta.creation_timestamp.as_ref().map(|t| t.0),
        })
    }
}

/// A Pod on its way to a [`Workload`].
#[derive(Debug)]
pub(super) struct Draft {
    /// What follows from the Pod alone.
    pub(super) template: Arc<Workload>,
    /// Its addresses that no younger Pod has.
    pub(super) addresses: Vec<IpAddr>,
    /// Whether it should get new connections.
    pub(super) ready: bool,
    pub(super) mode: Mode,
    pub(super) fail_mode: FailMode,
    pub(super) policies: Vec<NamespacedName>,
    pub(super) subject: SubjectId,
    zone: Arc<str>,
    network_policy: bool,
}

/// The workloads of a build, each with the template that it was made of, in the order of their uids.
pub(super) type Built = Vec<(Arc<Workload>, Arc<Workload>)>;

/// The workloads, in the drafts' order, which is that of their uids; one that is as it was keeps its allocation, of the
/// others `changed` is told, and the keys of those that are no more become `gone`.
pub(super) fn finish(
    drafts: Vec<Draft>,
    before: &Built,
    mut changed: impl FnMut(&Arc<Workload>),
    gone: &mut Vec<ResourceKey>,
) -> Built {
    let mut before = before.iter().peekable();
    let mut built = Built::with_capacity(drafts.len());
    for draft in drafts {
        let template = Arc::clone(&draft.template);
        while let Some((of, _)) = before.next_if(|(of, _)| of.uid < template.uid) {
            gone.push(ResourceKey::Workload(of.uid.clone()));
        }
        let workload = match before.next_if(|(of, _)| of.uid == template.uid) {
            Some((of, workload)) if Arc::ptr_eq(of, &template) && draft.same(workload) => {
                Arc::clone(workload)
            }
            _ => {
                let workload = Arc::new(draft.workload());
                changed(&workload);
                workload
            }
        };
        built.push((template, workload));
    }
    gone.extend(before.map(|(of, _)| ResourceKey::Workload(of.uid.clone())));
    built
}

/// Gives the workloads the numbers that their subjects have now.
pub(super) fn renumber(built: &mut Built, subjects: &Subjects, mut changed: impl FnMut(&Arc<Workload>)) {
    for ((_, workload), subject) in built.iter_mut().zip(subjects.of_pods()) {
        if workload.subject != subject {
            *workload = Arc::new(Workload { subject, ..Workload::clone(workload) });
            changed(workload);
        }
    }
}

impl Draft {
    /// Whether it would become `w`, which was made of the same template.
    fn same(&self, w: &Workload) -> bool {
        self.addresses == w.addresses
            && self.mode == w.mode
            && self.fail_mode == w.fail_mode
            && self.policies == w.policies
            && self.subject == w.subject
            && self.zone == w.zone
            && self.network_policy == w.network_policy
    }

    fn workload(self) -> Workload {
        Workload {
            addresses: self.addresses,
            mode: self.mode,
            fail_mode: self.fail_mode,
            policies: self.policies,
            subject: self.subject,
            zone: self.zone,
            network_policy: self.network_policy,
            ..Workload::clone(&self.template)
        }
    }
}

/// The Pods of a namespace that are scheduled and not over, in the order of their uids. `zones` are those of nodes.
///
/// Pods of the host's network are left out: any of them could be any other, and host daemons are never captured.
pub(super) fn collect(
    scope: Scope<'_>,
    zones: &HashMap<&str, &Arc<str>>,
    reports: &mut BTreeMap<ObjectKey, Report>,
) -> Vec<Draft> {
    let network_policies: Vec<&NetworkPolicy> = (scope.good())
        .filter_map(|(_, good)| match good {
            Good::NetworkPolicy(policy) => Some(&**policy),
            _ => None,
        })
        .collect();
    let none: Arc<str> = "".into();
    let namespace = scope.index.namespace(scope.namespace);
    let claims = &scope.index.claims;
    let mut drafts = Vec::new();
    for (key, good) in scope.good() {
        let Good::Pod(pod) = good else { continue };
        if !pod.scheduled {
            continue;
        }
        let template = &pod.template;
        if let Some(other) = claims.uid(&template.uid).filter(|other| *other != key) {
            let message = format!("metadata.uid: belongs to {other}, so this Pod is left out");
            complain(reports, key, &message);
            continue;
        }
        let (mode, fail_mode) = modes(namespace, key, pod.mode, reports);
        let mut draft = Draft {
            template: Arc::clone(template),
            addresses: Vec::with_capacity(template.addresses.len()),
            ready: pod.ready,
            mode,
            fail_mode,
            policies: Vec::new(),
            subject: SubjectId::UNKNOWN,
            zone: Arc::clone(zones.get(&*template.node).copied().unwrap_or(&none)),
            network_policy: network_policies.iter().any(|policy| restricts(policy, &template.labels)),
        };
        for address in &template.addresses {
            match claims.address(*address) {
                Some(owner) if owner != key || draft.addresses.contains(address) => complain(
                    reports,
                    key,
                    &format!("status.podIPs: {address} belongs to {owner}; give each Pod its own"),
                ),
                _ => draft.addresses.push(*address),
            }
        }
        drafts.push(draft);
    }
    if scope.namespace.is_empty() {
        drafts.extend(nodes(scope));
    }
    drafts.sort_by(|a, b| a.template.uid.cmp(&b.template.uid));
    drafts
}

/// The nodes' own networks, in the name of which their Pods there call.
fn nodes(scope: Scope<'_>) -> impl Iterator<Item = Draft> {
    let templates = scope.entries(Kind::Node).filter_map(|(_, entry)| match &entry.good {
        Some(Good::Node { host, .. }) => Some(host),
        _ => None,
    });
    templates.map(|template| Draft {
        template: Arc::clone(template),
        addresses: Vec::new(),
        ready: false,
        mode: Mode::Disabled,
        fail_mode: FailMode::Closed,
        policies: Vec::new(),
        subject: SubjectId::UNKNOWN,
        zone: Arc::clone(&template.zone),
        network_policy: false,
    })
}

/// What a node's own network is as a caller.
pub(super) fn node(trust_domain: &TrustDomain, name: &str, zone: &Arc<str>, node: &Node) -> Workload {
    let listed = node.status.as_ref().and_then(|s| s.addresses.as_ref());
    let mut host_addresses: Vec<IpAddr> = listed
        .into_iter()
        .flatten()
        .filter(|a| a.type_ == "InternalIP" || a.type_ == "ExternalIP")
        .filter_map(|a| super::address(&a.address))
        .filter(|a| !a.is_loopback() && !a.is_unspecified() && !a.is_multicast())
        .collect();
    host_addresses.dedup();
    Workload {
        uid: WorkloadUid::node(name),
        name: NamespacedName::new("", name),
        service_account: "".into(),
        identity: SpiffeId::node(trust_domain, name),
        subject: SubjectId::UNKNOWN,
        owner: Owner { kind: "Node".into(), name: name.into() },
        node: name.into(),
        zone: Arc::clone(zone),
        labels: BTreeMap::new(),
        addresses: Vec::new(),
        named_ports: BTreeMap::new(),
        mode: Mode::Disabled,
        fail_mode: FailMode::Closed,
        policies: Vec::new(),
        network_policy: false,
        netns: None,
        host_addresses,
    }
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

/// A Pod's label may only tighten its namespace's mode.
fn modes(
    (namespace, mut fail): (Mode, FailMode),
    key: &ObjectKey,
    own: Option<Mode>,
    reports: &mut BTreeMap<ObjectKey, Report>,
) -> (Mode, FailMode) {
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
fn addresses(pod: &Pod) -> Result<Vec<IpAddr>, FieldError> {
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

fn restricts(policy: &NetworkPolicy, own: &BTreeMap<String, String>) -> bool {
    let spec = policy.spec.as_ref();
    spec.is_some_and(|s| s.pod_selector.as_ref().is_none_or(|selector| selects(selector, own)))
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
