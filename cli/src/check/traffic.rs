//! What was seen of a namespace: is it encrypted, and who would strict mode break?

use std::{
    collections::{BTreeMap, HashSet},
    time::SystemTime,
};

use super::{
    Finding, Level,
    facts::Facts,
    names,
    namespaces::{candidates, captured, meshed},
};
use crate::{cluster::SYSTEM, format::View, when};

const SECTION: &str = "Traffic";
/// The tunnel itself, as the kernel sees it arrive.
const TUNNEL: u32 = 15008;

pub(super) fn all(facts: &Facts, namespace: &str, pod: Option<&str>) -> Vec<Finding> {
    let meshed = meshed(facts);
    let Some(mode) = meshed.get(namespace) else { return Vec::new() };
    let flows = match &facts.flows {
        Err(why) => return vec![Finding::unseen(SECTION, "flows", why)],
        Ok(flows) => flows,
    };
    let mut findings = probes(facts, flows, namespace, pod);
    findings.push(callers(flows, namespace, &meshed, mode, SystemTime::now()));
    findings
}

/// Whether each Pod is captured, and what was seen of it on the wire.
fn probes(facts: &Facts, flows: &[View], namespace: &str, only: Option<&str>) -> Vec<Finding> {
    let meshed = meshed(facts);
    let captured = captured(facts);
    let (mut findings, mut silent) = (Vec::new(), Vec::new());
    let name_of = |pod: &k8s_openapi::api::core::v1::Pod| pod.metadata.name.clone().unwrap_or_default();
    let mine = candidates(facts, &meshed).filter(|p| p.metadata.namespace.as_deref() == Some(namespace));
    let mut known = false;
    for pod in mine.filter(|p| only.is_none_or(|only| name_of(p) == only)) {
        known = true;
        let name = name_of(pod);
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        if captured.get(uid) != Some(&"") {
            let remedy = "see Namespaces above";
            findings.push(Finding::error(
                SECTION,
                format!("{name} is not captured: its traffic is not encrypted"),
                remedy,
            ));
            continue;
        }
        let of = |view: &&View| {
            let side = |s: &crate::format::Side| s.namespace == namespace && s.pod == name;
            (side(&view.source) && !view.reporter.ends_with("-destination")
                || side(&view.destination) && inbound(view))
                && through(view)
        };
        let (mut mutual, mut local, mut plain) = (0_usize, 0_usize, 0_usize);
        let mut connections = HashSet::new();
        for view in flows.iter().filter(of) {
            if !first(&mut connections, view) {
                continue;
            }
            match view.tls.mode {
                "mutual" => mutual += 1,
                "local" => local += 1,
                // The kernel's word about a connection that it handed to the proxy, which has its own record.
                _ if view.verdict == "REDIRECTED" => {}
                // A connection whose requests each went their own way.
                _ if view.to_service() => {}
                _ => plain += 1,
            }
        }
        match (mutual, local, plain) {
            (0, 0, 0) => silent.push(name),
            _ => {
                let mut parts = vec![format!("{mutual} connections with mTLS")];
                if local > 0 {
                    parts.push(format!("{local} within its node (never on the wire)"));
                }
                if plain > 0 {
                    parts.push(format!("{plain} in plaintext"));
                }
                let level = if plain > 0 { Level::Info } else { Level::Ok };
                findings.push(Finding::new(
                    SECTION,
                    level,
                    format!("{name} is captured: {}", parts.join(", ")),
                ));
            }
        }
    }
    if let (Some(only), false) = (only, known) {
        let remedy = format!("kubectl -n {namespace} get pods");
        findings.push(Finding::error(SECTION, format!("no Pod {only} runs in {namespace}"), remedy));
    }
    if !silent.is_empty() {
        let message = format!("captured, and no flow seen of: {}", names(&silent));
        let remedy = "make a request to them and run this again".to_owned();
        findings.push(Finding { remedy, ..Finding::info(SECTION, message) });
    }
    findings
}

