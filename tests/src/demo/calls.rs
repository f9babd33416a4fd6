//! The canary, the truth that both applications see, and the golden signals.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Teller;
use crate::{Lab, metrics, observe, stats, wait};

/// What an earlier step saw and a later one shows.
#[derive(Debug, Default)]
pub struct Seen {
    /// Latency of calls without the mesh.
    pub direct: Vec<Duration>,
}

/// `address:port` of a Service.
pub fn vip(lab: &Lab, key: &str, port: u16) -> Result<String> {
    Ok(std::net::SocketAddr::new(lab.service(key, false)?, port).to_string())
}

/// `address:port` of a Pod.
pub fn pod(lab: &Lab, name: &str, port: u16) -> Result<String> {
    Ok(std::net::SocketAddr::new(lab.pod(name)?.v4.into(), port).to_string())
}

/// Calls of client to an address.
pub fn http(lab: &Lab, from: &str, to: &str, more: &[&str]) -> Result<Value> {
    let mut args = vec!["http", "--to", to];
    args.extend_from_slice(more);
    lab.app(from, &args)
}

/// A number in an answer.
pub fn number(answer: &Value, pointer: &str) -> u64 {
    answer.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

/// The latencies in an answer.
pub fn latencies(answer: &Value) -> Vec<Duration> {
    let micros = answer["micros"].as_array().into_iter().flatten();
    micros.filter_map(Value::as_u64).map(Duration::from_micros).collect()
}

/// Milliseconds with one digit.
pub fn ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// Step 1.
///
/// # Errors
/// When something could not be done; what is not as told goes to the teller.
pub fn canary(tell: &mut Teller, lab: &Lab) -> Result<()> {
    tell.step(1, "A canary, live");
    let web = vip(lab, "shop/web", 80)?;
    let (first, _) = wait::until(Duration::from_secs(10), "a first call to web", || {
        let answer = http(lab, "client", &web, &["--count", "20"])?;
        (number(&answer, "/statuses/200") == 20).then_some(answer.clone()).with_context(|| answer.to_string())
    })?;
    tell.saw(
        number(&first, "/bodies/web-v1") > 0 && number(&first, "/bodies/web-v2") > 0,
        &format!("client calls web at its Service address {web}: {}", counts(&first)),
    );
    let took = lab.apply_example("canary")?;
    let (programmed, message) = lab.condition("HTTPRoute", "shop", "web-canary", "Programmed")?;
    tell.did("HTTPRoute web-canary is applied: 90 to v1, 10 to v2");
    tell.saw(
        programmed && took < Duration::from_millis(200),
        &format!("enforced after {}: {message}", ms(took)),
    );
    let answer = http(lab, "client", &web, &["--count", "1000", "--concurrency", "8"])?;
    let (v1, v2) = (number(&answer, "/bodies/web-v1"), number(&answer, "/bodies/web-v2"));
    let off = stats::deviation(v2, v1 + v2, 0.1);
    tell.saw(
        v1 + v2 == 1000 && off.abs() < 3.3,
        &format!(
            "1,000 calls: v1 {v1}, v2 {v2}, failed {}; {off:+.1} standard deviations from 90/10",
            number(&answer, "/failed")
        ),
    );
    Ok(())
}

fn counts(answer: &Value) -> String {
    let bodies = answer["bodies"].as_object().into_iter().flatten();
    let mut parts: Vec<String> = bodies.map(|(body, count)| format!("{count} from {body}")).collect();
    let errors = answer["errors"].as_object().into_iter().flatten();
    parts.extend(errors.map(|(error, count)| format!("{count} {error}")));
    parts.join(", ")
}

/// Step 2.
///
/// # Errors
/// When something could not be done; what is not as told goes to the teller.
pub fn truth(tell: &mut Teller, lab: &Lab) -> Result<()> {
    tell.step(2, "Both ends see the truth");
    let web = vip(lab, "shop/web", 80)?;
    let client = lab.pod("client")?.v4.to_string();
    let mut lines = lab.access_log("web-v1")?;
    lines.extend(lab.access_log("web-v2")?);
    let true_lines = lines.iter().filter(|line| line.starts_with(&format!("{client} "))).count();
    tell.saw(
        !lines.is_empty() && true_lines == lines.len(),
        &format!(
            "web's access logs: {true_lines} of {} lines show the client's address {client}",
            lines.len()
        ),
    );
    let answer = http(lab, "client", &web, &["--path", "/truth"])?;
    let (peer, local) =
        (answer["peer"].as_str().unwrap_or_default(), answer["local"].as_str().unwrap_or_default());
    tell.saw(
        peer == web && local.starts_with(&client),
        &format!("the client's socket: peer {peer} (the Service), own address {local}"),
    );
    let flow = flow(lab, |flow| flow["tls"]["mode"] == "mutual" && flow["http"]["status"] == 200)?;
    let (source, destination) = (text(&flow, "/source/identity"), text(&flow, "/destination/identity"));
    tell.saw(
        source == "spiffe://cluster.local/ns/shop/sa/client"
            && destination == "spiffe://cluster.local/ns/shop/sa/web",
        &format!("identities: {source} -> {destination}"),
    );
    let (exchange, cipher) = (text(&flow, "/tls/key_exchange"), text(&flow, "/tls/cipher"));
    tell.saw(
        exchange == "X25519MLKEM768" && cipher.starts_with("TLS13_"),
        &format!("TLS 1.3, {exchange}, {cipher}"),
    );
    Ok(())
}

/// Text at a pointer.
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The newest flow that fits, as soon as it is there.
pub fn flow(lab: &Lab, fits: impl Fn(&Value) -> bool) -> Result<Value> {
    let (flow, _) = wait::until(Duration::from_secs(5), "a flow record", || {
        let flows = observe::flows(lab, &["--last", "200"])?;
        flows.into_iter().rev().find(&fits).context("none that fits yet")
    })?;
    Ok(flow)
}

/// Step 6.
///
/// # Errors
/// When something could not be done; what is not as told goes to the teller.
pub fn signals(tell: &mut Teller, lab: &Lab, seen: &mut Seen) -> Result<()> {
    tell.step(6, "Golden signals");
    let web = vip(lab, "shop/web", 80)?;
    let meshed = http(lab, "client", &web, &["--count", "200"])?;
    let page = lab.node("node-a")?.admin("/metrics")?;
    let samples = metrics::parse(&page);
    let pair = [
        ("reporter", "source"),
        ("source_namespace", "shop"),
        ("source_workload", "client"),
        ("destination_identity", "spiffe://cluster.local/ns/shop/sa/web"),
    ];
    let with = |extra: &[(&'static str, &'static str)]| [&pair[..], extra].concat();
    let total = metrics::sum(&samples, "weft_requests_total", &with(&[]));
    let good = metrics::sum(&samples, "weft_requests_total", &with(&[("response_code", "200")]));
    let count = metrics::sum(&samples, "weft_request_duration_seconds_count", &with(&[]));
    let time = metrics::sum(&samples, "weft_request_duration_seconds_sum", &with(&[]));
    let opened = metrics::sum(&samples, "weft_connections_opened_total", &with(&[]));
    tell.saw(
        total >= 1200.0 && good > 0.0 && good < total && count > 0.0,
        &format!(
            "client -> web, from node-a's /metrics: {total} requests, {good} of them 200 ({:.1} %), mean {:.2} ms, {opened} connections",
            good / total * 100.0,
            time / count * 1e3
        ),
    );
    let mut latency = latencies(&meshed);
    let line = |values: &mut Vec<Duration>| {
        format!("p50 {}, p99 {}", ms(stats::quantile(values, 0.5)), ms(stats::quantile(values, 0.99)))
    };
    tell.saw(
        latency.len() == 200 && seen.direct.len() == 200,
        &format!(
            "200 calls each, a connection per call: direct {}; meshed {}",
            line(&mut seen.direct),
            line(&mut latency)
        ),
    );
    Ok(())
}
