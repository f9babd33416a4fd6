//! Connections on threads of their own.

use std::num::NonZeroUsize;

use weft_runtime::Workers;

use super::support::{Mesh, ping, soon};

#[tokio::test]
async fn connections_are_spread_and_each_worker_has_its_tunnel() {
    let mesh = Mesh::new();
    let workers = || Workers::start(NonZeroUsize::new(2).expect("two")).expect("threads");
    let (a, b) = (mesh.node_of("node-a", workers(), |_| {}), mesh.node_of("node-b", workers(), |_| {}));
    let (client, web) = (mesh.pod(&a, "client"), mesh.pod(&b, "web"));
    let app = web.echo().await;
    let mut open = Vec::new();
    for n in 0..20_usize {
        let mut stream = client.dial(app).await;
        soon("an echo", ping(&mut stream, &vec![n as u8; 100_000])).await.expect("an echo");
        open.push(stream);
    }
    let pod = a.proxy.shared().pod(&client.uid).expect("the Pod");
    let tunnels: Vec<usize> = pod.pools().iter().map(crate::tunnel::client::Pool::connections).collect();
    assert_eq!(tunnels, [1, 1]);
    assert_eq!(a.proxy.connections(), open.len());
}
