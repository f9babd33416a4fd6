//! A workload's private key: made on the node, never sent, wiped when dropped.

use std::fmt;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use weft_core::SpiffeId;
use zeroize::{Zeroize, Zeroizing};

/// A key or a request for it could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The library refused.
    #[error("the key is not usable: {0}")]
    Crypto(String),
}

/// An ECDSA P-256 private key as PKCS#8.
pub struct SvidKey(Zeroizing<Vec<u8>>);

impl SvidKey {
    /// A fresh key.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn generate() -> Result<Self, KeyError> {
        let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto)?;
        let key = Self(Zeroizing::new(pair.serialized_der().to_vec()));
        pair.zeroize();
        Ok(key)
    }

    /// A certificate request (PKCS#10, DER) for `id`, signed by this key.
    ///
    /// # Errors
    /// When the key is not an ECDSA P-256 key.
    pub fn request(&self, id: &SpiffeId) -> Result<Vec<u8>, KeyError> {
        let mut pair = self.pair()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(crypto)?)];
        let request = params.serialize_request(&pair).map_err(crypto);
        pair.zeroize();
        Ok(request?.der().to_vec())
    }

    pub(crate) fn from_pkcs8(der: Zeroizing<Vec<u8>>) -> Self {
        Self(der)
    }

    pub(crate) fn pkcs8(&self) -> &[u8] {
        &self.0
    }

    /// A copy for rustls, which wipes it after loading.
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.to_vec()))
    }

    fn pair(&self) -> Result<KeyPair, KeyError> {
        let der = PrivatePkcs8KeyDer::from(self.0.as_slice());
        KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256).map_err(crypto)
    }
}

impl fmt::Debug for SvidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SvidKey(..)")
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn crypto(error: rcgen::Error) -> KeyError {
    KeyError::Crypto(error.to_string())
}
