//! What is different when objects are: only what can differ is built again, a namespace at a time.
//!
//! Nearly everything that is made of a Pod follows from its own namespace: its mode, the Services and policies that
//! select it, its subject. What reaches further is kept apart: who has an address ([`super::claims`]), the numbers of
//! subjects, and routes, which name Services of other namespaces.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use weft_core::{NamespacedName, Resource, ResourceKey, Service, Workload, config::MeshConfig};

use super::{
    Entry, Good, Index, Output, Report,
    lookup::Lookup,
    pods, policies, report,
    routes::{self, Routes},
    services::{self, Known},
    subjects::{self, Subjects},
};
use crate::objects::{Kind, ObjectKey};

/// Resources by their keys; `None` where there is none any more.
pub(super) type Resources = BTreeMap<ResourceKey, Option<Resource>>;

/// What is different since the last build.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Resources that may differ; `None` where there is none any more.
    pub resources: BTreeMap<ResourceKey, Option<Resource>>,
    /// What is said of objects, where that may differ; `None` for those that are gone.
    pub reports: BTreeMap<ObjectKey, Option<Report>>,
    /// The nodes that there are, where that may differ.
    pub nodes: Option<BTreeSet<String>>,
}

/// What has to be built again.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// Objects that changed.
    pub(super) objects: BTreeSet<ObjectKey>,
    /// Namespaces in which something changed that Pods, Services or selections follow from.
    pub(super) namespaces: BTreeSet<String>,
    /// Nodes that are in another zone than before.
    pub(super) zones: BTreeSet<String>,
}

/// What was built last.
#[derive(Debug, Default)]
pub(super) struct Built {
    namespaces: BTreeMap<String, Part>,
    routes: Routes,
    config: Option<Arc<MeshConfig>>,
}

/// One namespace.
#[derive(Debug, Default)]
struct Part {
    workloads: pods::Built,
    /// Those of the workloads, in their order.
    subjects: Subjects,
    /// Services before a route makes ports of them HTTP, and as they were sent.
    services: BTreeMap<NamespacedName, (Known, Option<Arc<Service>>)>,
}

/// A namespace of which the subjects have no numbers yet.
struct Draft {
    pods: Vec<pods::Draft>,
    subjects: Subjects,
    services: BTreeMap<NamespacedName, Known>,
}

/// The kinds that Pods, Services and selections of a namespace follow from.
const OWN: [Kind; 5] =
    [Kind::Pod, Kind::Service, Kind::EndpointSlice, Kind::NetworkPolicy, Kind::AuthorizationPolicy];

/// The objects of one namespace.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    pub(super) index: &'a Index,
    pub(super) namespace: &'a str,
}

impl<'a> Scope<'a> {
    /// Those of one kind, in the order of their names.
    pub(super) fn entries(self, kind: Kind) -> impl Iterator<Item = (&'a ObjectKey, &'a Entry)> {
        let from = ObjectKey { kind, namespace: self.namespace.into(), name: String::new() };
        let own = move |key: &ObjectKey| key.kind == kind && key.namespace == self.namespace;
        self.index.entries.range(from..).take_while(move |(key, _)| own(key))
    }

    /// The checked forms of those that Pods, Services and selections follow from, kind by kind.
    pub(super) fn good(self) -> impl Iterator<Item = (&'a ObjectKey, &'a Good)> {
        let all = OWN.into_iter().flat_map(move |kind| self.entries(kind));
        all.filter_map(|(key, entry)| Some((key, entry.good.as_ref()?)))
    }
}

/// The Services of all namespaces, those included that are being built.
pub(super) struct Services<'a> {
    built: &'a BTreeMap<String, Part>,
    drafts: &'a BTreeMap<String, Draft>,
}

impl<'a> Services<'a> {
    /// One of them.
    pub(super) fn get(&self, name: &NamespacedName) -> Option<&'a Known> {
        match self.drafts.get(&*name.namespace) {
            Some(draft) => draft.services.get(name),
            None => self.built.get(&*name.namespace)?.services.get(name).map(|(known, _)| known),
        }
    }
}

