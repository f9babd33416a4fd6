//! `weft status`.

use std::{
    fmt::Write as _,
    path::Path,
    time::{Duration, SystemTime},
};

use serde::Serialize;
use weft_proto::agent::{StatusRequest, StatusResponse, agent_client::AgentClient};

use crate::{
    Failure, Outcome,
    args::{StatusArgs, StatusOutput},
    check::agents::is_program,
    connect,
    mesh::Mesh,
    text::{self, Colour, clean},
    when,
};

/// How long an agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest summary that is read, in bytes.
const MAX_SUMMARY: u64 = 4 << 20;

/// The whole answer.
#[derive(Debug, Serialize)]
struct Report {
    agents: Vec<Agent>,
    /// What is wrong with agents and operators that did not answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unknown: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    operator: Option<serde_json::Value>,
}

/// One agent.
#[derive(Debug, Serialize)]
struct Agent {
    server: String,
    node: String,
    version: String,
    kernel: String,
    started: String,
    ready: bool,
    not_ready: Vec<String>,
    config: Config,
    programs: Vec<Program>,
    pods: Vec<Pod>,
    svids: Vec<Svid>,
    maps: Vec<Map>,
    flows: Flows,
    open_files: u64,
    /// 0 where the agent does not tell.
    max_open_files: u64,
    #[serde(skip)]
    up: Duration,
}

#[derive(Debug, Serialize)]
struct Config {
    version: String,
    operator_connected: bool,
    last_change: String,
    problem: String,
    rejected: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Program {
    name: String,
    id: u32,
    attached_to: String,
    healthy: bool,
    repairs: u64,
    problem: String,
}

#[derive(Debug, Serialize)]
struct Pod {
    name: String,
    uid: String,
    identity: String,
    subject: u32,
    mode: String,
    addresses: Vec<String>,
    problem: String,
}

#[derive(Debug, Serialize)]
struct Svid {
    identity: String,
    not_after: String,
    /// The authority's name in the certificate.
    issued_by: String,
    serial: String,
    problem: String,
    #[serde(skip)]
    left: Option<Duration>,
}

#[derive(Debug, Serialize)]
struct Map {
    name: String,
    entries: u64,
    capacity: u64,
}

#[derive(Debug, Serialize)]
struct Flows {
    capacity: u64,
    held: u64,
    seen: u64,
    lost: u64,
}

/// Runs the command.
pub(crate) async fn run(args: &StatusArgs) -> Result<Outcome, Failure> {
    let operator = args.operator_status.as_deref().map(summary).transpose()?;
    let now = SystemTime::now();
    let (mut agents, mut unknown) = (Vec::new(), Vec::new());
    let addresses = match connect::addresses(&args.server)? {
        Some(addresses) => addresses,
        // Only the operator's folder was asked for.
        None if operator.is_some() && !args.server.cluster.given() => Vec::new(),
        None => {
            let states = Mesh::open(&connect::cluster(&args.server).await?).await?.states().await;
            let heard = states.nodes.into_values().filter_map(|(replica, s)| Some((replica, s.agent?)));
            agents.extend(heard.map(|(replica, state)| agent(replica, state, now)));
            unknown = states.problems;
            Vec::new()
        }
    };
    for address in &addresses {
        let mut client = AgentClient::new(connect::channel(address).await?);
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, client.status(StatusRequest {}))
            .await
            .map_err(|_| Failure::Unable(format!("the agent at {address} does not answer; see its log")))?
            .map_err(|e| Failure::Unable(format!("the agent at {address} says: {}", clean(e.message()))))?;
        agents.push(agent(address.to_string(), answer.into_inner(), now));
    }
    if let Some(namespace) = &args.namespace {
        let prefix = format!("{namespace}/");
        for agent in &mut agents {
            agent.pods.retain(|pod| pod.name.starts_with(&prefix));
        }
    }
    let report = Report { agents, unknown, operator };
    let problems = problems(&report);
    match args.output {
        StatusOutput::Table => print!("{}", table(&report, &problems, text::colours())),
        StatusOutput::Json => println!("{}", serde_json::to_string_pretty(&report).unwrap_or_default()),
        StatusOutput::Yaml => print!("{}", serde_yaml_ng::to_string(&report).unwrap_or_default()),
    }
    Ok(if problems.is_empty() { Outcome::Fine } else { Outcome::Finding })
}

fn summary(dir: &Path) -> Result<serde_json::Value, Failure> {
    use std::io::Read as _;
    let path = dir.join("summary.json");
    let unable = |e: &dyn std::fmt::Display| {
        Failure::Unable(format!(
            "cannot read {}: {e}; give the folder that the operator writes its status to",
            path.display()
        ))
    };
    let file = std::fs::File::open(&path).map_err(|e| unable(&e))?;
    serde_json::from_reader(file.take(MAX_SUMMARY)).map_err(|e| unable(&e))
}

