//! Who may call whom.

use anyhow::Result;
use serde_json::Value;

use super::{
    Teller, agents_of,
    calls::{flow, http, ms, number, pod, text, vip},
    wire::captured,
};
use crate::{Lab, metrics};

/// Entries of a kernel map on both nodes, by `weft status`.
fn entries(status: &Value, map: &str) -> u64 {
    let maps = agents_of(status).filter_map(|agent| agent["maps"].as_array()).flatten();
    maps.filter(|line| text(line, "/name").to_uppercase().starts_with(map))
        .map(|line| number(line, "/entries"))
        .sum()
}

/// Step 4.
///
/// # Errors
/// When something could not be done; what is not as told goes to the teller.
pub fn enforce(tell: &mut Teller, lab: &Lab) -> Result<()> {
    tell.step(4, "A policy, live");
    let web = vip(lab, "shop/web", 80)?;
    let before = lab.status()?;
    let took = lab.apply_example("policy")?;
    let after = lab.status()?;
    let changed: Vec<String> = ["POLICY", "VIP_DENIED"]
        .iter()
        .map(|map| format!("{map} {} -> {}", entries(&before, map), entries(&after, map)))
        .collect();
    let (programmed, message) = lab.condition("AuthorizationPolicy", "shop", "web-callers", "Programmed")?;
    tell.did("AuthorizationPolicy web-callers is applied: client may GET and HEAD, nobody else anything");
    tell.saw(
        programmed && entries(&after, "POLICY") > entries(&before, "POLICY"),
        &format!("enforced after {}: {message}; entries in BPF maps: {}", ms(took), changed.join(", ")),
    );
    let direct = pod(lab, "web-v1", 8080)?;
    let answers = [http(lab, "intruder", &web, &[])?, http(lab, "intruder", &direct, &[])?];
    let refused = answers.iter().all(|answer| number(answer, "/errors/ConnectionRefused") == 1);
    let denied = flow(lab, |flow| flow["verdict"] == "DENIED" && flow["source"]["pod"] == "intruder")?;
    tell.saw(
        refused,
        &format!(
            "intruder is refused at Service and Pod: {} ({}, {})",
            error_of(&answers[0]),
            text(&denied, "/reason"),
            place(text(&denied, "/reporter"))
        ),
    );
    let read = http(lab, "client", &web, &[])?;
    let write = http(lab, "client", &web, &["--method", "POST", "--path", "/admin"])?;
    let id = write["headers"].as_array().into_iter().flatten().find(|pair| pair[0] == "weft-flow-id");
    tell.saw(
        number(&read, "/statuses/200") == 1 && number(&write, "/statuses/403") == 1 && id.is_some(),
        &format!(
            "client: GET / {}, POST /admin {} with flow id {}",
            statuses(&read),
            statuses(&write),
            id.map_or("none", |pair| text(pair, "/1"))
        ),
    );
    forged(tell, lab)?;
    foreign(tell, lab)
}

/// Where a reporter sits, in words.
fn place(reporter: &str) -> &str {
    match reporter {
        "kernel-source" => "by the kernel of its own node, when it dials",
        "kernel-destination" => "by the kernel of web's node",
        "proxy-destination" => "by the proxy of web's node",
        other => other,
    }
}

fn statuses(answer: &Value) -> String {
    let codes = answer["statuses"].as_object().into_iter().flatten().map(|(code, _)| code.clone());
    let all: Vec<String> =
        codes.chain(std::iter::once(error_of(answer))).filter(|part| !part.is_empty()).collect();
    all.join(", ")
}

fn error_of(answer: &Value) -> String {
    answer["errors"].as_object().and_then(|errors| errors.keys().next().cloned()).unwrap_or_default()
}

/// A counter of a node, by a part of its name.
fn counter(lab: &Lab, node: &str, part: &str) -> Result<f64> {
    let page = lab.node(node)?.admin("/metrics")?;
    let samples = metrics::parse(&page);
    let holds = |sample: &&metrics::Sample| {
        sample.name.ends_with("_total")
            && (sample.name.contains(part) || sample.labels.values().any(|value| value.contains(part)))
    };
    Ok(samples.iter().filter(holds).map(|sample| sample.value).sum())
}

