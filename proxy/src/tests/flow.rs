//! Bytes: both ways, half-close, resets, and what is recorded of them.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use weft_core::{
    flow::{Reason, Reporter, Tls, Verdict},
    service::AppProtocol,
};

use super::support::{Mesh, is_reset, ping, soon};

#[tokio::test]
async fn an_echo_through_a_service_and_a_tunnel() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let vip = mesh.service("web", AppProtocol::Tcp, &[(&web, app.port())]);
    let mut stream = client.dial(vip).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    let port = stream.local_addr().expect("an address").port();
    drop(stream);

    let sent = a.records.find("the source's end", |r| !r.opening).await;
    let received = b.records.find("the destination's end", |r| !r.opening).await;
    for record in [&sent, &received] {
        assert_eq!((record.verdict, record.reason), (Verdict::Forwarded, Reason::None));
        assert_eq!((record.sent, record.received), (5, 5));
        assert_eq!(record.source.identity.as_ref(), Some(&client.workload.identity));
        assert_eq!(record.destination.identity.as_ref(), Some(&web.workload.identity));
        let Tls::Mutual { key_exchange, cipher } = &record.tls else { panic!("{:?}", record.tls) };
        assert_eq!(key_exchange.as_ref(), "X25519MLKEM768");
        assert!(cipher.starts_with("TLS13_"), "{cipher}");
    }
    assert_eq!(sent.connection, received.connection);
    assert_eq!((sent.reporter, received.reporter), (Reporter::ProxySource, Reporter::ProxyDestination));
    assert!(sent.service.is_some_and(|(name, port)| name.name.as_ref() == "web" && port == 80));
    assert_eq!(
        web.net.shown.lock().as_slice(),
        [(client.ip, port).into()],
        "the application sees the client"
    );
}

#[tokio::test]
async fn the_server_may_speak_first() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let listener = web.listen().await;
    let mut stream = client.dial(listener.local_addr().expect("an address")).await;
    let (mut app, _) = soon("a connection", listener.accept()).await.expect("a connection");
    app.write_all(b"220 ready\r\n").await.expect("written");
    let mut banner = [0; 11];
    soon("the banner", stream.read_exact(&mut banner)).await.expect("a banner");
    assert_eq!(&banner, b"220 ready\r\n");
}

#[tokio::test]
async fn half_close_passes_both_ways() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    for client_first in [true, false] {
        let listener = web.listen().await;
        let mut stream = client.dial(listener.local_addr().expect("an address")).await;
        let (mut app, _) = soon("a connection", listener.accept()).await.expect("a connection");
        let (first, second) = if client_first { (&mut stream, &mut app) } else { (&mut app, &mut stream) };
        first.write_all(b"question").await.expect("written");
        first.shutdown().await.expect("closed");
        let mut text = String::new();
        soon("the first half", second.read_to_string(&mut text)).await.expect("a clean end");
        assert_eq!(text, "question");
        second.write_all(b"answer").await.expect("the other half is open");
        second.shutdown().await.expect("closed");
        text.clear();
        soon("the second half", first.read_to_string(&mut text)).await.expect("a clean end");
        assert_eq!(text, "answer");
    }
}

#[tokio::test]
async fn a_failure_of_the_application_is_a_reset() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let listener = web.listen().await;
    let address = listener.local_addr().expect("an address");
    let mut stream = client.dial(address).await;
    let (mut app, _) = soon("a connection", listener.accept()).await.expect("a connection");
    app.write_all(b"x").await.expect("written");
    soon("a byte", stream.read_u8()).await.expect("the connection stands");
    app.set_zero_linger().expect("set");
    drop(app);
    is_reset(&mut stream).await;
    let end = a.records.find("the end", |r| !r.opening).await;
    assert_eq!((end.verdict, end.reason), (Verdict::Error, Reason::PeerReset));

    // And where nothing listens at all.
    drop(listener);
    is_reset(&mut client.dial(address).await).await;
    a.records.find("the failure", |r| r.reason == Reason::ConnectFailure).await;
    b.records.find("the failure", |r| r.reason == Reason::ConnectFailure).await;
}