impl Index {
    /// What follows from the changes since the last call.
    pub fn update(&mut self) -> Changes {
        let mut dirty = std::mem::take(&mut self.dirty);
        let mut built = std::mem::take(&mut self.built);
        let mut changes = Changes::default();
        for (namespace, part) in &built.namespaces {
            if !dirty.zones.is_empty() && part.workloads.iter().any(|(_, w)| dirty.zones.contains(&*w.node)) {
                dirty.namespaces.insert(namespace.clone());
            }
        }
        let touched = |kinds: &[Kind]| dirty.objects.iter().any(|key| kinds.contains(&key.kind));

        let zones = self.zones();
        let mut drafts = BTreeMap::new();
        for namespace in &dirty.namespaces {
            let draft = draft(Scope { index: self, namespace }, &zones, &mut changes.reports);
            drafts.insert(namespace.clone(), draft);
        }
        let services = Services { built: &built.namespaces, drafts: &drafts };
        self.objects(&dirty.objects, &services, &mut changes);
        let mut moved = BTreeSet::new();
        if touched(&[Kind::HttpRoute, Kind::ReferenceGrant, Kind::Service]) {
            let routes = routes::collect(self, &services, &mut changes.reports);
            moved = built.routes.replace(routes, &mut changes.resources);
        }
        finish(&mut built, drafts, &moved, &mut changes.resources);

        if touched(&[Kind::Node]) {
            changes.nodes = Some(self.nodes());
        }
        let settings = [Kind::Namespace, Kind::Node, Kind::ServiceCidr, Kind::MeshConfig];
        if built.config.is_none() || touched(&settings) {
            let config = self.config();
            if built.config.as_deref() != Some(&config) {
                let config = Arc::new(config);
                changes.resources.insert(ResourceKey::Config, Some(Resource::Config(Arc::clone(&config))));
                built.config = Some(config);
            }
        }
        self.built = built;
        changes
    }

    /// Everything that follows from the objects as they are now, from scratch.
    pub fn build(&self) -> Output {
        let mut fresh = Self::new(self.trust_domain.clone());
        fresh.entries = self.entries.clone();
        for key in self.entries.keys() {
            fresh.changed(key, &super::Trace::default());
        }
        let changes = fresh.update();
        let resources = changes.resources.into_iter().filter_map(|(key, r)| Some((key, r?)));
        let reports = changes.reports.into_iter().filter_map(|(key, r)| Some((key, r?)));
        Output {
            resources: resources.collect(),
            reports: reports.collect(),
            nodes: changes.nodes.unwrap_or_default(),
        }
    }

    /// The zone of each node.
    fn zones(&self) -> HashMap<&str, &Arc<str>> {
        let nodes = Scope { index: self, namespace: "" }.entries(Kind::Node);
        nodes
            .filter_map(|(key, entry)| match &entry.good {
                Some(Good::Node { zone, .. }) => Some((key.name.as_str(), zone)),
                _ => None,
            })
            .collect()
    }

    /// What changed objects say by themselves.
    fn objects(&self, objects: &BTreeSet<ObjectKey>, services: &Services<'_>, changes: &mut Changes) {
        for key in objects {
            let entry = self.entries.get(key);
            if key.kind == Kind::AuthorizationPolicy {
                let policy = match entry.and_then(|e| e.good.as_ref()) {
                    Some(Good::Policy(policy, _)) => Some(Resource::Policy(Arc::clone(policy))),
                    _ => None,
                };
                let name = NamespacedName::new(&key.namespace, &key.name);
                changes.resources.insert(ResourceKey::Policy(name), policy);
            }
            // What was built with its namespace has its report, and those of routes come with all routes.
            if changes.reports.contains_key(key) || (key.kind == Kind::HttpRoute && entry.is_some()) {
                continue;
            }
            let report = entry.map(|entry| {
                let mut report = report::of(key, entry);
                report.resolved = policies::resolved(key, entry, |name| services.get(name).is_some());
                report
            });
            changes.reports.insert(key.clone(), report);
        }
    }
}

