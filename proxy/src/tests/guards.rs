//! Limits, the guard against loops, and running out of descriptors.

use std::{net::SocketAddr, process::Command, time::Duration};

use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use weft_core::flow::Reason;

use super::support::{Mesh, is_reset, new_socket, ping, soon};
use crate::metrics::{Metrics, Reported, Side};

#[tokio::test]
async fn no_connection_leads_from_the_proxy_to_itself() {
    let mesh = Mesh::new();
    let node = mesh.node("node-a");
    let (client, web) = (mesh.pod(&node, "client"), mesh.pod(&node, "web"));
    let shared = node.proxy.shared();
    let mut loops = 0;
    let mut looped = |what: &str| {
        loops += 1;
        assert_eq!(shared.metrics.loops.get(), loops, "{what}");
    };
    // An application dials a port of the proxy in its own namespace, by the Pod's address, by loopback, by none.
    let port = client.inbound.port();
    for ip in [client.ip, [127, 0, 0, 1].into(), [0, 0, 0, 0].into()] {
        is_reset(&mut client.dial((ip, port).into()).await).await;
        looped("an application");
    }
    // The shortcut into a Pod of this node.
    is_reset(&mut client.dial(web.inbound).await).await;
    looped("the shortcut");
    node.records.find("the reason", |r| r.reason == Reason::ProtocolError).await;
    // Plain: the proxy's own port dialled, and the source that the proxy dials applications from.
    is_reset(&mut TcpStream::connect(web.inbound).await.expect("connected")).await;
    looped("the proxy's port");
    let socket = new_socket(web.ip).expect("a socket");
    socket.bind(([127, 0, 0, 6], 0).into()).expect("bound");
    let listener = web.listen().await;
    let mut outside = socket.connect(listener.local_addr().expect("an address")).await.expect("connected");
    let (accepted, client) = listener.accept().await.expect("accepted");
    let pod = shared.pod(&web.uid).expect("the Pod");
    crate::inbound::plain::serve(shared.clone(), pod, accepted, client, ()).await;
    is_reset(&mut outside).await;
    looped("the proxy's source");
}

