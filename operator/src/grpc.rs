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
        Refused::Forbidden(_) => "forbidden",
        Refused::Unavailable(_) => "unavailable",
    };
    metrics.unauthenticated.get_or_create(&Reason { reason }).inc();
    tracing::warn!(?peer, "a call is refused: {refused}");
    match refused {
        Refused::Unavailable(why) => Status::unavailable(why),
        Refused::Forbidden(why) => Status::permission_denied(why),
        other => Status::unauthenticated(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::kubernetes::{Cluster, review::Reviewer};

    #[tokio::test]
    async fn who_cannot_be_checked_now_shall_try_again() {
        // An API server that is away.
        let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let client = kube::Client::try_from(config).unwrap();
        let reviewer =
            Reviewer::new(&Cluster { client, namespace: "weft-system".into(), pod: "operator-0".into() });
        let metrics = Metrics::new(&mut prometheus_client::registry::Registry::default());
        let code = async |header: Option<&str>| {
            let mut request = Request::new(());
            if let Some(header) = header {
                request.metadata_mut().insert("authorization", header.parse().unwrap());
            }
            caller(&reviewer, &metrics, &request).await.unwrap_err()
        };
        let status = code(Some("Bearer never.seen.before")).await;
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(status.message().contains("cannot check tokens now"), "{status}");
        assert_eq!(code(None).await.code(), Code::Unauthenticated);
    }
}
