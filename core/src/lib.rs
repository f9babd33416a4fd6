//! The mesh as plain data: workloads, services, routes, policy, and the reference interpreter that judges them.
//!
//! Nothing here knows Kubernetes, BPF or an async runtime. The operator builds this state from what users write,
//! streams each node its share, and the agent turns the share into kernel maps and hands it to the proxy.
#![forbid(unsafe_code)]

pub mod config;
pub mod flow;
pub mod http;
pub mod id;
pub mod policy;
pub mod route;
pub mod service;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod workload;

pub use config::MeshConfig;
pub use id::{NamespacedName, SpiffeId, SubjectId, TrustDomain, WorkloadUid};
pub use policy::Policy;
pub use route::HttpRoute;
pub use service::Service;
pub use state::{Delta, MeshState, Resource, ResourceKey, Version};
pub use workload::Workload;