#[tokio::test]
async fn a_client_that_fails_is_a_reset_for_the_application() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let listener = web.listen().await;
    let mut stream = client.dial(listener.local_addr().expect("an address")).await;
    let (mut app, _) = soon("a connection", listener.accept()).await.expect("a connection");
    app.write_all(b"x").await.expect("written");
    soon("a byte", stream.read_u8()).await.expect("the connection stands");
    stream.set_zero_linger().expect("set");
    drop(stream);
    is_reset(&mut app).await;
}

#[tokio::test]
async fn pods_of_one_node_talk_without_a_tunnel() {
    let mesh = Mesh::new();
    let node = mesh.node("node-a");
    let (client, web) = (mesh.pod(&node, "client"), mesh.pod(&node, "web"));
    let mut stream = client.dial(web.echo().await).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    stream.shutdown().await.expect("closed");
    let mut rest = Vec::new();
    soon("the end", stream.read_to_end(&mut rest)).await.expect("a clean end");
    for reporter in [Reporter::ProxySource, Reporter::ProxyDestination] {
        let end = node.records.find("the end", |r| r.reporter == reporter && !r.opening).await;
        assert_eq!((end.tls, end.sent, end.received), (Tls::Local, 5, 5));
        assert_eq!(end.source.identity.as_ref(), Some(&client.workload.identity));
    }
}

#[tokio::test]
async fn a_pod_outside_the_mesh_is_dialled_plainly() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let client = mesh.pod(&a, "client");
    let mut legacy = mesh.pod(&b, "legacy");
    legacy.workload.mode = weft_core::workload::Mode::Disabled;
    let resource = weft_core::Resource::Workload(std::sync::Arc::new(legacy.workload.clone()));
    mesh.apply(vec![resource], vec![]);
    let mut stream = client.dial(legacy.echo().await).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    drop(stream);
    let end = a.records.find("the end", |r| !r.opening).await;
    assert_eq!(end.tls, Tls::None);
    assert_eq!(end.destination.identity, None);
}

#[tokio::test]
async fn plaintext_from_outside_is_judged_by_address() {
    let mesh = Mesh::new();
    let node = mesh.node("node-b");
    let mut web = mesh.pod(&node, "web");
    let shared = node.proxy.shared();
    let pod = shared.pod(&web.uid).expect("the Pod");
    for allowed in [false, true] {
        if allowed {
            let mut rule = super::support::from_account("client");
            rule.sources = Some(vec![weft_core::policy::Source::Unauthenticated(vec![])]);
            mesh.police(&mut web, weft_core::policy::Action::Allow, vec![rule]);
        }
        let (mut outside, accepted, app) = super::support::plain(&web).await;
        let client = accepted.peer_addr().expect("an address");
        let serve = crate::inbound::plain::serve(shared.clone(), pod.clone(), accepted, client, ());
        let talk = async {
            if !allowed {
                is_reset(&mut outside).await;
                return;
            }
            let (mut app, _) = soon("a connection", app.accept()).await.expect("a connection");
            app.write_all(b"hi").await.expect("written");
            drop(app);
            let mut text = String::new();
            outside.read_to_string(&mut text).await.expect("a clean end");
            assert_eq!(text, "hi");
            outside.shutdown().await.expect("closed");
        };
        soon("plaintext", async { tokio::join!(serve, talk) }).await;
        let verdict = if allowed { Verdict::Forwarded } else { Verdict::Denied };
        let record = node.records.find("the record", |r| !r.opening && r.verdict == verdict).await;
        assert_eq!(record.source.identity, None);
        assert_eq!(record.reason, if allowed { Reason::None } else { Reason::PlaintextRefused });
    }
}
