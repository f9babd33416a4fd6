//! From objects to the resources that nodes get. Pure and synchronous: changes in, [`Changes`] out.
//!
//! Pods are read when they come, what a change cannot reach is left as it is ([`build`]), a workload that did not change
//! keeps its allocation (so that later comparisons end at the pointer), and selectors are answered from a table of
//! labels ([`lookup::Lookup`]), never by asking each Pod.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use gateway_api::{httproutes::HttpRoute, referencegrants::ReferenceGrant};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice, networking::v1::NetworkPolicy};
use weft_api::{
    AuthorizationPolicy, AuthorizationPolicySpec, FieldError, ObjectError,
    authorization::TargetRef,
    convert::{authorization, http_route, mesh_config, traffic},
    labels,
};
use weft_core::{
    Policy, Resource, ResourceKey, TrustDomain, config,
    policy::Cidr,
    workload::{FailMode, Mode},
};

use crate::{
    objects::{Kind, Object, ObjectKey},
    source::Change,
};

mod build;
mod claims;
mod lookup;
mod mesh;
mod pods;
mod policies;
mod report;
mod routes;
mod services;
mod subjects;

pub use build::Changes;

/// How an object fares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// True where it is well.
    pub ok: bool,
    /// The reason, CamelCase.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

impl Finding {
    fn ok(reason: &'static str, message: impl Into<String>) -> Self {
        Self { ok: true, reason, message: message.into() }
    }
    fn bad(reason: &'static str, message: impl Into<String>) -> Self {
        Self { ok: false, reason, message: message.into() }
    }
}

/// What is said of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Where it comes from.
    pub origin: Arc<str>,
    /// The generation that this speaks of.
    pub generation: i64,
    /// Condition `Accepted`.
    pub accepted: Finding,
    /// Condition `ResolvedRefs`, for kinds that refer to others.
    pub resolved: Option<Finding>,
    /// Whether nodes enforce it: then condition `Programmed` follows their acks. `Err` says why none will.
    pub programmable: Option<Result<(), Finding>>,
    /// Of a route: what is wrong with parents, by their place in `spec.parentRefs`.
    pub parents: BTreeMap<usize, Finding>,
}

/// Everything that follows from the objects.
#[derive(Debug, Clone, Default)]
pub struct Output {
    /// What nodes get.
    pub resources: BTreeMap<ResourceKey, Resource>,
    /// What is said of the objects.
    pub reports: BTreeMap<ObjectKey, Report>,
    /// The nodes that there are.
    pub nodes: BTreeSet<String>,
}

