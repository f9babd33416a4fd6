//! What the soak has on its nodes beside the benchmark's: some ports whose requests are judged and routed, a server of
//! blobs, and a file whose bytes are known.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::Result;
use weft_tests::{lab::net, wait};

use super::super::ground::{BULK, Ground, H2, HTTP, REQUESTED};
use crate::load::soak::{BODY, blob};

/// Blobs.
pub(super) const BLOBS: u16 = 8082;

/// Connections are judged at some ports and requests at others; the Services of those have routes.
fn objects() -> String {
    let [http, h2] = REQUESTED;
    let service = |name: &str, pod: &str, port: u16, protocol: &str| {
        format!(
            "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: bench}}
spec:
  selector: {{pod: {pod}}}
  ports: [{{name: http, port: {port}, targetPort: {port}, appProtocol: {protocol}}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: bench}}
spec:
  parentRefs: [{{group: \"\", kind: Service, name: {name}}}]
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /}}}}]
    backendRefs: [{{name: {name}, port: {port}}}]
---
"
        )
    };
    [
        service("requests", "server", http, "http"),
        service("requests-h2", "server", h2, "kubernetes.io/h2c"),
        service("requests-near", "near", http, "http"),
    ]
    .concat()
        + &format!(
            "apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: soak, namespace: bench}}
spec:
  targetRefs: [{{group: \"\", kind: Pod, selector: {{matchLabels: {{app: server}}}}}}]
  action: ALLOW
  rules:
  - sources: [{{type: ServiceAccount, serviceAccount: {{name: client}}}}]
    networkAttributes: {{ports: [{HTTP}, {H2}, {BULK}, {BLOBS}]}}
  - sources: [{{type: ServiceAccount, serviceAccount: {{name: client}}}}]
    networkAttributes: {{ports: [{http}, {h2}]}}
    http: [{{methods: [GET, POST], paths: [{{type: PathPrefix, value: /}}]}}]
"
        )
}

/// Puts it there.
///
/// # Errors
/// When a node does not enforce it in time, or the server does not listen.
pub(super) fn settle(ground: &mut Ground) -> Result<()> {
    ground.lab.take_in("soak", &objects())?;
    ground.lab.delete("policy")?;
    let mut body = Vec::new();
    while (body.len() as u64) < BODY {
        body.extend_from_slice(blob::piece(0, body.len() as u64, BODY));
    }
    for pod in ["server", "near"] {
        fs::write(ground.lab.pod(pod)?.folder(ground.lab.dir()).join("www/blob"), &body)?;
    }
    let command = ground.load("server", &["blobs".into(), BLOBS.to_string()])?;
    ground.keep("server", "blobs", command)?;
    let place = ground.lab.pod("server")?.place.clone();
    let address = ground.address("server")?;
    wait::until(Duration::from_secs(10), "the server of blobs", || {
        net::within(&place.netns, || Ok(std::net::TcpStream::connect((address, BLOBS))?)).map(drop)
    })?;
    Ok(())
}

/// Where loads go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Targets {
    pub(super) http: SocketAddr,
    pub(super) h2: SocketAddr,
    pub(super) blobs: SocketAddr,
    pub(super) l7: SocketAddr,
    pub(super) l7_h2: SocketAddr,
    pub(super) l7_near: SocketAddr,
}

/// Of this ground.
///
/// # Errors
/// Before [`settle`].
pub(super) fn targets(ground: &Ground) -> Result<Targets> {
    let server = ground.address("server")?;
    let [http, h2] = REQUESTED;
    let service = |name: &str, port| -> Result<SocketAddr> {
        Ok(SocketAddr::new(ground.lab.service(name, false)?, port))
    };
    Ok(Targets {
        http: SocketAddr::new(server, HTTP),
        h2: SocketAddr::new(server, H2),
        blobs: SocketAddr::new(server, BLOBS),
        l7: service("bench/requests", http)?,
        l7_h2: service("bench/requests-h2", h2)?,
        l7_near: service("bench/requests-near", http)?,
    })
}
