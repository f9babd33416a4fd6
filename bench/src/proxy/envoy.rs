//! Configurations of the two Envoys, as JSON, which Envoy reads as YAML.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    ground::{BULK, H2, HTTP},
    pki,
    subject::{End, PORTS},
};

/// How they take the traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// `tcp_proxy` at both ends: each application connection has an mTLS connection with a full handshake.
    L4,
    /// `tcp_proxy` tunnels each connection as an HTTP/2 CONNECT over pooled mTLS.
    Hbone,
    /// HTTP connection managers at both ends, retries at the first, access by SPIFFE id at the second.
    L7,
}

const TYPES: &str = "type.googleapis.com/envoy.extensions";

/// The configuration of one end.
pub(crate) fn config(way: Way, end: &End, certificates: &Path) -> String {
    let tls = |first: bool, alpn: &str| transport(certificates, first, alpn);
    let mut listeners = Vec::new();
    let mut clusters = Vec::new();
    if way == Way::Hbone && !end.first {
        let routes: Vec<Value> = PORTS
            .iter()
            .map(|(port, _, _)| {
                json!({
                    "name": name(*port), "domains": [format!("{}:{port}", end.server)],
                    "routes": [{"match": {"connect_matcher": {}}, "route": {
                        "cluster": name(*port), "timeout": "0s",
                        "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]}}]
                })
            })
            .collect();
        let manager = manager("HTTP2", true, &json!({"virtual_hosts": routes}), true);
        listeners.push(listener("tunnel", end.tunnel, PORTS[0].2, &[manager], Some(tls(false, "h2"))));
    }
    for (port, entry, exit) in PORTS {
        let http = way == Way::L7 && port != BULK;
        let (alpn, codec) = match (http, port) {
            (true, H2) => ("h2", "HTTP2"),
            (true, HTTP) => ("http/1.1", "HTTP1"),
            _ => ("mesh", ""),
        };
        let cluster_name = if way == Way::Hbone && end.first { "tunnel".to_owned() } else { name(port) };
        let take = if http {
            vec![manager(codec, !end.first, &everything(&cluster_name), false)]
        } else {
            let tunnelled = (way == Way::Hbone && end.first).then(|| format!("{}:{port}", end.server));
            let judge = (!end.first).then(access);
            judge.into_iter().chain([tcp(&cluster_name, tunnelled)]).collect()
        };
        if end.first {
            listeners.push(listener(&name(port), end.listen, entry, &take, None));
            if way != Way::Hbone {
                clusters.push(cluster(
                    &cluster_name,
                    end.tunnel,
                    exit,
                    http && port == H2,
                    Some(tls(true, alpn)),
                ));
            }
        } else {
            if way != Way::Hbone {
                listeners.push(listener(&name(port), end.tunnel, exit, &take, Some(tls(false, alpn))));
            }
            clusters.push(cluster(&cluster_name, end.server, port, http && port == H2, None));
        }
    }
    if way == Way::Hbone && end.first {
        clusters.push(cluster("tunnel", end.tunnel, PORTS[0].2, true, Some(tls(true, "h2"))));
    }
    json!({
        "node": {"id": if end.first { "a" } else { "b" }, "cluster": "bench"},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    })
    .to_string()
}

fn name(port: u16) -> String {
    format!("p{port}")
}

fn address(ip: std::net::IpAddr, port: u16) -> Value {
    json!({"socket_address": {"address": ip, "port_value": port}})
}

fn listener(name: &str, ip: std::net::IpAddr, port: u16, filters: &[Value], tls: Option<Value>) -> Value {
    let mut chain = json!({"filters": filters});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({"name": name, "address": address(ip, port), "filter_chains": [chain]})
}

fn cluster(name: &str, ip: std::net::IpAddr, port: u16, h2: bool, tls: Option<Value>) -> Value {
    let many = json!({"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000, "max_retries": 100});
    let mut cluster = json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [many]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(ip, port)}}]}]},
    });
    if h2 {
        cluster["typed_extension_protocol_options"] = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
            "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 100}},
        }});
    }
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls;
    }
    cluster
}

/// mTLS without session resumption; `first` dials.
fn transport(folder: &Path, first: bool, alpn: &str) -> Value {
    let (own, peer) = if first { ("client", pki::SERVER) } else { ("server", pki::CLIENT) };
    let file = |name: String| json!({"filename": folder.join(name)});
    let common = json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "alpn_protocols": [alpn],
        "tls_certificates": [{"certificate_chain": file(format!("{own}.pem")), "private_key": file(format!("{own}.key"))}],
        "validation_context": {
            "trusted_ca": file("ca.pem".into()),
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
    });
    let context = if first {
        json!({"@type": format!("{TYPES}.transport_sockets.tls.v3.UpstreamTlsContext"), "max_session_keys": 0, "common_tls_context": common})
    } else {
        json!({
            "@type": format!("{TYPES}.transport_sockets.tls.v3.DownstreamTlsContext"),
            "require_client_certificate": true, "disable_stateless_session_resumption": true, "common_tls_context": common,
        })
    };
    json!({"name": "envoy.transport_sockets.tls", "typed_config": context})
}

fn tcp(cluster: &str, tunnelled: Option<String>) -> Value {
    let mut config = json!({
        "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
        "stat_prefix": cluster, "cluster": cluster, "idle_timeout": "0s",
    });
    if let Some(host) = tunnelled {
        config["tunneling_config"] = json!({"hostname": host});
    }
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": config})
}

fn rules() -> Value {
    json!({"action": "ALLOW", "policies": {"client": {
        "permissions": [{"any": true}],
        "principals": [{"authenticated": {"principal_name": {"exact": pki::CLIENT}}}],
    }}})
}

fn access() -> Value {
    json!({"name": "envoy.filters.network.rbac", "typed_config": {
        "@type": format!("{TYPES}.filters.network.rbac.v3.RBAC"), "stat_prefix": "rbac", "rules": rules(),
    }})
}

/// Every request to one cluster, with retries.
fn everything(cluster: &str) -> Value {
    json!({"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {
        "cluster": cluster, "timeout": "15s",
        "retry_policy": {"retry_on": "connect-failure,refused-stream,unavailable,reset", "num_retries": 2},
    }}]}]})
}

/// An HTTP connection manager; `judges` has it check the caller's SPIFFE id.
fn manager(codec: &str, judges: bool, routes: &Value, connect: bool) -> Value {
    let mut filters = Vec::new();
    if judges {
        filters.push(json!({"name": "envoy.filters.http.rbac", "typed_config": {
            "@type": format!("{TYPES}.filters.http.rbac.v3.RBAC"), "rules": rules(),
        }}));
    }
    filters.push(json!({"name": "envoy.filters.http.router", "typed_config": {
        "@type": format!("{TYPES}.filters.http.router.v3.Router"),
    }}));
    let mut config = json!({
        "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "http", "codec_type": codec, "stream_idle_timeout": "0s",
        "common_http_protocol_options": {"idle_timeout": "0s"},
        "http2_protocol_options": {"max_concurrent_streams": 1000, "allow_connect": true},
        "http_filters": filters, "route_config": routes,
    });
    if connect {
        config["upgrade_configs"] = json!([{"upgrade_type": "CONNECT"}]);
    }
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": config})
}
