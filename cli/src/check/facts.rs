//! What the cluster says of itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use futures_util::{StreamExt as _, future::join_all};
use http::{Request, header::DATE};
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment},
        coordination::v1::Lease,
        core::v1::{ConfigMap, Namespace, Node, Pod},
        networking::v1::NetworkPolicy,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::version::Info,
};
use kube::{Api, api::ListParams, client::Body};
use serde::de::DeserializeOwned;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc2822};
use weft_proto::{
    flow::FlowFilter,
    observer::{GetFlowsRequest, get_flows_response::ResponseTypes},
};

use crate::{
    Failure,
    cluster::{Cluster, SYSTEM},
    format::View,
    mesh::{Mesh, States, is_ready, labelled},
};

/// Where the operator writes when roots go.
const RETIRE_AT: &str = "weft.mesh/retire-at";
/// Objects of one page.
const PAGE: u32 = 500;
/// Most flows that are looked at.
const MAX_FLOWS: usize = 50_000;
/// Agents whose /readyz is asked.
const MAX_ASKED: usize = 20;
const MAX_REASON: usize = 300;
/// Kinds of Weft and of the Gateway API, by plural and group.
pub(super) const OWN_KINDS: [&str; 3] = ["authorizationpolicies", "trafficpolicies", "meshconfigs"];
pub(super) const ROUTES: &str = "httproutes.gateway.networking.k8s.io";

/// What was asked for, or why it is not known.
pub(super) type Got<T> = Result<T, String>;

/// The API server.
#[derive(Debug, Clone, Default)]
pub(super) struct Server {
    pub(super) address: String,
    pub(super) version: String,
    /// Major and minor.
    pub(super) number: Option<(u32, u32)>,
    /// How far its clock is before ours, in seconds.
    pub(super) ahead: Option<i64>,
}

/// Everything that is judged.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) kinds: Got<BTreeMap<String, CustomResourceDefinition>>,
    pub(super) operator: Got<Option<Deployment>>,
    pub(super) agents: Got<Option<DaemonSet>>,
    pub(super) bundle: Got<Option<String>>,
    /// Its roots that sign no more, by the SHA-256 of their certificates in hex.
    pub(super) retiring: BTreeSet<String>,
    pub(super) nodes: Got<Vec<Node>>,
    pub(super) leases: Got<Vec<Lease>>,
    pub(super) namespaces: Got<Vec<Namespace>>,
    pub(super) pods: Got<Vec<Pod>>,
    pub(super) policies: Got<Vec<NetworkPolicy>>,
    /// Objects of Weft, and routes.
    pub(super) objects: Got<Vec<Value>>,
    pub(super) states: Got<States>,
    /// By Pod, what an agent that is not ready misses.
    pub(super) missing: BTreeMap<String, String>,
    /// Flows to the namespace that was asked about.
    pub(super) flows: Got<Vec<View>>,
}

impl Default for Facts {
    fn default() -> Self {
        Self {
            kinds: Ok(BTreeMap::new()),
            operator: Ok(None),
            agents: Ok(None),
            bundle: Ok(None),
            retiring: BTreeSet::new(),
            nodes: Ok(Vec::new()),
            leases: Ok(Vec::new()),
            namespaces: Ok(Vec::new()),
            pods: Ok(Vec::new()),
            policies: Ok(Vec::new()),
            objects: Ok(Vec::new()),
            states: Ok(States::default()),
            missing: BTreeMap::new(),
            flows: Ok(Vec::new()),
        }
    }
}

/// Asks the API server who it is. Without an answer there is nothing to check.
pub(super) async fn server(cluster: &Cluster) -> Result<Server, Failure> {
    let failed = |e: &kube::Error| Failure::Unable(cluster.why(e));
    let request = Request::get("/version").body(Body::empty()).map_err(|e| Failure::Unable(e.to_string()))?;
    let before = SystemTime::now();
    let response = cluster.client.send(request).await.map_err(|e| failed(&e))?;
    let waited = before.elapsed().unwrap_or_default();
    let date = response.headers().get(DATE).and_then(|d| d.to_str().ok().map(ToOwned::to_owned));
    let ahead = date.and_then(|d| seconds_ahead(&d, before + waited / 2));
    let info: Info = cluster.client.apiserver_version().await.map_err(|e| failed(&e))?;
    let digits = |t: &str| t.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok();
    let number = digits(&info.major).zip(digits(&info.minor));
    Ok(Server { address: cluster.server.clone(), version: info.git_version, number, ahead })
}

