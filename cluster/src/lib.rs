//! A real Kubernetes on one machine, without a container engine: etcd, the control plane and any number of nodes
//! (kubelet, containerd, runc, CNI, kube-proxy), each node with its own net, mount, uts, pid and cgroup namespaces.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use weft_cluster::{Cluster, Options};
//! let cluster = Cluster::up(&Options::default(), &|line| eprintln!("{line}"))?;
//! cluster.load(std::path::Path::new("agent.tar"))?;
//! cluster.apply("{apiVersion: v1, kind: Namespace, metadata: {name: shop}}")?;
//! assert!(cluster.kubectl(&["get", "nodes"])?.contains("Ready"));
//! # Ok(())
//! # } // dropped: the cluster is gone, with everything that it made
//! ```
//!
//! Two clusters do not meet: names are unique, and all addresses live in namespaces of their own. The programs come
//! from [`parts`], cached outside the checkout.

#![forbid(unsafe_code)]

pub mod cache;
mod cgroup;
mod cluster;
mod control;
mod dns;
pub mod image;
mod net;
mod node;
mod options;
pub mod parts;
mod pki;
pub mod product;
pub mod record;
mod sh;
pub mod spire;
pub mod vm;

pub use cluster::Cluster;
pub use control::Program;
pub use node::{Node, Service};
pub use options::{Cni, Options, ProxyMode};