fn forged(tell: &mut Teller, lab: &Lab) -> Result<()> {
    let from = pod(lab, "client", 40_404)?;
    let to = pod(lab, "web-v1", 8080)?;
    let before = counter(lab, "node-a", "spoofed")?;
    let trace = captured(lab, "forged", || {
        lab.app("intruder", &["forge", "--from", &from, "--to", &to, "--count", "5"]).map(|_| ())
    })?;
    let port = 40_404_u16.to_be_bytes();
    let crossed = trace.find(&[port[0], port[1], 0x1f, 0x90]);
    let (dropped, _) = crate::wait::until(std::time::Duration::from_secs(5), "the drop counter", || {
        let dropped = counter(lab, "node-a", "spoofed")? - before;
        anyhow::ensure!(dropped >= 5.0, "{dropped}");
        Ok(dropped)
    })?;
    tell.saw(
        crossed == 0,
        &format!("intruder forges 5 SYNs as client: {dropped} dropped at its veth, {crossed} on the wire"),
    );
    Ok(())
}

fn foreign(tell: &mut Teller, lab: &Lab) -> Result<()> {
    let tunnel = pod(lab, "web-v1", 15008)?;
    let claims = "spiffe://cluster.local/ns/shop/sa/client";
    let answer = lab.app("stranger", &["tunnel", "--to", &tunnel, "--claims", claims])?;
    tell.saw(
        answer["accepted"] != true,
        &format!("a foreign CA's certificate for {claims}: {}", text(&answer, "/error")),
    );
    let answer = lab.app("client", &["dial", "--to", &tunnel])?;
    tell.saw(
        answer["connected"] == false,
        &format!("client's own program dials the tunnel port: {}", text(&answer, "/error")),
    );
    Ok(())
}

/// At most eight lines, the newest of their kind: requests and refusals. What differs in its time only is one.
fn calmly(lines: &str) -> Vec<String> {
    let mut kinds: Vec<(String, &str, u32)> = Vec::new();
    // Of what was let in, the requests: each stands for the connection that it came on.
    let told = |line: &&str| !line.contains(" FORWARDED ") || !line.contains(" tcp ");
    for line in lines.lines().filter(told) {
        let what = line.split_once(' ').map_or(line, |(_, what)| what);
        match kinds.iter_mut().find(|(_, known, _)| *known == what) {
            Some((_, _, times)) => *times += 1,
            None => kinds.push((line.into(), what, 1)),
        }
    }
    let newest = kinds.split_off(kinds.len().saturating_sub(8));
    let told = newest.into_iter().map(|(line, _, times)| match times {
        1 => line,
        times => format!("{line} ({times} times)"),
    });
    told.collect()
}

/// Step 5.
///
/// # Errors
/// When something could not be done; what is not as told goes to the teller.
pub fn observe(tell: &mut Teller, lab: &Lab) -> Result<()> {
    tell.step(5, "The same, as weft observe shows it");
    let denied = flow(lab, |flow| flow["http"]["status"] == 403)?;
    let lines = lab.weft(&["observe", "--namespace", "shop", "--last", "32", "-o", "compact"])?;
    for line in calmly(&lines) {
        tell.did(&line);
    }
    let names = [
        "/time",
        "/source/pod",
        "/source/identity",
        "/destination/pod",
        "/destination/identity",
        "/tls/cipher",
    ];
    let holds =
        names.iter().chain(&["/http/method", "/http/url"]).all(|pointer| !text(&denied, pointer).is_empty())
            && number(&denied, "/destination/port") == 8080
            && text(&denied, "/verdict") == "DENIED";
    let allowed = flow(lab, |flow| flow["verdict"] == "FORWARDED" && flow["policy"] == "shop/web-callers");
    tell.saw(allowed.is_ok(), "an allowed call's record names the policy that let it in: shop/web-callers");
    let policy = text(&denied, "/policy");
    let latency = denied["duration_ms"].as_f64().unwrap_or_default();
    tell.saw(
        holds && latency > 0.0 && text(&denied, "/http/method") == "POST",
        &format!(
            "the 403's record: {} {} -> {}, decided by {}, {latency:.1} ms",
            text(&denied, "/http/method"),
            text(&denied, "/http/url"),
            denied["http"]["status"],
            if policy.is_empty() { "the absence of an ALLOW" } else { policy }
        ),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_lines_are_one() {
        let lines = "12:00:00.1 a -> b DENIED tcp open\n12:00:00.2 a -> c FORWARDED GET /\n\
                     12:00:00.3 a -> c FORWARDED mtls tcp open\n12:00:00.4 a -> b DENIED tcp open\n";
        assert_eq!(
            calmly(lines),
            ["12:00:00.1 a -> b DENIED tcp open (2 times)", "12:00:00.2 a -> c FORWARDED GET /"]
        );
    }
}
