use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::sync::watch;
use tokio_rustls::{TlsConnector, client};
use weft_core::TrustDomain;
use weft_runtime::{Tasks, drain};

use super::*;

const NAME: &str = "weft-operator";
const WAIT: Duration = Duration::from_secs(20);

fn ca() -> Arc<EmbeddedCa> {
    Arc::new(EmbeddedCa::generate(TrustDomain::new("mesh.test").unwrap()).unwrap())
}

async fn connect(address: SocketAddr, ca: &EmbeddedCa) -> io::Result<client::TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.roots().remove(0)).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(address).await?;
    let name = ServerName::try_from(NAME).unwrap();
    timeout(WAIT, TlsConnector::from(Arc::new(config)).connect(name, tcp)).await.unwrap()
}

#[tokio::test]
async fn another_ca_signs_the_certificate_anew_without_a_restart() {
    let (first, second) = (ca(), ca());
    let (sender, receiver) = watch::channel(None);
    let certificate = Certificate::new(&[NAME], receiver).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut connections = Box::pin(incoming(listener, certificate.config().unwrap(), Limits::default()));
    let (tasks, (trigger, drain)) = (Tasks::new(), drain::channel());
    tasks.spawn("accept", async move { while connections.next().await.is_some() {} });
    let current = Arc::clone(&certificate.current);
    let shown = || current.0.read().as_ref().map(|(certificate, _)| Arc::clone(certificate));
    tasks.spawn("renew", certificate.renew(drain));
    // Without a CA no handshake succeeds, and the first that comes makes it succeed.
    assert!(connect(address, &first).await.is_err());
    sender.send(Some(Arc::clone(&first))).unwrap();
    let made = async {
        while shown().is_none() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(WAIT, made).await.unwrap();
    connect(address, &first).await.unwrap();
    assert!(connect(address, &second).await.is_err());
    let before = shown().unwrap();
    sender.send(Some(Arc::clone(&second))).unwrap();
    let renewed = async {
        while shown().is_none_or(|now| Arc::ptr_eq(&before, &now)) {
            tokio::task::yield_now().await;
        }
    };
    timeout(WAIT, renewed).await.unwrap();
    connect(address, &second).await.unwrap();
    drop(trigger);
}

#[tokio::test]
async fn an_address_holds_only_so_many_connections() {
    let ca = ca();
    let certificate = Certificate::new(&[NAME], watch::channel(Some(Arc::clone(&ca))).1).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let limits = Limits { connections: 8, per_address: 2 };
    let mut connections = Box::pin(incoming(listener, certificate.config().unwrap(), limits));
    // One of the two stays silent in its handshake: it counts, and holds up nobody.
    let silent = TcpStream::connect(address).await.unwrap();
    let (near, far) = tokio::join!(connect(address, &ca), connections.next());
    let (near, far) = (near.unwrap(), far.unwrap().unwrap());
    let refused = tokio::select! {
        result = connect(address, &ca) => result,
        _ = connections.next() => panic!("a third connection"),
    };
    assert!(refused.is_err());
    drop((near, far, silent));
    let (near, far) = tokio::join!(connect(address, &ca), connections.next());
    assert!(near.is_ok() && far.is_some());
}
