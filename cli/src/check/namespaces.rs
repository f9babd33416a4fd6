//! Namespaces in the mesh: their labels, the Pods that are not captured, and what a CNI would block.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        core::v1::Pod,
        networking::v1::{NetworkPolicy, NetworkPolicyPort},
    },
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

use super::{Finding, facts::Facts, names};
use crate::cluster::SYSTEM;

const SECTION: &str = "Namespaces";
const MODE: &str = "weft.mesh/mode";
const FAIL_MODE: &str = "weft.mesh/fail-mode";
/// Where agents reach each other for a Pod.
const TUNNEL: i32 = 15008;
type Labels = BTreeMap<String, String>;

/// The modes of the namespaces that are in the mesh.
pub(super) fn meshed(facts: &Facts) -> BTreeMap<String, String> {
    let all = facts.namespaces.as_deref().unwrap_or_default().iter();
    all.filter_map(|n| {
        let mode = n.metadata.labels.as_ref()?.get(MODE)?;
        (mode != "disabled").then(|| (n.metadata.name.clone().unwrap_or_default(), mode.clone()))
    })
    .collect()
}

pub(super) fn all(facts: &Facts, only: Option<&str>) -> Vec<Finding> {
    if let Err(why) = &facts.namespaces {
        return vec![Finding::unseen(SECTION, "namespaces", why)];
    }
    let mut meshed = meshed(facts);
    if let Some(only) = only {
        let exists = facts.namespaces.iter().flatten().any(|n| n.metadata.name.as_deref() == Some(only));
        if !exists {
            let remedy = "kubectl get namespaces";
            return vec![Finding::error(SECTION, format!("there is no namespace {only}"), remedy)];
        }
        meshed.retain(|name, _| name == only);
        if meshed.is_empty() {
            let message = format!("{only} is not in the mesh: its Pods are untouched");
            return vec![Finding {
                remedy: format!("kubectl label namespace {only} {MODE}=permissive"),
                ..Finding::info(SECTION, message)
            }];
        }
    }
    let mut findings = labels(facts, &meshed);
    if meshed.is_empty() {
        let remedy = format!("kubectl label namespace YOURS {MODE}=permissive");
        findings.push(Finding { remedy, ..Finding::info(SECTION, "no namespace is in the mesh yet") });
        return findings;
    }
    findings.extend(own_labels(facts, &meshed));
    findings.extend(enrolment(facts, &meshed));
    findings.extend(blocked(facts, &meshed));
    findings
}

fn labels(facts: &Facts, meshed: &BTreeMap<String, String>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut by_mode: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, mode) in meshed {
        let namespace = facts.namespaces.iter().flatten().find(|n| n.metadata.name.as_ref() == Some(name));
        let fail = namespace.and_then(|n| n.metadata.labels.as_ref()?.get(FAIL_MODE));
        if !matches!(mode.as_str(), "strict" | "permissive") {
            let message = format!("{name}: {MODE}={mode} means nothing");
            let remedy =
                format!("kubectl label --overwrite namespace {name} {MODE}=strict (or permissive, disabled)");
            findings.push(Finding::error(SECTION, message, remedy));
            continue;
        }
        by_mode.entry(mode).or_default().push(name);
        match (mode.as_str(), fail.map(String::as_str)) {
            ("strict", Some("open")) => findings.push(Finding::error(
                SECTION,
                format!("{name}: strict and {FAIL_MODE}=open contradict each other, so open is refused"),
                format!("kubectl label namespace {name} {FAIL_MODE}- (fail closed), or --overwrite {MODE}=permissive"),
            )),
            (_, Some(other)) if !matches!(other, "open" | "closed") => findings.push(Finding::error(
                SECTION,
                format!("{name}: {FAIL_MODE}={other} means nothing"),
                format!("kubectl label --overwrite namespace {name} {FAIL_MODE}=closed (or open)"),
            )),
            _ => {}
        }
    }
    let modes = by_mode.iter().map(|(mode, names_of)| format!("{mode}: {}", names(names_of)));
    let modes: Vec<_> = modes.collect();
    if !modes.is_empty() {
        findings.insert(0, Finding::ok(SECTION, modes.join("; ")));
    }
    findings
}

