//! The certificates and kubeconfigs of a cluster: one CA, ECDSA, seven days.

use std::{
    fs::{self, File},
    io::Write as _,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

use crate::net;

/// The PKI in a folder.
#[derive(Debug)]
pub(crate) struct Pki {
    folder: PathBuf,
}

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    /// That in `folder`.
    pub(crate) fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// A file of it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Makes all of it, for that many nodes.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(crate) fn make(&self, nodes: u8) -> Result<()> {
        fs::create_dir_all(&self.folder)?;
        let ca = self.authority("ca")?;
        let front = self.authority("front-ca")?;
        let api = [
            net::CONTROL,
            net::CONTROL6,
            net::API_SERVICE,
            "127.0.0.1",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        self.certificate("apiserver", &ca, None, "kube-apiserver", &api)?;
        self.certificate("front", &front, None, "front-proxy", &[])?;
        self.certificate("kubelet-client", &ca, Some("system:masters"), "kubelet-client", &[])?;
        self.certificate("admin", &ca, Some("system:masters"), "admin", &[])?;
        self.kubeconfig("admin", &ca)?;
        for name in ["kube-controller-manager", "kube-scheduler", "kube-proxy"] {
            self.certificate(name, &ca, None, &format!("system:{name}"), &[])?;
            self.kubeconfig(name, &ca)?;
        }
        for node in 1..=nodes {
            let name = format!("node{node}");
            let addresses = net::node_addresses(true, node);
            let mut sans: Vec<&str> = addresses.split(',').collect();
            sans.push(&name);
            self.certificate(&name, &ca, Some("system:nodes"), &format!("system:node:{name}"), &sans)?;
            self.kubeconfig(&name, &ca)?;
        }
        let accounts = KeyPair::generate()?;
        self.write("sa.key", &accounts.serialize_pem())?;
        self.write("sa.pub", &accounts.public_key_pem())
    }

    fn authority(&self, name: &str) -> Result<Authority> {
        let key = KeyPair::generate()?;
        let mut params = params(None, name)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = params.self_signed(&key)?.pem();
        self.write(&format!("{name}.crt"), &pem)?;
        Ok(Authority { pem, issuer: Issuer::new(params, key) })
    }

    fn certificate(
        &self,
        file: &str,
        ca: &Authority,
        group: Option<&str>,
        name: &str,
        sans: &[&str],
    ) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = params(group, name)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        for san in sans {
            params.subject_alt_names.push(match san.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName((*san).try_into()?),
            });
        }
        self.write(&format!("{file}.crt"), &params.signed_by(&key, &ca.issuer)?.pem())?;
        self.write(&format!("{file}.key"), &key.serialize_pem())
    }

    /// With everything inside, so that it can be copied.
    fn kubeconfig(&self, name: &str, ca: &Authority) -> Result<()> {
        let read = |kind: &str| -> Result<String> {
            Ok(BASE64_STANDARD.encode(fs::read(self.file(&format!("{name}.{kind}")))?))
        };
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: weft\n  cluster:\n    server: https://{}:6443\n    \
             certificate-authority-data: {}\nusers:\n- name: {name}\n  user:\n    client-certificate-data: {}\n    \
             client-key-data: {}\ncontexts:\n- name: weft\n  context: {{cluster: weft, user: {name}}}\n\
             current-context: weft\n",
            net::CONTROL,
            BASE64_STANDARD.encode(&ca.pem),
            read("crt")?,
            read("key")?,
        );
        self.write(&format!("{name}.kubeconfig"), &text)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.file(name);
        write_private(&path, text).with_context(|| format!("write {}", path.display()))
    }
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

fn params(group: Option<&str>, name: &str) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = DistinguishedName::new();
    if let Some(group) = group {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    params.distinguished_name.push(DnType::CommonName, name);
    // An hour back: a test may run with a clock that lags.
    params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
    params.not_after = params.not_before + Duration::days(7);
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}
