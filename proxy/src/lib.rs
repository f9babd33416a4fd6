//! The node proxy as a library: it knows sockets, TLS, HTTP and policy, but neither BPF nor Kubernetes.
#![forbid(unsafe_code)]

pub mod platform;

pub use platform::{Family, OriginalDst, PodHandle, PodListeners, PodNet};
