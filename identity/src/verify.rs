//! The check of a peer in the handshake: chain, trust domain, SPIFFE id.

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use weft_core::{SpiffeId, TrustDomain};

use self::known::{KnownChains, Shown};
use crate::peer::{Peer, PeerError, peer_identity};

mod known;

/// Most intermediates looked at; a mesh has none or one.
const MAX_INTERMEDIATES: usize = 8;

/// The chain is good, but it is not the peer that it must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The certificate is no SVID of a workload.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// It belongs to another trust domain.
    #[error("the peer is {peer}, outside the trust domain {expected}")]
    TrustDomain {
        /// Who the peer is.
        peer: SpiffeId,
        /// The trust domain of this node.
        expected: String,
    },
    /// It is somebody else.
    #[error("the peer is {peer}, expected {expected}: the address may have been given to another Pod")]
    Unexpected {
        /// Who the peer is.
        peer: SpiffeId,
        /// Who it must be.
        expected: SpiffeId,
    },
}

impl IdentityError {
    /// The reason inside a failed handshake's error, as rustls gives it or as IO error; `None` where the handshake
    /// failed for something else.
    pub fn find<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return Self::find(io.get_ref()?);
        }
        match error.downcast_ref::<Error>()? {
            Error::InvalidCertificate(CertificateError::Other(OtherError(reason))) => reason.downcast_ref(),
            _ => None,
        }
    }
}

/// What a certificate is shown for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    /// By the end that dials.
    Client,
    /// By the end that is dialled.
    Server,
}

impl Purpose {
    pub(crate) const ALL: [Self; 2] = [Self::Client, Self::Server];

    /// The extended key usage that it takes (RFC 5280 section 4.2.1.12).
    fn key_usage(self) -> KeyUsage {
        match self {
            Self::Client => KeyUsage::client_auth(),
            Self::Server => KeyUsage::server_auth(),
        }
    }
}

/// The roots of one trust domain.
pub(crate) struct TrustBundle {
    domain: TrustDomain,
    anchors: Vec<TrustAnchor<'static>>,
    provider: Arc<CryptoProvider>,
    known: KnownChains,
}

impl TrustBundle {
    pub(crate) fn new(
        domain: TrustDomain,
        roots: &[CertificateDer<'static>],
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, webpki::Error> {
        let anchors = roots
            .iter()
            .map(|root| Ok(anchor_from_trusted_cert(root)?.to_owned()))
            .collect::<Result<_, _>>()?;
        Ok(Self { domain, anchors, provider, known: KnownChains::default() })
    }

    /// The id of a peer whose chain leads to a root of this bundle, at `now`. A chain that is known to do is not walked
    /// again.
    pub(crate) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        purpose: Purpose,
    ) -> Result<SpiffeId, Error> {
        if intermediates.len() > MAX_INTERMEDIATES {
            return Err(Error::InvalidCertificate(CertificateError::BadEncoding));
        }
        let shown = Shown::new(purpose, leaf, intermediates);
        if let Some(peer) = shown.as_ref().and_then(|shown| self.known.get(shown, now)) {
            return Ok(peer);
        }
        let algorithms = self.provider.signature_verification_algorithms.all;
        let usage = purpose.key_usage();
        EndEntityCert::try_from(leaf)
            .and_then(|leaf| {
                leaf.verify_for_usage(algorithms, &self.anchors, intermediates, now, usage, None, None)
                    .map(drop)
            })
            .map_err(chain_error)?;
        let peer = peer_identity(std::slice::from_ref(leaf)).map_err(|error| refuse(error.into()))?;
        if peer.trust_domain() != self.domain.as_str() {
            return Err(refuse(IdentityError::TrustDomain { peer, expected: self.domain.to_string() }));
        }
        if let Some(shown) = shown {
            self.known.put(shown, peer.clone());
        }
        Ok(peer)
    }

    /// Whom a chain is of that [`Self::verify`] took. Read anew only where it is not remembered.
    pub(crate) fn peer(&self, chain: &[CertificateDer<'_>]) -> Result<Peer, PeerError> {
        let known = chain.split_first().and_then(|(leaf, rest)| self.known.whose(leaf, rest));
        known.map_or_else(|| Peer::read(chain), Ok)
    }

    fn signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustBundle")
            .field("domain", &self.domain)
            .field("roots", &self.anchors.len())
            .finish()
    }
}

/// What both verifiers' traits ask for alike: signatures of TLS 1.3, and none of TLS 1.2, which is never offered.
macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(only_tls13())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.bundle.signature(message, cert, dss)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.bundle.schemes()
        }
    };
}

/// The server's side: any workload of the trust domain may connect; what it may do is policy, later.
#[derive(Debug)]
pub(crate) struct AnyWorkload {
    pub(crate) bundle: Arc<TrustBundle>,
}

impl ClientCertVerifier for AnyWorkload {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.bundle
            .verify(end_entity, intermediates, now, Purpose::Client)
            .map(|_| ClientCertVerified::assertion())
    }

    tls13_signatures!();
}

/// The client's side: exactly this peer.
#[derive(Debug)]
pub(crate) struct ExpectedWorkload {
    pub(crate) bundle: Arc<TrustBundle>,
    pub(crate) expected: SpiffeId,
}

impl ServerCertVerifier for ExpectedWorkload {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let peer = self.bundle.verify(end_entity, intermediates, now, Purpose::Server)?;
        if peer == self.expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(refuse(IdentityError::Unexpected { peer, expected: self.expected.clone() }))
        }
    }

    tls13_signatures!();
}

/// Checks a chain as a handshake does, for the fuzzer.
///
/// # Errors
/// As the handshake's.
#[cfg(feature = "fuzzing")]
pub fn fuzz(
    domain: TrustDomain,
    root: &CertificateDer<'static>,
    leaf: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<SpiffeId, Error> {
    let bundle =
        TrustBundle::new(domain, std::slice::from_ref(root), crate::tls::provider()).map_err(chain_error)?;
    bundle.verify(leaf, &[], now, Purpose::Server)
}

fn only_tls13() -> Error {
    Error::General("a TLS 1.2 signature where only TLS 1.3 is offered".into())
}

fn refuse(error: IdentityError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// Keeps the reasons apart for which a peer gets a telling alert and an operator a telling log line.
fn chain_error(error: webpki::Error) -> Error {
    Error::InvalidCertificate(match error {
        webpki::Error::BadDer | webpki::Error::BadDerTime | webpki::Error::TrailingData(_) => {
            CertificateError::BadEncoding
        }
        webpki::Error::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        webpki::Error::CertExpired { time, not_after } => {
            CertificateError::ExpiredContext { time, not_after }
        }
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        webpki::Error::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

#[cfg(test)]
mod tests;
