//! Who signs: one trait, several implementations.

use std::{future::Future, pin::Pin};

use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use rustls_pki_types::CertificateDer;
use weft_core::SpiffeId;

use crate::{SvidKey, spire::SpireError};

/// A boxed future, so that issuers can be trait objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Obtains credentials for this node's workloads.
pub trait Issuer: Send + Sync {
    /// A key for `id`, and the certificate and roots that go with it.
    ///
    /// The future may be dropped at any await.
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>>;

    /// What comes without being asked for; the stream is made again, with pauses, when it fails or ends. An issuer
    /// that never has any leaves it pending.
    fn updates(&self) -> BoxStream<'_, Result<Update, IssueError>> {
        stream::pending().boxed()
    }

    /// Whether it renews by its own clock, through [`Self::updates`], what it has once issued.
    fn renews(&self) -> bool {
        false
    }

    /// `id` is not wanted any more: an issuer that follows it stops.
    fn forget(&self, _id: &SpiffeId) {}
}

/// What an issuer says by itself.
#[derive(Debug)]
pub enum Update {
    /// The roots of a trust domain changed; keys and certificates stay.
    Roots {
        /// The trust domain.
        trust_domain: String,
        /// All roots.
        roots: Vec<CertificateDer<'static>>,
    },
    /// An issuer that renews by its own clock did so.
    Renewed {
        /// Whose it is.
        id: SpiffeId,
        /// The new credential.
        issued: Issued,
    },
    /// An issuer that renews by its own clock cannot do so for now; it is asked again.
    Failed {
        /// Whose credential it would be.
        id: SpiffeId,
        /// Why there is none.
        error: IssueError,
    },
}

/// A credential as it was issued, not yet validated.
#[derive(Debug)]
pub struct Issued {
    /// The private key.
    pub key: SvidKey,
    /// Its certificate, and the roots.
    pub signed: Signed,
}

/// An issuer that signs requests: the key is made here and never leaves the node.
pub trait CsrSigner: Send + Sync {
    /// Has `csr_der` (PKCS#10) signed for `id`. Only the request's key counts; names in it are ignored.
    ///
    /// The future may be dropped at any await.
    fn sign<'a>(&'a self, id: &'a SpiffeId, csr_der: Vec<u8>) -> BoxFuture<'a, Result<Signed, IssueError>>;

    /// As [`Issuer::updates`].
    fn updates(&self) -> BoxStream<'_, Result<Update, IssueError>> {
        stream::pending().boxed()
    }
}

impl<S: CsrSigner> Issuer for S {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>> {
        Box::pin(async move {
            let key = SvidKey::generate().map_err(|error| IssueError::Request(error.to_string()))?;
            let request = key.request(id).map_err(|error| IssueError::Request(error.to_string()))?;
            let signed = self.sign(id, request).await?;
            Ok(Issued { key, signed })
        })
    }

    fn updates(&self) -> BoxStream<'_, Result<Update, IssueError>> {
        CsrSigner::updates(self)
    }
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
    /// The SPIRE agent gives nothing that could be used.
    #[error(transparent)]
    Spire(#[from] SpireError),
}
