//! Many streams, stalled streams, drain.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use weft_runtime::Tasks;

use super::support::{Mesh, ping, soon};
use crate::tunnel::{MAX_STREAMS, STREAM_WINDOW};

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_at_once() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let mut streams = Vec::new();
    for _ in 0..1000 {
        streams.push(client.dial(app).await);
    }
    let tasks = Tasks::new();
    let (done, mut answers) = tokio::sync::mpsc::channel(1000);
    for (n, mut stream) in streams.into_iter().enumerate() {
        let done = done.clone();
        tasks.spawn("client", async move {
            let result = ping(&mut stream, format!("{n:08}").repeat(2000).as_bytes()).await;
            // Kept open until all are through.
            let _ = done.send((result, stream)).await;
        });
    }
    drop(done);
    let mut open = Vec::new();
    while let Some((result, stream)) = soon("an echo", answers.recv()).await {
        result.expect("an echo");
        open.push(stream);
    }
    assert_eq!(open.len(), 1000);
    let tunnels = a.proxy.shared().pod(&client.uid).expect("the Pod").pool().connections();
    assert_eq!(tunnels, 1000 / MAX_STREAMS as usize);
}

#[tokio::test(flavor = "multi_thread")]
async fn stalled_streams_do_not_hold_up_others() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let listener = web.listen().await;
    let address = listener.local_addr().expect("an address");
    let mut stalled = Vec::new();
    for _ in 0..MAX_STREAMS - 1 {
        let mut stream = client.dial(address).await;
        let (app, _) = soon("a connection", listener.accept()).await.expect("a connection");
        // The application never reads. Far more than its window and socket buffers hold is offered.
        let offered = vec![7; 32 * STREAM_WINDOW as usize];
        let fill = async {
            loop {
                let _ = stream.write_all(&offered).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(20), fill).await;
        stalled.push((stream, app));
    }
    let echo = web.echo().await;
    let mut stream = client.dial(echo).await;
    soon("an echo beside stalled streams", ping(&mut stream, &vec![1; 1024 * 1024])).await.expect("an echo");
    let tunnels = a.proxy.shared().pod(&client.uid).expect("the Pod").pool().connections();
    assert_eq!(tunnels, 1, "they share one connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_beside_bulk_has_another_tunnel() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let mut bulk = client.dial(app).await;
    let pod = a.proxy.shared().pod(&client.uid).expect("the Pod");
    let much = vec![1; 1024 * 1024];
    soon("a tunnel without bulk", async {
        while pod.pool().connections() < 2 {
            ping(&mut bulk, &much).await.expect("an echo");
        }
    })
    .await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = client.dial(app).await;
        soon("an echo", ping(&mut stream, b"a request")).await.expect("an echo");
        streams.push(stream);
    }
    let mut shared = pod.pool().streams();
    shared.sort_unstable();
    assert_eq!(shared, [1, 3]);
}

#[tokio::test]
async fn drain_lets_connections_end_and_takes_no_more() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let mut stream = client.dial(app).await;
    soon("an echo", ping(&mut stream, b"before")).await.expect("an echo");
    let trigger = b.drain;
    let draining = trigger.drain(Duration::from_secs(15));
    let talk = async {
        let pod = a.proxy.shared().pod(&client.uid).expect("the Pod");
        let pool = pod.pool();
        // The tunnel's peer says that it takes no more.
        soon("a goodbye", async {
            while tokio::net::TcpStream::connect((web.ip, mesh.tunnel_port())).await.is_ok() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        ping(&mut stream, b"during").await.expect("live connections go on");
        super::support::is_reset(&mut client.dial(app).await).await;
        stream.shutdown().await.expect("closed");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.expect("a clean end");
        assert_eq!(rest.len(), 0);
        let _ = pool;
    };
    let (in_time, ()) = soon("the drain", async { tokio::join!(draining, talk) }).await;
    assert!(in_time, "it waited for its deadline");
}

#[tokio::test]
async fn drain_serves_what_the_kernel_has_accepted() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let mut queued: Vec<_> = (0..8).map(|_| client.dial_unaccepted(app)).collect();
    let talk = async {
        for stream in &mut queued {
            soon("an echo", ping(stream, b"queued")).await.expect("it is served");
        }
        queued.clear();
    };
    let (in_time, ()) =
        soon("the drain", async { tokio::join!(a.drain.drain(Duration::from_secs(15)), talk) }).await;
    assert!(in_time, "it waited for its deadline");
}

#[tokio::test]
async fn nothing_is_left_to_abort_after_the_drain() {
    let mesh = Mesh::new();
    let node = mesh.node("node-a");
    let pod = mesh.pod(&node, "web");
    assert!(soon("the drain", node.drain.drain(Duration::from_secs(15))).await);
    assert_eq!(soon("the tasks", node.tasks.join(Duration::from_secs(10))).await, 0);
    drop(pod);
}

#[tokio::test]
async fn metrics_name_the_pair_and_forget_it() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("node-a"), mesh.node("node-b"));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let mut stream = client.dial(web.echo().await).await;
    soon("an echo", ping(&mut stream, b"hello")).await.expect("an echo");
    drop(stream);
    a.records.find("the end", |r| !r.opening).await;
    let text = |registry: &prometheus_client::registry::Registry| {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).expect("metrics");
        text
    };
    let line = "weft_bytes_sent_total{reporter=\"source\",source_namespace=\"shop\",source_workload=\"client\",\
                source_identity=\"spiffe://mesh.test/ns/shop/sa/client\",destination_namespace=\"shop\",\
                destination_workload=\"web\",destination_identity=\"spiffe://mesh.test/ns/shop/sa/web\"} 5";
    assert!(text(&a.registry).contains(line), "{}", text(&a.registry));
    mesh.apply(vec![], vec![weft_core::ResourceKey::Workload(web.uid.clone())]);
    soon("the series to go", async {
        while text(&a.registry).contains("destination_workload=\"web\"") {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