/// Pods whose own label does nothing, or means nothing.
fn own_labels(facts: &Facts, meshed: &BTreeMap<String, String>) -> Option<Finding> {
    let rank = |mode: &str| ["disabled", "permissive", "strict"].iter().position(|m| *m == mode);
    let ignored: Vec<_> = candidates(facts, meshed)
        .filter_map(|pod| {
            let own = pod.metadata.labels.as_ref()?.get(MODE)?;
            let mode = meshed.get(pod.metadata.namespace.as_deref()?)?;
            let why = match (rank(own), rank(mode)) {
                (None, _) => format!("{MODE}={own} means nothing"),
                (Some(own_rank), Some(rank)) if own_rank < rank => {
                    format!("{MODE}={own} would loosen the namespace's {mode}")
                }
                _ => return None,
            };
            let meta = &pod.metadata;
            Some(format!("{}/{}: {why}", meta.namespace.as_deref()?, meta.name.as_deref()?))
        })
        .collect();
    let message = "labels of Pods are ignored: a Pod may only tighten its namespace's mode";
    let remedy = format!(
        "take the label out of the Pod's template (kubectl label pod NAME {MODE}- for a Pod without one), or change the namespace's mode"
    );
    (!ignored.is_empty()).then(|| Finding::warning(SECTION, message, remedy).with(ignored))
}

/// Running Pods of the mesh: those that must be captured.
pub(super) fn candidates<'a>(
    facts: &'a Facts,
    meshed: &'a BTreeMap<String, String>,
) -> impl Iterator<Item = &'a Pod> {
    facts.pods.as_deref().unwrap_or_default().iter().filter(|pod| {
        let spec = pod.spec.as_ref();
        let status = pod.status.as_ref();
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        meshed.contains_key(namespace)
            && namespace != SYSTEM
            && !spec.and_then(|s| s.host_network).unwrap_or(false)
            && status.and_then(|s| s.phase.as_deref()) == Some("Running")
            && pod.metadata.deletion_timestamp.is_none()
    })
}

/// By UID, what the Pod's agent says: nothing, or what is wrong.
pub(super) fn captured(facts: &Facts) -> BTreeMap<&str, &str> {
    let states = facts.states.iter().flat_map(|s| s.nodes.values());
    let pods = states.filter_map(|(_, s)| s.agent.as_ref()).flat_map(|a| &a.pods);
    pods.map(|p| (p.uid.as_str(), p.problem.as_str())).collect()
}

fn enrolment(facts: &Facts, meshed: &BTreeMap<String, String>) -> Vec<Finding> {
    let states = match (&facts.pods, &facts.states) {
        (Err(why), _) => return vec![Finding::unseen(SECTION, "Pods", why)],
        // Said with the agents already.
        (_, Err(_)) => return Vec::new(),
        (Ok(_), Ok(states)) => states,
    };
    let captured = captured(facts);
    let (mut fine, mut bad) = (0_usize, Vec::new());
    for pod in candidates(facts, meshed) {
        let (meta, spec) = (&pod.metadata, pod.spec.as_ref());
        let node = spec.and_then(|s| s.node_name.clone()).unwrap_or_default();
        let name = format!(
            "{}/{}",
            meta.namespace.clone().unwrap_or_default(),
            meta.name.clone().unwrap_or_default()
        );
        match captured.get(meta.uid.as_deref().unwrap_or_default()) {
            Some(&"") => fine += 1,
            Some(problem) => bad.push(format!("{name} on {node}: {problem}")),
            None if !states.nodes.contains_key(&node) => {
                bad.push(format!("{name}: the agent of {node} does not answer"));
            }
            None => bad.push(format!("{name}: the agent of {node} does not know it")),
        }
    }
    if bad.is_empty() {
        return vec![match fine {
            0 => Finding::info(SECTION, "no Pod runs in them yet"),
            n => Finding::ok(SECTION, format!("{n} Pods captured")),
        }];
    }
    let remedy = format!(
        "`weft status` on the node tells more; kubectl -n {SYSTEM} logs -l app.kubernetes.io/name=weft-agent --prefix"
    );
    let message = format!("{} of {} Pods are not captured", bad.len(), bad.len() + fine);
    vec![Finding::error(SECTION, message, remedy).with(bad)]
}

