//! One whole credential: validated once, then immutable.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use rustls::{ClientConfig, ServerConfig, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_core::{SpiffeId, TrustDomain, id::InvalidSpiffeId};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use crate::{
    issuer::Signed,
    key::SvidKey,
    peer::{Peer, PeerError, time},
    tls,
    verify::{ExpectedWorkload, Purpose, TrustBundle},
};

/// Why a signed chain and a key are no credential.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The chain is empty.
    #[error("the chain holds no certificate")]
    Empty,
    /// There are no roots, so no peer could be verified.
    #[error("there are no roots")]
    NoRoots,
    /// The leaf cannot be parsed.
    #[error("the leaf is malformed")]
    Malformed,
    /// A root cannot be used.
    #[error("a root is malformed: {0}")]
    Root(webpki::Error),
    /// The leaf is for somebody else.
    #[error("the leaf is for {found}, asked was {asked}")]
    WrongId {
        /// In the leaf.
        found: SpiffeId,
        /// Asked for.
        asked: SpiffeId,
    },
    /// The id's trust domain is malformed.
    #[error(transparent)]
    Id(#[from] InvalidSpiffeId),
    /// The chain does not lead to the roots, is not valid now, or does not fit the key.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// The credential of one SPIFFE id: certificate chain, key and roots, validated together.
///
/// Cheap to share through `Arc`; never changes. The next one of the same id is a new value with a greater
/// generation.
pub struct Credentials {
    id: SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
    obtained: SystemTime,
    serial: String,
    issued_by: String,
    generation: u64,
    server: Arc<ServerConfig>,
    /// Accepts this very id; the verifier is replaced for each peer.
    client: ClientConfig,
    bundle: Arc<TrustBundle>,
    key: SvidKey,
    signed: Signed,
}

impl Credentials {
    /// Validates the parts together, at `now`: the chain leads to the roots, holds `id` and no other, is valid, and
    /// belongs to the key.
    ///
    /// # Errors
    /// When any of that does not hold.
    pub fn new(
        id: &SpiffeId,
        key: SvidKey,
        signed: Signed,
        now: SystemTime,
    ) -> Result<Self, CredentialError> {
        static GENERATION: AtomicU64 = AtomicU64::new(1);

        let (leaf, intermediates) = signed.chain.split_first().ok_or(CredentialError::Empty)?;
        if signed.roots.is_empty() {
            return Err(CredentialError::NoRoots);
        }
        let provider = tls::provider();
        let domain = TrustDomain::new(id.trust_domain())?;
        let bundle =
            TrustBundle::new(domain, &signed.roots, Arc::clone(&provider)).map_err(CredentialError::Root)?;
        let at = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        for purpose in Purpose::ALL {
            let found = bundle.verify(leaf, intermediates, at, purpose)?;
            if found != *id {
                return Err(CredentialError::WrongId { found, asked: id.clone() });
            }
        }
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| CredentialError::Malformed)?;
        let not_before = time(parsed.validity().not_before.timestamp());
        // As its peers see it: they take the chain for as long as all of it is valid.
        let not_after = bundle.peer(&signed.chain).map_err(|_| CredentialError::Malformed)?.not_after;
        let serial = parsed.raw_serial_as_string();
        let issued_by = parsed.issuer().to_string();
        let certified = Arc::new(CertifiedKey::from_der(signed.chain.clone(), key.private_key(), &provider)?);
        certified.keys_match()?;
        let bundle = Arc::new(bundle);
        let server = tls::server_config(Arc::clone(&bundle), Arc::clone(&certified), Arc::clone(&provider))?;
        let server = Arc::new(server);
        let client = tls::client_config(Arc::clone(&bundle), id.clone(), certified, provider)?;
        let generation = GENERATION.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            id: id.clone(),
            not_before,
            not_after,
            obtained: now,
            serial,
            issued_by,
            generation,
            server,
            client,
            bundle,
            key,
            signed,
        })
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// When it begins to be valid.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When it expires: with the first certificate of its chain that does.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The leaf's serial number, in hexadecimal bytes joined by colons.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// The name of the authority that signed it, as its certificate gives it.
    pub fn issued_by(&self) -> &str {
        &self.issued_by
    }

    /// Greater than that of every credential made before in this process.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The leaf and its intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.signed.chain
    }

    /// The roots that peers' certificates must lead to.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.signed.roots
    }

    /// For accepting tunnels: TLS 1.3, ALPN `h2`, a client certificate of the same trust domain required,
    /// X25519MLKEM768 preferred, no resumption. Whom it accepted, [`Self::peer`] says.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For opening a tunnel: as the server's, and the peer must be `expected`. The server name given to the
    /// handshake is not used.
    pub fn client_config(&self, expected: &SpiffeId) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        config.dangerous().set_certificate_verifier(Arc::new(ExpectedWorkload {
            bundle: Arc::clone(&self.bundle),
            expected: expected.clone(),
        }));
        Arc::new(config)
    }

    /// Whom a chain is of that a handshake under these credentials accepted.
    ///
    /// Says nothing of whether it may be trusted: [`Self::server_config`] and [`Self::client_config`] do, in the
    /// handshake.
    ///
    /// # Errors
    /// When it is no chain of a workload, which no handshake accepts.
    pub fn peer(&self, chain: &[CertificateDer<'_>]) -> Result<Peer, PeerError> {
        self.bundle.peer(chain)
    }

    /// As obtained earlier, by a process before this one.
    pub(crate) fn obtained_at(mut self, obtained: SystemTime) -> Self {
        self.obtained = obtained;
        self
    }

    /// The same key and certificates under other roots.
    ///
    /// # Errors
    /// When the certificates do not lead to these roots.
    pub(crate) fn with_roots(
        &self,
        roots: Vec<CertificateDer<'static>>,
        now: SystemTime,
    ) -> Result<Self, CredentialError> {
        let key = SvidKey::from_pkcs8(zeroize::Zeroizing::new(self.key.pkcs8().to_vec()));
        let signed = Signed { chain: self.signed.chain.clone(), roots };
        Ok(Self::new(&self.id, key, signed, now)?.obtained_at(self.obtained))
    }

    pub(crate) fn obtained(&self) -> SystemTime {
        self.obtained
    }

    pub(crate) fn key(&self) -> &SvidKey {
        &self.key
    }

    pub(crate) fn signed(&self) -> &Signed {
        &self.signed
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("generation", &self.generation)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}