fn stamp(t: Option<prost_types::Timestamp>) -> Option<SystemTime> {
    t.and_then(|t| SystemTime::try_from(t).ok())
}

fn agent(server: String, s: StatusResponse, now: SystemTime) -> Agent {
    let config = s.config.unwrap_or_default();
    let flows = s.flows.unwrap_or_default();
    let started = stamp(s.started);
    Agent {
        server,
        node: s.node,
        version: s.agent_version,
        kernel: s.kernel,
        started: started.map(when::full).unwrap_or_default(),
        up: started.and_then(|t| now.duration_since(t).ok()).unwrap_or_default(),
        ready: s.not_ready.is_empty(),
        not_ready: s.not_ready,
        config: Config {
            version: config.version,
            operator_connected: config.connected,
            last_change: stamp(config.last_change).map(when::full).unwrap_or_default(),
            problem: config.problem,
            rejected: config.rejected,
        },
        programs: s
            .programs
            .into_iter()
            .map(|p| Program {
                name: p.name,
                id: p.id,
                attached_to: p.attached_to,
                healthy: p.healthy,
                repairs: p.repairs,
                problem: p.problem,
            })
            .collect(),
        pods: s
            .pods
            .into_iter()
            .map(|p| Pod {
                name: format!("{}/{}", p.namespace, p.name),
                uid: p.uid,
                identity: p.identity,
                subject: p.subject,
                mode: p.mode,
                addresses: p.addresses,
                problem: p.problem,
            })
            .collect(),
        svids: s
            .svids
            .into_iter()
            .map(|v| {
                let not_after = stamp(v.not_after);
                Svid {
                    identity: v.identity,
                    not_after: not_after.map(when::full).unwrap_or_default(),
                    issued_by: v.issued_by,
                    serial: v.serial,
                    problem: v.problem,
                    left: not_after.and_then(|t| t.duration_since(now).ok()),
                }
            })
            .collect(),
        maps: s
            .maps
            .into_iter()
            .map(|m| Map { name: m.name, entries: m.entries, capacity: m.capacity })
            .collect(),
        open_files: s.open_files,
        max_open_files: s.max_open_files,
        flows: Flows { capacity: flows.capacity, held: flows.held, seen: flows.seen, lost: flows.lost },
    }
}

/// Everything that is wrong, one sentence each.
fn problems(report: &Report) -> Vec<String> {
    let mut found = report.unknown.clone();
    for a in &report.agents {
        let mut note = |text: String| found.push(format!("{}: {text}", a.node));
        if !a.ready {
            note(format!("not ready, missing: {}", a.not_ready.join(", ")));
        }
        if !a.config.operator_connected {
            note("no link to the operator; the last configuration goes on".into());
        }
        if !a.config.problem.is_empty() {
            note(format!("configuration: {}", a.config.problem));
        }
        for key in &a.config.rejected {
            note(format!("rejected: {key}"));
        }
        for p in a.programs.iter().filter(|p| !p.healthy) {
            note(if is_program(&p.name, p.id) {
                format!("program {} at {}: {}", p.name, p.attached_to, p.problem)
            } else {
                p.problem.clone()
            });
        }
        for p in a.pods.iter().filter(|p| !p.problem.is_empty()) {
            note(format!("Pod {}: {}", p.name, p.problem));
        }
        for v in a.svids.iter().filter(|v| !v.problem.is_empty() || v.left.is_none()) {
            let problem = if v.problem.is_empty() { "expired" } else { &v.problem };
            note(format!("SVID {}: {problem}", v.identity));
        }
        for m in a.maps.iter().filter(|m| nearly(m.entries, m.capacity)) {
            note(format!(
                "map {} is nearly full: {} of {}; make room with --map-size {}=ENTRIES of weft-agent",
                m.name, m.entries, m.capacity, m.name
            ));
        }
        if nearly(a.open_files, a.max_open_files) {
            note(format!(
                "{} of {} files are open, and beyond that new connections wait or fail; raise the container runtime's limit of open files \
                 (LimitNOFILE of its service)",
                a.open_files, a.max_open_files
            ));
        }
    }
    if let Some(operator) = &report.operator {
        found.extend(operator_problems(operator));
    }
    found
}

/// Whether nine tenths are used of what there is; nothing is known of what is none.
fn nearly(used: u64, of: u64) -> bool {
    of > 0 && used.saturating_mul(10) >= of.saturating_mul(9)
}

