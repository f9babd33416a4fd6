//! The mesh of a cluster, through its operator: each ready replica is reached by a port-forward of the API server, and
//! speaks for the agents that are connected to it.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use futures_util::future::join_all;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::{ConfigMap, Pod, ServiceAccount},
};
use kube::{
    Api,
    api::{ListParams, PostParams},
};
use tokio::time::timeout;
use tonic::{
    Request, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use weft_proto::{
    observer::{GetFlowsRequest, GetFlowsResponse, observer_client::ObserverClient},
    weft_relay::{NodeStatus, ProbeRequest, ProbeResult, StatusRequest, mesh_client::MeshClient},
};

use crate::{
    Failure,
    cluster::{Cluster, SYSTEM},
    connect::chain,
    text::clean,
};

/// Whom the token is for, and of which ServiceAccount it is.
const AUDIENCE: &str = "weft-observer";
pub(crate) const VIEWER: &str = "weft-viewer";
/// The Role of the way to the operator, and the ClusterRole that lets a namespace's ServiceAccount see its flows.
const CONNECT: &str = "weft-connect";
const FLOWS: &str = "weft-flows-viewer";
/// The header that asks for the flows of one namespace.
const NAMESPACE: &str = "weft-namespace";
/// The operator's port, and the name in its certificate.
const PORT: u16 = 15012;
const SERVER_NAME: &str = "weft-operator";
/// How long the token is good: calls prove themselves when they begin. The API server makes none for less.
const TOKEN_SECONDS: i64 = 600;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a replica may take to ask its agents.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Largest answer: the states of all agents.
const MAX_ANSWER: usize = 256 << 20;

/// A replica of the operator.
#[derive(Clone)]
pub(crate) struct Replica {
    pub(crate) name: String,
    channel: Channel,
    pass: Pass,
}

/// The right to see flows: of one namespace where that is named, otherwise of all.
#[derive(Clone)]
struct Pass {
    token: MetadataValue<Ascii>,
    namespace: Option<MetadataValue<Ascii>>,
}

/// The operator's replicas that answer, and what is wrong with the others.
pub(crate) struct Mesh {
    pub(crate) replicas: Vec<Replica>,
    pub(crate) problems: Vec<String>,
    /// The nodes that have an agent's Pod.
    pub(crate) nodes: Vec<String>,
}

/// What the agents say of themselves.
#[derive(Debug, Default)]
pub(crate) struct States {
    /// By node, with the replica that it came from.
    pub(crate) nodes: BTreeMap<String, (String, NodeStatus)>,
    /// What is wrong with the others.
    pub(crate) problems: Vec<String>,
}

impl Mesh {
    /// Connects to every ready replica, as who may see everything.
    pub(crate) async fn open(cluster: &Cluster) -> Result<Self, Failure> {
        Self::open_for(cluster, None).await
    }

    /// Connects to every ready replica to see the flows of a namespace, or everything.
    pub(crate) async fn open_for(cluster: &Cluster, namespace: Option<&str>) -> Result<Self, Failure> {
        let (pass, bundle, pods) = tokio::join!(pass(cluster, namespace), bundle(cluster), pods(cluster));
        let (pass, bundle, pods) = (pass?, bundle?, pods?);
        let (ready, waiting): (Vec<_>, Vec<_>) = pods
            .iter()
            .filter(|p| labelled(p, "weft-operator"))
            .partition(|p| is_ready(p) && p.metadata.deletion_timestamp.is_none());
        let opened = ready.iter().filter_map(|p| p.metadata.name.clone()).map(|name| {
            let (bundle, pass) = (&bundle, &pass);
            async move {
                let channel = forward(cluster, &name, bundle).await;
                channel.map(|channel| Replica { name: name.clone(), channel, pass: pass.clone() })
            }
        });
        let (mut replicas, mut problems) = (Vec::new(), Vec::new());
        for outcome in join_all(opened).await {
            match outcome {
                Ok(replica) => replicas.push(replica),
                Err(problem) => problems.push(problem),
            }
        }
        if replicas.is_empty() {
            let why = match problems.first() {
                Some(problem) => problem.clone(),
                None if waiting.is_empty() => "there is none; is Weft installed? run `weft check`".into(),
                None => format!(
                    "none of its {} Pods is ready; see `kubectl -n {SYSTEM} describe pods -l app.kubernetes.io/name=weft-operator`",
                    waiting.len()
                ),
            };
            return Err(Failure::Unable(format!("cannot reach the operator: {why}")));
        }
        let on = |p: &Pod| p.spec.as_ref().and_then(|s| s.node_name.clone());
        let mut nodes: Vec<_> = pods.iter().filter(|p| labelled(p, "weft-agent")).filter_map(on).collect();
        nodes.sort();
        nodes.dedup();
        Ok(Self { replicas, problems, nodes })
    }

    /// Asks every replica how its agents are.
    pub(crate) async fn states(&self) -> States {
        let asked = self.replicas.iter().map(|replica| async move {
            let mut client = MeshClient::new(replica.channel.clone()).max_decoding_message_size(MAX_ANSWER);
            match timeout(ANSWER_TIMEOUT, client.status(replica.request(StatusRequest {}))).await {
                Ok(Ok(answer)) => Ok((replica.name.clone(), answer.into_inner())),
                Ok(Err(status)) => Err(format!("operator {}: {}", replica.name, clean(status.message()))),
                Err(_) => Err(format!("operator {}: it does not answer; see its log", replica.name)),
            }
        });
        let mut states = States { problems: self.problems.clone(), ..States::default() };
        let mut silent = BTreeMap::new();
        for outcome in join_all(asked).await {
            match outcome {
                Ok((replica, answer)) => {
                    for status in answer.nodes {
                        let Some(node) = status.agent.as_ref().map(|a| a.node.clone()) else { continue };
                        states.nodes.insert(node, (replica.clone(), status));
                    }
                    silent.extend(answer.silent.into_iter().map(|s| (s.node, s.problem)));
                }
                Err(problem) => states.problems.push(problem),
            }
        }
        for node in &self.nodes {
            if !states.nodes.contains_key(node) && !silent.contains_key(node) {
                let problem = "its agent is not connected to the operator".to_owned();
                silent.insert(node.clone(), problem);
            }
        }
        // An agent that moved from one replica to the other in this moment did answer.
        silent.retain(|node, _| !states.nodes.contains_key(node));
        states.problems.extend(silent.into_iter().map(|(node, problem)| {
            format!("{node}: {problem}; see `kubectl -n {SYSTEM} logs -l app.kubernetes.io/name=weft-agent`")
        }));
        states
    }
}

impl Replica {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.pass.token.clone());
        if let Some(namespace) = &self.pass.namespace {
            request.metadata_mut().insert(NAMESPACE, namespace.clone());
        }
        request
    }

    /// Has a Pod's agent make a probe.
    pub(crate) async fn probe(&self, request: ProbeRequest) -> Result<ProbeResult, tonic::Status> {
        let mut client = MeshClient::new(self.channel.clone());
        match timeout(ANSWER_TIMEOUT, client.probe(self.request(request))).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(tonic::Status::deadline_exceeded("the operator does not answer; see its log")),
        }
    }

    /// Flows of this replica's agents.
    pub(crate) async fn flows(
        &self,
        request: GetFlowsRequest,
    ) -> Result<Streaming<GetFlowsResponse>, tonic::Status> {
        let mut client = ObserverClient::new(self.channel.clone());
        client.get_flows(self.request(request)).await.map(tonic::Response::into_inner)
    }
}

