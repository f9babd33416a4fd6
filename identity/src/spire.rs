//! SPIRE as the issuer: the node's SPIRE agent, through its Delegated Identity API.
//!
//! The API hands out the credentials of others to a delegate that it trusts. Weft's agent names a service account by
//! the selectors that SPIRE's own attestor of Kubernetes workloads would find, and takes only what carries exactly that
//! SPIFFE id. Keys are SPIRE's, and so is the clock of renewal: each subscription stays open and brings what follows.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{
    Stream, StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use spire_api::pb::spire::api::agent::delegatedidentity::v1::{
    SubscribeToX509BundlesRequest, SubscribeToX509BundlesResponse, SubscribeToX509sviDsRequest,
    SubscribeToX509sviDsResponse, delegated_identity_client::DelegatedIdentityClient,
};
use tokio::net::UnixStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};
use weft_core::SpiffeId;

use crate::issuer::{BoxFuture, IssueError, Issued, Issuer, Signed, Update};

mod answer;

/// Largest answer, in bytes: one identity with its chain, or the roots of every trust domain.
const MAX_ANSWER: usize = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Most Pods of one identity that are named to SPIRE.
const MAX_PODS: usize = 64;

/// The UIDs of this node's Pods that have an identity.
pub type PodUids = Arc<dyn Fn(&SpiffeId) -> Vec<Arc<str>> + Send + Sync>;

/// Why the SPIRE agent gives no usable credential.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpireError {
    /// It cannot be reached, or ended.
    #[error(
        "the SPIRE agent does not answer at {socket}: {why}; check that it runs on this node and that its \
         admin_socket_path is the one in the MeshConfig"
    )]
    Unavailable {
        /// Its admin socket.
        socket: String,
        /// What was said.
        why: String,
    },
    /// It does not take Weft's agent for a delegate.
    #[error(
        "the SPIRE agent at {socket} refuses weft-agent ({why}); make an entry in SPIRE for k8s:ns:weft-system and \
         k8s:sa:weft-agent, and put its SPIFFE id into authorized_delegates of the SPIRE agent's configuration"
    )]
    NotDelegate {
        /// Its admin socket.
        socket: String,
        /// What was said.
        why: String,
    },
    /// It serves another trust domain.
    #[error(
        "SPIRE knows no trust domain {mesh}, only {spire}; set spec.trustDomain of the MeshConfig to SPIRE's own"
    )]
    TrustDomain {
        /// The mesh's.
        mesh: String,
        /// Those that it knows.
        spire: String,
    },
    /// It has no identity for that service account on this node.
    #[error(
        "SPIRE has no entry for {id} on this node; make one: spire-server entry create -spiffeID {id} \
         -parentID <this node's SPIRE agent>{selectors}"
    )]
    NoEntry {
        /// Who it should be.
        id: SpiffeId,
        /// What the entry must select by.
        selectors: String,
    },
    /// Its entry names somebody else.
    #[error(
        "SPIRE's entries for that service account name {found}, but Weft needs {id}; correct the SPIFFE id of the entry \
         (with spire-controller-manager: spiffeIDTemplate)"
    )]
    OtherId {
        /// Who it should be.
        id: SpiffeId,
        /// Who it is.
        found: String,
    },
    /// What it sent cannot be used.
    #[error("the SPIRE agent's answer is not usable: {0}")]
    Malformed(String),
}

/// Takes credentials from the node's SPIRE agent. Make it inside a Tokio runtime.
pub struct SpireIssuer {
    socket: PathBuf,
    client: DelegatedIdentityClient<Channel>,
    pods: PodUids,
    followed: Mutex<Followed>,
    /// By trust domain; empty while nobody tells of changes.
    roots: Mutex<BTreeMap<String, Vec<CertificateDer<'static>>>>,
}

type Svids = Streaming<SubscribeToX509sviDsResponse>;

/// The subscriptions, one for each identity.
#[derive(Default)]
struct Followed {
    streams: HashMap<SpiffeId, Svids>,
    waker: Option<Waker>,
}

