//! The agents: their rollout, and what they say of themselves.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use weft_proto::weft_relay::NodeStatus;

use super::{
    Finding,
    facts::{Facts, Server},
    names,
    system::{SKEW_WARNING, clock, supported},
};
use crate::{
    cluster::SYSTEM,
    mesh::{is_ready, labelled},
    when,
};

mod mtu;

const SECTION: &str = "Agents";
/// Longest reason that is shown, in characters.
const MAX_REASON: usize = 160;

/// Whether an agent speaks of a program, or of what it looks at beside them. A program that is detached has no number.
pub(crate) fn is_program(name: &str, id: u32) -> bool {
    id != 0 || name.starts_with("weft_")
}

fn look() -> String {
    format!("kubectl -n {SYSTEM} logs -l app.kubernetes.io/name=weft-agent --prefix; weft status")
}

pub(super) fn rollout(facts: &Facts) -> Vec<Finding> {
    let set = match &facts.agents {
        Err(why) => return vec![Finding::unseen(SECTION, "the DaemonSet", why)],
        Ok(None) => {
            let message = format!("the agents are not installed in {SYSTEM}");
            return vec![Finding::error(SECTION, message, "weft install | kubectl apply -f -")];
        }
        Ok(Some(set)) => set,
    };
    let status = set.status.clone().unwrap_or_default();
    let (ready, wanted) = (status.number_ready, status.desired_number_scheduled);
    let updated = status.updated_number_scheduled.unwrap_or(0);
    let said = format!("{ready} of {wanted} ready");
    let pods = facts.pods.as_deref().unwrap_or_default();
    if wanted == 0 && facts.nodes.as_ref().map_or(true, Vec::is_empty) {
        let message = "no node is chosen for an agent";
        return vec![Finding::error(
            SECTION,
            message,
            format!("kubectl -n {SYSTEM} describe daemonset weft-agent"),
        )];
    }
    if ready < wanted {
        let why = troubles(pods, "weft-agent", &facts.missing);
        let remedy =
            format!("kubectl -n {SYSTEM} describe pods -l app.kubernetes.io/name=weft-agent; {}", look());
        return vec![Finding::error(SECTION, said, remedy).with(why)];
    }
    let mut findings = uncovered(facts);
    let why = troubles(pods, "weft-agent", &facts.missing);
    if updated < wanted {
        let remedy = match why.is_empty() {
            true => format!("wait for it: kubectl -n {SYSTEM} rollout status daemonset/weft-agent"),
            false => format!(
                "the earlier agents go on meanwhile; correct what is said above, or go back: kubectl -n {SYSTEM} rollout undo daemonset/weft-agent"
            ),
        };
        let message = format!("{said}, {updated} of {wanted} of the newest version");
        findings.push(Finding::warning(SECTION, message, remedy).with(why));
    } else if findings.is_empty() {
        findings.push(Finding::ok(SECTION, said));
    }
    findings
}

/// Nodes that could have an agent and have none.
fn uncovered(facts: &Facts) -> Vec<Finding> {
    let (Ok(nodes), Ok(pods)) = (&facts.nodes, &facts.pods) else { return Vec::new() };
    let ours =
        pods.iter().filter(|p| p.metadata.namespace.as_deref() == Some(SYSTEM) && labelled(p, "weft-agent"));
    let covered: BTreeSet<_> = ours.filter_map(|p| p.spec.as_ref()?.node_name.as_deref()).collect();
    let bare: Vec<_> = nodes
        .iter()
        .filter(|node| supported(node))
        .filter_map(|node| node.metadata.name.clone())
        .filter(|name| !covered.contains(name.as_str()))
        .collect();
    if bare.is_empty() {
        return Vec::new();
    }
    let message = format!("no agent on {}: Pods of the mesh that start there are not captured", names(&bare));
    let remedy = format!(
        "take the DaemonSet's node selector or affinity away (kubectl -n {SYSTEM} edit daemonset weft-agent), or see why it is not there: kubectl -n {SYSTEM} describe daemonset weft-agent"
    );
    vec![Finding::error(SECTION, message, remedy)]
}

