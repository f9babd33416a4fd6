//! The gRPC services for agents.

use tonic::{Request, Status};

use crate::{
    auth::{Refused, Tokens},
    metrics::{Metrics, Reason},
};

pub mod control;
pub mod identity;

/// The node that a call comes from; refused calls are counted and logged.
fn caller<T>(tokens: &Tokens, metrics: &Metrics, request: &Request<T>) -> Result<String, Status> {
    tokens.node(request.metadata()).map_err(|refused| {
        let reason = match refused {
            Refused::Missing => "missing",
            Refused::Invalid => "invalid",
            Refused::Revoked => "revoked",
        };
        metrics.unauthenticated.get_or_create(&Reason { reason }).inc();
        tracing::warn!(peer = ?request.remote_addr(), "a call is refused: {refused}");
        Status::unauthenticated(refused.to_string())
    })
}
