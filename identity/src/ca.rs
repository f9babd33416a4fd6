//! The embedded certificate authority: one ECDSA P-256 root, SVIDs of bounded life.

use std::{
    fmt,
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer as Signer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use time::OffsetDateTime;
use weft_core::{SpiffeId, TrustDomain};
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY},
    prelude::FromDer,
};
use zeroize::{Zeroize, Zeroizing};

use self::chain::Certificates;
use crate::issuer::{BoxFuture, CsrSigner, IssueError, Signed};

mod chain;
mod file;

/// How long a new root lives.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// The longest life of an SVID, whatever is asked.
pub const MAX_SVID_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The life of an SVID where nobody asks for another.
pub const SVID_LIFETIME: Duration = Duration::from_secs(3600);
/// How long the operator's own server certificate lives.
pub const SERVER_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Validity begins this much before the signing, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(60);
/// Longest request accepted, in bytes; one with a P-256 key is about 300.
const MAX_REQUEST: usize = 8 * 1024;

/// Why the authority cannot be opened or does not sign.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The file cannot be read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// What went wrong.
        error: std::io::Error,
    },
    /// Others than the owner can read the root key.
    #[error(
        "{path} holds the mesh's root key and can be read by others (mode {mode:o}); run: chmod 600 {path}"
    )]
    Permissions {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// The file's text is not one key and its certificate.
    #[error(
        "the authority's PEM is not usable: {0}; it must hold one ECDSA P-256 key and its certificate (with cert-manager: \
         privateKey.algorithm ECDSA, size 256)"
    )]
    Pem(&'static str),
    /// What it signs does not lead to the roots.
    #[error(
        "what this authority signs is not trusted by its own roots: {0}; tls.crt must hold every intermediate, and ca.crt \
         the root above them"
    )]
    Chain(String),
    /// The root is of another mesh.
    #[error("the root certificate is of the trust domain {found}, this mesh is {expected}")]
    TrustDomain {
        /// In the certificate.
        found: String,
        /// Configured.
        expected: TrustDomain,
    },
    /// An id outside the trust domain.
    #[error("{0} is outside the trust domain {1}")]
    Foreign(SpiffeId, TrustDomain),
    /// The request cannot be used.
    #[error("the certificate request is refused: {0}")]
    Request(&'static str),
    /// The root is expired, or nothing would be left of the lifetime.
    #[error(
        "nothing can be signed: the root certificate has expired or the lifetime is zero; replace the root"
    )]
    Lifetime,
    /// A name that is neither DNS name nor address.
    #[error("{0:?} is neither a DNS name nor an IP address")]
    Name(String),
    /// The library refused.
    #[error("cannot sign: {0}")]
    Crypto(String),
}

/// A root key and its certificate. `Debug` shows neither.
pub struct EmbeddedCa {
    domain: TrustDomain,
    signer: Arc<Signer<'static, KeyPair>>,
    /// The signing one.
    certificate: CertificateDer<'static>,
    /// It and those above it, without the root; empty where it is the root.
    intermediates: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
    /// Older or newer ones are trusted too, while a root is being replaced.
    roots: Vec<CertificateDer<'static>>,
}

/// The operator's own TLS identity.
pub struct ServerCredentials {
    /// The certificate chain, PEM.
    pub chain_pem: String,
    /// The private key, PKCS#8 PEM; wiped when dropped.
    pub key_pem: Zeroizing<String>,
    /// When the certificate expires.
    pub not_after: SystemTime,
}

impl EmbeddedCa {
    /// A new root in memory.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn generate(domain: TrustDomain) -> Result<Self, CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto)?;
        let now = SystemTime::now();
        let not_after = now + ROOT_LIFETIME;
        let mut params = validity(now, not_after)?;
        params.distinguished_name.push(DnType::OrganizationName, "Weft");
        params.distinguished_name.push(DnType::CommonName, domain.as_str());
        // The signing certificate's own SPIFFE id has no path (X.509-SVID, section 3.2).
        params.subject_alt_names = vec![uri(&format!("spiffe://{domain}"))?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(crypto)?.der().clone();
        Self::assemble(domain, key, vec![certificate], Vec::new())
    }

