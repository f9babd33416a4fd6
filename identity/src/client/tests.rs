use std::{fs::Permissions, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path};

use parking_lot::Mutex;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Response,
    transport::{Identity as TlsIdentity, Server, ServerTlsConfig},
};
use weft_proto::control::{
    SignResponse, TrustResponse,
    identity_server::{Identity, IdentityServer},
};
use weft_runtime::Tasks;

use super::*;
use crate::{
    SvidKey,
    ca::EmbeddedCa,
    testing::{HOUR, ca, id},
};

struct Operator {
    ca: Arc<EmbeddedCa>,
    trust_domain: String,
    roots: usize,
    tokens: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl Identity for Operator {
    type TrustStream = BoxStream<'static, Result<TrustResponse, Status>>;

    async fn trust(&self, _: Request<TrustRequest>) -> Result<Response<Self::TrustStream>, Status> {
        let roots_der = self.ca.roots().iter().map(|c| c.to_vec()).cycle().take(self.roots).collect();
        let answer = TrustResponse { trust_domain: self.trust_domain.clone(), roots_der };
        Ok(Response::new(stream::iter([Ok(answer)]).boxed()))
    }

    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let token =
            request.metadata().get("authorization").ok_or_else(|| Status::unauthenticated("no token"))?;
        let token = token.to_str().map_err(|_| Status::unauthenticated("no token"))?.to_owned();
        self.tokens.lock().push(token);
        let request = request.into_inner();
        if request.service_account == "stranger" {
            return Err(Status::permission_denied("no such Pod on node-1"));
        }
        let id =
            SpiffeId::service_account(self.ca.trust_domain(), &request.namespace, &request.service_account);
        let signed = self
            .ca
            .sign(&id, &request.csr_der, HOUR)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(SignResponse {
            chain_der: signed.chain.iter().map(|c| c.to_vec()).collect(),
            trust_domain: self.trust_domain.clone(),
            roots_der: signed.roots.iter().map(|c| c.to_vec()).cycle().take(self.roots).collect(),
        }))
    }
}

struct Fixture {
    _tasks: Tasks,
    address: SocketAddr,
    bundle: String,
    tokens: Arc<Mutex<Vec<String>>>,
    folder: tempfile::TempDir,
}

async fn start(trust_domain: &str, roots: usize) -> Fixture {
    let ca = Arc::new(ca());
    let server = ca.server_credentials(&["weft-operator.weft-system.svc"]).unwrap();
    let tokens = Arc::new(Mutex::new(Vec::new()));
    let operator = Operator {
        ca: Arc::clone(&ca),
        trust_domain: trust_domain.into(),
        roots,
        tokens: Arc::clone(&tokens),
    };
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let identity = TlsIdentity::from_pem(&server.chain_pem, server.key_pem.as_str());
    let mut builder = Server::builder().tls_config(ServerTlsConfig::new().identity(identity)).unwrap();
    let serving = builder
        .add_service(IdentityServer::new(operator))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let tasks = Tasks::new();
    tasks.vital("operator", async move { Ok(serving.await?) });
    let folder = tempfile::tempdir().unwrap();
    write_token(&folder.path().join("token"), "first\n");
    Fixture { _tasks: tasks, address, bundle: ca.roots_pem(), tokens, folder }
}

fn write_token(path: &Path, content: &str) {
    weft_runtime::durable::replace(path, content.as_bytes(), 0o600).unwrap();
}

impl Fixture {
    fn token(&self) -> std::path::PathBuf {
        self.folder.path().join("token")
    }

    fn issuer(&self, server_name: &str, bundle: &str) -> OperatorIssuer {
        let uri = format!("https://{}", self.address);
        OperatorIssuer::new(
            channel(&uri, server_name, bundle.as_bytes()).unwrap(),
            TokenFile::new(self.token()),
        )
    }

    fn good(&self) -> OperatorIssuer {
        self.issuer("weft-operator.weft-system.svc", &self.bundle)
    }
}

async fn sign(issuer: &OperatorIssuer, account: &str) -> Result<Signed, IssueError> {
    let request = SvidKey::generate().unwrap().request(&id(account)).unwrap();
    issuer.sign(&id(account), request).await
}

#[tokio::test]
async fn signs_with_the_token_that_is_in_the_file_now() {
    let fixture = start("mesh.test", 1).await;
    let issuer = fixture.good();
    let signed = sign(&issuer, "web").await.unwrap();
    assert_eq!(crate::peer_identity(&signed.chain).unwrap(), id("web"));
    write_token(&fixture.token(), "second");
    sign(&issuer, "web").await.unwrap();
    assert_eq!(*fixture.tokens.lock(), ["Bearer first", "Bearer second"]);
}

#[tokio::test]
async fn a_refusal_is_told_apart() {
    let fixture = start("mesh.test", 1).await;
    assert_eq!(
        sign(&fixture.good(), "stranger").await,
        Err(IssueError::Denied("no such Pod on node-1".into()))
    );
    let result = fixture.good().sign(&id("web"), b"no request".to_vec()).await;
    assert!(matches!(result, Err(IssueError::Request(_))), "{result:?}");
    let other: SpiffeId = "spiffe://mesh.test/gateway".parse().unwrap();
    assert!(matches!(fixture.good().sign(&other, Vec::new()).await, Err(IssueError::Request(_))));
}

#[tokio::test]
async fn an_operator_that_cannot_be_verified_gets_no_token() {
    let fixture = start("mesh.test", 1).await;
    for issuer in [
        fixture.issuer("weft-operator.weft-system.svc", &ca().roots_pem()),
        fixture.issuer("somebody-else.weft-system.svc", &fixture.bundle),
    ] {
        let result = sign(&issuer, "web").await;
        assert!(matches!(result, Err(IssueError::Unavailable(_))), "{result:?}");
    }
    assert!(fixture.tokens.lock().is_empty());
}

#[tokio::test]
async fn an_answer_of_another_mesh_or_too_long_is_refused() {
    let other = start("other.test", 1).await;
    assert!(matches!(sign(&other.good(), "web").await, Err(IssueError::Invalid(_))));
    let long = start("mesh.test", MAX_ROOTS + 1).await;
    assert!(matches!(sign(&long.good(), "web").await, Err(IssueError::Invalid(_))));
}

#[tokio::test]
async fn a_bad_token_file_is_named_and_not_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    let read = async |path: &Path| TokenFile::new(path).read().await;
    assert!(read(&path).await.unwrap_err().to_string().contains("token"));
    for content in ["", " \n", "SECRET\nSECRET"] {
        write_token(&path, content);
        let error = read(&path).await.unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()) && !error.contains("SECRET"), "{error}");
    }
    write_token(&path, "good");
    let value = read(&path).await.unwrap();
    assert!(value.is_sensitive() && !format!("{value:?}").contains("good"));
}

#[tokio::test]
async fn a_token_that_others_can_use_is_not_sent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    write_token(&path, "SECRET");
    for mode in [0o644, 0o640, 0o620, 0o606] {
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let error = TokenFile::new(&path).read().await.unwrap_err().to_string();
        assert!(error.contains(&format!("(mode {mode:04o})")) && error.contains("chmod 600"), "{error}");
        assert!(!error.contains("SECRET"), "{error}");
    }
    std::fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
    assert!(TokenFile::new(&path).read().await.is_ok());
}

#[tokio::test]
async fn a_malformed_address_is_an_error() {
    assert!(channel("https://not an address", "weft-operator", ca().roots_pem().as_bytes()).is_err());
}
