//! A CA as a user might bring one, with an end of its own.

use std::time::Duration;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256,
};

/// A root that ends `life` from now.
#[derive(Debug)]
pub struct Root {
    /// Its key, PKCS#8 PEM.
    pub key: String,
    /// Its certificate, PEM.
    pub certificate: String,
}

impl Root {
    /// Makes one.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn lasting(life: Duration) -> Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("test root of {} s", life.as_secs()));
        let now = std::time::SystemTime::now();
        params.not_before = (now - Duration::from_secs(60)).into();
        params.not_after = (now + life).into();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { key: key.serialize_pem(), certificate })
    }
}
