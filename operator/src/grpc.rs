//! The gRPC services for agents.

use std::net::SocketAddr;

use tonic::{Request, Status};

use crate::{
    auth::{Authenticator, Refused, bearer},
    metrics::{Metrics, Reason},
};

pub mod control;
pub mod identity;
pub mod pieces;
pub mod turns;

/// The node that a call comes from; refused calls are counted and logged.
pub(crate) fn caller<'a, T>(
    callers: &'a dyn Authenticator,
    metrics: &'a Metrics,
    request: &Request<T>,
) -> impl Future<Output = Result<String, Status>> + Send + use<'a, T> {
    let (token, peer) = (bearer(request.metadata()).map(str::to_owned), request.remote_addr());
    async move {
        let outcome = match token {
            Ok(token) => callers.node(&token).await,
            Err(refused) => Err(refused),
        };
        outcome.map_err(|refused| refuse(metrics, peer, refused))
    }
}

fn refuse(metrics: &Metrics, peer: Option<SocketAddr>, refused: Refused) -> Status {
    let reason = match refused {
        Refused::Missing => "missing",
        Refused::Invalid => "invalid",
        Refused::Revoked => "revoked",
        Refused::NoAgent(_) => "no_agent",
        Refused::Unavailable(_) => "unavailable",
    };
    metrics.unauthenticated.get_or_create(&Reason { reason }).inc();
    tracing::warn!(?peer, "a call is refused: {refused}");
    match refused {
        Refused::Unavailable(why) => Status::unavailable(why),
        other => Status::unauthenticated(other.to_string()),
    }
}