/// Pods whose NetworkPolicies leave no way for the tunnel, by the policies that do so.
fn blocked(facts: &Facts, meshed: &BTreeMap<String, String>) -> Vec<Finding> {
    let policies = match &facts.policies {
        Err(why) => return vec![Finding::unseen(SECTION, "NetworkPolicies", why)],
        Ok(policies) => policies,
    };
    let mut findings = Vec::new();
    for (direction, inbound) in [("Ingress", true), ("Egress", false)] {
        let mut blocked: BTreeMap<String, usize> = BTreeMap::new();
        for pod in candidates(facts, meshed) {
            let selecting: Vec<_> = policies.iter().filter(|p| selects(p, pod, inbound)).collect();
            if !selecting.is_empty() && !selecting.iter().any(|p| passes(p, inbound)) {
                let who: Vec<_> = selecting.iter().map(|p| full_name(p)).collect();
                *blocked.entry(names(&who)).or_default() += 1;
            }
        }
        for (policies, pods) in blocked {
            let message = format!(
                "NetworkPolicy {policies} lets no {direction} to TCP {TUNNEL} pass: {pods} Pods are cut off from the mesh"
            );
            let remedy = format!("add TCP {TUNNEL} to the ports of its {} rules", direction.to_lowercase());
            findings.push(Finding::error(SECTION, message, remedy));
        }
    }
    if findings.is_empty() && !policies.is_empty() {
        findings.push(Finding::ok(SECTION, format!("no NetworkPolicy blocks the tunnel (TCP {TUNNEL})")));
    }
    findings
}

fn full_name(policy: &NetworkPolicy) -> String {
    let meta = &policy.metadata;
    format!("{}/{}", meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

fn selects(policy: &NetworkPolicy, pod: &Pod, inbound: bool) -> bool {
    let Some(spec) = &policy.spec else { return false };
    let wanted = if inbound { "Ingress" } else { "Egress" };
    let applies = match spec.policy_types.as_deref() {
        Some(types) if !types.is_empty() => types.iter().any(|t| t == wanted),
        // networking/v1: Ingress always, Egress where there are such rules.
        _ => inbound || spec.egress.is_some(),
    };
    let empty = Labels::new();
    let labels = pod.metadata.labels.as_ref().unwrap_or(&empty);
    applies
        && policy.metadata.namespace == pod.metadata.namespace
        && spec.pod_selector.as_ref().is_none_or(|s| matches(s, labels))
}

fn matches(selector: &LabelSelector, labels: &Labels) -> bool {
    let exact = selector.match_labels.iter().flatten().all(|(k, v)| labels.get(k) == Some(v));
    exact
        && selector.match_expressions.iter().flatten().all(|e| {
            let value = labels.get(&e.key);
            let one_of = || value.is_some_and(|v| e.values.iter().flatten().any(|w| w == v));
            match e.operator.as_str() {
                "In" => one_of(),
                "NotIn" => !one_of(),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

/// Whether one of its rules leaves the tunnel's port open, for whomever.
fn passes(policy: &NetworkPolicy, inbound: bool) -> bool {
    let Some(spec) = &policy.spec else { return false };
    let open =
        |ports: Option<&Vec<NetworkPolicyPort>>| ports.is_none_or(|p| p.is_empty() || p.iter().any(tunnel));
    if inbound {
        spec.ingress.iter().flatten().any(|rule| open(rule.ports.as_ref()))
    } else {
        spec.egress.iter().flatten().any(|rule| open(rule.ports.as_ref()))
    }
}

fn tunnel(port: &NetworkPolicyPort) -> bool {
    if port.protocol.as_deref().unwrap_or("TCP") != "TCP" {
        return false;
    }
    match &port.port {
        None => true,
        Some(IntOrString::Int(first)) => (*first..=port.end_port.unwrap_or(*first)).contains(&TUNNEL),
        // A named port is a container's; none is the agent's.
        Some(IntOrString::String(_)) => false,
    }
}