/// The certificates that the operator's own must lead to.
async fn bundle(cluster: &Cluster) -> Result<String, Failure> {
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let what = "the trust bundle (ConfigMap weft-trust-bundle)";
    let map = maps.get_opt("weft-trust-bundle").await.map_err(|e| unread(cluster, what, &e))?;
    map.and_then(|m| m.data?.remove("bundle.pem")).ok_or_else(|| {
        Failure::Unable(format!(
            "there is no trust bundle in {SYSTEM}: is Weft installed, and does its operator run? run `weft check`"
        ))
    })
}

/// What everybody who asks the operator reads was not given.
fn unread(cluster: &Cluster, what: &str, error: &kube::Error) -> Failure {
    match cluster.failed(what, error) {
        Failure::Unable(why) if is(error, 403) => Failure::Unable(format!(
            "{why}; the way to the operator is for whom the Role {CONNECT} is bound to: kubectl -n {SYSTEM} create rolebinding \
             NAME --role={CONNECT} --user=YOU"
        )),
        other => other,
    }
}

fn is(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

/// The right to see everything; where the caller has none and asks for one namespace, for that one.
async fn pass(cluster: &Cluster, namespace: Option<&str>) -> Result<Pass, Failure> {
    let all = match token(cluster, SYSTEM).await {
        Ok(token) => return Ok(Pass { token: header(&token)?, namespace: None }),
        Err(error) => error,
    };
    match namespace {
        Some(namespace) if is(&all, 403) => match token(cluster, namespace).await {
            Ok(token) => {
                let name = namespace.parse();
                let name = name.map_err(|_| Failure::Usage(format!("{namespace:?} is no namespace")))?;
                Ok(Pass { token: header(&token)?, namespace: Some(name) })
            }
            Err(error) if is(&error, 403) || is(&error, 404) => {
                Err(refused(cluster, &error, Some(namespace)))
            }
            Err(error) => Err(refused(cluster, &error, None)),
        },
        _ => Err(refused(cluster, &all, None)),
    }
}

/// Why there is no token, and whom to ask for what.
fn refused(cluster: &Cluster, error: &kube::Error, namespace: Option<&str>) -> Failure {
    let why = cluster.why(error);
    Failure::Unable(match namespace {
        Some(namespace) => format!(
            "you may not see the flows of namespace {namespace}: {why}; ask an administrator for: \
             kubectl -n {namespace} create serviceaccount {VIEWER}; \
             kubectl -n {namespace} create rolebinding {VIEWER} --clusterrole={FLOWS} \
             --serviceaccount={namespace}:{VIEWER} --user=YOU; \
             kubectl -n {SYSTEM} create rolebinding NAME --role={CONNECT} --user=YOU"
        ),
        None if is(error, 403) => format!(
            "you may not see the whole mesh: {why}; ask an administrator for: \
             kubectl -n {SYSTEM} create rolebinding NAME --role={VIEWER} --user=YOU; \
             the flows of one namespace need less: weft observe -n NAMESPACE"
        ),
        None if is(error, 404) => {
            format!("no token of ServiceAccount {VIEWER}: {why}; is Weft installed? run `weft check`")
        }
        None => format!("no token of ServiceAccount {VIEWER}: {why}"),
    })
}

/// A token of the viewers' ServiceAccount in a namespace.
async fn token(cluster: &Cluster, namespace: &str) -> Result<String, kube::Error> {
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client.clone(), namespace);
    let request = TokenRequest {
        spec: TokenRequestSpec {
            audiences: vec![AUDIENCE.into()],
            expiration_seconds: Some(TOKEN_SECONDS),
            bound_object_ref: None,
        },
        ..TokenRequest::default()
    };
    let made = accounts.create_token_request(VIEWER, &PostParams::default(), &request).await?;
    Ok(made.status.map(|s| s.token).unwrap_or_default())
}

