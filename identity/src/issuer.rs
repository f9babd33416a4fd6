//! Who signs: one trait, several implementations.

use std::{future::Future, pin::Pin};

use rustls_pki_types::CertificateDer;
use weft_core::SpiffeId;

/// A boxed future, so that issuers can be trait objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Signs certificate requests of this node's workloads.
pub trait Issuer: Send + Sync {
    /// Has `csr_der` (PKCS#10) signed for `id`. Only the request's key counts; names in it are ignored.
    ///
    /// The future may be dropped at any await.
    fn sign<'a>(&'a self, id: &'a SpiffeId, csr_der: Vec<u8>) -> BoxFuture<'a, Result<Signed, IssueError>>;
}

/// What an issuer gives for a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots of the trust domain; more than one while a root is being replaced.
    pub roots: Vec<CertificateDer<'static>>,
}

/// Why there is no certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// The issuer refused; it may change its mind when it learns of the Pod.
    #[error("the issuer refuses: {0}; is a Pod of this service account scheduled on this node?")]
    Denied(String),
    /// The issuer does not know this node.
    #[error("the issuer does not accept this node's token: {0}; check the token file and its audience")]
    Unauthenticated(String),
    /// The issuer cannot be reached or did not answer in time.
    #[error("the issuer is not available: {0}; check that weft-operator runs and is ready")]
    Unavailable(String),
    /// The answer cannot be used.
    #[error("the issuer's answer is not usable: {0}")]
    Invalid(String),
    /// The request could not be made.
    #[error("the request could not be made: {0}")]
    Request(String),
}
