//! The tunnel with a peer that this project did not write: Envoy as its client, and as its server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, net::Ipv4Addr, path::PathBuf, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weft_tests::{
    Lab, LabOptions,
    failure::ca::Root,
    http,
    lab::{Process, net},
    wait,
};

const BANNER: u16 = 7001;
const SINK: u16 = 7002;
const SOURCE: u16 = 7003;
/// Resets its connections.
const RESETS: u16 = 7004;
/// Prints how its connections end.
const HEARS: u16 = 7005;
const PORTS: [(&str, u16); 5] =
    [("banner", BANNER), ("sink", SINK), ("source", SOURCE), ("resets", RESETS), ("hears", HEARS)];
const TUNNEL: u16 = 15008;
const ADMIN: &str = "127.0.0.1:9901";
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const STRANGER: &str = "spiffe://cluster.local/ns/outside/sa/stranger";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const TYPES: &str = "type.googleapis.com/envoy.extensions";
/// What each of several streams carries at a time.
const BYTES: &str = "8000009";

/// A lab whose CA is this test's.
fn lab(root: &Root, without_agent: &[&str]) -> Lab {
    let without_agent = without_agent.iter().map(ToString::to_string).collect();
    let options = LabOptions { ca: Some(root.pem()), without_agent, ..LabOptions::default() };
    let mut lab = Lab::start(options).unwrap_or_else(|error| panic!("{error:#}"));
    for (kind, port) in PORTS {
        lab.start_server("web-v1", kind, port).unwrap();
    }
    lab
}

/// Envoy in a Pod.
struct Envoy<'a> {
    lab: &'a Lab,
    pod: &'static str,
    process: Process,
    folder: PathBuf,
}

impl<'a> Envoy<'a> {
    /// Starts it with a certificate of that identity; it dials or takes peers of the other one.
    fn start(
        lab: &'a Lab,
        pod: &'static str,
        root: &Root,
        (own, peer): (&str, &str),
        resources: impl FnOnce(&Tls) -> Value,
    ) -> Self {
        let folder = lab.pod(pod).unwrap().folder(lab.dir()).join("envoy");
        fs::create_dir_all(&folder).unwrap();
        let leaf = root.leaf(own).unwrap();
        for (name, text) in
            [("ca.pem", &root.certificate), ("own.pem", &leaf.certificate), ("own.key", &leaf.key)]
        {
            fs::write(folder.join(name), text).unwrap();
        }
        let config = json!({
            "node": {"id": pod, "cluster": "lab"},
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 9901}}},
            "static_resources": resources(&Tls { folder: folder.clone(), peer: peer.into() }),
        });
        let file = folder.join("envoy.json");
        fs::write(&file, config.to_string()).unwrap();
        let binary = weft_cluster::parts::envoy::binary(&|_| ()).unwrap();
        let mut command = lab.pod(pod).unwrap().place.command(lab.bins(), binary);
        command.arg("-c").arg(&file).args(["--concurrency", "1", "--disable-hot-restart", "-l", "info"]);
        let process = Process::spawn(command, "envoy", &folder.join("envoy.log")).unwrap();
        let mut envoy = Self { lab, pod, process, folder };
        wait::until(Duration::from_secs(30), "Envoy to be ready", || {
            if let Err(error) = envoy.process.check() {
                return Ok(Err(error));
            }
            ensure!(envoy.admin("/ready")?.trim() == "LIVE", "not yet");
            Ok(Ok(()))
        })
        .unwrap()
        .0
        .unwrap();
        envoy
    }

    fn admin(&self, path: &str) -> Result<String> {
        let path = path.to_owned();
        net::within(&self.lab.pod(self.pod)?.place.netns, move || {
            Ok(http::get(ADMIN, "localhost", &path, Duration::from_secs(5))?.text().to_string())
        })
    }

    /// The sum of the counters whose names end like that.
    fn counted(&self, names: &[&str]) -> u64 {
        let stats = self.admin("/stats").unwrap();
        let lines = stats.lines().filter_map(|line| line.split_once(": "));
        let fits = |name: &str| names.iter().any(|wanted| name.ends_with(wanted));
        lines.filter(|(name, _)| fits(name)).filter_map(|(_, n)| n.parse::<u64>().ok()).sum()
    }

    /// Envoy has nothing against what its peer sent.
    fn is_content(&self) {
        let faults = [
            "cx_protocol_error",
            "http2.rx_messaging_error",
            "http2.header_overflow",
            "http2.headers_cb_no_stream",
            "http2.inbound_empty_frames_flood",
            "http2.inbound_priority_frames_flood",
            "http2.inbound_window_update_frames_flood",
            "http2.outbound_flood",
            "http2.outbound_control_flood",
            "http2.stream_refused_errors",
            "http2.too_many_header_frames",
            "http2.trailers",
            "http2.tx_flush_timeout",
            "ssl.connection_error",
            "ssl.fail_verify_error",
            "ssl.fail_verify_san",
        ];
        let stats = self.admin("/stats?usedonly").unwrap();
        assert_eq!(self.counted(&faults), 0, "{stats}");
        assert!(stats.contains("http2."), "there are counters of HTTP/2: {stats}");
    }
}

