//! The protocols: operator and agent (`control`), an agent's own state (`agent`), flows (`observer`, `flow`).
#![forbid(unsafe_code)]
#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code; the .proto files hold the documentation")]

/// Operator and agent.
pub mod control {
    tonic::include_proto!("weft.control.v1");
}

/// An agent's own state.
pub mod agent {
    tonic::include_proto!("weft.agent.v1");
}
