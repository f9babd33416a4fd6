//! Hubble's flow filters: OR inside a field, AND across fields, OR across filters; whitelist minus blacklist.

use std::net::IpAddr;

use regex::{Regex, RegexBuilder};
use weft_core::policy::Cidr;
use weft_proto::flow::{self, FlowFilter};

use super::selector::Selector;

/// Most filters in one list, and most values in one field: a request is read in full before it is judged.
const MAX_FILTERS: usize = 64;
/// Longest regular expression, in bytes of its compiled form.
const MAX_REGEX: usize = 1 << 20;

/// A filter that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bad flow filter: {0}")]
pub struct InvalidFilter(pub String);

type Test = Box<dyn Fn(&flow::Flow) -> bool + Send + Sync>;

/// One compiled filter.
struct Filter(Vec<Test>);

/// A whitelist and a blacklist, compiled.
pub struct Filters {
    allow: Vec<Filter>,
    deny: Vec<Filter>,
}

impl std::fmt::Debug for Filters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filters({} allow, {} deny)", self.allow.len(), self.deny.len())
    }
}

impl Filters {
    /// Compiles the two lists.
    ///
    /// # Errors
    /// When a value cannot be read or there are more than 64 filters or values.
    pub fn new(whitelist: &[FlowFilter], blacklist: &[FlowFilter]) -> Result<Self, InvalidFilter> {
        if whitelist.len() > MAX_FILTERS || blacklist.len() > MAX_FILTERS {
            return Err(InvalidFilter(format!("more than {MAX_FILTERS} filters in a list")));
        }
        let compile = |list: &[FlowFilter]| list.iter().map(Filter::new).collect::<Result<Vec<_>, _>>();
        Ok(Self { allow: compile(whitelist)?, deny: compile(blacklist)? })
    }

    /// Whether a flow is asked for.
    pub fn matches(&self, message: &flow::Flow) -> bool {
        (self.allow.is_empty() || self.allow.iter().any(|f| f.matches(message)))
            && !self.deny.iter().any(|f| f.matches(message))
    }
}

impl Filter {
    fn new(f: &FlowFilter) -> Result<Self, InvalidFilter> {
        let mut all = Tests(Vec::new());
        all.endpoints(f)?;
        all.any(&f.verdict, |v| Ok(*v), |v, m| *v == m.verdict)?;
        all.any(&f.traffic_direction, |v| Ok(*v), |v, m| *v == m.traffic_direction)?;
        all.any(&f.drop_reason_desc, |v| Ok(*v), |v, m| *v == m.drop_reason_desc)?;
        all.any(&f.reply, |v| Ok(*v), |v, m| m.is_reply == Some(*v))?;
        all.any(&f.uuid, |v| Ok(v.clone()), |v, m| *v == m.uuid)?;
        all.any(&f.encrypted, |v| Ok(*v), |v, m| m.ip.as_ref().is_some_and(|ip| ip.encrypted == *v))?;
        all.any(&f.ip_version, |v| Ok(*v), |v, m| m.ip.as_ref().is_some_and(|ip| ip.ip_version == *v))?;
        all.any(&f.node_name, |v| glob(v), |v, m| v.is_match(&m.node_name))?;
        all.any(
            &f.event_type,
            |v| Ok(*v),
            |v, m| {
                m.event_type
                    .as_ref()
                    .is_some_and(|e| e.r#type == v.r#type && (!v.match_sub_type || e.sub_type == v.sub_type))
            },
        )?;
        all.any(
            &f.trace_id,
            |v| Ok(v.clone()),
            |v, m| {
                let parent = m.trace_context.as_ref().and_then(|t| t.parent.as_ref());
                parent.is_some_and(|p| p.trace_id == *v)
            },
        )?;
        all.any(&f.tcp_flags, |v| Ok(*v), |v, m| tcp_flags(m).is_some_and(|have| flags_within(v, have)))?;
        all.any(&f.protocol, |v| protocol(v), |v, m| v(m))?;
        all.any(&f.source_port, |v| port(v), |v, m| ports(m).is_some_and(|p| p.0 == *v))?;
        all.any(&f.destination_port, |v| port(v), |v, m| ports(m).is_some_and(|p| p.1 == *v))?;
        all.http(f)?;
        // Weft records no DNS: a filter for it matches nothing.
        all.any(&f.dns_query, |v| Ok(v.clone()), |_, _| false)?;
        Ok(Self(all.0))
    }

    fn matches(&self, message: &flow::Flow) -> bool {
        self.0.iter().all(|test| test(message))
    }
}

struct Tests(Vec<Test>);

impl Tests {
    /// Adds a field: any of its values, each compiled once.
    fn any<V, C: Send + Sync + 'static>(
        &mut self,
        values: &[V],
        compile: impl Fn(&V) -> Result<C, InvalidFilter>,
        test: impl Fn(&C, &flow::Flow) -> bool + Send + Sync + 'static,
    ) -> Result<(), InvalidFilter> {
        if values.is_empty() {
            return Ok(());
        }
        if values.len() > MAX_FILTERS {
            return Err(InvalidFilter(format!("more than {MAX_FILTERS} values in a field")));
        }
        let values = values.iter().map(compile).collect::<Result<Vec<_>, _>>()?;
        self.0.push(Box::new(move |m| values.iter().any(|v| test(v, m))));
        Ok(())
    }

