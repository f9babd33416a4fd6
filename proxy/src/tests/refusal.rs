//! Who is refused, and what is cut.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, StatusCode};
use rustls_pki_types::ServerName;
use tokio::{io::AsyncReadExt, net::TcpSocket};
use tokio_rustls::TlsConnector;
use weft_core::{
    ResourceKey, SpiffeId,
    flow::{Reason, Verdict},
    policy::Action,
    service::AppProtocol,
};
use weft_identity::{Credentials, ca::EmbeddedCa};
use weft_runtime::Tasks;

use super::support::{Mesh, Pod, from_account, is_reset, ping, soon};
use crate::early::Early;

#[tokio::test]
async fn policy_refuses_and_a_change_cuts() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, intruder, mut web) = (mesh.pod(&a, "client"), mesh.pod(&a, "intruder"), mesh.pod(&b, "web"));
    mesh.police(&mut web, Action::Allow, vec![from_account("client")]);
    let app = web.echo().await;
    is_reset(&mut intruder.dial(app).await).await;
    let denied = b.records.find("the denial", |r| r.verdict == Verdict::Denied).await;
    assert_eq!(denied.reason, Reason::PolicyDenied);
    assert_eq!(denied.source.identity.as_ref(), Some(&intruder.workload.identity));

    let mut stream = client.dial(app).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("allowed");
    let changed = std::time::Instant::now();
    mesh.police(&mut web, Action::Deny, vec![from_account("client")]);
    is_reset(&mut stream).await;
    assert!(changed.elapsed().as_secs() < 1, "{:?}", changed.elapsed());
    b.records.find("the revocation", |r| r.reason == Reason::Revoked && r.verdict == Verdict::Denied).await;
}

#[tokio::test]
async fn a_change_cuts_on_one_node_too() {
    let mesh = Mesh::new();
    let node = mesh.node("node-a");
    let (client, mut web) = (mesh.pod(&node, "client"), mesh.pod(&node, "web"));
    let mut stream = client.dial(web.echo().await).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("allowed");
    mesh.police(&mut web, Action::Deny, vec![from_account("client")]);
    is_reset(&mut stream).await;
    node.records.find("the revocation", |r| r.reason == Reason::Revoked).await;
}

#[tokio::test]
async fn a_pod_that_is_gone_loses_its_connections() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let mut stream = client.dial(app).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    b.proxy.remove_pod(&web.uid);
    is_reset(&mut stream).await;

    let web = mesh.pod(&b, "web");
    let mut stream = client.dial(web.echo().await).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    mesh.apply(vec![], vec![ResourceKey::Workload(client.uid.clone())]);
    is_reset(&mut stream).await;
}

#[tokio::test]
async fn credentials_that_are_taken_back_end_connections() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let mut stream = client.dial(app).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    a.publisher.revoke(&client.workload.identity);
    is_reset(&mut stream).await;
    is_reset(&mut client.dial(app).await).await;
    a.records.find("the reason", |r| r.reason == Reason::NoCredentials).await;
}

#[tokio::test]
async fn without_credentials_there_is_no_handshake() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.describe(&b, "web"));
    is_reset(&mut client.dial(web.echo().await).await).await;
    a.records.find("the failure", |r| r.verdict == Verdict::Error).await;
}

#[tokio::test]
async fn a_peer_that_is_not_who_it_should_be_is_refused() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, mut web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    web.workload.identity = SpiffeId::service_account(mesh.ca.trust_domain(), "shop", "other");
    let expected = a.proxy.shared().credentials.current(&client.workload.identity).expect("credentials");
    let key = crate::tunnel::client::Key {
        source: client.uid.clone(),
        identity: client.workload.identity.clone(),
        destination: web.uid.clone(),
        address: SocketAddr::new(web.ip, mesh.tunnel_port()),
        expected: web.workload.identity.clone(),
    };
    let request = crate::tunnel::ConnectRequest { authority: app, source: Default::default() };
    let pod = a.proxy.shared().pod(&client.uid).expect("the Pod");
    let refused = soon("a refusal", pod.pool().connect(&key, &expected, &request, &mut Early::default()))
        .await
        .expect_err("refused");
    assert_eq!(refused.reason, Reason::IdentityMismatch, "{refused}");
}

