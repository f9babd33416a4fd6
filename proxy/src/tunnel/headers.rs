//! The headers of a CONNECT: `forwarded` (RFC 7239), `baggage` and `traceparent` (W3C), and `weft-connection`, which
//! joins the flow records of both nodes. None of them feeds a decision but `forwarded`, which must be true.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderValue};
use rand::Rng;

/// Longest header value read, in bytes.
const MAX_VALUE: usize = 2048;

/// A CONNECT, as the source's proxy sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    /// The Pod's address and port that are wanted.
    pub authority: SocketAddr,
    /// What the source says of itself.
    pub source: SourceInfo,
}

/// What the source's proxy says of the source. For records only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceInfo {
    /// The socket cookie of the application's socket.
    pub connection: u64,
    /// The port of the application's socket.
    pub port: u16,
    /// The node.
    pub node: String,
    /// Namespace of the Pod.
    pub namespace: String,
    /// The kind of the Pod's owner, e.g. `Deployment`.
    pub owner_kind: String,
    /// The name of the Pod's owner.
    pub owner: String,
    /// The Pod.
    pub pod: String,
}

impl SourceInfo {
    pub(super) fn write(&self, client: IpAddr, headers: &mut HeaderMap) {
        let mut put = |name: &'static str, value: String| {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        };
        put("forwarded", forwarded(client));
        let mut baggage = vec![("k8s.namespace.name", &self.namespace), ("k8s.pod.name", &self.pod)];
        let kind = format!("k8s.{}.name", self.owner_kind.to_ascii_lowercase());
        baggage.push((&kind, &self.owner));
        let baggage: Vec<_> = baggage.iter().map(|(k, v)| format!("{k}={}", escape(v))).collect();
        put("baggage", baggage.join(","));
        let (trace, span): (u128, u64) =
            (rand::rng().random_range(1..=u128::MAX), rand::rng().random_range(1..=u64::MAX));
        put("traceparent", format!("00-{trace:032x}-{span:016x}-00"));
        put(
            "weft-connection",
            format!("{:016x};port={};node={}", self.connection, self.port, escape(&self.node)),
        );
    }

    /// Reads what a peer sent; what is missing or malformed stays empty.
    pub(super) fn read(headers: &HeaderMap) -> Self {
        let mut info = Self::default();
        let mut parts = text(headers, "weft-connection").unwrap_or_default().split(';');
        info.connection = parts.next().and_then(|id| u64::from_str_radix(id, 16).ok()).unwrap_or_default();
        for (name, value) in parts.filter_map(|p| p.split_once('=')) {
            match name {
                "port" => info.port = value.parse().unwrap_or_default(),
                "node" => info.node = label(value),
                _ => {}
            }
        }
        for (name, value) in
            text(headers, "baggage").unwrap_or_default().split(',').filter_map(|p| p.split_once('='))
        {
            match name.trim() {
                "k8s.namespace.name" => info.namespace = label(value),
                "k8s.pod.name" => info.pod = label(value),
                name => {
                    if let Some(kind) = name.strip_prefix("k8s.").and_then(|n| n.strip_suffix(".name")) {
                        info.owner_kind = label(kind);
                        info.owner = label(value);
                    }
                }
            }
        }
        info
    }
}

/// The one client that `forwarded` names; `None` where the header is missing, repeated or not of that form.
pub(super) fn forwarded_for(headers: &HeaderMap) -> Option<IpAddr> {
    let mut values = headers.get_all("forwarded").iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let value = value.to_str().ok()?.trim();
    if value.len() > MAX_VALUE || value.contains(',') {
        return None;
    }
    let mut clients = value.split(';').filter_map(|pair| {
        let (name, node) = pair.split_once('=')?;
        name.trim().eq_ignore_ascii_case("for").then(|| node.trim().trim_matches('"'))
    });
    let (Some(node), None) = (clients.next(), clients.next()) else { return None };
    let address = node
        .parse::<IpAddr>()
        .or_else(|_| node.parse::<SocketAddr>().map(|a| a.ip()))
        .or_else(|_| node.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>());
    address.ok().map(|a| a.to_canonical())
}

/// Reads both headers of a CONNECT that a peer sent, for the fuzzer.
#[cfg(feature = "fuzzing")]
pub fn fuzz(headers: &HeaderMap) -> (SourceInfo, Option<IpAddr>) {
    (SourceInfo::read(headers), forwarded_for(headers))
}

fn forwarded(client: IpAddr) -> String {
    match client.to_canonical() {
        IpAddr::V4(client) => format!("for={client}"),
        IpAddr::V6(client) => format!("for=\"[{client}]\""),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().filter(|v| v.len() <= MAX_VALUE)
}

/// Keeps what Kubernetes names consist of.
fn escape(value: &str) -> String {
    value.chars().filter(|c| c.is_ascii_alphanumeric() || "-._:/".contains(*c)).collect()
}

fn label(value: &str) -> String {
    escape(value.trim()).chars().take(253).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> SourceInfo {
        SourceInfo {
            connection: 0xabc,
            port: 4711,
            node: "node-a".into(),
            namespace: "shop".into(),
            owner_kind: "deployment".into(),
            owner: "web".into(),
            pod: "web-1".into(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for client in ["10.1.2.3", "fd00::1"] {
            let client: IpAddr = client.parse().expect("an address");
            let mut headers = HeaderMap::new();
            info().write(client, &mut headers);
            assert_eq!(SourceInfo::read(&headers), info());
            assert_eq!(forwarded_for(&headers), Some(client));
            assert!(headers.contains_key("traceparent"));
        }
    }

    #[test]
    fn forwarded_that_is_not_one_client_is_refused() {
        for (value, expected) in [
            ("for=10.0.0.1", Some("10.0.0.1")),
            ("For=\"10.0.0.1:80\";proto=https", Some("10.0.0.1")),
            ("for=\"[fd00::2]:80\"", Some("fd00::2")),
            ("for=::ffff:10.0.0.1", Some("10.0.0.1")),
            ("for=10.0.0.1, for=10.0.0.2", None),
            ("for=10.0.0.1;for=10.0.0.2", None),
            ("for=_hidden", None),
            ("by=10.0.0.1", None),
            ("", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("forwarded", HeaderValue::from_static(value));
            assert_eq!(forwarded_for(&headers).map(|a| a.to_string()).as_deref(), expected, "{value}");
        }
        let mut twice = HeaderMap::new();
        twice.append("forwarded", HeaderValue::from_static("for=10.0.0.1"));
        twice.append("forwarded", HeaderValue::from_static("for=10.0.0.1"));
        assert_eq!(forwarded_for(&twice), None);
        assert_eq!(forwarded_for(&HeaderMap::new()), None);
    }

    #[test]
    fn hostile_values_are_cut() {
        let mut headers = HeaderMap::new();
        headers.insert("baggage", HeaderValue::from_static("k8s.namespace.name=a b c{}\",k8s.x.name"));
        headers.insert("weft-connection", HeaderValue::from_static("zz;port=99999999;node=<n>"));
        let info = SourceInfo::read(&headers);
        assert_eq!(info.namespace, "abc");
        assert_eq!((info.connection, info.port, info.node.as_str()), (0, 0, "n"));
    }
}
