//! Whose certificate it is: the SPIFFE id in it, read strictly.

use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use weft_core::{SpiffeId, id::InvalidSpiffeId};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

/// What a peer's chain says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Who it is.
    pub identity: SpiffeId,
    /// When the first of its certificates ends.
    pub not_after: SystemTime,
}

impl Peer {
    /// Reads a chain, leaf first.
    ///
    /// # Errors
    /// As [`peer_identity`], or when another of its certificates cannot be read.
    pub(crate) fn read(chain: &[CertificateDer<'_>]) -> Result<Self, PeerError> {
        let identity = peer_identity(chain)?;
        let mut not_after = i64::MAX;
        for der in chain {
            let (_, certificate) = X509Certificate::from_der(der).map_err(|_| PeerError::Malformed)?;
            not_after = not_after.min(certificate.validity().not_after.timestamp());
        }
        Ok(Self { identity, not_after: time(not_after) })
    }
}

/// Seconds since 1970 as a time; before it counts as the beginning.
pub(crate) fn time(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// Why a certificate is no X.509-SVID of a workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The peer sent no certificate.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// It is not an X.509 certificate, or bytes follow it.
    #[error("the peer's certificate is malformed")]
    Malformed,
    /// It has no subject alternative name of type URI.
    #[error("the peer's certificate has no SPIFFE id: no URI among its subject alternative names")]
    NoUri,
    /// It has more than one, which the X.509-SVID specification forbids (section 2).
    #[error(
        "the peer's certificate has {0} URIs among its subject alternative names; an SVID has exactly one"
    )]
    ManyUris(usize),
    /// The URI is no SPIFFE id.
    #[error(transparent)]
    Invalid(#[from] InvalidSpiffeId),
    /// It may sign certificates, which the leaf of a workload must not (X.509-SVID, sections 4.1 and 4.3).
    #[error("the peer's certificate is one of an authority, not of a workload")]
    Authority,
    /// It may not be used for signatures, so not for TLS 1.3 (X.509-SVID, section 4.3).
    #[error("the peer's certificate lacks the key usage digitalSignature")]
    NoSignature,
}

/// The SPIFFE id of the leaf, which is the first of `certs`.
///
/// Reads only: whether the chain is trusted was checked in the handshake by the configurations of
/// [`crate::Credentials`], which call this too.
///
/// # Errors
/// When the leaf is not exactly what the X.509-SVID specification says of a workload's certificate: one URI among
/// its subject alternative names, not an authority, key usage digitalSignature.
pub fn peer_identity(certs: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    let leaf = certs.first().ok_or(PeerError::NoCertificate)?;
    let (rest, certificate) = X509Certificate::from_der(leaf).map_err(|_| PeerError::Malformed)?;
    if !rest.is_empty() {
        return Err(PeerError::Malformed);
    }
    let constraints = certificate.basic_constraints().map_err(|_| PeerError::Malformed)?;
    if constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(PeerError::Authority);
    }
    let usage = certificate.key_usage().map_err(|_| PeerError::Malformed)?.ok_or(PeerError::NoSignature)?;
    if usage.value.key_cert_sign() || usage.value.crl_sign() {
        return Err(PeerError::Authority);
    }
    if !usage.value.digital_signature() {
        return Err(PeerError::NoSignature);
    }
    // The accessor refuses a second extension of the same kind.
    let names =
        certificate.subject_alternative_name().map_err(|_| PeerError::Malformed)?.ok_or(PeerError::NoUri)?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let id = uris.next().ok_or(PeerError::NoUri)?;
    match uris.count() {
        0 => Ok(id.parse()?),
        more => Err(PeerError::ManyUris(more + 1)),
    }
}

#[cfg(test)]
mod tests;