/// What the operator's summary says is wrong: unreadable files, objects with a failed condition, nodes that refused
/// something or have no stream.
fn operator_problems(summary: &serde_json::Value) -> Vec<String> {
    let text = |v: &serde_json::Value, name: &str| v[name].as_str().unwrap_or_default().to_owned();
    let list = |v: &serde_json::Value| v.as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    for (place, message) in summary["unreadable"].as_object().into_iter().flatten() {
        found.push(format!("operator: {place}: {}", message.as_str().unwrap_or_default()));
    }
    for object in list(&summary["objects"]) {
        let (namespace, name) = (text(&object, "namespace"), text(&object, "name"));
        let name = if namespace.is_empty() { name } else { format!("{namespace}/{name}") };
        for condition in list(&object["conditions"]) {
            if condition["status"] == "False" {
                let (kind, file) = (text(&object, "kind"), text(&object, "file"));
                let (what, message) = (text(&condition, "type"), text(&condition, "message"));
                found.push(format!("operator: {file}: {kind} {name}: not {what}: {message}"));
            }
        }
    }
    for node in list(&summary["nodes"]) {
        if node["connected"] == false {
            found.push(format!("operator: node {} is not connected", text(&node, "node")));
        }
    }
    found
}

fn table(report: &Report, problems: &[String], colour: bool) -> String {
    let mut out = String::new();
    for a in &report.agents {
        let state = if a.ready {
            text::paint(colour, Colour::Good, "ready")
        } else {
            text::paint(colour, Colour::Bad, "not ready")
        };
        let link = if a.config.operator_connected { "connected" } else { "not connected" };
        let _ = writeln!(out, "{} {state}, up {}", clean(&a.node), when::span(a.up));
        let mut rows = vec![
            vec!["  Agent".to_owned(), format!("{} on Linux {}", a.version, a.kernel)],
            vec!["  Operator".into(), link.into()],
            vec!["  Config".into(), format!("version {}", a.config.version)],
            vec![
                "  Flows".into(),
                format!(
                    "{} held of {}, {} seen, {} lost",
                    a.flows.held, a.flows.capacity, a.flows.seen, a.flows.lost
                ),
            ],
        ];
        if a.max_open_files > 0 {
            let files = format!("{} open, {} may be", a.open_files, a.max_open_files);
            rows.push(vec!["  Files".into(), files]);
        }
        let programs = || a.programs.iter().filter(|p| is_program(&p.name, p.id));
        let healthy = programs().filter(|p| p.healthy).count();
        rows.push(vec![
            "  Programs".into(),
            format!("{healthy} of {} attached and healthy", programs().count()),
        ]);
        out.push_str(&lines(&rows));
        section(
            &mut out,
            &["PROGRAM", "ID", "ATTACHED TO", "REPAIRS", "STATE"],
            programs().map(|p| {
                let state = if p.healthy { "healthy".to_owned() } else { p.problem.clone() };
                vec![p.name.clone(), p.id.to_string(), p.attached_to.clone(), p.repairs.to_string(), state]
            }),
        );
        section(
            &mut out,
            &["POD", "MODE", "IDENTITY", "ADDRESSES", "STATE"],
            a.pods.iter().map(|p| {
                let state = if p.problem.is_empty() { "enrolled".to_owned() } else { p.problem.clone() };
                vec![p.name.clone(), p.mode.clone(), p.identity.clone(), p.addresses.join(","), state]
            }),
        );
        section(
            &mut out,
            &["SVID", "EXPIRES", "IN", "STATE"],
            a.svids.iter().map(|v| {
                let left = v.left.map(when::span).unwrap_or_else(|| "-".into());
                let state = if v.problem.is_empty() { "valid".to_owned() } else { v.problem.clone() };
                vec![v.identity.clone(), v.not_after.clone(), left, state]
            }),
        );
        out.push('\n');
    }
    if problems.is_empty() {
        let _ = writeln!(out, "{}", text::paint(colour, Colour::Good, "Nothing is wrong."));
    } else {
        let _ = writeln!(out, "{}", text::paint(colour, Colour::Bad, "Problems"));
        for problem in problems {
            let _ = writeln!(out, "  {}", clean(problem));
        }
    }
    out
}

fn section(out: &mut String, header: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let mut all = vec![header.iter().map(ToString::to_string).collect::<Vec<_>>()];
    all.extend(rows.map(|row| row.iter().map(|c| clean(c).into_owned()).collect()));
    if all.len() > 1 {
        for row in &mut all {
            if let Some(first) = row.first_mut() {
                first.insert_str(0, "  ");
            }
        }
        out.push('\n');
        out.push_str(&lines(&all));
    }
}

fn lines(rows: &[Vec<String>]) -> String {
    let mut out = String::new();
    for line in text::columns(rows, &text::widths(rows)) {
        out.push_str(&line);
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests;
