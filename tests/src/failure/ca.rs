//! CAs as a user might bring them.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256,
};
use serde_json::json;

/// For a CA of that name that ends `life` from now; `below` is how many further ones may stand below it.
fn params(name: &str, life: Duration, below: u8) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now();
    params.not_before = (now - Duration::from_secs(60)).into();
    params.not_after = (now + life).into();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn key() -> Result<KeyPair> {
    Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)
}

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
        let key = key()?;
        let certificate =
            params(&format!("test root of {} s", life.as_secs()), life, 0).self_signed(&key)?.pem();
        Ok(Self { key: key.serialize_pem(), certificate })
    }
}

/// A company's root, and the intermediate below it that it gives to the mesh: `NAME root` and `NAME issuing`.
#[derive(Debug)]
pub struct Company {
    /// The intermediate's key, PKCS#8 PEM.
    pub key: String,
    /// The intermediate, PEM.
    pub certificate: String,
    /// The root, PEM.
    pub root: String,
}

impl Company {
    /// Makes both; they end `life` from now.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn new(name: &str, life: Duration) -> Result<Self> {
        let (above, own) = (key()?, key()?);
        let root = params(&format!("{name} root"), life, 1);
        let issuing = params(&format!("{name} issuing"), life, 0);
        let certificate = issuing.signed_by(&own, &Issuer::from_params(&root, &above))?.pem();
        Ok(Self { key: own.serialize_pem(), certificate, root: root.self_signed(&above)?.pem() })
    }

    /// The Secret as cert-manager writes it, as a document.
    pub fn secret(&self, namespace: &str, name: &str) -> String {
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": {"name": name, "namespace": namespace},
            "stringData": {"tls.crt": self.certificate, "tls.key": self.key, "ca.crt": self.root},
        });
        format!("---\n{secret}\n")
    }
}
