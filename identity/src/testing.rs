//! What several test modules need: certificates good and bad, and a handshake over an in-memory stream.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{ClientConfig, ServerConfig, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::{Credentials, SpiffeId, SvidKey, TrustDomain, ca::EmbeddedCa, tls, verify::TrustBundle};

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::new("mesh.test").unwrap()
}

pub(crate) fn id(account: &str) -> SpiffeId {
    SpiffeId::service_account(&domain(), "shop", account)
}

pub(crate) fn ca() -> EmbeddedCa {
    EmbeddedCa::generate(domain()).unwrap()
}

pub(crate) fn credentials(ca: &EmbeddedCa, id: &SpiffeId) -> Credentials {
    let key = SvidKey::generate().unwrap();
    let signed = ca.sign(id, &key.request(id).unwrap(), HOUR).unwrap();
    Credentials::new(id, key, signed, SystemTime::now()).unwrap()
}

/// The parameters of a good SVID, to be spoiled by a test.
pub(crate) fn leaf(uris: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

/// What a peer presents that our own side would never have accepted as its credential.
pub(crate) struct Forged {
    bundle: Arc<TrustBundle>,
    certified: Arc<CertifiedKey>,
}

impl Forged {
    pub(crate) fn new(ca: &EmbeddedCa, params: &CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let leaf: CertificateDer<'static> = params.signed_by(&key, ca.signer()).unwrap().der().clone();
        let provider = tls::provider();
        let der = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let certified = Arc::new(CertifiedKey::from_der(vec![leaf], der, &provider).unwrap());
        let bundle = Arc::new(TrustBundle::new(domain(), &ca.roots(), provider).unwrap());
        Self { bundle, certified }
    }

    pub(crate) fn client_config(&self, expected: &SpiffeId) -> Arc<ClientConfig> {
        let (bundle, certified) = (Arc::clone(&self.bundle), Arc::clone(&self.certified));
        Arc::new(tls::client_config(bundle, expected.clone(), certified, tls::provider()).unwrap())
    }

    pub(crate) fn server_config(&self) -> Arc<ServerConfig> {
        let (bundle, certified) = (Arc::clone(&self.bundle), Arc::clone(&self.certified));
        Arc::new(tls::server_config(bundle, certified, tls::provider()).unwrap())
    }
}

pub(crate) type Ends = (client::TlsStream<DuplexStream>, server::TlsStream<DuplexStream>);

/// A handshake and one byte each way: in TLS 1.3 the client learns that it was refused only when it reads.
pub(crate) async fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> (io::Result<client::TlsStream<DuplexStream>>, io::Result<server::TlsStream<DuplexStream>>) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from("10.0.0.1").unwrap();
    let connect = async {
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.write_all(b"?").await?;
        let mut answer = [0];
        stream.read_exact(&mut answer).await?;
        Ok(stream)
    };
    let accept = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        let mut question = [0];
        stream.read_exact(&mut question).await?;
        stream.write_all(b"!").await?;
        stream.flush().await?;
        Ok(stream)
    };
    tokio::join!(connect, accept)
}

pub(crate) async fn connected(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Ends {
    let (client, server) = handshake(client, server).await;
    (client.unwrap(), server.unwrap())
}
