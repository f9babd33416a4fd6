//! Signs identities, by the node rule: a node gets certificates only for Pods that are scheduled on it.

use std::sync::Arc;

use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use tonic::{Request, Response, Status};
use weft_core::{Resource, SpiffeId, config::Issuer};
use weft_identity::ca::CaError;
use weft_proto::control::{
    SignRequest, SignResponse, TrustRequest, TrustResponse, identity_server::Identity,
};

use weft_runtime::DrainWatcher;

use super::caller;
use crate::{
    auth::Authenticator,
    authority::Signing,
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
    pub ca: Signing,
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
            loop {
                tokio::select! {
                    () = drain.draining() => {
                        return Some((Err(Status::unavailable("the operator stops; try again")), None));
                    }
                    changed = ca.changed() => {
                        // Whoever changed the CA is gone; the roots stay until the process ends.
                        if changed.is_err() {
                            drain.draining().await;
                            return None;
                        }
                        let Some(now) = ca.borrow_and_update().clone() else { continue };
                        let answer = TrustResponse {
                            trust_domain: now.trust_domain().to_string(),
                            roots_der: now.roots().iter().map(|root| root.to_vec()).collect(),
                        };
                        return Some((Ok(answer), Some((ca, drain))));
                    }
                }
            }
        });
        Ok(Response::new(followed.boxed()))
    }

    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let node = caller(&*self.callers, &self.metrics, &request).await?;
        let SignRequest { namespace, service_account, csr_der, node: itself } = request.into_inner();
        let Some(state) = self.distribution.current() else {
            return Err(Status::unavailable("the operator has not read its objects yet; try again"));
        };
        let config = state.resources.values().find_map(|published| match &published.resource {
            Resource::Config(config) => Some(config),
            _ => None,
        });
        if let Some(Issuer::Spire { socket }) = config.map(|config| &config.issuer) {
            self.refused("issuer");
            return Err(Status::failed_precondition(format!(
                "the MeshConfig's issuer is Spire: the operator signs nothing, the SPIRE agent at {socket} does"
            )));
        }
        let lifetime = config.map_or(weft_identity::ca::SVID_LIFETIME, |config| config.svid_lifetime);
        let Some(ca) = self.ca.borrow().clone() else {
            self.refused("no_ca");
            return Err(Status::unavailable(
                "the operator has no usable CA; the condition CertificateAuthority of the MeshConfig says why",
            ));
        };
        let id = if itself.is_empty() {
            if !is_object_name(&namespace) || !is_object_name(&service_account) {
                self.refused("malformed");
                let message = "namespace and service_account must be names of objects";
                return Err(Status::invalid_argument(message));
            }
            let scheduled = state.resources.values().any(|published| match &published.resource {
                Resource::Workload(w) => {
                    *w.node == *node
                        && *w.name.namespace == *namespace
                        && *w.service_account == *service_account
                }
                _ => false,
            });
            if !scheduled {
                let what = format!("service account {namespace}/{service_account}");
                return Err(
                    self.not_of_the_node(&node, &format!("no Pod of {what} is scheduled on node {node}"))
                );
            }
            SpiffeId::service_account(ca.trust_domain(), &namespace, &service_account)
        } else {
            if !namespace.is_empty() || !service_account.is_empty() {
                self.refused("malformed");
                return Err(Status::invalid_argument(
                    "ask for a service account or for the node, not for both",
                ));
            }
            // The name that the caller has proven, never the one that it gives.
            if *itself != *node {
                let asked: String = itself.chars().take(253).collect();
                let message = format!("node {node} may not have the identity of node {asked:?}");
                return Err(self.not_of_the_node(&node, &message));
            }
            if !is_object_name(&node) {
                self.refused("malformed");
                return Err(Status::invalid_argument("the node's name is not the name of an object"));
            }
            SpiffeId::node(ca.trust_domain(), &node)
        };
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
    fn not_of_the_node(&self, node: &str, message: &str) -> Status {
        self.refused("node_rule");
        tracing::warn!(node, "node rule: a certificate is refused: {message}");
        Status::permission_denied(format!("node rule: {message}"))
    }

    fn refused(&self, reason: &'static str) {
        self.metrics.sign_refused.get_or_create(&Reason { reason }).inc();
    }
}
