//! Handshakes with rustls' own record layer as the other end, and what both say afterwards.

use std::{sync::Arc, time::Duration};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use bytes::BytesMut;
use weft_core::flow::Tls;

use super::{
    record::{Content, MAX_PLAIN},
    *,
};

/// Longer than anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// More than a few records.
const MUCH: usize = 300_000;

pub(crate) struct Configs {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

/// Configurations of ends that trust each other; the client trusts nobody where `strangers`.
fn configs(suite: rustls::SupportedCipherSuite, strangers: bool) -> Configs {
    let made = rcgen::generate_simple_self_signed(["test".into()]).unwrap();
    let certificate = CertificateDer::from(made.cert.der().to_vec());
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::CryptoProvider {
        cipher_suites: vec![suite],
        ..aws_lc_rs::default_provider()
    });
    let mut roots = RootCertStore::empty();
    if !strangers {
        roots.add(certificate.clone()).unwrap();
    }
    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    client.enable_secret_extraction = true;
    server.enable_secret_extraction = true;
    Configs { client: Arc::new(client), server: Arc::new(server) }
}

pub(crate) fn usual() -> Configs {
    configs(aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256, false)
}

pub(crate) async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), server.unwrap().0)
}

fn name() -> ServerName<'static> {
    ServerName::try_from("test").unwrap()
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

/// Our end, with what the connection of a tunnel does beside its frames.
struct Ours {
    socket: TcpStream,
    records: Records,
    input: BytesMut,
}

impl Ours {
    async fn new(mut socket: TcpStream, tls: Established) -> Self {
        socket.write_all(&tls.unsent).await.unwrap();
        Self { socket, records: tls.records, input: BytesMut::from(&tls.received[..]) }
    }

    async fn send(&mut self, mut plain: &[u8]) {
        let mut out = vec![0; 3 * MAX_PLAIN];
        loop {
            let (taken, written) = self.records.seal(plain, &mut out).unwrap();
            self.socket.write_all(&out[..written]).await.unwrap();
            plain = &plain[taken..];
            if plain.is_empty() && !self.records.due() {
                return;
            }
        }
    }

    /// The next record that is none of TLS' own.
    async fn next(&mut self) -> Result<Option<BytesMut>, rustls::Error> {
        loop {
            match Records::length(&self.input)? {
                Some(length) if length <= self.input.len() => {
                    let mut record = self.input.split_to(length);
                    match self.records.open(&mut record)? {
                        Content::Data => return Ok(Some(record)),
                        Content::Control => self.send(&[]).await,
                        Content::Closed => return Ok(None),
                    }
                }
                _ => assert!(self.socket.read_buf(&mut self.input).await.unwrap() > 0, "the peer closed"),
            }
        }
    }

    async fn take(&mut self, bytes: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < bytes {
            all.extend_from_slice(&self.next().await.unwrap().expect("no end"));
        }
        all
    }
}

fn text(seed: u8) -> Vec<u8> {
    (0..MUCH).map(|n| (n as u8).wrapping_mul(7).wrapping_add(seed)).collect()
}

/// Much in both directions, twice; in between `refresh` has the other end change its keys and ask for ours.
async fn talk<S: AsyncRead + AsyncWrite + Unpin>(ours: &mut Ours, theirs: &mut S, refresh: impl Fn(&mut S)) {
    for seed in [1, 2] {
        let (up, down) = (text(seed), text(seed + 10));
        let mut read = vec![0; MUCH];
        let (mut theirs_read, mut theirs_write) = tokio::io::split(&mut *theirs);
        let (_, _) = tokio::join!(soon(ours.send(&up)), soon(theirs_read.read_exact(&mut read)));
        assert!(read == up, "what we sent");
        let send = async {
            theirs_write.write_all(&down).await.unwrap();
            theirs_write.flush().await.unwrap();
        };
        let (_, read) = tokio::join!(soon(send), soon(ours.take(MUCH)));
        assert!(read == down, "what they sent");
        refresh(theirs);
    }
}