impl SpireIssuer {
    /// Asks at the admin socket `socket`, a path of the node: where this process has a root folder of its own, the
    /// node's is found through its first process. Nothing is connected yet.
    pub fn new(socket: impl Into<PathBuf>, pods: PodUids) -> Self {
        let socket = socket.into();
        let path = socket.clone();
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let path = path.clone();
            async move { connect(&path).await.map(TokioIo::new) }
        });
        // No keep-alive: the end of a local socket is noticed, and a gRPC server in Go closes on pings.
        let channel = Endpoint::from_static("http://spire-agent")
            .connect_timeout(CONNECT_TIMEOUT)
            .connect_with_connector_lazy(connector);
        let client = DelegatedIdentityClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        Self { socket, client, pods, followed: Mutex::default(), roots: Mutex::default() }
    }

    async fn svids(&self, id: &SpiffeId) -> Result<Svids, IssueError> {
        let uids = (self.pods)(id);
        let selectors = answer::selectors(id, uids.iter().take(MAX_PODS)).ok_or_else(|| {
            IssueError::Request(format!("{id} is neither a service account's nor a node's"))
        })?;
        let request = SubscribeToX509sviDsRequest { selectors, pid: 0 };
        let mut client = self.client.clone();
        let answers = client.subscribe_to_x509svi_ds(request).await;
        Ok(answers.map_err(|status| self.refused(&status))?.into_inner())
    }

    /// The roots of all trust domains, as they are now.
    async fn bundles(&self) -> Result<Streaming<SubscribeToX509BundlesResponse>, SpireError> {
        let mut client = self.client.clone();
        let answers = client.subscribe_to_x509_bundles(SubscribeToX509BundlesRequest {}).await;
        Ok(answers.map_err(|status| self.refused(&status))?.into_inner())
    }

    async fn roots_of(&self, id: &SpiffeId) -> Result<Vec<CertificateDer<'static>>, SpireError> {
        let known = |all: &BTreeMap<String, Vec<_>>| all.get(id.trust_domain()).cloned();
        if let Some(roots) = known(&self.roots.lock()) {
            return Ok(roots);
        }
        let mut bundles = self.bundles().await?;
        let first = bundles.message().await.map_err(|status| self.refused(&status))?;
        let all = answer::roots(first.ok_or_else(|| self.ended())?)?;
        known(&all).ok_or_else(|| SpireError::TrustDomain {
            mesh: id.trust_domain().to_owned(),
            spire: all.keys().take(8).cloned().collect::<Vec<_>>().join(", "),
        })
    }

    async fn issued(
        &self,
        id: &SpiffeId,
        answer: &SubscribeToX509sviDsResponse,
    ) -> Result<Issued, IssueError> {
        let roots = self.roots_of(id).await?;
        let (key, chain) = answer::pick(id, answer)?;
        Ok(Issued { key, signed: Signed { chain, roots } })
    }

    async fn ask(&self, id: &SpiffeId) -> Result<Issued, IssueError> {
        let mut answers = self.svids(id).await?;
        let first = answers.message().await.map_err(|status| self.refused(&status))?;
        let result = self.issued(id, &first.ok_or_else(|| self.ended())?).await;
        // Where there is nothing yet, too: an entry that is made later comes this way.
        self.followed.lock().add(id, answers);
        result
    }

    /// What the subscription of `id` brought.
    async fn brought(
        &self,
        id: SpiffeId,
        item: Option<Result<SubscribeToX509sviDsResponse, Status>>,
    ) -> Update {
        let issued = match item {
            Some(Ok(answer)) => self.issued(&id, &answer).await,
            Some(Err(status)) => Err(self.refused(&status).into()),
            None => Err(self.ended().into()),
        };
        match issued {
            Ok(issued) => Update::Renewed { id, issued },
            Err(error) => Update::Failed { id, error },
        }
    }

    /// Roots and renewed credentials, until the roots are not told of any more.
    async fn follow(&self) -> Result<impl Stream<Item = Result<Update, IssueError>> + Send + '_, IssueError> {
        self.roots.lock().clear();
        let bundles = self.bundles().await?;
        let told = bundles.map(Some).chain(stream::iter([None])).map(|item| match item {
            Some(Ok(answer)) => Ok::<_, IssueError>(self.told(answer)?),
            Some(Err(status)) => Err(self.refused(&status).into()),
            None => Err(self.ended().into()),
        });
        let told =
            told.map_ok(|updates| stream::iter(updates.into_iter().map(Ok::<_, IssueError>))).try_flatten();
        let brought = stream::poll_fn(|context| self.followed.lock().poll(context))
            .then(async |(id, item)| Ok::<_, IssueError>(self.brought(id, item).await));
        Ok(stream::select(told, brought))
    }

    fn told(&self, answer: SubscribeToX509BundlesResponse) -> Result<Vec<Update>, SpireError> {
        let roots = answer::roots(answer)?;
        self.roots.lock().clone_from(&roots);
        Ok(roots.into_iter().map(|(trust_domain, roots)| Update::Roots { trust_domain, roots }).collect())
    }

    fn refused(&self, status: &Status) -> SpireError {
        let why: String = status.message().chars().take(300).collect();
        let socket = self.socket.display().to_string();
        match status.code() {
            Code::PermissionDenied => SpireError::NotDelegate { socket, why },
            Code::OutOfRange => SpireError::Malformed(why),
            _ => SpireError::Unavailable { socket, why: format!("{}{}", why, cause(status)) },
        }
    }

    fn ended(&self) -> SpireError {
        let why = "it ended the subscription".to_owned();
        SpireError::Unavailable { socket: self.socket.display().to_string(), why }
    }
}

impl Issuer for SpireIssuer {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>> {
        Box::pin(self.ask(id))
    }

    fn updates(&self) -> BoxStream<'_, Result<Update, IssueError>> {
        stream::once(self.follow()).try_flatten().boxed()
    }

    fn renews(&self) -> bool {
        true
    }

    fn forget(&self, id: &SpiffeId) {
        self.followed.lock().streams.remove(id);
    }
}

/// What a subscription gave; `None` at its end.
type Answer = Option<Result<SubscribeToX509sviDsResponse, Status>>;

impl Followed {
    fn add(&mut self, id: &SpiffeId, answers: Svids) {
        self.streams.insert(id.clone(), answers);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<(SpiffeId, Answer)>> {
        for (id, answers) in &mut self.streams {
            if let Poll::Ready(item) = answers.poll_next_unpin(context) {
                let id = id.clone();
                if !matches!(item, Some(Ok(_))) {
                    self.streams.remove(&id);
                }
                return Poll::Ready(Some((id, item)));
            }
        }
        self.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

/// The socket, as this process or else as the node's first process sees it.
async fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    match UnixStream::connect(socket).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let below = socket.strip_prefix("/").unwrap_or(socket);
            UnixStream::connect(Path::new("/proc/1/root").join(below)).await
        }
        outcome => outcome,
    }
}

/// The innermost reason: the transport's own message says only that it failed.
fn cause(status: &Status) -> String {
    let mut error = std::error::Error::source(status);
    let mut last = None;
    while let Some(inner) = error {
        last = Some(inner.to_string());
        error = inner.source();
    }
    last.map(|text| format!(" ({})", text.chars().take(200).collect::<String>())).unwrap_or_default()
}

impl fmt::Debug for SpireIssuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpireIssuer").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