/// Why Pods of Weft are not ready, one line each.
pub(super) fn troubles(pods: &[Pod], name: &str, missing: &BTreeMap<String, String>) -> Vec<String> {
    let ours = pods.iter().filter(|p| p.metadata.namespace.as_deref() == Some(SYSTEM) && labelled(p, name));
    let trouble = |pod: &Pod| {
        let own = pod.metadata.name.clone().unwrap_or_default();
        let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_else(|| "no node".into());
        let why = missing.get(&own).cloned().unwrap_or_else(|| waits_for(pod));
        let mut why = why.replace('\n', " ");
        if let Some((end, _)) = why.char_indices().nth(MAX_REASON) {
            why.truncate(end);
            why.push_str("...");
        }
        format!("{node} ({own}): {why}")
    };
    ours.filter(|p| !is_ready(p) && p.metadata.deletion_timestamp.is_none()).map(trouble).collect()
}

/// What the kubelet or the scheduler says of a Pod.
pub(crate) fn waits_for(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let reason = |c: &ContainerStatus| {
        let state = c.state.clone().unwrap_or_default();
        if let Some(waiting) = state.waiting {
            let ended = c.last_state.as_ref().and_then(|s| s.terminated.as_ref());
            let ended = ended.map(|t| {
                let message = t.message.clone().unwrap_or_default();
                format!("; it ended with {} {message}", t.exit_code).trim_end().to_owned()
            });
            let text = [waiting.reason.unwrap_or_default(), waiting.message.unwrap_or_default()];
            return Some(format!("{}{}", text.join(" ").trim(), ended.unwrap_or_default()));
        }
        state.terminated.map(|t| format!("it ended with {} {}", t.exit_code, t.reason.unwrap_or_default()))
    };
    let found = status.container_statuses.iter().flatten().find_map(reason);
    let unscheduled = || {
        let mut all = status.conditions.iter().flatten();
        all.find(|c| c.type_ == "PodScheduled" && c.status != "True").and_then(|c| c.message.clone())
    };
    found.or_else(unscheduled).unwrap_or_else(|| "runs, and is not ready yet".into())
}

