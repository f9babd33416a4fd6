//! The operator as an issuer, over gRPC.

use std::{fmt, io, os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

use futures_util::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use rustls_pki_types::CertificateDer;
use tokio::{fs::File, io::AsyncReadExt};
use tonic::{
    Code, Request, Status,
    body::Body,
    codegen::{Service, http},
    metadata::{Ascii, MetadataValue},
    transport::{self, Certificate, Channel, ClientTlsConfig, Endpoint},
};
use weft_core::SpiffeId;
use weft_proto::control::{SignRequest, TrustRequest, TrustResponse, identity_client::IdentityClient};
use zeroize::Zeroizing;

use crate::issuer::{BoxFuture, CsrSigner, IssueError, Signed, Update};

/// How long one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Longest answer, in bytes.
const MAX_ANSWER: usize = 256 * 1024;
/// Longest token file, in bytes.
const MAX_TOKEN: u64 = 64 * 1024;
const MAX_CHAIN: usize = 8;
const MAX_ROOTS: usize = 32;

/// What calls to the operator go over: a [`Channel`], or something around one.
pub trait Calls:
    Service<
        http::Request<Body>,
        Response = http::Response<Body>,
        Error = transport::Error,
        Future: Send + 'static,
    > + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> Calls for S where
    S: Service<
            http::Request<Body>,
            Response = http::Response<Body>,
            Error = transport::Error,
            Future: Send + 'static,
        > + Clone
        + Send
        + Sync
        + 'static
{
}

/// Asks the operator for signatures, over TLS verified with the trust bundle.
#[derive(Clone)]
pub struct OperatorIssuer<S = Channel> {
    client: IdentityClient<S>,
    token: TokenFile,
}

/// The bearer token that proves this node, in a file that the kubelet replaces: read at every call.
#[derive(Debug, Clone)]
pub struct TokenFile(PathBuf);

/// A connection to the operator cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("the operator's address {uri:?} or its trust bundle is not usable: {error}")]
pub struct ChannelError {
    uri: String,
    error: tonic::transport::Error,
}

/// A lazy connection to the operator at `uri` (`https://host:port`), whose certificate must lead to a root in
/// `bundle_pem` and hold `server_name`. Reconnects by itself; the control stream may share it.
///
/// # Errors
/// When the address or the bundle is malformed. Reaching the operator is not tried here.
pub fn channel(uri: &str, server_name: &str, bundle_pem: &[u8]) -> Result<Channel, ChannelError> {
    let tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(bundle_pem)).domain_name(server_name);
    Endpoint::from_shared(uri.to_owned())
        .and_then(|endpoint| endpoint.tls_config(tls))
        .map(|endpoint| {
            endpoint
                .connect_timeout(CONNECT_TIMEOUT)
                .http2_keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(CONNECT_TIMEOUT)
                .keep_alive_while_idle(true)
                .connect_lazy()
        })
        .map_err(|error| ChannelError { uri: uri.to_owned(), error })
}

impl<S: Calls> OperatorIssuer<S> {
    /// Calls over `channel`, proving this node with the token in the file.
    pub fn new(channel: S, token: TokenFile) -> Self {
        Self { client: IdentityClient::new(channel).max_decoding_message_size(MAX_ANSWER), token }
    }

    async fn call(&self, id: &SpiffeId, csr_der: Vec<u8>) -> Result<Signed, IssueError> {
        let mut request = match (id.as_service_account(), id.as_node()) {
            (Some((namespace, account)), _) => Request::new(SignRequest {
                namespace: namespace.to_owned(),
                service_account: account.to_owned(),
                csr_der,
                ..SignRequest::default()
            }),
            (None, Some(node)) => {
                Request::new(SignRequest { node: node.to_owned(), csr_der, ..SignRequest::default() })
            }
            (None, None) => {
                return Err(IssueError::Request(format!("{id} is neither a service account's nor a node's")));
            }
        };
        request.set_timeout(CALL_TIMEOUT);
        let token = self.token.read().await.map_err(|error| IssueError::Request(error.to_string()))?;
        request.metadata_mut().insert("authorization", token);
        let mut client = self.client.clone();
        let answer = client.sign(request).await.map_err(|status| refused(&status))?.into_inner();
        if answer.trust_domain != id.trust_domain() {
            let domain: String = answer.trust_domain.chars().take(255).collect();
            return Err(IssueError::Invalid(format!(
                "it is for the trust domain {domain:?}, this node is of {id}"
            )));
        }
        if answer.chain_der.len() > MAX_CHAIN || answer.roots_der.len() > MAX_ROOTS {
            return Err(IssueError::Invalid("it holds too many certificates".into()));
        }
        Ok(Signed {
            chain: answer.chain_der.into_iter().map(CertificateDer::from).collect(),
            roots: answer.roots_der.into_iter().map(CertificateDer::from).collect(),
        })
    }
}