    fn endpoints(&mut self, f: &FlowFilter) -> Result<(), InvalidFilter> {
        fn source(m: &flow::Flow) -> Option<&flow::Endpoint> {
            m.source.as_ref()
        }
        fn destination(m: &flow::Flow) -> Option<&flow::Endpoint> {
            m.destination.as_ref()
        }
        self.any(
            &f.source_ip,
            |v| address(v),
            |v, m| m.ip.as_ref().is_some_and(|ip| within(*v, &ip.source)),
        )?;
        self.any(
            &f.destination_ip,
            |v| address(v),
            |v, m| m.ip.as_ref().is_some_and(|ip| within(*v, &ip.destination)),
        )?;
        self.any(&f.source_fqdn, |v| glob(v), |v, m| m.source_names.iter().any(|n| v.is_match(n)))?;
        self.any(&f.destination_fqdn, |v| glob(v), |v, m| m.destination_names.iter().any(|n| v.is_match(n)))?;
        self.any(
            &f.source_service,
            |v| name(v),
            |v, m| m.source_service.as_ref().is_some_and(|s| v.service(s)),
        )?;
        self.any(
            &f.destination_service,
            |v| name(v),
            |v, m| m.destination_service.as_ref().is_some_and(|s| v.service(s)),
        )?;
        let end = source;
        self.any(&f.source_pod, |v| name(v), move |v, m| end(m).is_some_and(|e| v.pod(e)))?;
        self.any(&f.source_label, |v| selector(v), move |v, m| end(m).is_some_and(|e| v.matches(&e.labels)))?;
        self.any(&f.source_identity, |v| Ok(*v), move |v, m| end(m).is_some_and(|e| e.identity == *v))?;
        self.any(&f.source_workload, |v| Ok(v.clone()), move |v, m| end(m).is_some_and(|e| workload(v, e)))?;
        let end = destination;
        self.any(&f.destination_pod, |v| name(v), move |v, m| end(m).is_some_and(|e| v.pod(e)))?;
        self.any(
            &f.destination_label,
            |v| selector(v),
            move |v, m| end(m).is_some_and(|e| v.matches(&e.labels)),
        )?;
        self.any(&f.destination_identity, |v| Ok(*v), move |v, m| end(m).is_some_and(|e| e.identity == *v))?;
        self.any(
            &f.destination_workload,
            |v| Ok(v.clone()),
            move |v, m| end(m).is_some_and(|e| workload(v, e)),
        )
    }