fn header(token: &str) -> Result<MetadataValue<Ascii>, Failure> {
    let mut header: MetadataValue<Ascii> = format!("Bearer {token}")
        .parse()
        .map_err(|_| Failure::Unable("the API server made a token that cannot be sent".into()))?;
    header.set_sensitive(true);
    Ok(header)
}

/// Weft's own Pods.
async fn pods(cluster: &Cluster) -> Result<Vec<Pod>, Failure> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let params = ListParams::default().labels("app.kubernetes.io/part-of=weft");
    let found = pods.list(&params).await;
    found.map(|list| list.items).map_err(|e| unread(cluster, "the Pods of Weft", &e))
}

pub(crate) fn labelled(pod: &Pod, name: &str) -> bool {
    let labels = pod.metadata.labels.as_ref();
    labels.and_then(|l| l.get("app.kubernetes.io/name")).is_some_and(|n| n == name)
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

async fn forward(cluster: &Cluster, pod: &str, bundle: &str) -> Result<Channel, String> {
    let (pods, name): (Api<Pod>, Arc<str>) = (Api::namespaced(cluster.client.clone(), SYSTEM), pod.into());
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let (pods, name) = (pods.clone(), Arc::clone(&name));
        async move {
            let mut forwarder = pods.portforward(&name, &[PORT]).await.map_err(io::Error::other)?;
            let stream = forwarder.take_stream(PORT);
            stream.map(TokioIo::new).ok_or_else(|| io::Error::other("the API server forwards no port"))
        }
    });
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(bundle)).domain_name(SERVER_NAME);
    let endpoint = Endpoint::from_static("https://weft-operator")
        .tls_config(tls)
        .map_err(|e| format!("the trust bundle is not usable: {}", chain(&e)))?
        .connect_timeout(CONNECT_TIMEOUT);
    match timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(connector)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(e)) => Err(format!("operator {pod}: {}", chain(&e))),
        Err(_) => Err(format!("operator {pod}: no connection within {} s", CONNECT_TIMEOUT.as_secs())),
    }
}

#[cfg(test)]
mod tests;
