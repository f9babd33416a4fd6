//! One flow as a line, a table row or JSON.

use std::time::{Duration, SystemTime};

use prost::Message as _;
use serde::Serialize;
use weft_proto::{
    flow::{self, layer4::Protocol, layer7::Record},
    weft_flow,
};

use crate::{
    text::{self, Colour, clean},
    when,
};

/// A flow in the terms of this command.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct View {
    #[serde(skip)]
    pub(crate) at: SystemTime,
    pub(crate) time: String,
    pub(crate) node: String,
    pub(crate) reporter: String,
    pub(crate) verdict: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) reason: String,
    pub(crate) source: Side,
    pub(crate) destination: Side,
    pub(crate) protocol: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) service: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) policy: String,
    pub(crate) tls: TlsView,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) http: Option<HttpView>,
    pub(crate) duration_ms: f64,
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    pub(crate) opening: bool,
    pub(crate) connection: u64,
    pub(crate) uuid: String,
    #[serde(skip)]
    pub(crate) duration: Duration,
}

/// One end.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub(crate) struct Side {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) namespace: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) pod: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) workload: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) workload_kind: String,
    /// SPIFFE id, where proven.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) identity: String,
    pub(crate) subject: u32,
    pub(crate) address: String,
    pub(crate) port: u32,
    #[serde(skip)]
    pub(crate) reserved: &'static str,
}

/// How it was protected.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub(crate) struct TlsView {
    pub(crate) mode: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) key_exchange: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) cipher: String,
}

/// The HTTP part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct HttpView {
    pub(crate) method: String,
    pub(crate) url: String,
    pub(crate) protocol: String,
    pub(crate) status: u32,
    pub(crate) headers: Vec<(String, String)>,
}

impl View {
    /// Reads a flow of an agent, or of another server of Hubble's API (then without Weft's part).
    pub(crate) fn of(f: &flow::Flow) -> Self {
        let extension = f
            .extensions
            .as_ref()
            .filter(|any| any.type_url == weft_flow::TYPE_URL)
            .and_then(|any| weft_flow::Flow::decode(any.value.as_slice()).ok())
            .unwrap_or_default();
        let at = f.time.and_then(|t| SystemTime::try_from(t).ok()).unwrap_or(SystemTime::UNIX_EPOCH);
        let ip = f.ip.clone().unwrap_or_default();
        let (protocol, source_port, destination_port) =
            match f.l4.as_ref().and_then(|l4| l4.protocol.as_ref()) {
                Some(Protocol::Tcp(p)) => ("tcp", p.source_port, p.destination_port),
                Some(Protocol::Udp(p)) => ("udp", p.source_port, p.destination_port),
                Some(Protocol::Sctp(p)) => ("sctp", p.source_port, p.destination_port),
                Some(Protocol::IcmPv4(_)) => ("icmpv4", 0, 0),
                Some(Protocol::IcmPv6(_)) => ("icmpv6", 0, 0),
                None => ("ip", 0, 0),
            };
        let http = f.l7.as_ref().and_then(|l7| l7.record.as_ref()).map(|Record::Http(h)| HttpView {
            method: h.method.clone(),
            url: h.url.clone(),
            protocol: h.protocol.clone(),
            status: h.code,
            headers: h.headers.iter().map(|h| (h.key.clone(), h.value.clone())).collect(),
        });
        let named =
            |policies: &[flow::Policy]| policies.first().map(|p| format!("{}/{}", p.namespace, p.name));
        let policy = named(&f.ingress_denied_by)
            .or_else(|| named(&f.egress_denied_by))
            .or_else(|| named(&f.ingress_allowed_by))
            .or_else(|| named(&f.egress_allowed_by));
        let duration = Duration::from_nanos(extension.duration_ns);
        let tls = extension.tls.unwrap_or_default();
        Self {
            at,
            time: when::full(at),
            node: f.node_name.clone(),
            reporter: extension.reporter,
            verdict: match f.verdict() {
                flow::Verdict::Forwarded => "FORWARDED",
                flow::Verdict::Dropped => "DENIED",
                flow::Verdict::Error => "ERROR",
                flow::Verdict::Audit => "AUDITED",
                flow::Verdict::Redirected => "REDIRECTED",
                _ => "UNKNOWN",
            },
            reason: extension.reason,
            source: side(f.source.as_ref(), ip.source, source_port, extension.source_identity),
            destination: side(
                f.destination.as_ref(),
                ip.destination,
                destination_port,
                extension.destination_identity,
            ),
            protocol,
            service: extension.service,
            policy: policy.unwrap_or_default(),
            tls: TlsView {
                mode: match tls.mode() {
                    weft_flow::tls::Mode::None => "none",
                    weft_flow::tls::Mode::Local => "local",
                    weft_flow::tls::Mode::Mutual => "mutual",
                },
                key_exchange: tls.key_exchange,
                cipher: tls.cipher,
            },
            http,
            duration_ms: duration.as_secs_f64() * 1e3,
            sent_bytes: extension.sent_bytes,
            received_bytes: extension.received_bytes,
            opening: extension.opening,
            connection: extension.connection,
            uuid: f.uuid.clone(),
            duration,
        }
    }

