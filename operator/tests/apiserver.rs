//! The operator's Kubernetes side against a real API server (etcd and kube-apiserver).
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "apiserver/ca.rs"]
mod ca;
#[path = "apiserver/crds.rs"]
mod crds;
#[path = "apiserver/objects.rs"]
mod objects;
#[path = "apiserver/operator.rs"]
mod operator;
#[path = "apiserver/parts.rs"]
mod parts;
#[path = "apiserver/proxy.rs"]
mod proxy;
#[path = "apiserver/server.rs"]
mod server;
#[path = "apiserver/source.rs"]
mod source;
#[path = "apiserver/start.rs"]
mod start;
#[path = "apiserver/viewers.rs"]
mod viewers;
