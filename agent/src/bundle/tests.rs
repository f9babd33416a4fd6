use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures_util::{StreamExt as _, stream::BoxStream};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{
    Code, Request, Response, Status,
    transport::{Identity as TlsIdentity, Server, ServerTlsConfig},
};
use weft_core::TrustDomain;
use weft_identity::ca::EmbeddedCa;
use weft_proto::control::{
    SignRequest, SignResponse, TrustRequest, TrustResponse,
    identity_client::IdentityClient,
    identity_server::{Identity, IdentityServer},
};
use weft_runtime::Tasks;

use super::*;

fn way(bundle: &Path) -> Way {
    Way { uri: "https://127.0.0.1:1".into(), server_name: "weft-operator".into(), bundle: bundle.into() }
}

#[test]
fn a_bundle_without_a_certificate_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle.pem");
    let missing = read(&path).unwrap_err().to_string();
    assert!(missing.contains("weft-trust-bundle"), "{missing}");
    std::fs::write(&path, "nonsense").unwrap();
    let content = read(&path).unwrap();
    assert!(matches!(endpoint(&way(&path), &content), Err(BundleError::Empty { .. })));
}

/// A replica of the operator that cannot check tokens, or can; its stream of roots goes on in any case.
struct Replica {
    number: u8,
    serves: Arc<AtomicBool>,
    roots: watch::Receiver<u8>,
}

#[tonic::async_trait]
impl Identity for Replica {
    type TrustStream = BoxStream<'static, Result<TrustResponse, Status>>;

    async fn trust(&self, _: Request<TrustRequest>) -> Result<Response<Self::TrustStream>, Status> {
        let told = |number: u8| Ok(TrustResponse { trust_domain: number.to_string(), roots_der: Vec::new() });
        Ok(Response::new(WatchStream::new(self.roots.clone()).map(told).boxed()))
    }

    async fn sign(&self, _: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        if !self.serves.load(Ordering::Relaxed) {
            return Err(Status::unavailable("the API server cannot check tokens now; try again"));
        }
        Ok(Response::new(SignResponse { trust_domain: self.number.to_string(), ..SignResponse::default() }))
    }
}

/// Two replicas behind one address that gives them connections in turn, as a Service does at random.
struct Service {
    tasks: Tasks,
    connections: Arc<AtomicUsize>,
    serves: [Arc<AtomicBool>; 2],
    roots: watch::Sender<u8>,
    operator: Operator,
    _folder: tempfile::TempDir,
}

async fn service(serves: [bool; 2]) -> Service {
    let ca = EmbeddedCa::generate(TrustDomain::new("mesh.test").unwrap()).unwrap();
    let server = ca.server_credentials(&["weft-operator"]).unwrap();
    let identity = TlsIdentity::from_pem(&server.chain_pem, server.key_pem.as_str());
    let serves = serves.map(|serves| Arc::new(AtomicBool::new(serves)));
    let roots = watch::Sender::new(0);
    let tasks = Tasks::new();
    let mut behind = Vec::new();
    for (number, serves) in (0..).zip(&serves) {
        let (connections, incoming) = mpsc::channel::<io::Result<TcpStream>>(1);
        let replica = Replica { number, serves: serves.clone(), roots: roots.subscribe() };
        let tls = ServerTlsConfig::new().identity(identity.clone());
        let serving = Server::builder().tls_config(tls).unwrap().add_service(IdentityServer::new(replica));
        let serving = serving.serve_with_incoming(ReceiverStream::new(incoming));
        tasks.vital("replica", async move { Ok(serving.await?) });
        behind.push(connections);
    }
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let uri = format!("https://{}", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    tasks.vital("service", async move {
        loop {
            let (stream, _) = listener.accept().await?;
            let number = counted.fetch_add(1, Ordering::Relaxed);
            behind[number % behind.len()].send(Ok(stream)).await?;
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle.pem");
    std::fs::write(&bundle, ca.roots_pem()).unwrap();
    let (operator, keeper) = channel(Way { uri, server_name: "weft-operator".into(), bundle });
    tasks.spawn("keeper", keeper.run());
    Service { tasks, connections, serves, roots, operator, _folder: folder }
}

impl Service {
    fn client(&self) -> IdentityClient<Operator> {
        IdentityClient::new(self.operator.clone())
    }

    /// The replica that answers, asked again as long as none can.
    async fn signer(&self) -> String {
        loop {
            match self.client().sign(SignRequest::default()).await {
                Ok(answer) => return answer.into_inner().trust_domain,
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn who_is_turned_away_comes_to_another_replica() {
    let service = service([false, true]).await;
    let limit = Duration::from_secs(20);
    let first = service.client().sign(SignRequest::default()).await.unwrap_err();
    assert_eq!(first.code(), Code::Unavailable);
    assert_eq!(timeout(limit, service.signer()).await.unwrap(), "1");
    assert_eq!(service.connections(), 2, "one more connection is enough");

    // What stands over the first connection goes on when later calls leave it.
    let mut standing = service.client().trust(TrustRequest {}).await.unwrap().into_inner();
    assert_eq!(standing.message().await.unwrap().unwrap().trust_domain, "0");
    service.serves[0].store(true, Ordering::Relaxed);
    service.serves[1].store(false, Ordering::Relaxed);
    assert_eq!(timeout(limit, service.signer()).await.unwrap(), "0");
    service.roots.send_replace(7);
    let told = timeout(limit, standing.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(told.trust_domain, "7");
    assert_eq!(service.connections(), 3);
    service.tasks.join(Duration::ZERO).await;
}

#[tokio::test]
async fn replicas_that_all_turn_away_are_not_stormed() {
    let service = service([false, false]).await;
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        let many = (0..50).map(|_| async { service.client().sign(SignRequest::default()).await });
        let answers = futures_util::future::join_all(many).await;
        assert!(answers.into_iter().all(|answer| answer.is_err_and(|s| s.code() == Code::Unavailable)));
        sleep(Duration::from_millis(10)).await;
    }
    // Waits of at least half of 250, 500, 1000, ... ms lie between them.
    let connections = service.connections();
    assert!((3..=7).contains(&connections), "{connections} connections");
    service.tasks.join(Duration::ZERO).await;
}
