//! A peer with a certificate that looks right and is signed by somebody else.

use std::{
    io::{Read as _, Write as _},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use rcgen::{CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
};
use serde_json::{Value, json};

use super::calls::kind_of;
use crate::http;

/// Opens a tunnel with a certificate of a foreign CA.
#[derive(Debug, Clone, Args)]
pub struct Tunnel {
    /// `address:port` of a tunnel listener.
    #[arg(long)]
    to: String,
    /// The SPIFFE id that the certificate claims.
    #[arg(long)]
    claims: String,
}

impl Tunnel {
    pub(super) fn run(self) -> Result<Value> {
        let stream = match http::dial(&self.to, Duration::from_secs(5)) {
            Ok(stream) => stream,
            Err(error) => return Ok(json!({"connected": false, "error": kind_of(&error)})),
        };
        let client = ClientConnection::new(Arc::new(self.config()?), ServerName::try_from("peer")?)?;
        let mut tls = StreamOwned::new(client, stream);
        // In TLS 1.3 the client is done before the server has judged its certificate: only an answer to a
        // request shows that it was accepted.
        let mut answer = [0; 16];
        let result = tls
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
            .and_then(|()| tls.flush())
            .and_then(|()| tls.read(&mut answer));
        Ok(match result {
            Ok(0) => json!({"connected": true, "accepted": false, "error": "closed"}),
            Ok(_) => json!({"connected": true, "accepted": true}),
            Err(error) => json!({"connected": true, "accepted": false, "error": error.to_string()}),
        })
    }

    fn config(&self) -> Result<ClientConfig> {
        let (ca_key, key) = (KeyPair::generate()?, KeyPair::generate()?);
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = Issuer::new(ca, ca_key);
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI(self.claims.as_str().try_into()?)];
        let certificate = leaf.signed_by(&key, &issuer).context("sign with a foreign CA")?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| anyhow::anyhow!(error))?;
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
            .with_client_auth_cert(vec![certificate.der().clone()], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// An attacker does not care who the server is.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
