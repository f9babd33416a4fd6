//! From objects to the resources that nodes get. Pure and synchronous: changes in, [`Output`] out.
//!
//! A build goes over everything, but what costs is done once: Pods are read when they come, a workload that did not
//! change keeps its allocation (so that later comparisons end at the pointer), and selectors are answered from a
//! table of labels ([`lookup::Lookup`]), never by asking each Pod.

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

mod lookup;
mod mesh;
mod pods;
mod policies;
mod routes;
mod services;
mod subjects;

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

#[derive(Debug)]
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
    /// The workloads of the last build.
    built: pods::Built,
}

impl Index {
    /// An empty one. The trust domain stays for the process's life: the CA is made for it.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self { trust_domain, entries: BTreeMap::new(), built: pods::Built::default() }
    }

    /// Takes a change. `Some` holds what is wrong with it; the object's last good form then goes on.
    pub fn apply(&mut self, origin: &Arc<str>, change: Change) -> Option<String> {
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
                let spec = o.spec.unwrap_or_default();
                let texts = spec.pod_cidrs.unwrap_or_else(|| spec.pod_cidr.into_iter().collect());
                let labels = o.metadata.labels.unwrap_or_default();
                let zone = labels.get("topology.kubernetes.io/zone").map_or("", String::as_str).into();
                Good::Node { ranges: ranges("spec.podCIDRs", &texts)?, zone }
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

    /// Everything that follows from the objects as they are now.
    pub fn build(&mut self) -> Output {
        let mut output = Output { reports: self.reports(), nodes: self.nodes(), ..Output::default() };
        let mut pods = pods::collect(self, &mut output.reports);
        let lookup = lookup::Lookup::new(&pods);
        let mut services = services::collect(self, &pods, &lookup);
        let routes = routes::collect(self, &mut services, &mut output.reports);
        let selected = policies::attach(self, &pods, &lookup, &services, &mut output.reports);
        drop(lookup);
        for (pod, policies) in pods.iter_mut().zip(selected) {
            pod.policies = policies;
        }
        subjects::number(&mut pods, self);
        self.built = pods::finish(pods, &self.built);
        let workloads = self.built.iter().map(|(_, workload)| Resource::Workload(Arc::clone(workload)));
        let config = Resource::Config(Arc::new(self.config()));
        let all = std::iter::once(config)
            .chain(workloads)
            .chain(services.into_values().map(|s| Resource::Service(Arc::new(s.service))))
            .chain(routes.into_iter().map(|r| Resource::Route(Arc::new(r))))
            .chain(self.good().filter_map(|(_, good)| match good {
                Good::Policy(policy, _) => Some(Resource::Policy(Arc::clone(policy))),
                _ => None,
            }));
        output.resources = all.map(|r| (r.key(), r)).collect();
        output
    }

    fn good(&self) -> impl Iterator<Item = (&ObjectKey, &Good)> {
        self.entries.iter().filter_map(|(key, entry)| Some((key, entry.good.as_ref()?)))
    }

    fn reports(&self) -> BTreeMap<ObjectKey, Report> {
        (self.entries.iter())
            .map(|(key, entry)| {
                let accepted = match (&entry.problem, &entry.good) {
                    (None, Some(Good::Mesh(_, set))) => Finding::ok("Accepted", mesh::message(set)),
                    (None, _) => Finding::ok("Accepted", ""),
                    (Some(problem), Some(_)) => {
                        Finding::bad("Invalid", format!("{problem} (the last good form goes on)"))
                    }
                    (Some(problem), None) if key.kind == Kind::AuthorizationPolicy => Finding::bad(
                        "Invalid",
                        format!("{problem} ({})", policies::guard_message(key, entry)),
                    ),
                    (Some(problem), None) => Finding::bad("Invalid", problem.as_str()),
                };
                let programmable = match key.kind {
                    Kind::AuthorizationPolicy | Kind::HttpRoute | Kind::MeshConfig => {
                        Some(match (&entry.problem, &entry.good) {
                            (None, _) => Ok(()),
                            (Some(_), Some(_)) => Err(Finding::bad(
                                "Invalid",
                                "this form is not accepted; the last good one is enforced",
                            )),
                            (Some(_), None) if key.kind == Kind::AuthorizationPolicy => {
                                Err(Finding::bad("Invalid", policies::guard_message(key, entry)))
                            }
                            (Some(_), None) => {
                                Err(Finding::bad("Invalid", "not accepted, so nothing is enforced"))
                            }
                        })
                    }
                    Kind::TrafficPolicy => Some(Err(Finding::bad("NotSupportedYet", traffic::NOT_SUPPORTED))),
                    _ => None,
                };
                let (origin, generation) = (Arc::clone(&entry.origin), entry.generation);
                (
                    key.clone(),
                    Report {
                        origin,
                        generation,
                        accepted,
                        resolved: None,
                        programmable,
                        parents: BTreeMap::new(),
                    },
                )
            })
            .collect()
    }

    fn nodes(&self) -> BTreeSet<String> {
        self.good().filter(|(_, g)| matches!(g, Good::Node { .. })).map(|(key, _)| key.name.clone()).collect()
    }

    fn config(&self) -> config::MeshConfig {
        let mut config = (self.good())
            .find_map(|(_, good)| match good {
                Good::Mesh(config, _) => Some(config.clone()),
                _ => None,
            })
            .unwrap_or_else(|| mesh_config::defaults(self.trust_domain.clone()));
        let ranges: BTreeSet<Cidr> = (self.good())
            .flat_map(|(_, good)| match good {
                Good::Node { ranges, .. } | Good::Ranges(ranges) => ranges.clone(),
                _ => Vec::new(),
            })
            .collect();
        config.ranges = ranges.into_iter().collect();
        config.namespaces = (self.entries.keys())
            .filter(|key| key.kind == Kind::Namespace)
            .map(|key| {
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
mod scale;
#[cfg(test)]
mod tests;