/// One CONNECT by hand.
async fn connect(
    mesh: &Mesh,
    from: &Pod,
    to: &Pod,
    credentials: &Credentials,
    authority: SocketAddr,
    forwarded: Option<&str>,
) -> Result<StatusCode, String> {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((from.ip, 0).into()).expect("bound");
    let tcp = socket.connect((to.ip, mesh.tunnel_port()).into()).await.map_err(|e| e.to_string())?;
    let config = credentials.client_config(&to.workload.identity);
    let name = ServerName::IpAddress(to.ip.into());
    let tls = TlsConnector::from(config).connect(name, tcp).await.map_err(|e| e.to_string())?;
    let (send, connection) = h2::client::handshake::<_>(tls).await.map_err(|e| e.to_string())?;
    Tasks::new().spawn("raw", async move { drop(connection.await) });
    let mut send: h2::client::SendRequest<Bytes> = send.ready().await.map_err(|e| e.to_string())?;
    let mut request = Request::builder().method("CONNECT").uri(authority.to_string());
    if let Some(forwarded) = forwarded {
        request = request.header("forwarded", forwarded);
    }
    let (response, _body) =
        send.send_request(request.body(()).expect("a request"), false).map_err(|e| e.to_string())?;
    response.await.map(|r| r.status()).map_err(|e| e.to_string())
}

#[tokio::test]
async fn a_connect_must_be_true() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web, other) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"), mesh.pod(&b, "other"));
    let (app, others) = (web.echo().await, other.echo().await);
    let mine = Mesh::credentials(&mesh.ca, &client.workload.identity);
    let truth = format!("for={}", client.ip);
    let own_tunnel = SocketAddr::new(web.ip, mesh.tunnel_port());
    let loopback = SocketAddr::from(([127, 0, 0, 1], app.port()));
    for (what, authority, forwarded, status) in [
        ("the truth", app, Some(truth.as_str()), StatusCode::OK),
        ("a forged client", app, Some("for=10.1.2.3"), StatusCode::BAD_REQUEST),
        ("no client", app, None, StatusCode::BAD_REQUEST),
        ("two clients", app, Some("for=10.1.2.3,for=10.1.2.4"), StatusCode::BAD_REQUEST),
        ("another Pod", others, Some(truth.as_str()), StatusCode::BAD_REQUEST),
        ("the proxy itself", own_tunnel, Some(truth.as_str()), StatusCode::BAD_REQUEST),
        ("loopback", loopback, Some(truth.as_str()), StatusCode::BAD_REQUEST),
    ] {
        let answer = soon(what, connect(&mesh, &client, &web, &mine, authority, forwarded)).await;
        assert_eq!(answer, Ok(status), "{what}");
    }
    // A true certificate of the mesh, used from another Pod's address.
    let theirs = Mesh::credentials(&mesh.ca, &other.workload.identity);
    let answer = soon("a stolen identity", connect(&mesh, &client, &web, &theirs, app, Some(&truth))).await;
    assert_eq!(answer, Ok(StatusCode::UNAUTHORIZED));
    assert_eq!(b.proxy.shared().metrics.peer_mismatches.get(), 1);
}

#[tokio::test]
async fn a_certificate_of_a_foreign_ca_is_refused() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let foreign = EmbeddedCa::generate(mesh.ca.trust_domain().clone()).expect("a CA");
    // Signed by the foreign CA but trusting ours, so that only the other side can refuse.
    let key = weft_identity::SvidKey::generate().expect("a key");
    let id = &client.workload.identity;
    let mut signed = foreign
        .sign(id, &key.request(id).expect("a request"), std::time::Duration::from_secs(600))
        .expect("a signature");
    signed.roots.extend(mesh.ca.roots());
    let forged = Credentials::new(id, key, signed, std::time::SystemTime::now()).expect("credentials");
    let truth = format!("for={}", client.ip);
    let answer = soon("a refusal", connect(&mesh, &client, &web, &forged, app, Some(&truth))).await;
    assert!(answer.is_err(), "{answer:?}");
    soon("the count", async {
        while b.proxy.shared().metrics.handshakes_failed.get() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_the_kernel_did_not_steer_is_closed() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    is_reset(&mut client.intrude().await).await;
    assert_eq!(a.proxy.shared().metrics.original_dst_missing.get(), 1);
    // The tunnel port is not for applications.
    is_reset(&mut client.dial((web.ip, mesh.tunnel_port()).into()).await).await;
    a.records.find("the refusal", |r| r.reason == Reason::TunnelPortDialled).await;
}

#[tokio::test]
async fn an_undescribed_address_is_held_then_refused_or_taken() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let client = mesh.pod(&a, "client");
    is_reset(&mut client.dial(([10, 99, 0, 7], 80).into()).await).await;
    a.records.find("the refusal", |r| r.reason == Reason::UnknownPeer).await;

    let web = mesh.pod(&b, "web");
    let app = web.echo().await;
    let vip = std::net::IpAddr::from([10, 99, 0, 8]);
    let mut held = client.dial((vip, 80).into()).await;
    let waiting = tokio::time::timeout(std::time::Duration::from_millis(50), ping(&mut held, b"early"));
    assert!(waiting.await.is_err(), "it is held while nobody described the address");
    mesh.service_at(vip, "web", AppProtocol::Tcp, &[(&web, app.port())]);
    let mut back = [0; 5];
    soon("an echo", held.read_exact(&mut back)).await.expect("it went through");
    assert_eq!(&back, b"early");
}