pub(super) fn states(facts: &Facts, server: &Server, now: SystemTime) -> Vec<Finding> {
    let states = match &facts.states {
        Err(why) => {
            let remedy = "without it flows, enrolment and certificates cannot be looked at";
            return vec![Finding::error(SECTION, format!("they cannot be asked: {why}"), remedy)];
        }
        Ok(states) => states,
    };
    let mut findings = Vec::new();
    if !states.problems.is_empty() {
        let message = "some do not answer";
        findings.push(Finding::error(SECTION, message, look()).with(states.problems.clone()));
    }
    let (mut reasons, mut programs, mut certificates, mut settings, mut full) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut attached, mut valid, mut besides) = (0_usize, 0_usize, Vec::new());
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (node, (_, status)) in &states.nodes {
        let Some(agent) = &status.agent else { continue };
        versions.entry(agent.agent_version.clone()).or_default().push(node.clone());
        if !agent.not_ready.is_empty() {
            reasons.push(format!("{node}: waits for {}", agent.not_ready.join(", ")));
        }
        let (bad, beside): (Vec<_>, Vec<_>) =
            agent.programs.iter().filter(|p| !p.healthy).partition(|p| is_program(&p.name, p.id));
        besides.extend(beside.iter().map(|p| format!("{node}: {}", p.problem)));
        let bad = bad.iter();
        programs.extend(bad.map(|p| format!("{node}: {} at {}: {}", p.name, p.attached_to, p.problem)));
        attached += agent.programs.iter().filter(|p| p.healthy && p.id != 0).count();
        for svid in &agent.svids {
            let end = svid.not_after.and_then(|t| SystemTime::try_from(t).ok());
            let left = end.and_then(|end| end.duration_since(now).ok());
            match (svid.problem.as_str(), left) {
                ("", Some(_)) => valid += 1,
                ("", None) => certificates.push(format!("{node}: {}: expired", svid.identity)),
                (problem, Some(left)) => {
                    let left = when::span(left);
                    certificates.push(format!(
                        "{node}: {}: {problem}; the old one is good for {left}",
                        svid.identity
                    ));
                }
                (problem, None) => certificates.push(format!("{node}: {}: {problem}", svid.identity)),
            }
        }
        let config = agent.config.clone().unwrap_or_default();
        if !config.problem.is_empty() {
            settings.push(format!("{node}: {}", config.problem));
        }
        settings.extend(config.rejected.iter().map(|r| format!("{node}: {r}")));
        let nearly = |entries: u64, capacity: u64| {
            capacity > 0 && entries.saturating_mul(10) >= capacity.saturating_mul(9)
        };
        let maps = agent.maps.iter().filter(|m| nearly(m.entries, m.capacity));
        full.extend(maps.map(|m| format!("{node}: {} holds {} of {}", m.name, m.entries, m.capacity)));
    }
    let mut judge = |bad: Vec<String>, good: String, message: &str, remedy: String| {
        findings.push(if bad.is_empty() {
            Finding::ok(SECTION, good)
        } else {
            Finding::error(SECTION, message, remedy).with(bad)
        });
    };
    if !states.nodes.is_empty() {
        let all = states.nodes.len();
        judge(
            reasons,
            format!("{all} answer, each with all that it needs"),
            "some wait for something",
            look(),
        );
        judge(
            programs,
            format!("{attached} BPF programs attached and probed"),
            "programs are not attached",
            format!("the agent repairs them by itself; if it does not: {}", look()),
        );
        judge(
            certificates,
            format!("{valid} SVIDs valid"),
            "SVIDs are missing or not renewed",
            format!("kubectl -n {SYSTEM} logs deployment/weft-operator; {}", look()),
        );
        let good = "the newest configuration is in force everywhere".to_owned();
        judge(settings, good, "some cannot apply the configuration", look());
    }
    if !besides.is_empty() {
        let remedy = "as each line says";
        findings.push(Finding::error(SECTION, "nodes must be set up differently", remedy).with(besides));
    }
    if !full.is_empty() {
        let remedy = "new Pods will be refused when it is full: spread Pods over more nodes";
        findings.push(Finding::warning(SECTION, "tables are nearly full", remedy).with(full));
    }
    if versions.len() > 1 {
        let all = versions.iter().map(|(version, nodes)| format!("{version}: {}", names(nodes))).collect();
        let remedy = format!("wait for the rollout: kubectl -n {SYSTEM} rollout status daemonset/weft-agent");
        findings.push(Finding::warning(SECTION, "agents of several versions", remedy).with(all));
    }
    findings.extend(clocks(&states.nodes, server, now));
    findings.extend(mtu::all(facts, &states.nodes));
    findings
}

fn clocks(nodes: &BTreeMap<String, (String, NodeStatus)>, server: &Server, now: SystemTime) -> Vec<Finding> {
    let now = when::seconds(now).saturating_add(server.ahead.unwrap_or_default());
    let mut findings = Vec::new();
    let mut known = 0_usize;
    for (node, (_, status)) in nodes {
        let Some(clock_of) = status.clock else { continue };
        known += 1;
        let off = clock_of.seconds.saturating_sub(now);
        // Answers are some seconds old when they are judged.
        if off.abs() > SKEW_WARNING {
            findings.push(clock(SECTION, node, off, "the API server"));
        }
    }
    if findings.is_empty() && known > 0 {
        findings.push(Finding::ok(SECTION, "the clocks of all nodes agree"));
    }
    findings
}
