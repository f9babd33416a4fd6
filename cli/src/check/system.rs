//! The API server, the kinds, the operator, certificates and nodes.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use k8s_openapi::api::core::v1::{Node, PodTemplateSpec};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use x509_parser::parse_x509_certificate;

use super::{
    Finding,
    facts::{Facts, OWN_KINDS, ROUTES, Server},
    names, schema,
};
use crate::{cluster::SYSTEM, when};

const API: &str = "API server";
const INSTALLATION: &str = "Installation";
const NODES: &str = "Nodes";
/// The version of Weft's kinds that this program speaks.
const VERSION: &str = "v1alpha1";
/// The first that binds agents' tokens to their node by itself.
const OLDEST_API: (u32, u32) = (1, 32);
const OLDEST_KERNEL: (u32, u32) = (5, 15);
/// From when a clock that is off is worth a word, and from when certificates and tokens suffer.
pub(super) const SKEW_WARNING: i64 = 10;
pub(super) const SKEW_ERROR: i64 = 60;
/// A kubelet renews its lease each ten seconds.
const LEASE_LATE: i64 = 120;
/// From when the end of a CA should be known.
const CA_SOON: Duration = Duration::from_secs(30 * 86_400);

pub(super) fn server(server: &Server) -> Vec<Finding> {
    let said = format!("{} at {}", server.version, server.address);
    let mut findings = vec![match server.number {
        Some(number) if number < OLDEST_API => Finding::error(
            API,
            format!("{said} is too old"),
            format!(
                "upgrade Kubernetes to {}.{} or newer: agents' tokens are not bound to their node before",
                OLDEST_API.0, OLDEST_API.1
            ),
        ),
        _ => Finding::ok(API, said),
    }];
    match server.ahead {
        None => findings.push(Finding::info(API, "its clock is not known: it sends no Date")),
        Some(ahead) => findings.push(clock(API, "this machine", -ahead, "the API server")),
    }
    findings
}

/// How far `who`'s clock is before another one.
pub(super) fn clock(section: &'static str, who: &str, ahead: i64, other: &str) -> Finding {
    let off = ahead.unsigned_abs();
    let way = if ahead > 0 { "ahead of" } else { "behind" };
    let message =
        format!("the clock of {who} is {} {way} that of {other}", when::span(Duration::from_secs(off)));
    let remedy =
        "set it right (chronyd or systemd-timesyncd): certificates and tokens are good by the clock only";
    match i64::try_from(off).unwrap_or(i64::MAX) {
        off if off > SKEW_ERROR => Finding::error(section, message, remedy),
        off if off > SKEW_WARNING => Finding::warning(section, message, remedy),
        _ => Finding::ok(section, format!("the clocks of {who} and {other} agree")),
    }
}

pub(super) fn kinds_before(facts: &Facts) -> Vec<Finding> {
    match &facts.kinds {
        Err(why) => vec![Finding::unseen(INSTALLATION, "kinds (CRDs)", why)],
        Ok(kinds) => {
            let own = kinds.keys().filter(|k| *k != ROUTES).count();
            let mut findings = vec![gateway(kinds.contains_key(ROUTES))];
            if own > 0 {
                findings.push(Finding::info(
                    INSTALLATION,
                    "kinds of Weft are here already; `weft install` updates them, and policies stay",
                ));
            }
            findings
        }
    }
}

fn gateway(there: bool) -> Finding {
    if there {
        Finding::ok(INSTALLATION, "Gateway API: HTTPRoute is there")
    } else {
        Finding::info(INSTALLATION, "Gateway API is not installed: no HTTPRoutes, all else works")
    }
}

pub(super) fn absent() -> Finding {
    let remedy = "weft check --pre, then weft install | kubectl apply -f -";
    Finding::error(INSTALLATION, format!("Weft is not installed in {SYSTEM}"), remedy)
}

pub(super) fn kinds(facts: &Facts) -> Vec<Finding> {
    let kinds = match &facts.kinds {
        Err(why) => return vec![Finding::unseen(INSTALLATION, "kinds (CRDs)", why)],
        Ok(kinds) => kinds,
    };
    let (mut missing, mut wrong, mut old) = (Vec::new(), Vec::new(), Vec::new());
    for plural in OWN_KINDS {
        let name = format!("{plural}.weft.mesh");
        let Some(kind) = kinds.get(&name) else {
            missing.push(name);
            continue;
        };
        let conditions = kind.status.as_ref().and_then(|s| s.conditions.as_ref());
        let established =
            conditions.is_some_and(|c| c.iter().any(|c| c.type_ == "Established" && c.status == "True"));
        let served: Vec<_> =
            kind.spec.versions.iter().filter(|v| v.served).map(|v| v.name.as_str()).collect();
        if !served.contains(&VERSION) {
            wrong.push(format!("{name} has {}, not {VERSION}", served.join(", ")));
        } else if !established {
            wrong.push(format!("{name} is not established; `kubectl describe crd {name}` says why"));
        }
        let lacking = schema::lacking(kind);
        if !lacking.is_empty() {
            old.push(format!("{name} does not know {}", names(&lacking)));
        }
    }
    let mut findings = Vec::new();
    if missing.is_empty() && wrong.is_empty() && old.is_empty() {
        findings.push(Finding::ok(INSTALLATION, format!("{} kinds of weft.mesh/{VERSION}", OWN_KINDS.len())));
    }
    let remedy = "weft install | kubectl apply -f -";
    if !missing.is_empty() {
        let message = format!("kinds (CRDs) are missing: {}", names(&missing));
        findings.push(Finding::error(INSTALLATION, message, remedy));
    }
    if !wrong.is_empty() {
        let message = "kinds (CRDs) do not fit this version of Weft";
        findings.push(Finding::error(INSTALLATION, message, remedy).with(wrong));
    }
    if !old.is_empty() {
        let message =
            "kinds (CRDs) are of an older version: the API server refuses fields that this version has";
        let remedy = "weft upgrade | kubectl apply -f -";
        findings.push(Finding::error(INSTALLATION, message, remedy).with(old));
    }
    findings.push(gateway(kinds.contains_key(ROUTES)));
    findings
}

