//! Signs identities, by the node rule: a node gets certificates only for Pods that are scheduled on it.

use std::sync::Arc;

use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use weft_core::{Resource, SpiffeId};
use weft_identity::ca::{CaError, EmbeddedCa};
use weft_proto::control::{
    SignRequest, SignResponse, TrustRequest, TrustResponse, identity_server::Identity,
};

use weft_runtime::DrainWatcher;

use super::caller;
use crate::{
    auth::Authenticator,
    distribution::Distribution,
    metrics::{Metrics, Reason},
    objects::is_object_name,
};

/// The service.
#[derive(Clone)]
pub struct IdentityService {
    /// Who is scheduled where.
    pub distribution: Arc<Distribution>,
    /// Who may ask.
    pub callers: Arc<dyn Authenticator>,
    /// Who signs.
    pub ca: watch::Receiver<Arc<EmbeddedCa>>,
    /// What is counted.
    pub metrics: Metrics,
    /// When streams end.
    pub drain: DrainWatcher,
}

#[tonic::async_trait]
impl Identity for IdentityService {
    type TrustStream = BoxStream<'static, Result<TrustResponse, Status>>;

    async fn trust(&self, request: Request<TrustRequest>) -> Result<Response<Self::TrustStream>, Status> {
        caller(&*self.callers, &self.metrics, &request).await?;
        let mut ca = self.ca.clone();
        ca.mark_changed();
        let followed = stream::unfold(Some((ca, self.drain.clone())), async |state| {
            let (mut ca, drain) = state?;
            tokio::select! {
                () = drain.draining() => {
                    Some((Err(Status::unavailable("the operator stops; try again")), None))
                }
                changed = ca.changed() => {
                    // Whoever changed the CA is gone; the roots stay until the process ends.
                    if changed.is_err() {
                        drain.draining().await;
                        return None;
                    }
                    let now = Arc::clone(&ca.borrow_and_update());
                    let answer = TrustResponse {
                        trust_domain: now.trust_domain().to_string(),
                        roots_der: now.roots().iter().map(|root| root.to_vec()).collect(),
                    };
                    Some((Ok(answer), Some((ca, drain))))
                }
            }
        });
        Ok(Response::new(followed.boxed()))
    }

    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let node = caller(&*self.callers, &self.metrics, &request).await?;
        let SignRequest { namespace, service_account, csr_der } = request.into_inner();
        if !is_object_name(&namespace) || !is_object_name(&service_account) {
            self.refused("malformed");
            return Err(Status::invalid_argument("namespace and service_account must be names of objects"));
        }
        let Some(state) = self.distribution.current() else {
            return Err(Status::unavailable("the operator has not read its objects yet; try again"));
        };
        let mut lifetime = weft_identity::ca::SVID_LIFETIME;
        let mut scheduled = false;
        for published in state.resources.values() {
            match &published.resource {
                Resource::Config(config) => lifetime = config.svid_lifetime,
                Resource::Workload(w) => {
                    scheduled |= *w.node == *node
                        && *w.name.namespace == *namespace
                        && *w.service_account == *service_account;
                }
                _ => {}
            }
        }
        if !scheduled {
            self.refused("node_rule");
            tracing::warn!(
                node,
                "node rule: a certificate for {namespace}/{service_account} is refused, no Pod of it is scheduled there"
            );
            return Err(Status::permission_denied(format!(
                "node rule: no Pod of service account {namespace}/{service_account} is scheduled on node {node}"
            )));
        }
        let ca = Arc::clone(&self.ca.borrow());
        let id = SpiffeId::service_account(ca.trust_domain(), &namespace, &service_account);
        let signed = ca.sign(&id, &csr_der, lifetime).map_err(|error| {
            self.refused("ca");
            match error {
                CaError::Request(_) => Status::invalid_argument(error.to_string()),
                _ => {
                    tracing::error!(node, %id, "cannot sign: {error}");
                    Status::internal(error.to_string())
                }
            }
        })?;
        self.metrics.signed.inc();
        tracing::info!(node, %id, "a certificate is signed");
        Ok(Response::new(SignResponse {
            chain_der: signed.chain.iter().map(|c| c.to_vec()).collect(),
            trust_domain: ca.trust_domain().to_string(),
            roots_der: signed.roots.iter().map(|c| c.to_vec()).collect(),
        }))
    }
}

impl IdentityService {
    fn refused(&self, reason: &'static str) {
        self.metrics.sign_refused.get_or_create(&Reason { reason }).inc();
    }
}