    /// Opens the authority in the file `path`, or makes one there: mode 0600, complete or not at all, and safe
    /// against a second process doing the same.
    ///
    /// # Errors
    /// When the file is readable by others, is not usable, is of another trust domain, or cannot be written.
    pub fn open_or_create(path: &Path, domain: TrustDomain) -> Result<Self, CaError> {
        if let Some(pem) = file::read(path)? {
            return Self::from_pem(&pem, domain);
        }
        let ca = Self::generate(domain.clone())?;
        if file::create(path, ca.to_pem().as_bytes())? {
            return Ok(ca);
        }
        // Another process was first; its root is the mesh's.
        let pem = file::read(path)?.ok_or(CaError::Pem("the file vanished while it was opened"))?;
        Self::from_pem(&pem, domain)
    }

    /// Reads an authority: one PKCS#8 key, its certificate, those between it and a root, and roots to trust.
    ///
    /// # Errors
    /// When it is malformed, the certificate may not sign, leads to no root, has expired, or is of another trust domain.
    pub fn from_pem(pem: &str, domain: TrustDomain) -> Result<Self, CaError> {
        let (key, certificates) = file::parse(pem)?;
        Self::assemble(domain, key, certificates, Vec::new())
    }

    /// Reads an authority in parts: the key (PKCS#8), its certificate with those above it, and the roots. Where no roots
    /// are given the chain must hold one.
    ///
    /// # Errors
    /// As [`Self::from_pem`].
    pub fn from_parts(key: &str, chain: &str, roots: &str, domain: TrustDomain) -> Result<Self, CaError> {
        let (key, none) = file::parse(key)?;
        if !none.is_empty() {
            return Err(CaError::Pem("the key is followed by a certificate"));
        }
        Self::assemble(domain, key, file::certificates(chain)?, file::certificates(roots)?)
    }

    /// The key and all certificates as PEM, as [`EmbeddedCa::from_pem`] reads them. Wiped when dropped.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let key = Zeroizing::new(self.signer.key().serialize_pem());
        let between: String = self.intermediates.iter().map(file::certificate_pem).collect();
        let roots = self.roots_pem();
        // In one allocation: growing would leave copies of the key behind.
        let mut whole = Zeroizing::new(String::with_capacity(key.len() + between.len() + roots.len()));
        whole.push_str(&key);
        whole.push_str(&between);
        whole.push_str(&roots);
        whole
    }

    /// The roots that peers shall trust; the signing one first, where it is one.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.roots.clone()
    }

    /// The roots as PEM, for agents that verify the operator.
    pub fn roots_pem(&self) -> String {
        self.roots.iter().map(file::certificate_pem).collect()
    }

    /// When the signing certificate, or the first of those between it and the root, expires.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Signs an SVID for `id` with the key of `csr_der`; nothing else of the request is used. Whether the caller
    /// may have that id is for the caller of this function to check.
    ///
    /// `lifetime` is cut to [`MAX_SVID_LIFETIME`] and to the root's own end.
    ///
    /// # Errors
    /// When the id is of another trust domain, the request's signature or key is not good, or the root has expired.
    pub fn sign(&self, id: &SpiffeId, csr_der: &[u8], lifetime: Duration) -> Result<Signed, CaError> {
        self.sign_at(id, csr_der, lifetime, SystemTime::now())
    }

    pub(crate) fn sign_at(
        &self,
        id: &SpiffeId,
        csr_der: &[u8],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Signed, CaError> {
        if id.trust_domain() != self.domain.as_str() {
            return Err(CaError::Foreign(id.clone(), self.domain.clone()));
        }
        let request = request(csr_der)?;
        let leaf = self.leaf_for(id, &request.public_key, lifetime, now)?;
        let chain = std::iter::once(leaf).chain(self.intermediates.iter().cloned()).collect();
        Ok(Signed { chain, roots: self.roots() })
    }

    fn leaf_for(
        &self,
        id: &SpiffeId,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, CaError> {
        let mut params = self.leaf(lifetime.min(MAX_SVID_LIFETIME), now)?;
        // With an empty subject the SAN extension is critical, as the specification wants it (section 2).
        params.subject_alt_names = vec![uri(id.as_str())?];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(key, &self.signer).map_err(crypto)?.der().clone())
    }

    /// A key and a server certificate for DNS names and addresses: the operator's own gRPC TLS. It has no SPIFFE
    /// id, so no proxy takes it for a workload's.
    ///
    /// # Errors
    /// When a name is malformed, none is given, or the root has expired.
    pub fn server_credentials<S: AsRef<str>>(&self, names: &[S]) -> Result<ServerCredentials, CaError> {
        let mut key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto)?;
        let mut params = self.leaf(SERVER_LIFETIME, SystemTime::now())?;
        params.subject_alt_names =
            names.iter().map(|name| dns_or_ip(name.as_ref())).collect::<Result<_, _>>()?;
        if params.subject_alt_names.is_empty() {
            return Err(CaError::Name(String::new()));
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let not_after = params.not_after.into();
        let leaf = params.signed_by(&key, &self.signer).map_err(crypto)?;
        let key_pem = Zeroizing::new(key.serialize_pem());
        key.zeroize();
        let chain = std::iter::once(leaf.der()).chain(&self.intermediates);
        Ok(ServerCredentials { chain_pem: chain.map(file::certificate_pem).collect(), key_pem, not_after })
    }

    #[cfg(test)]
    pub(crate) fn signer(&self) -> &Signer<'static, KeyPair> {
        &self.signer
    }

    fn assemble(
        domain: TrustDomain,
        key: KeyPair,
        given: Vec<CertificateDer<'static>>,
        declared: Vec<CertificateDer<'static>>,
    ) -> Result<Self, CaError> {
        let Certificates { signing, intermediates, roots } = Certificates::sort(&key, given, declared)?;
        let mut not_after = file::check_authority(&signing, &domain)?;
        for certificate in &intermediates {
            not_after = not_after.min(file::check_authority(certificate, &domain)?);
        }
        let signer = Arc::new(Signer::from_ca_cert_der(&signing, key).map_err(crypto)?);
        let ca = Self { domain, signer, certificate: signing, intermediates, not_after, roots };
        ca.prove()?;
        Ok(ca)
    }

    /// What every leaf has: no authority, signatures only, a random serial number, and a life within the root's.
    fn leaf(&self, lifetime: Duration, now: SystemTime) -> Result<CertificateParams, CaError> {
        let not_after = (now + lifetime).min(self.not_after);
        if not_after <= now {
            return Err(CaError::Lifetime);
        }
        let mut params = validity(now, not_after)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }
}