/// The checked form of an object that goes on while a newer one is bad.
#[derive(Debug, Clone)]
enum Good {
    Namespace(Mode, FailMode),
    Node {
        ranges: Vec<Cidr>,
        zone: Arc<str>,
        /// Its own network, as a caller.
        host: Arc<weft_core::Workload>,
    },
    Ranges(Vec<Cidr>),
    Pod(Box<pods::Facts>),
    Service(Box<Service>),
    Slice(Box<EndpointSlice>),
    NetworkPolicy(Box<NetworkPolicy>),
    Route(Box<HttpRoute>),
    Grant(Box<ReferenceGrant>),
    Policy(Arc<Policy>, Vec<authorization::Target>),
    Traffic(Vec<String>),
    /// The settings, and the fields set in them that have no effect yet.
    Mesh(config::MeshConfig, Vec<&'static str>),
}

#[derive(Debug, Clone)]
struct Entry {
    origin: Arc<str>,
    generation: i64,
    good: Option<Good>,
    /// What is wrong with the newest form.
    problem: Option<String>,
    /// What an AuthorizationPolicy without any good form selects; `None`: every Pod of its namespace.
    guarded: Option<Vec<authorization::Target>>,
}

/// All objects, in their checked forms.
#[derive(Debug)]
pub struct Index {
    trust_domain: TrustDomain,
    entries: BTreeMap<ObjectKey, Entry>,
    claims: claims::Claims,
    dirty: build::Dirty,
    built: build::Built,
}

/// What of an object others follow from.
#[derive(Debug, Default)]
struct Trace {
    pod: Option<pods::Facts>,
    zone: Option<Arc<str>>,
    host: Option<Arc<weft_core::Workload>>,
    /// The targets of a policy (`None`: every Pod) and the ports that it calls by name.
    selection: Option<(Option<Vec<authorization::Target>>, Vec<String>)>,
}

impl Index {
    /// An empty one. The trust domain stays for the process's life: the CA is made for it.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            entries: BTreeMap::new(),
            claims: claims::Claims::default(),
            dirty: build::Dirty::default(),
            built: build::Built::default(),
        }
    }

    /// Takes a change. `Some` holds what is wrong with it; the object's last good form then goes on.
    pub fn apply(&mut self, origin: &Arc<str>, change: Change) -> Option<String> {
        let key = change.key().clone();
        let before = self.entries.get(&key).map(Entry::trace).unwrap_or_default();
        let problem = self.take(origin, change);
        self.changed(&key, &before);
        problem
    }

    fn take(&mut self, origin: &Arc<str>, change: Change) -> Option<String> {
        let (key, generation, checked, target_refs) = match change {
            Change::Remove(key) => {
                self.entries.remove(&key);
                return None;
            }
            Change::Bad { key, generation, message, target_refs } => {
                let message = if message.starts_with(key.kind.as_str()) {
                    message
                } else {
                    format!("{key}: {message}")
                };
                (key, generation, Err(message), target_refs)
            }
            Change::Apply(document) => {
                let target_refs = match &document.object {
                    Object::AuthorizationPolicy(o) => Some(o.spec.target_refs.clone().into_boxed_slice()),
                    _ => None,
                };
                let checked = self.check(&document.key, document.object).map_err(|e| e.to_string());
                (document.key, document.generation, checked, target_refs)
            }
        };
        let guarded = target_refs.and_then(|refs| targets(&key, refs));
        let entry = self.entries.entry(key).or_insert_with(|| Entry {
            origin: Arc::clone(origin),
            generation,
            good: None,
            problem: None,
            guarded: None,
        });
        entry.origin = Arc::clone(origin);
        entry.generation = generation;
        entry.guarded = guarded;
        match checked {
            Ok(good) => {
                entry.good = Some(good);
                entry.problem = None;
            }
            Err(problem) => entry.problem = Some(problem),
        }
        entry.problem.clone()
    }

    /// Notes what has to be built again because of an object.
    fn changed(&mut self, key: &ObjectKey, before: &Trace) {
        let after = self.entries.get(key).map(Entry::trace).unwrap_or_default();
        let namespaces = &mut self.dirty.namespaces;
        match key.kind {
            Kind::Pod => {
                namespaces.insert(key.namespace.clone());
                namespaces.extend(self.claims.change(key, before.pod.as_ref(), after.pod.as_ref()));
            }
            Kind::Service | Kind::EndpointSlice | Kind::NetworkPolicy => {
                namespaces.insert(key.namespace.clone());
            }
            // Rules alone change nothing of the Pods that the policy selects.
            Kind::AuthorizationPolicy if before.selection != after.selection => {
                namespaces.insert(key.namespace.clone());
            }
            Kind::Namespace => drop(namespaces.insert(key.name.clone())),
            Kind::Node => {
                // Nodes are of no namespace.
                if before.host != after.host {
                    namespaces.insert(String::new());
                }
                if before.zone.as_deref().unwrap_or("") != after.zone.as_deref().unwrap_or("") {
                    self.dirty.zones.insert(key.name.clone());
                }
            }
            _ => {}
        }
        self.dirty.objects.insert(key.clone());
    }

    fn check(&self, key: &ObjectKey, object: Object) -> Result<Good, ObjectError> {
        let wrong = |problem: FieldError| ObjectError {
            kind: key.kind.as_str(),
            name: if key.namespace.is_empty() {
                key.name.clone()
            } else {
                format!("{}/{}", key.namespace, key.name)
            },
            problems: vec![problem],
        };
        let ranges = |field: &str, texts: &[String]| {
            let parse = |(i, text): (usize, &String)| {
                text.parse::<Cidr>().map_err(|e| wrong(FieldError::new(format!("{field}[{i}]"), e)))
            };
            texts.iter().enumerate().map(parse).collect::<Result<Vec<_>, _>>()
        };
        Ok(match object {
            Object::Namespace(o) => {
                let (mode, fail) = labels::namespace_modes(o.metadata.labels.as_ref()).map_err(wrong)?;
                Good::Namespace(mode, fail)
            }
            Object::Node(o) => {
                let labels = o.metadata.labels.clone().unwrap_or_default();
                let zone = labels.get("topology.kubernetes.io/zone").map_or("", String::as_str).into();
                let host = pods::node(&self.trust_domain, &key.name, &zone, &o);
                let spec = o.spec.unwrap_or_default();
                let texts = spec.pod_cidrs.unwrap_or_else(|| spec.pod_cidr.into_iter().collect());
                Good::Node { ranges: ranges("spec.podCIDRs", &texts)?, zone, host: Arc::new(host) }
            }
            Object::ServiceCidr(o) => {
                Good::Ranges(ranges("spec.cidrs", &o.spec.and_then(|s| s.cidrs).unwrap_or_default())?)
            }
            Object::Pod(o) => {
                Good::Pod(Box::new(pods::Facts::new(&self.trust_domain, key, &o).map_err(wrong)?))
            }
            Object::Service(o) => Good::Service(o),
            Object::EndpointSlice(o) => Good::Slice(o),
            Object::NetworkPolicy(o) => Good::NetworkPolicy(o),
            Object::HttpRoute(o) => {
                http_route::convert(&o, &routes::Anything)?;
                Good::Route(o)
            }
            Object::ReferenceGrant(o) => Good::Grant(o),
            Object::AuthorizationPolicy(o) => {
                let converted = authorization::convert(&o)?;
                Good::Policy(Arc::new(converted.policy), converted.targets)
            }
            Object::TrafficPolicy(o) => {
                traffic::check(&o)?;
                Good::Traffic(o.spec.target_refs.iter().map(|t| t.name.clone()).collect())
            }
            Object::MeshConfig(o) => {
                let config = mesh_config::convert(&o)?;
                if config.trust_domain != self.trust_domain {
                    let message = format!(
                        "{} is not this mesh's trust domain {}, which cannot change while it runs; write {}, or start \
                         a new mesh with an empty --state-dir",
                        config.trust_domain, self.trust_domain, self.trust_domain
                    );
                    return Err(wrong(FieldError::new("spec.trustDomain", message)));
                }
                Good::Mesh(config, mesh::without_effect(&o.spec))
            }
        })
    }

    /// The objects of one kind.
    fn of(&self, kind: Kind) -> impl Iterator<Item = (&ObjectKey, &Entry)> {
        let first = ObjectKey { kind, namespace: String::new(), name: String::new() };
        self.entries.range(first..).take_while(move |(key, _)| key.kind == kind)
    }

    /// Their checked forms.
    fn good(&self, kind: Kind) -> impl Iterator<Item = (&ObjectKey, &Good)> {
        self.of(kind).filter_map(|(key, entry)| Some((key, entry.good.as_ref()?)))
    }

    fn nodes(&self) -> BTreeSet<String> {
        self.good(Kind::Node).map(|(key, _)| key.name.clone()).collect()
    }

    fn config(&self) -> config::MeshConfig {
        let mut config = (self.good(Kind::MeshConfig))
            .find_map(|(_, good)| match good {
                Good::Mesh(config, _) => Some(config.clone()),
                _ => None,
            })
            .unwrap_or_else(|| mesh_config::defaults(self.trust_domain.clone()));
        let ranges: BTreeSet<Cidr> = (self.good(Kind::Node).chain(self.good(Kind::ServiceCidr)))
            .flat_map(|(_, good)| match good {
                Good::Node { ranges, .. } | Good::Ranges(ranges) => ranges.clone(),
                _ => Vec::new(),
            })
            .collect();
        config.ranges = ranges.into_iter().collect();
        config.namespaces = (self.of(Kind::Namespace))
            .map(|(key, _)| {
                let (mode, fail_mode) = self.namespace(&key.name);
                (Arc::from(key.name.as_str()), config::NamespaceMode { mode, fail_mode })
            })
            .collect();
        config
    }

    /// Mode and fail mode of a namespace. One whose labels were never good is strict and closed: somebody wanted the
    /// mesh there, and a typing error must not turn into plaintext.
    fn namespace(&self, name: &str) -> (Mode, FailMode) {
        let key = ObjectKey { kind: Kind::Namespace, namespace: String::new(), name: name.into() };
        match self.entries.get(&key) {
            Some(Entry { good: Some(Good::Namespace(mode, fail)), .. }) => (*mode, *fail),
            Some(_) => (Mode::Strict, FailMode::Closed),
            None => (Mode::Disabled, FailMode::Closed),
        }
    }
}

