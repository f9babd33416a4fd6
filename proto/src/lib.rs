//! The protocols: operator and agent (`control`), an agent's own state (`agent`), flows (`observer`, `flow`),
//! and the container runtime's (`cri`, `nri`, `ttrpc`).
#![forbid(unsafe_code)]
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the .proto files hold the documentation"
)]

/// Operator and agent.
pub mod control {
    tonic::include_proto!("weft.control.v1");
}

/// An agent's own state.
pub mod agent {
    tonic::include_proto!("weft.agent.v1");
}

/// Flow records, as Hubble's `flow` package numbers them.
pub mod flow {
    tonic::include_proto!("flow");
}

/// Node states, as Hubble's `relay` package numbers them.
pub mod relay {
    tonic::include_proto!("relay");
}

/// The observer service, as Hubble speaks it.
pub mod observer {
    tonic::include_proto!("observer");
}

/// Weft's part of a flow, in `flow::Flow::extensions`.
pub mod weft_flow {
    tonic::include_proto!("weft.flow.v1");

    /// The type URL of [`Flow`] in an `Any`.
    pub const TYPE_URL: &str = "type.googleapis.com/weft.flow.v1.Flow";
}

/// Flows and states of all nodes through the operator.
pub use weft::relay::v1 as weft_relay;

/// Packages whose generated code names other packages, where it looks for them.
mod weft {
    pub(crate) mod agent {
        pub(crate) use crate::agent as v1;
    }

    pub(crate) mod relay {
        pub mod v1 {
            tonic::include_proto!("weft.relay.v1");
        }
    }
}

/// The standard health service.
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// The container runtime, as the kubelet speaks to it.
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

/// The container runtime's plugins.
pub mod nri {
    tonic::include_proto!("nri.pkg.api.v1alpha1");
}

/// What NRI is spoken over.
pub mod ttrpc {
    tonic::include_proto!("ttrpc");
}
