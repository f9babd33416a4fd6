//! Certificates for the peers: one root, and a P-256 leaf with a SPIFFE id for each end, as Weft's own are.

use std::{fs, path::Path};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// The caller's identity.
pub(crate) const CLIENT: &str = "spiffe://cluster.local/ns/bench/sa/client";
/// The server's identity.
pub(crate) const SERVER: &str = "spiffe://cluster.local/ns/bench/sa/server";

/// Writes `ca.pem`, `client.{pem,key}`, `server.{pem,key}`, and `client-all.pem`, `server-all.pem` with both parts.
///
/// # Errors
/// When the folder cannot be written.
pub(crate) fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
    let key = KeyPair::generate()?;
    let root = params.self_signed(&key)?;
    fs::write(folder.join("ca.pem"), root.pem())?;
    let issuer = Issuer::from_params(&params, &key);
    for (name, id) in [("client", CLIENT), ("server", SERVER)] {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &issuer)?;
        fs::write(folder.join(format!("{name}.pem")), leaf.pem())?;
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
        fs::write(folder.join(format!("{name}-all.pem")), leaf.pem() + &key.serialize_pem())?;
    }
    Ok(())
}