#[tokio::test]
async fn a_pod_has_so_many_connections_and_no_more() {
    let mesh = Mesh::new();
    let a = mesh.node_with("node-a", |c| c.outbound_limit = 2);
    let b = mesh.node_with("node-b", |c| (c.inbound_limit, c.tunnel_limit) = (0, 1));
    let (client, other, web) = (mesh.pod(&a, "client"), mesh.pod(&a, "other"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let (mut first, mut second) = (client.dial(app).await, client.dial(app).await);
    for stream in [&mut first, &mut second] {
        soon("an echo", ping(stream, b"hello")).await.expect("within the limit");
    }
    is_reset(&mut client.dial(app).await).await;
    assert_eq!(a.proxy.shared().metrics.limited.get(), 1, "outbound");
    // Another Pod has its own room, but the one tunnel that web may have is the client's.
    is_reset(&mut other.dial(app).await).await;
    let limited = || b.proxy.shared().metrics.limited.get();
    let refused = limited();
    assert!(refused > 0, "tunnels");
    is_reset(&mut TcpStream::connect(web.inbound).await.expect("connected")).await;
    assert_eq!(limited(), refused + 1, "plain connections");
    // Room comes back.
    first.shutdown().await.expect("closed");
    first.read_to_end(&mut Vec::new()).await.expect("a clean end");
    soon("room", async {
        while ping(&mut client.dial(app).await, b"again").await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_silent_connection_is_reset() {
    let idle = Duration::from_millis(100);
    let mesh = Mesh::new();
    let (a, b) = (mesh.node_with("node-a", |c| c.idle_timeout = idle), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let mut stream = client.dial(web.echo().await).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    is_reset(&mut stream).await;
    a.records.find("the reason", |r| r.reason == Reason::Timeout && r.duration >= idle).await;
    // At the destination too, where the source would wait for longer.
    let (far, node) = (mesh.node("node-c"), mesh.node_with("node-d", |c| c.idle_timeout = idle));
    let (client, web) = (mesh.pod(&far, "client"), mesh.pod(&node, "web"));
    let mut stream = client.dial(web.echo().await).await;
    is_reset(&mut stream).await;
    node.records.find("the reason", |r| r.reason == Reason::Timeout).await;
}

#[tokio::test]
async fn an_application_that_does_not_answer_is_given_up() {
    let limit = Duration::from_millis(100);
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node_with("node-b", |c| c.connect_timeout = limit));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let socket = new_socket(web.ip).expect("a socket");
    socket.bind((web.ip, 0).into()).expect("bound");
    let full = socket.listen(0).expect("a listener");
    let address = full.local_addr().expect("an address");
    let _queued = TcpStream::connect(address).await.expect("queued");
    is_reset(&mut client.dial(address).await).await;
    b.records.find("the timeout", |r| r.reason == Reason::Timeout && r.duration >= limit).await;
}

#[test]
fn pairs_beyond_the_limit_share_a_series_and_are_counted() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry, 2);
    let side = |n: u32| {
        let id = weft_core::TrustDomain::new("mesh.test").expect("a domain");
        Side::identity(&weft_core::SpiffeId::service_account(&id, "shop", &format!("sa-{n}")))
    };
    for n in 0..10 {
        metrics.pair(Reported::Source, side(n), Side::outside()).opened.inc();
        metrics.pair(Reported::Source, side(n), Side::outside()).sent.inc_by(3);
    }
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("metrics");
    let opened: Vec<_> = text.lines().filter(|l| l.starts_with("weft_connections_opened_total{")).collect();
    assert_eq!(opened.len(), 3, "{opened:#?}");
    let shared = opened.iter().find(|l| l.contains("source_workload=\"overflow\"")).expect("a shared series");
    assert!(shared.ends_with(" 8"), "{shared}");
    assert!(text.contains("weft_metric_pairs_overflowed_total 16\n"), "{text}");
}

#[test]
fn codes_beyond_the_limit_share_a_series() {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry, 2);
    let pair = metrics.pair(Reported::Source, Side::outside(), Side::outside());
    for code in 100..=999 {
        pair.request(code, weft_core::flow::Verdict::Forwarded, Duration::ZERO);
    }
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("metrics");
    let counted: Vec<u64> = text
        .lines()
        .filter(|l| l.starts_with("weft_requests_total{"))
        .filter_map(|l| l.rsplit_once(' ')?.1.parse().ok())
        .collect();
    assert_eq!((counted.len(), counted.iter().sum::<u64>()), (65, 900));
}

/// Set where this process is the one with few descriptors.
const CHILD: &str = "WEFT_TEST_FEW_DESCRIPTORS";

#[test]
fn accepting_waits_while_descriptors_are_out() {
    if std::env::var_os(CHILD).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let _inside = runtime.enter();
        return runtime.block_on(out_of_descriptors());
    }
    // The limit is the process's, so another one runs into it.
    let name = "tests::guards::accepting_waits_while_descriptors_are_out";
    let child = Command::new("sh")
        .args(["-c", "ulimit -n 64 && exec \"$0\" --exact \"$1\" --nocapture"])
        .arg(std::env::current_exe().expect("this program"))
        .arg(name)
        .env(CHILD, "1")
        .output()
        .expect("sh runs");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&child.stderr)
    );
}

async fn out_of_descriptors() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app: SocketAddr = web.echo().await;
    let socket = new_socket(client.ip).expect("a socket");
    let mut all = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        all.push(file);
    }
    let mut stream = client.dial_from(socket, app).await;
    let errors = || a.proxy.shared().metrics.accept_errors.get();
    let begun = std::time::Instant::now();
    soon("failed accepts", async {
        while errors() < 4 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // Waits of 5, 10 and 20 ms lie between them, give or take the jitter.
    assert!(begun.elapsed() >= Duration::from_millis(10), "{:?}", begun.elapsed());
    let (at, so_far) = (std::time::Instant::now(), errors());
    while at.elapsed() < Duration::from_millis(200) {
        tokio::task::yield_now().await;
    }
    assert!(errors() - so_far < 10, "a busy loop: {} errors", errors() - so_far);
    drop(all);
    soon("an echo", ping(&mut stream, b"hello")).await.expect("it recovers");
}
