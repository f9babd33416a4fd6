//! The access log: complete flows as lines on standard output.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use prometheus_client::metrics::counter::Counter;
use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
};
use weft_core::{
    SpiffeId,
    config::AccessLog as Level,
    flow::{FlowRecord, Peer, Reporter, Tls, Verdict},
};
use weft_runtime::{DrainWatcher, Tasks};

use super::{
    convert::{reason_name, reporter_name},
    store::StoredFlow,
};

/// Flows that wait for standard output.
const QUEUE: usize = 4096;
/// Flows that are written at once.
const BATCH: usize = 256;
/// Longest field that a peer chooses, in characters.
const MAX_FIELD: usize = 2048;

/// How a flow becomes a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// As `weft observe -o compact` shows it, with the whole time.
    Text,
    /// One JSON object with the keys of `weft observe -o json`.
    Json {
        /// This node's name.
        node: Arc<str>,
    },
}

/// The way into the log. It never waits: what finds the queue full is dropped and counted.
pub struct AccessLog {
    queue: mpsc::Sender<Arc<StoredFlow>>,
    dropped: Counter,
}

impl AccessLog {
    /// Starts to write lines to `to`, until `drain` is complete.
    pub fn start<W>(format: Format, to: W, dropped: Counter, tasks: &Tasks, drain: DrainWatcher) -> Self
    where
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let (queue, flows) = mpsc::channel(QUEUE);
        tasks.spawn("access-log", async move {
            if let Err(error) = write(flows, format, to, drain).await {
                tracing::error!(%error, "the access log ends: standard output cannot be written to");
            }
        });
        Self { queue, dropped }
    }

    /// Logs the flow where `level` asks for it. A connection through the proxy is logged at its end, not at its
    /// opening.
    pub fn offer(&self, flow: &Arc<StoredFlow>, level: Level) {
        if wanted(flow, level) && self.queue.try_send(Arc::clone(flow)).is_err() {
            self.dropped.inc();
        }
    }
}

fn wanted(flow: &StoredFlow, level: Level) -> bool {
    let record = &flow.record;
    let failed = matches!(record.verdict, Verdict::Denied | Verdict::Error);
    let proxied = matches!(record.reporter, Reporter::ProxySource | Reporter::ProxyDestination);
    match level {
        Level::Off => false,
        Level::Errors => failed,
        Level::All => failed || !(record.opening && proxied),
    }
}

async fn write<W: AsyncWrite + Unpin>(
    mut flows: mpsc::Receiver<Arc<StoredFlow>>,
    format: Format,
    mut to: W,
    drain: DrainWatcher,
) -> std::io::Result<()> {
    let mut batch = Vec::with_capacity(BATCH);
    let mut lines = String::new();
    let mut drained = std::pin::pin!(drain.drained());
    let mut ending = false;
    loop {
        tokio::select! {
            taken = flows.recv_many(&mut batch, BATCH) => {
                if taken == 0 {
                    return Ok(());
                }
            }
            () = &mut drained, if !ending => {
                // What is in the queue is still written.
                ending = true;
                flows.close();
            }
        }
        for flow in batch.drain(..) {
            line(&flow, &format, &mut lines);
        }
        to.write_all(lines.as_bytes()).await?;
        to.flush().await?;
        lines.clear();
    }
}

/// Appends the flow's line.
fn line(flow: &StoredFlow, format: &Format, out: &mut String) {
    match format {
        Format::Text => text(flow, out),
        Format::Json { node } => {
            // Writing to a String cannot fail.
            let _ = write!(out, "{}", object(flow, node));
        }
    }
    out.push('\n');
}

fn text(flow: &StoredFlow, out: &mut String) {
    let record = &flow.record;
    let mut parts = vec![
        time(record.time),
        side(&record.source, false),
        "->".into(),
        match (&record.destination.pod, &record.service) {
            // Nobody chose an endpoint, or each request has its own.
            (None, Some((service, port))) => format!("{service}:{port} (service)"),
            _ => side(&record.destination, true),
        },
        verdict(flow).into(),
        reason_name(record.reason).into(),
    ];
    parts.extend(record.policy.as_ref().map(|p| format!("by {p}")));
    parts.push(match &record.tls {
        Tls::Mutual { key_exchange, .. } => format!("mtls({key_exchange})"),
        Tls::Local => "tls=local".into(),
        Tls::None => "plaintext".into(),
    });
    parts.push(what(record));
    parts.push(format!("[{}]", reporter_name(record.reporter)));
    parts.retain(|p| !p.is_empty());
    out.push_str(&parts.join(" "));
}

/// The request, or what there is to say of the connection.
fn what(record: &FlowRecord) -> String {
    let took = latency(record.duration);
    let protocol = protocol_name(record.protocol);
    match &record.http {
        Some(http) => {
            let status = if http.status == 0 { "-".into() } else { http.status.to_string() };
            if http.method.is_empty() {
                // It broke before there was a request that could be read.
                return format!("{} no request {status} {took}", http.protocol);
            }
            let rest = http.url.split_once("://").map_or(http.url.as_str(), |(_, rest)| rest);
            let path = rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/");
            format!("{} {} {status} {took}", clean(&http.method), clean(path))
        }
        None if record.sent + record.received > 0 => {
            format!("{protocol} {}B out {}B in {took}", record.sent, record.received)
        }
        None if !record.opening => format!("{protocol} closed {took}"),
        None => protocol.into(),
    }
}