/// How far an HTTP date is before `now`; whole seconds, so that one more or less says nothing.
pub(super) fn seconds_ahead(date: &str, now: SystemTime) -> Option<i64> {
    let date = OffsetDateTime::parse(&date.replace("GMT", "+0000"), &Rfc2822).ok()?;
    Some((date - OffsetDateTime::from(now)).whole_seconds())
}

impl Facts {
    /// What is needed before an installation.
    pub(super) async fn before(cluster: &Cluster) -> Self {
        let (kinds, nodes, leases) = tokio::join!(kinds(cluster), list(cluster), leases(cluster));
        Self { kinds, nodes, leases, ..Self::default() }
    }

    /// All of it.
    pub(super) async fn collect(cluster: &Cluster, namespace: Option<&str>) -> Self {
        let (kinds, operator, agents, bundle, nodes, leases, namespaces, pods, policies, seen) = tokio::join!(
            kinds(cluster),
            one::<Deployment>(cluster, "weft-operator"),
            one::<DaemonSet>(cluster, "weft-agent"),
            one::<ConfigMap>(cluster, "weft-trust-bundle"),
            list(cluster),
            leases(cluster),
            list(cluster),
            list::<Pod>(cluster),
            list(cluster),
            seen(cluster, namespace),
        );
        let objects = match &kinds {
            Ok(kinds) => objects(cluster, kinds).await,
            Err(why) => Err(why.clone()),
        };
        let missing = match &pods {
            Ok(pods) => missing(cluster, pods).await,
            Err(_) => BTreeMap::new(),
        };
        let retiring = bundle.iter().flatten().find_map(|m| m.metadata.annotations.as_ref()?.get(RETIRE_AT));
        let retiring = retiring.and_then(|text| serde_json::from_str::<BTreeMap<String, u64>>(text).ok());
        let retiring = retiring.unwrap_or_default().into_keys().collect();
        let bundle = bundle.map(|map| map.and_then(|m| m.data?.remove("bundle.pem")));
        let (states, flows) = seen;
        Self {
            kinds,
            operator,
            agents,
            bundle,
            retiring,
            nodes,
            leases,
            namespaces,
            pods,
            policies,
            objects,
            states,
            missing,
            flows,
        }
    }
}

async fn one<K>(cluster: &Cluster, name: &str) -> Got<Option<K>>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let api: Api<K> = Api::namespaced(cluster.client.clone(), SYSTEM);
    api.get_opt(name).await.map_err(|e| cluster.why(&e))
}

async fn list<K>(cluster: &Cluster) -> Got<Vec<K>>
where
    K: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    pages(cluster, Api::<K>::all(cluster.client.clone())).await
}

async fn leases(cluster: &Cluster) -> Got<Vec<Lease>> {
    pages(cluster, Api::<Lease>::namespaced(cluster.client.clone(), "kube-node-lease")).await
}

async fn pages<K>(cluster: &Cluster, api: Api<K>) -> Got<Vec<K>>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    let (mut found, mut params) = (Vec::new(), ListParams::default().limit(PAGE));
    loop {
        let page = api.list(&params).await.map_err(|e| cluster.why(&e))?;
        found.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(found),
        }
    }
}

async fn kinds(cluster: &Cluster) -> Got<BTreeMap<String, CustomResourceDefinition>> {
    let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    let own = OWN_KINDS.iter().map(|plural| format!("{plural}.weft.mesh"));
    let mut found = BTreeMap::new();
    for name in own.chain([ROUTES.to_owned()]) {
        if let Some(kind) = api.get_opt(&name).await.map_err(|e| cluster.why(&e))? {
            found.insert(name, kind);
        }
    }
    Ok(found)
}