/// Whether operator and agents are of one version, by their images.
pub(super) fn skew(facts: &Facts) -> Vec<Finding> {
    let (Ok(Some(operator)), Ok(Some(agents))) = (&facts.operator, &facts.agents) else { return Vec::new() };
    let operator = operator.spec.as_ref().and_then(|s| tag(&s.template));
    let agents = agents.spec.as_ref().and_then(|s| tag(&s.template));
    match (operator, agents) {
        (Some(operator), Some(agents)) if operator != agents => {
            let message = format!("the operator's image is {operator}, the agents' is {agents}");
            let remedy = "give both one version: weft upgrade | kubectl apply -f -";
            vec![Finding::warning(INSTALLATION, message, remedy)]
        }
        (Some(operator), Some(_)) => vec![Finding::ok(INSTALLATION, format!("images: {operator}"))],
        _ => Vec::new(),
    }
}

/// The tag or digest of a template's first image.
fn tag(template: &PodTemplateSpec) -> Option<String> {
    let image = template.spec.as_ref()?.containers.first()?.image.as_deref()?;
    let last = image.rsplit('/').next().unwrap_or(image);
    Some(last.split_once([':', '@']).map_or("latest", |(_, tag)| tag).to_owned())
}

pub(super) fn operator(facts: &Facts) -> Vec<Finding> {
    let deployment = match &facts.operator {
        Err(why) => return vec![Finding::unseen(INSTALLATION, "the operator", why)],
        Ok(None) => {
            let message = format!("the operator is not installed in {SYSTEM}");
            return vec![Finding::error(INSTALLATION, message, "weft install | kubectl apply -f -")];
        }
        Ok(Some(deployment)) => deployment,
    };
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let status = deployment.status.clone().unwrap_or_default();
    let available = status.available_replicas.unwrap_or(0);
    let said = format!("operator: {available} of {wanted} replicas available");
    let pods = facts.pods.as_deref().unwrap_or_default();
    let why = super::agents::troubles(pods, "weft-operator", &facts.missing);
    let look = format!(
        "kubectl -n {SYSTEM} describe pods -l app.kubernetes.io/name=weft-operator; kubectl -n {SYSTEM} logs deployment/weft-operator"
    );
    vec![match available {
        _ if wanted <= 0 => {
            let message =
                "the operator is scaled to 0: no agent learns of changes, no certificate is renewed";
            let remedy = format!("kubectl -n {SYSTEM} scale deployment/weft-operator --replicas=2");
            Finding::error(INSTALLATION, message, remedy)
        }
        0 => {
            let message = format!("{said}: no agent learns of changes, no certificate is renewed");
            Finding::error(INSTALLATION, message, look).with(why)
        }
        n if n < wanted => Finding::warning(INSTALLATION, said, look).with(why),
        _ => Finding::ok(INSTALLATION, said),
    }]
}