impl<S: Calls> CsrSigner for OperatorIssuer<S> {
    fn sign<'a>(&'a self, id: &'a SpiffeId, csr_der: Vec<u8>) -> BoxFuture<'a, Result<Signed, IssueError>> {
        Box::pin(self.call(id, csr_der))
    }

    fn updates(&self) -> BoxStream<'_, Result<Update, IssueError>> {
        let opened = async {
            let mut request = Request::new(TrustRequest {});
            let token = self.token.read().await.map_err(|error| IssueError::Request(error.to_string()))?;
            request.metadata_mut().insert("authorization", token);
            let mut client = self.client.clone();
            let answers = client.trust(request).await.map_err(|status| refused(&status))?.into_inner();
            Ok::<_, IssueError>(answers.map(|answer| match answer {
                Ok(TrustResponse { trust_domain, roots_der }) if roots_der.len() <= MAX_ROOTS => {
                    let roots = roots_der.into_iter().map(CertificateDer::from).collect();
                    Ok(Update::Roots { trust_domain, roots })
                }
                Ok(_) => Err(IssueError::Invalid("it holds too many roots".into())),
                Err(status) => Err(refused(&status)),
            }))
        };
        stream::once(opened).try_flatten().boxed()
    }
}

impl<S> fmt::Debug for OperatorIssuer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OperatorIssuer").field("token", &self.token).finish_non_exhaustive()
    }
}

impl TokenFile {
    /// The token is in this file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The `authorization` header, marked as sensitive.
    ///
    /// # Errors
    /// When the file cannot be read, others than its owner can use it, it is empty or holds what no token holds.
    pub async fn read(&self) -> io::Result<MetadataValue<Ascii>> {
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("token {}: {error}", self.0.display()));
        let file = File::open(&self.0).await.map_err(named)?;
        // Of the open file, not of the path: nobody can change one for the other in between.
        let mode = file.metadata().await.map_err(named)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            let message = format!(
                "others than its owner can use it (mode {mode:04o}), and who has it can act as this node; make a new \
                 token and run `chmod 600` on the file (a Pod's projected token is 0600 once every container of the \
                 Pod sets the same securityContext.runAsUser)"
            );
            return Err(named(io::Error::new(io::ErrorKind::PermissionDenied, message)));
        }
        let mut text = Zeroizing::new(String::new());
        file.take(MAX_TOKEN).read_to_string(&mut text).await.map_err(named)?;
        let token = text.trim();
        if token.is_empty() {
            return Err(named(io::Error::new(io::ErrorKind::InvalidData, "it is empty")));
        }
        let header = Zeroizing::new(format!("Bearer {token}"));
        // The parser's own error could quote the token.
        let mut value: MetadataValue<Ascii> = header
            .parse()
            .map_err(|_| named(io::Error::new(io::ErrorKind::InvalidData, "it holds no token")))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

fn refused(status: &Status) -> IssueError {
    let message: String = status.message().chars().take(500).collect();
    match status.code() {
        Code::PermissionDenied | Code::NotFound => IssueError::Denied(message),
        Code::Unauthenticated => IssueError::Unauthenticated(message),
        Code::InvalidArgument | Code::FailedPrecondition => IssueError::Request(message),
        code => IssueError::Unavailable(format!("{code:?}: {message}")),
    }
}

#[cfg(test)]
mod tests;
