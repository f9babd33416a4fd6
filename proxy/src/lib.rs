//! The node proxy as a library: it knows sockets, TLS, HTTP and policy, but neither BPF nor Kubernetes.
#![forbid(unsafe_code)]

mod accept;
pub mod balance;
mod beside;
pub mod config;
pub mod connections;
pub mod copy;
pub mod early;
pub mod hbone;
pub mod http;
pub mod inbound;
pub mod l7;
pub mod metrics;
pub mod outbound;
pub mod pipe;
pub mod platform;
pub mod pod;
pub mod proxy;
pub mod record;
pub mod socket;
pub mod tls;
pub mod tunnel;
pub mod upstream;

pub use config::ProxyConfig;
pub use platform::{Family, OriginalDst, PodHandle, PodListeners, PodNet};
pub use proxy::Proxy;

#[cfg(test)]
mod tests;
