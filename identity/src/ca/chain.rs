//! An authority's certificates: the signing one, those between it and the root, and the roots.

use std::{sync::Arc, time::SystemTime};

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_core::{SpiffeId, TrustDomain};

use super::{CaError, EmbeddedCa, crypto, file};
use crate::{
    tls,
    verify::{Purpose, TrustBundle},
};

/// Most certificates from the signing one to the last below the root.
const MAX_INTERMEDIATES: usize = 5;
/// Most roots.
const MAX_ROOTS: usize = 32;

/// The certificates of an authority, sorted.
pub(super) struct Certificates {
    /// It belongs to the key.
    pub(super) signing: CertificateDer<'static>,
    /// What goes into each chain after the leaf; empty where the signing one is a root itself.
    pub(super) intermediates: Vec<CertificateDer<'static>>,
    /// What peers trust.
    pub(super) roots: Vec<CertificateDer<'static>>,
}

impl Certificates {
    /// Sorts what belongs to `key`. `declared` are roots because somebody says so; of the others, those that are signed
    /// by themselves are.
    pub(super) fn sort(
        key: &KeyPair,
        given: Vec<CertificateDer<'static>>,
        declared: Vec<CertificateDer<'static>>,
    ) -> Result<Self, CaError> {
        let public = key.subject_public_key_info();
        let mut signing = None;
        for certificate in given.iter().chain(&declared) {
            if file::public_key(certificate)? == public {
                signing = Some(certificate.clone());
                break;
            }
        }
        let signing = signing.ok_or(CaError::Pem("no certificate belongs to the key"))?;
        let mut roots = Vec::new();
        let mut between = Vec::new();
        // The signing root comes first.
        for certificate in std::iter::once(signing.clone()).chain(given) {
            let list = if file::is_self_signed(&certificate)? { &mut roots } else { &mut between };
            if !list.contains(&certificate) {
                list.push(certificate);
            }
        }
        for root in declared {
            if !roots.contains(&root) && root != signing {
                roots.push(root);
            }
        }
        if roots.is_empty() {
            return Err(CaError::Pem(
                "the signing certificate is an intermediate and its root is not there; put the root into ca.crt",
            ));
        }
        if roots.len() > MAX_ROOTS {
            return Err(CaError::Pem("there are more than 32 roots"));
        }
        let intermediates =
            if roots.contains(&signing) { Vec::new() } else { file::path(&signing, between)? };
        if intermediates.len() > MAX_INTERMEDIATES {
            return Err(CaError::Pem("there are more than 5 intermediates"));
        }
        Ok(Self { signing, intermediates, roots })
    }
}

impl EmbeddedCa {
    /// Signs for nobody and looks whether that leads to the roots, as every peer will.
    pub(super) fn prove(&self) -> Result<(), CaError> {
        let roots_unusable = |_| CaError::Pem("a root cannot be used");
        let bundle =
            TrustBundle::new(self.domain.clone(), &self.roots, tls::provider()).map_err(roots_unusable)?;
        let id = SpiffeId::service_account(&self.domain, "weft-system", "nobody");
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto)?;
        let now = SystemTime::now();
        let leaf = self.leaf_for(&id, &key, super::SVID_LIFETIME, now)?;
        let at = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        for purpose in Purpose::ALL {
            bundle
                .verify(&leaf, &self.intermediates, at, purpose)
                .map_err(|error| CaError::Chain(error.to_string()))?;
        }
        Ok(())
    }

    /// The same authority with other roots to trust.
    pub fn with_roots(&self, roots: Vec<CertificateDer<'static>>) -> Self {
        Self {
            domain: self.domain.clone(),
            signer: Arc::clone(&self.signer),
            certificate: self.certificate.clone(),
            intermediates: self.intermediates.clone(),
            not_after: self.not_after,
            roots,
        }
    }

    /// The signing certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Of what mesh it is.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }
}