/// What the destination's node says of a connection to the Pod itself.
fn inbound(view: &View) -> bool {
    !view.reporter.ends_with("-source") && view.destination.port != TUNNEL
}

fn through(view: &View) -> bool {
    matches!(view.verdict, "FORWARDED" | "AUDITED" | "REDIRECTED")
}

/// Whether this is the first record of its connection.
fn first<'a>(connections: &mut HashSet<(&'a str, u64)>, view: &'a View) -> bool {
    view.connection == 0 || connections.insert((&view.node, view.connection))
}

/// Who calls in plaintext.
fn callers(
    flows: &[View],
    namespace: &str,
    meshed: &BTreeMap<String, String>,
    mode: &str,
    now: SystemTime,
) -> Finding {
    let mut callers: BTreeMap<String, (usize, SystemTime)> = BTreeMap::new();
    let (mut seen, mut connections) = (0_usize, HashSet::new());
    for view in flows.iter().filter(|v| v.destination.namespace == namespace && inbound(v)) {
        let plain = view.tls.mode == "none" && view.source.identity.is_empty();
        // Probes of the kubelet pass in strict mode as well.
        let probe = view.source.reserved == "host";
        if view.verdict == "REDIRECTED" || probe {
            continue;
        }
        if !first(&mut connections, view) {
            continue;
        }
        seen += 1;
        // Who came into the mesh since calls with mTLS now.
        let joined = meshed.contains_key(&view.source.namespace);
        if !plain || joined || (mode == "strict") == through(view) {
            continue;
        }
        let to = &view.destination;
        let target = if to.workload.is_empty() { &to.pod } else { &to.workload };
        let line = format!("{} -> {target}:{} ({})", who(view), to.port, view.protocol);
        let entry = callers.entry(line).or_insert((0, view.at));
        *entry = (entry.0 + 1, entry.1.max(view.at));
    }
    let lines = |callers: &BTreeMap<String, (usize, SystemTime)>| {
        let mut all: Vec<_> = callers.iter().collect();
        all.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
        let ago = |at: SystemTime| when::span(now.duration_since(at).unwrap_or_default());
        all.iter()
            .map(|(line, (count, last))| format!("{line}: {count} times, last {} ago", ago(*last)))
            .collect()
    };
    if mode == "strict" {
        if callers.is_empty() {
            return Finding::ok(
                SECTION,
                format!("{namespace} is strict, and refused nobody that agents remember"),
            );
        }
        let remedy = "put the caller's namespace into the mesh, or allow it: an AuthorizationPolicy with a source of type Unauthenticated".to_owned();
        let message = format!("{namespace} is strict and refuses these plaintext callers");
        return Finding { remedy, ..Finding::info(SECTION, message).with(lines(&callers)) };
    }
    if callers.is_empty() {
        let message = if seen == 0 {
            format!(
                "no call to {namespace} was seen yet: nothing is known of callers that strict would break"
            )
        } else {
            format!("strict would break none of the {seen} calls that agents remember")
        };
        return Finding::new(SECTION, if seen == 0 { Level::Info } else { Level::Ok }, message);
    }
    let message =
        format!("strict would break {} callers of {namespace}, which call in plaintext", callers.len());
    let remedy = format!(
        "put their namespaces into the mesh (kubectl label namespace NAME weft.mesh/mode=permissive), or allow them: an AuthorizationPolicy with a source of type Unauthenticated; agents in {SYSTEM} remember only the newest flows"
    );
    Finding::warning(SECTION, message, remedy).with(lines(&callers))
}

fn who(view: &View) -> String {
    let source = &view.source;
    match (source.workload.as_str(), source.pod.as_str()) {
        ("", "") if source.reserved.is_empty() => source.address.clone(),
        ("", "") => format!("{} ({})", source.address, source.reserved),
        ("", pod) => format!("{}/{pod}", source.namespace),
        (workload, _) => format!("{}/{workload}", source.namespace),
    }
}