#[tokio::test]
async fn our_client_and_our_server_speak_with_rustls_in_every_suite_and_over_new_keys() {
    for suite in [
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ] {
        let configs = configs(suite, false);
        let (mut client, server) = sockets().await;
        let taking = async {
            let mut theirs = TlsAcceptor::from(configs.server.clone()).accept(server).await.unwrap();
            let mut byte = [0];
            theirs.read_exact(&mut byte).await.unwrap();
            theirs
        };
        let dialling = async {
            let tls = connect(&mut client, configs.client.clone(), name()).await.unwrap();
            assert!(
                matches!(&tls.protection, Tls::Mutual { cipher, .. } if **cipher == format!("{:?}", suite.suite()))
            );
            assert_eq!(tls.certificates.len(), 1);
            let mut ours = Ours::new(client, tls).await;
            ours.send(b"x").await;
            ours
        };
        let (mut ours, mut theirs) = soon(async { tokio::join!(dialling, taking) }).await;
        talk(&mut ours, &mut theirs, |theirs| theirs.get_mut().1.refresh_traffic_keys().unwrap()).await;

        let (client, mut server) = sockets().await;
        let connector = TlsConnector::from(configs.client.clone());
        let (tls, theirs) = soon(async {
            tokio::join!(accept(&mut server, configs.server.clone()), connector.connect(name(), client))
        })
        .await;
        let (mut ours, mut theirs) = (Ours::new(server, tls.unwrap()).await, theirs.unwrap());
        talk(&mut ours, &mut theirs, |theirs| theirs.get_mut().1.refresh_traffic_keys().unwrap()).await;
    }
}

#[tokio::test]
async fn a_key_that_is_worn_out_is_replaced() {
    let configs = usual();
    let (client, mut server) = sockets().await;
    let connector = TlsConnector::from(configs.client.clone());
    let (tls, theirs) = soon(async {
        tokio::join!(accept(&mut server, configs.server.clone()), connector.connect(name(), client))
    })
    .await;
    let (mut ours, mut theirs) = (Ours::new(server, tls.unwrap()).await, theirs.unwrap());
    ours.records.wears_out_after(3);
    talk(&mut ours, &mut theirs, |_| ()).await;
    assert!(ours.records.sealed_under_this_key() <= 3);
}

#[tokio::test]
async fn a_handshake_that_comes_byte_by_byte_is_understood() {
    let configs = usual();
    let ((mut client, near), (far, mut server)) = (sockets().await, sockets().await);
    let ((mut near_read, mut near_write), (mut far_read, mut far_write)) =
        (near.into_split(), far.into_split());
    let up = async {
        while let Ok(byte) = near_read.read_u8().await {
            far_write.write_u8(byte).await.unwrap();
        }
    };
    let down = async {
        while let Ok(byte) = far_read.read_u8().await {
            near_write.write_u8(byte).await.unwrap();
        }
    };
    let both = async {
        let dial = async {
            let mut tls = connect(&mut client, configs.client.clone(), name()).await.unwrap();
            client.write_all(&std::mem::take(&mut tls.unsent)).await.unwrap();
            tls
        };
        tokio::join!(dial, accept(&mut server, configs.server.clone()))
    };
    let (one, two) = tokio::select! {
        ends = soon(both) => ends,
        () = async { tokio::join!(up, down); } => panic!("the wire ended first"),
    };
    assert_eq!(one.protection, two.unwrap().protection);
}

#[tokio::test]
async fn who_is_refused_is_told_why() {
    let strangers = configs(aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256, true);
    let (mut client, server) = sockets().await;
    let acceptor = TlsAcceptor::from(strangers.server);
    let (ours, theirs) =
        soon(async { tokio::join!(connect(&mut client, strangers.client, name()), acceptor.accept(server)) })
            .await;
    assert!(matches!(ours, Err(Error::Tls(rustls::Error::InvalidCertificate(_)))), "{ours:?}");
    let told = theirs.err().unwrap();
    let told = told.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    assert_eq!(told, Some(&rustls::Error::AlertReceived(rustls::AlertDescription::UnknownCA)));
}

#[tokio::test]
async fn what_is_no_handshake_is_refused() {
    let garbage: [(&str, Vec<u8>); 4] = [
        ("HTTP", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()),
        ("a record that is too long", [22, 3, 1, 0xff, 0xff].into_iter().chain([0; 64]).collect()),
        ("a message that does not end", [22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff].repeat(40_000)),
        ("zeros", vec![0; 300_000]),
    ];
    for (what, bytes) in garbage {
        let (mut client, mut server) = sockets().await;
        let (mut read, mut write) = client.split();
        let mut answer = Vec::new();
        let writing = async {
            let _ = write.write_all(&bytes).await;
            let _ = write.shutdown().await;
        };
        let accepting = async {
            let accepted = accept(&mut server, usual().server).await;
            drop(server);
            accepted
        };
        let (accepted, ..) =
            soon(async { tokio::join!(accepting, writing, read.read_to_end(&mut answer)) }).await;
        assert!(matches!(accepted, Err(Error::Tls(_))), "{what}: {accepted:?}");
    }
    let (client, mut server) = sockets().await;
    drop(client);
    let accepted = soon(accept(&mut server, usual().server)).await;
    assert!(matches!(accepted, Err(Error::Closed)), "{accepted:?}");
}