fn protocol_name(number: u8) -> &'static str {
    match number {
        1 => "icmpv4",
        6 => "tcp",
        17 => "udp",
        58 => "icmpv6",
        132 => "sctp",
        _ => "ip",
    }
}

/// `namespace/workload[:port] (namespace/account)`, or the address.
fn side(peer: &Peer, port: bool) -> String {
    let address = SocketAddr::new(peer.address.ip().to_canonical(), peer.address.port());
    let named = match (&peer.owner, &peer.pod) {
        // A node is of no namespace.
        (_, Some(pod)) if pod.namespace.is_empty() => Some(format!("node/{}", pod.name)),
        (Some(owner), Some(pod)) if !owner.name.is_empty() => {
            Some(format!("{}/{}", pod.namespace, owner.name))
        }
        (_, Some(pod)) => Some(format!("{}/{}", pod.namespace, pod.name)),
        _ => None,
    };
    let mut side = match named {
        Some(name) if port && address.port() != 0 => format!("{name}:{}", address.port()),
        Some(name) => name,
        None if port && address.port() != 0 => address.to_string(),
        None => address.ip().to_string(),
    };
    if let Some(id) = &peer.identity {
        let _ = write!(side, " ({})", short(id));
    }
    clean(&side)
}

fn short(id: &SpiffeId) -> String {
    id.as_service_account()
        .map_or_else(|| id.to_string(), |(namespace, account)| format!("{namespace}/{account}"))
}

fn object(flow: &StoredFlow, node: &str) -> Value {
    let record = &flow.record;
    let mut object = json!({
        "time": time(record.time),
        "node": node,
        "reporter": reporter_name(record.reporter),
        "verdict": verdict(flow),
        "source": peer(&record.source),
        "destination": peer(&record.destination),
        "protocol": protocol_name(record.protocol),
        "tls": match &record.tls {
            Tls::None => json!({ "mode": "none" }),
            Tls::Local => json!({ "mode": "local" }),
            Tls::Mutual { key_exchange, cipher } =>
                json!({ "mode": "mutual", "key_exchange": &**key_exchange, "cipher": &**cipher }),
        },
        "duration_ms": record.duration.as_secs_f64() * 1e3,
        "sent_bytes": record.sent,
        "received_bytes": record.received,
        "connection": record.connection,
    });
    let mut add = |key: &str, value: Option<Value>| {
        if let (Some(object), Some(value)) = (object.as_object_mut(), value) {
            object.insert(key.into(), value);
        }
    };
    let reason = reason_name(record.reason);
    add("reason", (!reason.is_empty()).then(|| reason.into()));
    add("policy", record.policy.as_ref().map(|p| p.to_string().into()));
    add("service", record.service.as_ref().map(|(s, port)| format!("{s}:{port}").into()));
    add(
        "http",
        record.http.as_ref().map(|http| {
            json!({
                "method": cut(&http.method),
                "url": cut(&http.url),
                "protocol": http.protocol,
                "status": http.status,
                "headers": http.headers.iter().map(|(k, v)| (cut(k), cut(v))).collect::<Vec<_>>(),
            })
        }),
    );
    object
}

fn peer(peer: &Peer) -> Value {
    let mut object = Map::new();
    if let Some(pod) = &peer.pod {
        object.insert("namespace".into(), pod.namespace.as_ref().into());
        object.insert("pod".into(), pod.name.as_ref().into());
    }
    if let Some(owner) = &peer.owner {
        object.insert("workload".into(), owner.name.as_ref().into());
        object.insert("workload_kind".into(), owner.kind.as_ref().into());
    }
    if let Some(id) = &peer.identity {
        object.insert("identity".into(), id.to_string().into());
    }
    object.insert("subject".into(), peer.subject.0.into());
    object.insert("address".into(), peer.address.ip().to_canonical().to_string().into());
    object.insert("port".into(), peer.address.port().into());
    object.into()
}

fn verdict(flow: &StoredFlow) -> &'static str {
    match flow.record.verdict {
        Verdict::Forwarded if flow.redirected => "REDIRECTED",
        Verdict::Forwarded => "FORWARDED",
        Verdict::Denied => "DENIED",
        Verdict::Error => "ERROR",
        Verdict::Audited => "AUDITED",
    }
}

/// RFC 3339, UTC.
fn time(at: SystemTime) -> String {
    OffsetDateTime::from(at).format(&Rfc3339).unwrap_or_default()
}

fn latency(length: Duration) -> String {
    let ms = length.as_secs_f64() * 1e3;
    match length.as_micros() {
        us @ 0..1_000 => format!("{us}us"),
        1_000..1_000_000 => format!("{ms:.2}ms"),
        _ => format!("{:.2}s", length.as_secs_f64()),
    }
}

fn cut(text: &str) -> &str {
    text.char_indices().nth(MAX_FIELD).map_or(text, |(at, _)| text.get(..at).unwrap_or_default())
}

/// What a peer sent, without the power to end the line or to steer a terminal.
fn clean(text: &str) -> String {
    let steers = |c: char| {
        c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c) || ('\u{2066}'..='\u{2069}').contains(&c)
    };
    cut(text).chars().fold(String::new(), |mut clean, c| {
        if steers(c) {
            clean.extend(c.escape_unicode());
        } else {
            clean.push(c);
        }
        clean
    })
}

#[cfg(test)]
mod tests;