pub(super) fn trust(facts: &Facts, now: SystemTime) -> Vec<Finding> {
    let section = "Certificates";
    let pem = match &facts.bundle {
        Err(why) => return vec![Finding::unseen(section, "the trust bundle", why)],
        Ok(None) => {
            let remedy = format!(
                "the operator writes it when it starts: kubectl -n {SYSTEM} logs deployment/weft-operator"
            );
            let message =
                "there is no trust bundle (ConfigMap weft-trust-bundle): agents cannot reach the operator";
            return vec![Finding::error(section, message, remedy)];
        }
        Ok(Some(pem)) => pem,
    };
    // Until when each is good, and whether it may still sign.
    let roots: Vec<(SystemTime, bool)> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .filter_map(Result::ok)
        .filter_map(|der| {
            let seconds = parse_x509_certificate(&der).ok()?.1.validity().not_after.timestamp();
            let end = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).ok()?);
            let name: String = Sha256::digest(&der).iter().map(|b| format!("{b:02x}")).collect();
            Some((end, !facts.retiring.contains(&name)))
        })
        .collect();
    let renew = "put a new CA into the Secret weft-ca (docs/operations.md); the operator takes it into use with overlap";
    let signing = roots.iter().filter(|(_, signs)| *signs).map(|(end, _)| end).min();
    let Some(last) = signing.or_else(|| roots.iter().map(|(end, _)| end).max()) else {
        let remedy = format!(
            "delete it, the operator writes it anew: kubectl -n {SYSTEM} delete configmap weft-trust-bundle"
        );
        return vec![Finding::error(section, "the trust bundle holds no certificate", remedy)];
    };
    let roots = if roots.len() == 1 { "1 root".to_owned() } else { format!("{} roots", roots.len()) };
    vec![match last.duration_since(now) {
        Err(past) => {
            let message =
                format!("the CA expired {} ago: no connection can be opened", when::span(past.duration()));
            Finding::error(section, message, renew)
        }
        Ok(left) if left < CA_SOON => {
            Finding::warning(section, format!("the CA expires in {}", when::span(left)), renew)
        }
        Ok(left) => Finding::ok(section, format!("CA: {roots}, good for {}", when::span(left))),
    }]
}

pub(super) fn nodes(facts: &Facts, server: &Server) -> Vec<Finding> {
    let nodes = match &facts.nodes {
        Err(why) => return vec![Finding::unseen(NODES, "nodes", why)],
        Ok(nodes) => nodes,
    };
    let (mut old, mut foreign, mut down, mut kernels) = (Vec::new(), Vec::new(), Vec::new(), BTreeMap::new());
    for node in nodes {
        let name = node.metadata.name.clone().unwrap_or_default();
        let info = node.status.as_ref().and_then(|s| s.node_info.clone()).unwrap_or_default();
        *kernels.entry(info.kernel_version.clone()).or_insert(0_usize) += 1;
        if !supported(node) {
            foreign.push(format!("{name}: {} on {}", info.operating_system, info.architecture));
        } else if kernel(&info.kernel_version).is_none_or(|k| k < OLDEST_KERNEL) {
            old.push(format!("{name}: Linux {}", info.kernel_version));
        }
        if !ready(node) {
            down.push(name);
        }
    }
    let mut findings = Vec::new();
    if old.is_empty() {
        let all: Vec<_> = kernels
            .iter()
            .map(|(version, n)| format!("{version} on {n} node{}", if *n == 1 { "" } else { "s" }))
            .collect();
        findings.push(Finding::ok(NODES, format!("kernels: {}", names(&all))));
    } else {
        let message = format!(
            "{} of {} nodes have a kernel before {}.{}",
            old.len(),
            nodes.len(),
            OLDEST_KERNEL.0,
            OLDEST_KERNEL.1
        );
        findings.push(Finding::error(NODES, message, "upgrade them, or keep meshed Pods off them").with(old));
    }
    if !foreign.is_empty() {
        findings.push(Finding::info(NODES, "nodes that Weft has no agent for").with(foreign));
    }
    if !down.is_empty() {
        let message = format!("not ready: {}", names(&down));
        findings.push(Finding::warning(NODES, message, "kubectl describe node NAME says why"));
    }
    findings.extend(leases(facts, server));
    findings
}

/// Whether there are agents for a node of this kind.
pub(super) fn supported(node: &Node) -> bool {
    let info = node.status.as_ref().and_then(|s| s.node_info.as_ref());
    info.is_some_and(|i| {
        i.operating_system == "linux" && ["amd64", "arm64"].contains(&i.architecture.as_str())
    })
}

/// What the kubelets' leases tell of the nodes' clocks. Agents tell it more exactly; this works without them.
fn leases(facts: &Facts, server: &Server) -> Vec<Finding> {
    let (Ok(nodes), Ok(leases), Some(ahead)) = (&facts.nodes, &facts.leases, server.ahead) else {
        return Vec::new();
    };
    let now = when::seconds(SystemTime::now()).saturating_add(ahead);
    let mut findings = Vec::new();
    for lease in leases {
        let name = lease.metadata.name.clone().unwrap_or_default();
        let up = nodes.iter().any(|n| n.metadata.name.as_deref() == Some(&name) && ready(n));
        let renewed = lease.spec.as_ref().and_then(|s| s.renew_time.as_ref());
        let Some(renewed) = renewed.map(|t| t.0.as_second()).filter(|_| up) else { continue };
        let off = renewed.saturating_sub(now);
        if off > SKEW_WARNING {
            findings.push(clock(NODES, &name, off, "the API server"));
        } else if off < -LEASE_LATE {
            // A lease is up to some renewals old even where the clock is right.
            let late = when::span(Duration::from_secs(off.unsigned_abs()));
            let message = format!(
                "{name} renewed its lease {late} ago by the API server's clock: its own is behind, or its kubelet hangs"
            );
            let remedy = format!("compare `date -u` on {name}; see the kubelet's log there");
            findings.push(Finding::warning(NODES, message, remedy));
        }
    }
    findings
}

pub(crate) fn ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// `5.15.0-91-generic` as (5, 15).
fn kernel(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