impl Entry {
    fn trace(&self) -> Trace {
        let mut trace = Trace::default();
        match &self.good {
            Some(Good::Pod(facts)) => trace.pod = Some(pods::Facts::clone(facts)),
            Some(Good::Node { zone, host, .. }) => {
                (trace.zone, trace.host) = (Some(Arc::clone(zone)), Some(Arc::clone(host)));
            }
            Some(Good::Policy(policy, targets)) => {
                let called = subjects::called_ports(policy).map(str::to_owned);
                trace.selection = Some((Some(targets.clone()), called.collect()));
            }
            None => trace.selection = Some((self.guarded.clone(), Vec::new())),
            _ => {}
        }
        trace
    }
}

/// Targets in their checked form; `None` where one of them is wrong.
fn targets(key: &ObjectKey, target_refs: Box<[TargetRef]>) -> Option<Vec<authorization::Target>> {
    let spec = AuthorizationPolicySpec {
        target_refs: target_refs.into_vec(),
        action: Default::default(),
        rules: Vec::new(),
    };
    let mut object = AuthorizationPolicy::new(&key.name, spec);
    object.metadata.namespace = Some(key.namespace.clone());
    authorization::convert(&object).ok().map(|converted| converted.targets)
}

/// Text to an address in its plain form.
fn address(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>().ok().map(|a| a.to_canonical())
}

#[cfg(test)]
mod equal;
#[cfg(test)]
mod scale;
#[cfg(test)]
mod tests;
