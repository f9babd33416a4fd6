//! The whole way over IPv6.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tokio::io::AsyncWriteExt;
use weft_core::{
    flow::{Reason, Tls, Verdict},
    service::AppProtocol,
};

use super::support::{Mesh, is_reset, ping, soon};

#[tokio::test]
async fn an_echo_through_a_service_and_a_tunnel() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = mesh.v6_pods(&a, &b);
    let vip = "fd00::80".parse().expect("an address");
    let vip = mesh.service_at(vip, "web", AppProtocol::Tcp, &[(&web, web.echo().await.port())]);
    let mut stream = client.dial(vip).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    let port = stream.local_addr().expect("an address").port();
    drop(stream);
    let sent = a.records.find("the source's end", |r| !r.opening).await;
    let received = b.records.find("the destination's end", |r| !r.opening).await;
    for record in [&sent, &received] {
        assert_eq!((record.verdict, record.sent, record.received), (Verdict::Forwarded, 5, 5));
        assert!(matches!(record.tls, Tls::Mutual { .. }), "{:?}", record.tls);
        assert_eq!(record.destination.address.ip(), web.ip);
    }
    assert_eq!(sent.source.address, (client.workload.addresses[0], port).into());
    assert_eq!(web.net.shown.lock().as_slice(), [SocketAddr::new(client.ip, port)]);
}

#[tokio::test]
async fn a_failure_is_a_reset() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = mesh.v6_pods(&a, &b);
    let listener = web.listen().await;
    let address = listener.local_addr().expect("an address");
    let mut stream = client.dial(address).await;
    let (mut app, _) = soon("a connection", listener.accept()).await.expect("a connection");
    app.write_all(b"x").await.expect("written");
    app.set_zero_linger().expect("set");
    drop(app);
    is_reset(&mut stream).await;
    // The tunnel port is as closed to applications as it is over IPv4.
    is_reset(&mut client.dial((web.ip, mesh.tunnel_port()).into()).await).await;
    a.records.find("the refusal", |r| r.reason == Reason::TunnelPortDialled).await;
}

#[tokio::test]
async fn a_mapped_address_is_the_address_that_it_maps() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let vip = mesh.service("web", AppProtocol::Tcp, &[(&web, web.echo().await.port())]);
    let IpAddr::V4(plain) = vip.ip() else { panic!("{vip}") };
    let mapped = SocketAddr::new(Ipv4Addr::to_ipv6_mapped(&plain).into(), vip.port());
    soon("an echo", ping(&mut client.dial(mapped).await, b"hello")).await.expect("an echo");
    let end = a.records.find("the end", |r| !r.opening).await;
    assert!(end.service.is_some() && end.destination.address.is_ipv4(), "{end:?}");
}
