//! A tunnel ends with the certificates it was made under, unless both its ends prove themselves anew.

use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use weft_core::{
    Resource, SpiffeId,
    flow::{Reason, Verdict},
};
use weft_identity::ca::EmbeddedCa;

use super::support::{Mesh, Node, Pod, is_reset, ping, soon};

/// Times in certificates are whole seconds: the least that a handshake surely fits into.
const LIFE: Duration = Duration::from_secs(3);

/// A connection from `client` to `web`, one of which has a certificate that ends soon. What that one shows from then on
/// the other does not take: it is another CA's.
async fn opened(mesh: &Mesh, (node, brief): (&Node, &Pod), client: &Pod, web: &Pod) -> TcpStream {
    let id = &brief.workload.identity;
    node.publisher.publish(Mesh::credentials_for(&mesh.ca, id, LIFE));
    let mut stream = client.dial(web.echo().await).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    let other = EmbeddedCa::generate(mesh.ca.trust_domain().clone()).expect("a CA");
    node.publisher.publish(Mesh::credentials(&other, id));
    stream
}

#[tokio::test]
async fn the_end_of_the_callers_certificate_ends_its_connections() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let mut stream = opened(&mesh, (&a, &client), &client, &web).await;
    is_reset(&mut stream).await;
    let end = b.records.find("the end", |r| !r.opening).await;
    assert_eq!((end.verdict, end.reason), (Verdict::Error, Reason::NoCredentials));
    // With a good one there is a new tunnel.
    a.publisher.publish(Mesh::credentials(&mesh.ca, &client.workload.identity));
    soon("an echo", ping(&mut client.dial(web.echo().await).await, b"again")).await.expect("an echo");
}

#[tokio::test]
async fn the_end_of_the_servers_certificate_ends_its_connections() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let mut stream = opened(&mesh, (&b, &web), &client, &web).await;
    let pod = a.proxy.shared().pod(&client.uid).expect("the Pod");
    let pool = pod.pool();
    is_reset(&mut stream).await;
    let end = a.records.find("the end", |r| !r.opening).await;
    assert_eq!((end.verdict, end.reason), (Verdict::Error, Reason::NoCredentials));
    soon("the tunnel to go", async {
        while pool.connections() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    b.publisher.publish(Mesh::credentials(&mesh.ca, &web.workload.identity));
    soon("an echo", ping(&mut client.dial(web.echo().await).await, b"again")).await.expect("an echo");
}

#[tokio::test]
async fn a_tunnel_retires_before_its_end() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let life = Duration::from_secs(4);
    b.publisher.publish(Mesh::credentials_for(&mesh.ca, &web.workload.identity, life));
    let app = web.echo().await;
    let mut first = client.dial(app).await;
    soon("an echo", ping(&mut first, b"old")).await.expect("an echo");
    b.publisher.publish(Mesh::credentials(&mesh.ca, &web.workload.identity));
    let pod = a.proxy.shared().pod(&client.uid).expect("the Pod");
    let pool = pod.pool();
    soon("a second tunnel", async {
        while pool.connections() < 2 {
            ping(&mut client.dial(app).await, b"new").await.expect("an echo");
        }
    })
    .await;
    ping(&mut first, b"still").await.expect("what is under way goes on");
}

/// Long enough for a few attempts to prove the ends anew before it ends, on a busy machine too.
const RENEWED: Duration = Duration::from_secs(4);

/// Keeps `stream` in use for more than two lives of a certificate, and both sides' credentials renewed meanwhile.
async fn renewed(mesh: &Mesh, sides: &[(&Node, &Pod)], stream: &mut TcpStream) {
    let end = Instant::now() + RENEWED * 2 + Duration::from_secs(1);
    let mut tick = tokio::time::interval(RENEWED / 8);
    while Instant::now() < end {
        tick.tick().await;
        for (node, pod) in sides {
            node.publisher.publish(Mesh::credentials_for(&mesh.ca, &pod.workload.identity, RENEWED));
        }
        soon("an echo", ping(stream, b"still here")).await.expect("the connection lives on");
    }
}

#[tokio::test]
async fn a_connection_outlives_renewed_certificates_and_ends_when_the_issuer_stops() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.describe(&a, "client"), mesh.describe(&b, "web"));
    for (node, pod) in [(&a, &client), (&b, &web)] {
        node.publisher.publish(Mesh::credentials_for(&mesh.ca, &pod.workload.identity, RENEWED));
    }
    let mut stream = client.dial(web.echo().await).await;
    renewed(&mesh, &[(&a, &client), (&b, &web)], &mut stream).await;
    let pod = a.proxy.shared().pod(&client.uid).expect("the Pod");
    let pool = pod.pool();
    assert!(pool.connections() <= 6, "{} tunnels for one connection", pool.connections());
    // Nobody signs for the server any more; the client has what it needs.
    a.publisher.publish(Mesh::credentials(&mesh.ca, &client.workload.identity));
    is_reset(&mut stream).await;
}

#[tokio::test]
async fn a_connection_does_not_outlive_its_peers_identity() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.describe(&b, "web"));
    b.publisher.publish(Mesh::credentials_for(&mesh.ca, &web.workload.identity, LIFE));
    let app = web.echo().await;
    let mut stream = client.dial(app).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    // From here on it proves to be somebody else, whose certificate is good; its own side would go on.
    let mut other = web.workload.clone();
    other.identity = SpiffeId::service_account(mesh.ca.trust_domain(), "shop", "other");
    b.publisher.publish(Mesh::credentials(&mesh.ca, &web.workload.identity));
    b.publisher.publish(Mesh::credentials(&mesh.ca, &other.identity));
    mesh.apply(vec![Resource::Workload(other.into())], vec![]);
    is_reset(&mut stream).await;
    let end = a.records.find("the end", |r| !r.opening).await;
    assert_eq!((end.verdict, end.reason), (Verdict::Error, Reason::NoCredentials));
    soon("an echo", ping(&mut client.dial(app).await, b"again")).await.expect("an echo");
}