/// Where an Envoy's certificates are, and whom it expects.
struct Tls {
    folder: PathBuf,
    peer: String,
}

impl Tls {
    fn socket(&self, dials: bool) -> Value {
        let file = |name: &str| json!({"filename": self.folder.join(name)});
        let common = json!({
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "alpn_protocols": ["h2"],
            "tls_certificates": [{"certificate_chain": file("own.pem"), "private_key": file("own.key")}],
            "validation_context": {
                "trusted_ca": file("ca.pem"),
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": self.peer}}],
            },
        });
        let kind = if dials { "UpstreamTlsContext" } else { "DownstreamTlsContext" };
        let mut config = json!({"@type": format!("{TYPES}.transport_sockets.tls.v3.{kind}"), "common_tls_context": common});
        if !dials {
            config["require_client_certificate"] = true.into();
        }
        json!({"name": "envoy.transport_sockets.tls", "typed_config": config})
    }
}

fn address(ip: Ipv4Addr, port: u16) -> Value {
    json!({"socket_address": {"address": ip, "port_value": port}})
}

fn cluster(name: &str, ip: Ipv4Addr, port: u16) -> Value {
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(ip, port)}}]}]},
    })
}

/// As the dialling end: what connects to a port of its own Pod goes through the tunnel to that port of the other.
fn dialling(tls: &Tls, own: Ipv4Addr, there: Ipv4Addr) -> Value {
    let log = json!([{"name": "envoy.access_loggers.file", "typed_config": {
        "@type": format!("{TYPES}.access_loggers.file.v3.FileAccessLog"), "path": tls.folder.join("access.log"),
        "log_format": {"text_format_source": {"inline_string":
            "%RESPONSE_FLAGS% %FILTER_STATE(envoy.tcp_proxy.propagate_response_headers:TYPED)%\n"}},
    }}]);
    let listeners: Vec<Value> = PORTS
        .iter()
        .map(|(name, port)| {
            let proxy = json!({
                "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
                "stat_prefix": name, "cluster": "tunnel", "access_log": log, "max_connect_attempts": 1,
                "tunneling_config": {
                    "hostname": format!("{there}:{port}"), "propagate_response_headers": true,
                    "headers_to_add": [{"header": {"key": "forwarded", "value": format!("for={own}")}}],
                },
            });
            let filter = json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy});
            json!({"name": name, "address": address(Ipv4Addr::LOCALHOST, *port), "filter_chains": [{"filters": [filter]}]})
        })
        .collect();
    let mut tunnel = cluster("tunnel", there, TUNNEL);
    tunnel["transport_socket"] = tls.socket(true);
    tunnel["typed_extension_protocol_options"] = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": format!("{TYPES}.upstreams.http.v3.HttpProtocolOptions"),
        "explicit_http_config": {"http2_protocol_options": {}},
    }});
    json!({"listeners": listeners, "clusters": [tunnel]})
}