async fn objects(cluster: &Cluster, kinds: &BTreeMap<String, CustomResourceDefinition>) -> Got<Vec<Value>> {
    let mut found = Vec::new();
    for kind in kinds.values() {
        let Some(version) = kind.spec.versions.iter().find(|v| v.served && v.storage) else { continue };
        let path =
            format!("/apis/{}/{}/{}?limit=5000", kind.spec.group, version.name, kind.spec.names.plural);
        let request = Request::get(path).body(Vec::new()).map_err(|e| e.to_string())?;
        let mut page: Value = cluster.client.request(request).await.map_err(|e| cluster.why(&e))?;
        if let Value::Array(items) = page["items"].take() {
            found.extend(items.into_iter().map(|mut item| {
                // Items of a list do not name their kind.
                item["kind"] = kind.spec.names.kind.clone().into();
                item
            }));
        }
    }
    Ok(found)
}

/// What agents that are not ready say at /readyz, through the API server.
async fn missing(cluster: &Cluster, pods: &[Pod]) -> BTreeMap<String, String> {
    let waiting = pods.iter().filter(|p| {
        p.metadata.namespace.as_deref() == Some(SYSTEM)
            && labelled(p, "weft-agent")
            && !is_ready(p)
            // At the address of one that does not run, its predecessor on the node answers.
            && runs(p)
    });
    let asked = waiting.filter_map(|p| p.metadata.name.clone()).take(MAX_ASKED).map(|name| async move {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{name}:15020/proxy/readyz");
        let request = Request::get(path).body(Body::empty()).ok()?;
        let response = cluster.client.send(request).await.ok()?;
        // Other answers are the API server's: it does not reach the Pod.
        let own = matches!(response.status().as_u16(), 200 | 503);
        let text = response.into_body().collect_bytes().await.ok()?;
        let text: String = String::from_utf8_lossy(&text).trim().chars().take(MAX_REASON).collect();
        (own && !matches!(&*text, "" | "ready") && !text.starts_with('{')).then_some((name, text))
    });
    join_all(asked).await.into_iter().flatten().collect()
}

/// Whether a container of the Pod has been started and has not ended.
fn runs(pod: &Pod) -> bool {
    let containers = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    containers.filter_map(|c| c.state.as_ref()).any(|s| s.running.is_some())
}

/// What the agents say, and the flows to a namespace.
async fn seen(cluster: &Cluster, namespace: Option<&str>) -> (Got<States>, Got<Vec<View>>) {
    let mesh = match Mesh::open(cluster).await {
        Ok(mesh) => mesh,
        Err(failure) => return (Err(failure.to_string()), Err(failure.to_string())),
    };
    let flows = async {
        match namespace {
            Some(namespace) => flows(&mesh, namespace).await,
            None => Ok(Vec::new()),
        }
    };
    let (states, flows) = tokio::join!(mesh.states(), flows);
    (Ok(states), flows)
}

async fn flows(mesh: &Mesh, namespace: &str) -> Got<Vec<View>> {
    let pods = vec![format!("{namespace}/")];
    let from = FlowFilter { source_pod: pods.clone(), ..FlowFilter::default() };
    let to = FlowFilter { destination_pod: pods, ..FlowFilter::default() };
    let request = GetFlowsRequest { whitelist: vec![from, to], ..GetFlowsRequest::default() };
    let mut found = Vec::new();
    for replica in &mesh.replicas {
        let mut stream = replica.flows(request.clone()).await.map_err(|s| s.message().to_owned())?;
        while let Some(answer) = stream.next().await {
            let answer = answer.map_err(|s| s.message().to_owned())?;
            if let Some(ResponseTypes::Flow(flow)) = answer.response_types
                && found.len() < MAX_FLOWS
            {
                found.push(View::of(&flow));
            }
        }
    }
    Ok(found)
}