    fn http(&mut self, f: &FlowFilter) -> Result<(), InvalidFilter> {
        self.any(
            &f.http_status_code,
            |v| status(v),
            |v, m| http(m).is_some_and(|h| h.code != 0 && v.matches(h.code)),
        )?;
        self.any(
            &f.http_method,
            |v| Ok(v.to_ascii_uppercase()),
            |v, m| http(m).is_some_and(|h| h.method.eq_ignore_ascii_case(v)),
        )?;
        self.any(&f.http_path, |v| regex(v), |v, m| http(m).is_some_and(|h| v.is_match(path(&h.url))))?;
        self.any(&f.http_url, |v| regex(v), |v, m| http(m).is_some_and(|h| v.is_match(&h.url)))?;
        self.any(
            &f.http_header,
            |v| Ok(v.clone()),
            |v, m| {
                http(m).is_some_and(|h| {
                    h.headers.iter().any(|x| x.key.eq_ignore_ascii_case(&v.key) && x.value == v.value)
                })
            },
        )
    }
}

/// `[namespace/][prefix of a name]`; without a namespace, any.
struct Name {
    namespace: Option<String>,
    prefix: String,
}

impl Name {
    fn is(&self, namespace: &str, name: &str) -> bool {
        self.namespace.as_deref().is_none_or(|n| n == namespace) && name.starts_with(&self.prefix)
    }

    fn pod(&self, e: &flow::Endpoint) -> bool {
        (!e.pod_name.is_empty() || self.prefix.is_empty()) && self.is(&e.namespace, &e.pod_name)
    }

    fn service(&self, s: &flow::Service) -> bool {
        self.is(&s.namespace, &s.name)
    }
}

fn name(text: &str) -> Result<Name, InvalidFilter> {
    let parsed = match text.split_once('/') {
        Some((namespace, prefix)) if !namespace.is_empty() => {
            Name { namespace: Some(namespace.into()), prefix: prefix.into() }
        }
        Some((_, prefix)) => Name { namespace: None, prefix: prefix.into() },
        None => Name { namespace: None, prefix: text.into() },
    };
    if parsed.namespace.is_none() && parsed.prefix.is_empty() {
        return Err(InvalidFilter(format!("{text:?} names nothing; write [namespace/][name]")));
    }
    Ok(parsed)
}

fn workload(wanted: &flow::Workload, e: &flow::Endpoint) -> bool {
    e.workloads.iter().any(|w| {
        (wanted.name.is_empty() || wanted.name == w.name) && (wanted.kind.is_empty() || wanted.kind == w.kind)
    })
}

fn selector(text: &str) -> Result<Selector, InvalidFilter> {
    Selector::parse(text).map_err(InvalidFilter)
}

fn address(text: &str) -> Result<Cidr, InvalidFilter> {
    let alone = || {
        let ip: IpAddr = text.parse().ok()?;
        Cidr::new(ip, if ip.is_ipv4() { 32 } else { 128 })
    };
    text.parse().ok().or_else(alone).ok_or_else(|| InvalidFilter(format!("{text:?} is no address or range")))
}

fn within(range: Cidr, address: &str) -> bool {
    address.parse().is_ok_and(|ip| range.contains(ip))
}

fn port(text: &str) -> Result<u32, InvalidFilter> {
    let number: u16 = text.parse().map_err(|_| InvalidFilter(format!("{text:?} is no port number")))?;
    Ok(number.into())
}

/// A status code, or `5+` for all that begin so.
struct Status {
    digits: String,
    prefix: bool,
}

impl Status {
    fn matches(&self, code: u32) -> bool {
        let code = code.to_string();
        if self.prefix { code.starts_with(&self.digits) } else { code == self.digits }
    }
}

