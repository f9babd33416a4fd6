//! The authority's file: reading with a check of who else could, writing whole or not at all.

use std::{
    fs::File,
    io::{ErrorKind, Read},
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject};
use weft_core::TrustDomain;
use weft_runtime::durable;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};
use zeroize::{Zeroize, Zeroizing};

use super::CaError;

/// Longest file read, in bytes.
const MAX_FILE: u64 = 256 * 1024;
/// Most certificates read.
const MAX_CERTIFICATES: usize = 64;

/// The file's text; `None` where there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<Zeroizing<String>>, CaError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(path, error)),
    };
    // Of the open file, not of the path: nobody can change one for the other in between.
    let metadata = file.metadata().map_err(|error| io(path, error))?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(CaError::Permissions { path: path.display().to_string(), mode });
    }
    let mut text =
        Zeroizing::new(String::with_capacity(usize::try_from(metadata.len().min(MAX_FILE)).unwrap_or(0) + 1));
    file.take(MAX_FILE).read_to_string(&mut text).map_err(|error| io(path, error))?;
    Ok(Some(text))
}

/// Writes a new file; false where one appeared in the meantime, which is then left as it is.
pub(super) fn create(path: &Path, content: &[u8]) -> Result<bool, CaError> {
    durable::create(path, content, 0o600).map_err(|error| io(path, error))
}

/// The one key and the certificates.
pub(super) fn parse(pem: &str) -> Result<(KeyPair, Vec<CertificateDer<'static>>), CaError> {
    let mut keys = PrivatePkcs8KeyDer::pem_slice_iter(pem.as_bytes());
    let mut der = keys.next().and_then(Result::ok).ok_or(CaError::Pem("there is no PKCS#8 PRIVATE KEY"))?;
    if keys.next().is_some() {
        return Err(CaError::Pem("there is more than one key"));
    }
    let key = KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256);
    der.zeroize();
    let key = key.map_err(|_| CaError::Pem("the key is not ECDSA P-256"))?;
    Ok((key, certificates(pem)?))
}

/// The certificates in a PEM.
pub(super) fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let found =
        CertificateDer::pem_slice_iter(pem.as_bytes()).take(MAX_CERTIFICATES).collect::<Result<Vec<_>, _>>();
    found.map_err(|_| CaError::Pem("a certificate is malformed"))
}

/// Whether it names itself as its issuer.
pub(super) fn is_self_signed(certificate: &CertificateDer<'_>) -> Result<bool, CaError> {
    let parsed = parsed(certificate)?;
    Ok(parsed.subject() == parsed.issuer())
}

/// `signing` and the certificates of `others` above it, in order, as far as they go.
pub(super) fn path(
    signing: &CertificateDer<'static>,
    others: Vec<CertificateDer<'static>>,
) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let mut path = vec![signing.clone()];
    let mut rest: Vec<_> = others.into_iter().filter(|other| other != signing).collect();
    let mut last = signing.clone();
    while let Some(at) = above(&last, &rest)? {
        last = rest.swap_remove(at);
        path.push(last.clone());
    }
    Ok(path)
}

/// Which of `others` bears the name of the issuer of `certificate`.
fn above(
    certificate: &CertificateDer<'_>,
    others: &[CertificateDer<'static>],
) -> Result<Option<usize>, CaError> {
    let certificate = parsed(certificate)?;
    for (at, other) in others.iter().enumerate() {
        if parsed(other)?.subject() == certificate.issuer() {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// The SubjectPublicKeyInfo of a certificate, DER.
pub(super) fn public_key(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, CaError> {
    Ok(parsed(certificate)?.public_key().raw.to_vec())
}

/// Checks that the certificate may sign for `domain`, and says until when.
pub(super) fn check_authority(
    certificate: &CertificateDer<'_>,
    domain: &TrustDomain,
) -> Result<SystemTime, CaError> {
    let authority = parsed(certificate)?;
    let malformed = |_| CaError::Pem("its extensions are malformed");
    if !authority.basic_constraints().map_err(malformed)?.is_some_and(|constraints| constraints.value.ca) {
        return Err(CaError::Pem("the certificate is not one of an authority (CA:TRUE)"));
    }
    if !authority.key_usage().map_err(malformed)?.is_none_or(|usage| usage.value.key_cert_sign()) {
        return Err(CaError::Pem("the certificate may not sign others (keyCertSign)"));
    }
    if let Some(names) = authority.subject_alternative_name().map_err(malformed)? {
        let own = format!("spiffe://{domain}");
        for name in &names.value.general_names {
            if let GeneralName::URI(uri) = name
                && uri.trim_end_matches('/') != own
            {
                return Err(CaError::TrustDomain {
                    found: uri.chars().take(300).collect(),
                    expected: domain.clone(),
                });
            }
        }
    }
    let not_after = u64::try_from(authority.validity().not_after.timestamp()).unwrap_or(0);
    let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(not_after);
    if not_after <= SystemTime::now() {
        return Err(CaError::Lifetime);
    }
    Ok(not_after)
}

pub(super) fn certificate_pem(certificate: &CertificateDer<'static>) -> String {
    let encoded = STANDARD.encode(certificate);
    let mut pem = String::with_capacity(encoded.len() + encoded.len() / 64 + 64);
    pem.push_str("-----BEGIN CERTIFICATE-----\n");
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, next) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = next;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

fn parsed<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, CaError> {
    X509Certificate::from_der(certificate)
        .map(|(_, parsed)| parsed)
        .map_err(|_| CaError::Pem("a certificate is malformed"))
}

fn io(path: &Path, error: std::io::Error) -> CaError {
    CaError::Io { path: path.display().to_string(), error }
}
