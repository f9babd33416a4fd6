//! CAs as a user might bring them.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
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
    issuer: Issuer<'static, KeyPair>,
}

/// A workload's certificate.
#[derive(Debug)]
pub struct Leaf {
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
        let params = params(&format!("test root of {} s", life.as_secs()), life, 0);
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { key: key.serialize_pem(), certificate, issuer: Issuer::new(params, key) })
    }

    /// Signs an X.509-SVID of an hour for a SPIFFE id, as the operator does.
    ///
    /// # Errors
    /// When the id is no URI, or the system gives no randomness.
    pub fn leaf(&self, id: &str) -> Result<Leaf> {
        let own = key()?;
        let mut leaf = params("", Duration::from_secs(3600), 0);
        leaf.distinguished_name = DistinguishedName::new();
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        leaf.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        leaf.use_authority_key_identifier_extension = true;
        let certificate = leaf.signed_by(&own, &self.issuer)?.pem();
        Ok(Leaf { key: own.serialize_pem(), certificate })
    }

    /// Key and certificate, as [`crate::LabOptions::ca`] takes them.
    pub fn pem(&self) -> String {
        format!("{}{}", self.key, self.certificate)
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