fn status(text: &str) -> Result<Status, InvalidFilter> {
    let digits = text.strip_suffix('+').unwrap_or(text);
    let prefix = digits.len() != text.len();
    let length = if prefix { 1..=2 } else { 3..=3 };
    if length.contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit()) {
        Ok(Status { digits: digits.into(), prefix })
    } else {
        Err(InvalidFilter(format!("{text:?} is no HTTP status; write 404 or 5+")))
    }
}

fn protocol(text: &str) -> Result<fn(&flow::Flow) -> bool, InvalidFilter> {
    use flow::layer4::Protocol as P;
    fn l4(m: &flow::Flow) -> Option<&P> {
        m.l4.as_ref()?.protocol.as_ref()
    }
    Ok(match text.to_ascii_lowercase().as_str() {
        "tcp" => |m| matches!(l4(m), Some(P::Tcp(_))),
        "udp" => |m| matches!(l4(m), Some(P::Udp(_))),
        "sctp" => |m| matches!(l4(m), Some(P::Sctp(_))),
        "icmp" => |m| matches!(l4(m), Some(P::IcmPv4(_) | P::IcmPv6(_))),
        "icmpv4" => |m| matches!(l4(m), Some(P::IcmPv4(_))),
        "icmpv6" => |m| matches!(l4(m), Some(P::IcmPv6(_))),
        "http" => |m| http(m).is_some(),
        "dns" | "kafka" => |_| false,
        _ => {
            return Err(InvalidFilter(format!(
                "{text:?} is no protocol; write tcp, udp, sctp, icmp, icmpv4, icmpv6 or http"
            )));
        }
    })
}

fn ports(m: &flow::Flow) -> Option<(u32, u32)> {
    use flow::layer4::Protocol as P;
    match m.l4.as_ref()?.protocol.as_ref()? {
        P::Tcp(p) => Some((p.source_port, p.destination_port)),
        P::Udp(p) => Some((p.source_port, p.destination_port)),
        P::Sctp(p) => Some((p.source_port, p.destination_port)),
        P::IcmPv4(_) | P::IcmPv6(_) => None,
    }
}

fn tcp_flags(m: &flow::Flow) -> Option<&flow::TcpFlags> {
    match m.l4.as_ref()?.protocol.as_ref()? {
        flow::layer4::Protocol::Tcp(tcp) => tcp.flags.as_ref(),
        _ => None,
    }
}

fn flags_within(wanted: &flow::TcpFlags, have: &flow::TcpFlags) -> bool {
    let bits = |f: &flow::TcpFlags| [f.fin, f.syn, f.rst, f.psh, f.ack, f.urg, f.ece, f.cwr, f.ns];
    bits(wanted).iter().zip(bits(have)).all(|(w, h)| !w || h)
}

fn http(m: &flow::Flow) -> Option<&flow::Http> {
    match m.l7.as_ref()?.record.as_ref()? {
        flow::layer7::Record::Http(http) => Some(http),
    }
}

/// The path of a URL, without host and query.
fn path(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let path = rest.find('/').map_or("/", |at| &rest[at..]);
    path.split(['?', '#']).next().unwrap_or(path)
}

fn regex(text: &str) -> Result<Regex, InvalidFilter> {
    RegexBuilder::new(text)
        .size_limit(MAX_REGEX)
        .build()
        .map_err(|e| InvalidFilter(format!("{text:?} is no regular expression: {e}")))
}

/// `*` stands for anything; `cluster/` alone for every node of a cluster.
fn glob(text: &str) -> Result<Regex, InvalidFilter> {
    let mut pattern = String::from("^(?:[^/]*/)?");
    for part in text.trim_end_matches('.').split_inclusive('*') {
        pattern.push_str(&regex::escape(part.trim_end_matches('*')));
        if part.ends_with('*') {
            pattern.push_str(".*");
        }
    }
    pattern.push('$');
    regex(&pattern)
}

#[cfg(test)]
mod tests;