fn draft(
    scope: Scope<'_>,
    zones: &HashMap<&str, &Arc<str>>,
    all: &mut BTreeMap<ObjectKey, Option<Report>>,
) -> Draft {
    let entries = OWN.into_iter().flat_map(|kind| scope.entries(kind));
    let mut reports: BTreeMap<_, _> =
        entries.map(|(key, entry)| (key.clone(), report::of(key, entry))).collect();
    let mut pods = pods::collect(scope, zones, &mut reports);
    let lookup = Lookup::new(&pods);
    let services = services::collect(scope, &pods, &lookup);
    let selected = policies::attach(scope, &pods, &lookup, &services, &mut reports);
    drop(lookup);
    for (pod, policies) in pods.iter_mut().zip(selected) {
        pod.policies = policies;
    }
    let subjects = Subjects::new(&pods, scope);
    all.extend(reports.into_iter().map(|(key, report)| (key, Some(report))));
    Draft { pods, subjects, services }
}

/// Puts the namespaces in their places, and notes each resource that is different. `moved` are Services of which routes
/// speak otherwise than before.
fn finish(
    built: &mut Built,
    mut drafts: BTreeMap<String, Draft>,
    moved: &BTreeSet<NamespacedName>,
    resources: &mut Resources,
) {
    let Built { namespaces, routes, .. } = built;
    let mut renumber = false;
    for (namespace, draft) in &mut drafts {
        let part = namespaces.entry(namespace.clone()).or_default();
        renumber |= part.subjects.replace(std::mem::take(&mut draft.subjects));
    }
    if renumber {
        subjects::number(namespaces.values_mut().map(|part| &mut part.subjects));
    }
    // Of two namespaces one may lose what the other one gets.
    let mut gone = Vec::new();
    namespaces.retain(|namespace, part| {
        let mut changed = |workload: &Arc<Workload>| {
            let resource = Resource::Workload(Arc::clone(workload));
            resources.insert(resource.key(), Some(resource));
        };
        match drafts.remove(namespace) {
            Some(mut draft) => {
                part.subjects.give(draft.pods.iter_mut().map(|pod| &mut pod.subject));
                let before = std::mem::take(&mut part.workloads);
                part.workloads = pods::finish(draft.pods, &before, &mut changed, &mut gone);
                let mut before = std::mem::take(&mut part.services);
                for (name, known) in draft.services {
                    let sent = before.remove(&name).and_then(|(_, sent)| sent);
                    part.services.insert(name, (known, sent));
                }
                gone.extend(before.into_keys().map(ResourceKey::Service));
                for (known, sent) in part.services.values_mut() {
                    send(known, sent, routes, resources);
                }
            }
            // A number that collided with one of another namespace may be free again, or the other way round.
            None if renumber => pods::renumber(&mut part.workloads, &part.subjects, &mut changed),
            None => {}
        }
        !part.workloads.is_empty() || !part.services.is_empty()
    });
    for name in moved {
        let part = namespaces.get_mut(&*name.namespace);
        if let Some((known, sent)) = part.and_then(|part| part.services.get_mut(name)) {
            send(known, sent, routes, resources);
        }
    }
    for key in gone {
        resources.entry(key).or_insert(None);
    }
}

/// A Service as nodes get it, where it differs from what they got.
fn send(known: &Known, sent: &mut Option<Arc<Service>>, routes: &Routes, resources: &mut Resources) {
    let service = routes.applied(&known.service);
    if sent.as_deref() != Some(&service) {
        let service = Arc::new(service);
        let resource = Resource::Service(Arc::clone(&service));
        resources.insert(resource.key(), Some(resource));
        *sent = Some(service);
    }
}