/// As the end that is dialled: it takes CONNECTs for the ports of its own Pod.
fn dialled(tls: &Tls, own: Ipv4Addr) -> Value {
    let hosts: Vec<Value> = PORTS
        .iter()
        .map(|(name, port)| {
            json!({
                "name": name, "domains": [format!("{own}:{port}")],
                "routes": [{"match": {"connect_matcher": {}}, "route": {
                    "cluster": name, "timeout": "0s",
                    "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]}}],
            })
        })
        .collect();
    let router = json!({"name": "envoy.filters.http.router", "typed_config": {
        "@type": format!("{TYPES}.filters.http.router.v3.Router"),
    }});
    let manager = json!({
        "@type": format!("{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "tunnel", "codec_type": "HTTP2", "stream_idle_timeout": "0s",
        "http2_protocol_options": {"allow_connect": true, "hpack_table_size": 0},
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "http_filters": [router], "route_config": {"virtual_hosts": hosts},
    });
    let filter = json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": manager});
    let listener = json!({
        "name": "tunnel", "address": address(own, TUNNEL),
        "filter_chains": [{"filters": [filter], "transport_socket": tls.socket(false)}],
    });
    let clusters: Vec<Value> =
        PORTS.iter().map(|(name, port)| cluster(name, Ipv4Addr::LOCALHOST, *port)).collect();
    json!({"listeners": [listener], "clusters": clusters})
}

/// Reads [`BYTES`] from a `source` server, and tells whether they were the right ones.
fn download(lab: &Lab, from: &str, name: &str, to: &str, half: bool) -> Result<Value> {
    let at_once = lab.dir().display().to_string();
    let mut args = vec!["slow", "--to", to, "--bytes", BYTES, "--until", &at_once];
    args.extend(half.then_some("--half"));
    let mut app = lab.spawn_app(from, name, &args)?;
    let status = app.wait(Duration::from_secs(120))?;
    let output = app.output();
    ensure!(status.success(), "{status}: {output}");
    serde_json::from_str(output.lines().last().unwrap_or_default()).context(output)
}

/// Much at once in both directions, ends of halves and resets, from a Pod to web-v1's servers at an address. Where not
/// all that download end their half first (`half`), the server's end comes first. `ends` is how a server sees the
/// client's reset.
fn talk(lab: &Lab, from: &str, ip: Ipv4Addr, half: bool, ends: &str) {
    let at = move |port: u16| format!("{ip}:{port}");
    let mut held = lab.hold(from, "held", &at(BANNER)).unwrap_or_else(|error| panic!("{error:#}"));
    thread::scope(|scope| {
        for n in 0..6 {
            // Each ends its half, and is answered after.
            scope.spawn(move || {
                let answer = lab.app(from, &["stream", "--to", &at(SINK), "--bytes", BYTES]).unwrap();
                assert_eq!(answer["matches"], true, "{answer}");
            });
            scope.spawn(move || {
                let answer = download(lab, from, &format!("download-{n}"), &at(SOURCE), n % 2 == 0 || half);
                let answer = answer.unwrap();
                assert_eq!(answer["matches"], true, "{answer}");
            });
        }
    });
    let many = ["many", "--to", &at(BANNER), "--count", "300", "--threads", "16"];
    let answer = lab.app(from, &many).unwrap();
    assert_eq!(answer["ok"], 300, "{answer}");

    // The server resets.
    let answer = lab.app(from, &["dial", "--to", &at(RESETS), "--send", "go", "--to-end"]).unwrap();
    assert_eq!(answer["error"], "ConnectionReset", "{answer}");
    // The client does.
    lab.app(from, &["dial", "--to", &at(HEARS), "--reset"]).unwrap();
    let log = lab.pod("web-v1").unwrap().folder(lab.dir()).join("hears.log");
    wait::until(Duration::from_secs(10), "the server to see the reset", || {
        let text = fs::read_to_string(&log)?;
        ensure!(text.contains(ends), "{text}");
        Ok(())
    })
    .unwrap();
    assert!(held.check().is_ok(), "what stands on the same tunnel goes on standing: {}", held.tail(5));
}

fn weft_is_content(lab: &Lab, node: &str) {
    let node = lab.node(node).unwrap();
    for name in [
        "weft_tunnel_requests_malformed_total",
        "weft_tunnel_handshakes_failed_total",
        "weft_task_panics_total",
    ] {
        assert_eq!(node.sample(name, &[]).unwrap(), 0.0, "{name}");
    }
}

const DENY_STRANGER: &str = "
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {name: no-stranger, namespace: shop}
spec:
  targetRefs:
  - {group: \"\", kind: Pod, selector: {}}
  action: DENY
  rules:
  - sources:
    - {type: ServiceAccount, serviceAccount: {namespace: outside, name: stranger}}
";

#[test]
fn envoy_is_a_client_of_the_tunnel() {
    let root = Root::lasting(Duration::from_secs(3600)).unwrap();
    let lab = lab(&root, &[]);
    let (own, there) = (lab.pod("stranger").unwrap().v4, lab.pod("web-v1").unwrap().v4);
    let envoy = Envoy::start(&lab, "stranger", &root, (STRANGER, WEB), |tls| dialling(tls, own, there));
    talk(&lab, "stranger", Ipv4Addr::LOCALHOST, false, "broken: ConnectionReset");
    envoy.is_content();
    weft_is_content(&lab, "node-b");
    assert!(envoy.counted(&["cluster.tunnel.http2.rx_reset"]) > 0, "the server's reset is the stream's");

    // What policy denies is refused by status, on the tunnel that goes on.
    lab.apply("deny", DENY_STRANGER).unwrap();
    let to = format!("127.0.0.1:{BANNER}");
    let answer = lab.app("stranger", &["dial", "--to", &to, "--to-end"]).unwrap();
    assert_eq!(answer["heard"], "", "{answer}");
    let log = envoy.folder.join("access.log");
    wait::until(Duration::from_secs(10), "the status in Envoy's log", || {
        let text = fs::read_to_string(&log).context("there is no access log yet")?;
        ensure!(text.contains(r#"{"key":":status","value":"401"}"#), "{text}");
        Ok(())
    })
    .unwrap();
    envoy.is_content();
}

/// A Pod that the mesh's state has enrolled, on a node without an agent: its proxy is Envoy.
#[test]
fn envoy_is_a_server_of_the_tunnel() {
    let root = Root::lasting(Duration::from_secs(3600)).unwrap();
    let lab = lab(&root, &["node-b"]);
    let own = lab.pod("web-v1").unwrap().v4;
    let envoy = Envoy::start(&lab, "web-v1", &root, (WEB, CLIENT), |tls| dialled(tls, own));
    // A stream that is reset is a FIN for the server behind Envoy, whatever the code.
    talk(&lab, "client", own, true, "end after 0");
    assert!(envoy.counted(&["http2.rx_reset"]) > 0, "the client's reset is the stream's");
    // Where its server closes first, Envoy resets the CONNECT, and drops what waits for credit: the application sees an
    // error then, and no end.
    match download(&lab, "client", "cut-short", &format!("{own}:{SOURCE}"), false) {
        Ok(answer) => assert_eq!(answer["matches"], true, "{answer}"),
        Err(error) => assert!(format!("{error:#}").contains("Connection reset"), "{error:#}"),
    }
    envoy.is_content();
    weft_is_content(&lab, "node-a");
    assert!(envoy.counted(&["http.tunnel.downstream_rq_2xx"]) > 300, "all of it went through Envoy");
    // Whoever is not the caller that Envoy expects does not get through.
    let answer = lab.app("intruder", &["dial", "--to", &format!("{own}:{BANNER}")]).unwrap();
    assert_eq!(answer["heard"].as_str().unwrap_or_default(), "", "{answer}");
}