impl fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedCa").field("domain", &self.domain).finish_non_exhaustive()
    }
}

impl fmt::Debug for ServerCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCredentials").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// An [`Issuer`](crate::Issuer) in the same process as the authority: for one machine without an operator, and for tests.
#[derive(Debug)]
pub struct LocalIssuer {
    /// The authority.
    pub ca: EmbeddedCa,
    /// The life of each SVID.
    pub lifetime: Duration,
}

impl CsrSigner for LocalIssuer {
    fn sign<'a>(&'a self, id: &'a SpiffeId, csr_der: Vec<u8>) -> BoxFuture<'a, Result<Signed, IssueError>> {
        Box::pin(async move {
            self.ca.sign(id, &csr_der, self.lifetime).map_err(|error| IssueError::Denied(error.to_string()))
        })
    }
}

/// Parses a request and checks that its sender holds the key; only ECDSA P-256 is taken.
fn request(csr_der: &[u8]) -> Result<CertificateSigningRequestParams, CaError> {
    if csr_der.len() > MAX_REQUEST {
        return Err(CaError::Request("it is longer than 8 KiB"));
    }
    let (rest, parsed) = X509CertificationRequest::from_der(csr_der)
        .map_err(|_| CaError::Request("it is no PKCS#10 request"))?;
    if !rest.is_empty() {
        return Err(CaError::Request("bytes follow it"));
    }
    let algorithm = &parsed.certification_request_info.subject_pki.algorithm;
    let curve = algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    if algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
        return Err(CaError::Request("its key is not ECDSA P-256"));
    }
    let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))
        .map_err(|_| {
            CaError::Request("its signature is not good, or it asks for extensions that are not known")
        })?;
    if request.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
        return Err(CaError::Request("it is not signed with ECDSA P-256 and SHA-256"));
    }
    Ok(request)
}

fn validity(now: SystemTime, not_after: SystemTime) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(not_after);
    params.serial_number = Some(serial()?);
    Ok(params)
}

/// 127 random bits: positive, and unique without a counter to keep (RFC 5280, section 4.1.2.2).
fn serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| CaError::Crypto("no randomness".into()))?;
    bytes[0] &= 0x7f;
    bytes[0] |= 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn uri(uri: &str) -> Result<SanType, CaError> {
    Ok(SanType::URI(uri.try_into().map_err(crypto)?))
}

fn dns_or_ip(name: &str) -> Result<SanType, CaError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    rustls_pki_types::DnsName::try_from(name).map_err(|_| CaError::Name(name.to_owned()))?;
    Ok(SanType::DnsName(name.try_into().map_err(crypto)?))
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn crypto(error: rcgen::Error) -> CaError {
    CaError::Crypto(error.to_string())
}

#[cfg(test)]
mod tests;