    /// The line of `-o compact`.
    pub(crate) fn compact(&self, colour: bool) -> String {
        let mut parts = vec![
            text::paint(colour, Colour::Dim, &when::clock(self.at)),
            self.source.with_identity(false),
            "->".into(),
            self.server(),
            self.painted_verdict(colour),
        ];
        if !self.reason.is_empty() {
            parts.push(self.reason.clone());
        }
        if !self.policy.is_empty() {
            parts.push(format!("by {}", self.policy));
        }
        parts.push(self.tls_short());
        parts.push(self.what());
        if !self.reporter.is_empty() {
            parts.push(text::paint(colour, Colour::Dim, &format!("[{}]", self.reporter)));
        }
        let line: Vec<_> = parts.into_iter().filter(|p| !p.is_empty()).collect();
        line.join(" ")
    }

    /// The columns of `-o table`.
    pub(crate) fn row(&self) -> Vec<String> {
        vec![
            when::clock(self.at),
            self.source.with_identity(false),
            self.server(),
            self.verdict.into(),
            self.reason.clone(),
            self.policy.clone(),
            self.tls_short(),
            self.what(),
            self.reporter.clone(),
        ]
    }

    /// The names of [`View::row`]'s columns.
    pub(crate) const HEADER: [&'static str; 9] =
        ["TIME", "SOURCE", "DESTINATION", "VERDICT", "REASON", "POLICY", "TLS", "SUMMARY", "REPORTER"];

    fn painted_verdict(&self, colour: bool) -> String {
        let shade = match self.verdict {
            "FORWARDED" => Colour::Good,
            "DENIED" | "ERROR" => Colour::Bad,
            _ => Colour::Warn,
        };
        text::paint(colour, shade, self.verdict)
    }

    fn tls_short(&self) -> String {
        match self.tls.mode {
            "mutual" => format!("mtls({})", clean(&self.tls.key_exchange)),
            "local" => "tls=local".into(),
            // Each request went its own way, and has its own record.
            _ if self.to_service() => String::new(),
            _ => "plaintext".into(),
        }
    }

    /// Whether a Service was dialled and no endpoint chosen for the connection as a whole.
    pub(crate) fn to_service(&self) -> bool {
        self.destination.pod.is_empty() && !self.service.is_empty()
    }

    /// The server's side: the endpoint, or the Service where none was chosen.
    fn server(&self) -> String {
        if self.to_service() {
            format!("{} (service)", clean(&self.service))
        } else {
            self.destination.with_identity(true)
        }
    }

    /// The request, or what there is to say of the connection.
    fn what(&self) -> String {
        let latency = when::latency(self.duration);
        match &self.http {
            // It broke before there was a request that could be read.
            Some(h) if h.method.is_empty() => {
                let status = if h.status == 0 { String::new() } else { format!(" {}", h.status) };
                format!("{} no request{status} {latency}", clean(&h.protocol))
            }
            Some(h) => {
                let path = h
                    .url
                    .split_once("://")
                    .map_or(h.url.as_str(), |(_, rest)| rest.find('/').map_or("/", |at| &rest[at..]));
                let status = if h.status == 0 { "-".into() } else { h.status.to_string() };
                format!("{} {} {status} {latency}", clean(&h.method), clean(path))
            }
            None if self.opening => format!("{} open", self.protocol),
            None if self.sent_bytes + self.received_bytes > 0 => {
                format!("{} {}B out {}B in {latency}", self.protocol, self.sent_bytes, self.received_bytes)
            }
            None if self.protocol == "tcp" && self.connection != 0 && self.ended() => {
                format!("tcp closed {latency}")
            }
            None => self.protocol.into(),
        }
    }

    fn ended(&self) -> bool {
        !self.opening && matches!(self.verdict, "FORWARDED" | "AUDITED")
    }
}

impl Side {
    /// `namespace/workload[:port] (identity)`, or the address.
    fn with_identity(&self, port: bool) -> String {
        let mut name = match (self.workload.is_empty(), self.pod.is_empty()) {
            // A node is of no namespace.
            (false, _) if self.namespace.is_empty() => format!("node/{}", self.workload),
            (false, _) => format!("{}/{}", self.namespace, self.workload),
            (_, false) => format!("{}/{}", self.namespace, self.pod),
            _ if self.address.contains(':') && port => format!("[{}]", self.address),
            _ => self.address.clone(),
        };
        if port && self.port != 0 {
            name = format!("{name}:{}", self.port);
        }
        let who = short(&self.identity).unwrap_or_else(|| self.reserved.into());
        let name = clean(&name).into_owned();
        if who.is_empty() { name } else { format!("{name} ({})", clean(&who)) }
    }
}

fn side(e: Option<&flow::Endpoint>, address: String, port: u32, identity: String) -> Side {
    let e = e.cloned().unwrap_or_default();
    let workload = e.workloads.into_iter().next().unwrap_or_default();
    Side {
        namespace: e.namespace,
        pod: e.pod_name,
        workload: workload.name,
        workload_kind: workload.kind,
        identity,
        subject: e.identity,
        address,
        port,
        reserved: match e.identity {
            1 => "host",
            2 => "world",
            _ => "",
        },
    }
}

/// `spiffe://<domain>/ns/<namespace>/sa/<account>` as `<namespace>/<account>`; another id whole.
fn short(identity: &str) -> Option<String> {
    if identity.is_empty() {
        return None;
    }
    let parsed: Option<weft_core::SpiffeId> = identity.parse().ok();
    let account = parsed.as_ref().and_then(|id| id.as_service_account());
    Some(account.map_or_else(|| identity.to_owned(), |(namespace, name)| format!("{namespace}/{name}")))
}

#[cfg(test)]
pub(crate) mod tests;
