//! The mesh that is simulated: objects in a real API server.

use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{ConfigMap, Pod, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
    core::{ApiResource, GroupVersionKind},
};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{Options, agents::MARKED};
use crate::objects;

/// Weft's namespace.
pub(crate) const SYSTEM: &str = "weft-system";
/// Namespaces over which everything is spread.
const NAMESPACES: usize = 20;
/// Requests to the API server at one time.
const PARALLEL: usize = 32;
/// Longer than a run.
const TOKEN_SECONDS: i64 = 3600;

/// Writes the mesh's objects.
#[derive(Clone)]
pub(crate) struct Mesh {
    client: Client,
    nodes: usize,
    services: usize,
}

fn namespace(number: usize) -> String {
    format!("n{}", number % NAMESPACES)
}

/// A Pod's address; no two of up to 4 million are the same.
fn address(number: usize) -> String {
    format!("10.{}.{}.{}", 64 + (number >> 16 & 63), number >> 8 & 255, number & 255)
}

impl Mesh {
    pub(crate) fn new(client: Client, options: &Options) -> Self {
        Self { client, nodes: options.nodes, services: options.services }
    }

    /// Makes everything but the agents.
    pub(crate) async fn create(&self, options: &Options) -> Result<()> {
        let namespaces = (0..NAMESPACES).map(|n| {
            json!({"apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": namespace(n), "labels": {"weft.mesh/mode": "strict"}}})
        });
        self.all(namespaces).await?;
        self.all((0..self.services).map(|n| self.service(n))).await?;
        self.all((0..options.pods).map(|n| self.pod(n))).await?;
        self.all((0..self.services).map(|n| self.slice(n, options.pods))).await?;
        self.all((0..options.policies).map(|n| self.policy(n, 80))).await
    }

    /// Makes the nodes and an agent's Pod on each, and gives each agent's token, bound to that Pod by the API server.
    pub(crate) async fn tokens(&self) -> Result<Vec<String>> {
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": "weft-agent", "namespace": SYSTEM}});
        self.all([account]).await?;
        let node = |n| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{n}")}});
        self.all((0..self.nodes).map(node)).await?;
        let agent = |n| {
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": format!("weft-agent-{n}"), "namespace": SYSTEM},
                "spec": {"nodeName": format!("node-{n}"), "serviceAccountName": "weft-agent", "hostNetwork": true,
                    "containers": [{"name": "agent", "image": "agent"}]}})
        };
        self.all((0..self.nodes).map(agent)).await?;
        let tokens = stream::iter(0..self.nodes).map(|n| self.token(n)).buffered(PARALLEL);
        tokens.try_collect().await
    }

    async fn token(&self, number: usize) -> Result<String> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), SYSTEM);
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), SYSTEM);
        let name = format!("weft-agent-{number}");
        let uid = pods.get(&name).await?.metadata.uid;
        let bound = BoundObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(name),
            uid,
        };
        let spec = TokenRequestSpec {
            audiences: vec!["weft-operator".into()],
            bound_object_ref: Some(bound),
            expiration_seconds: Some(TOKEN_SECONDS),
        };
        let request = TokenRequest { spec, ..TokenRequest::default() };
        let made = accounts.create_token_request("weft-agent", &PostParams::default(), &request).await?;
        Ok(made.status.context("a token request without an answer")?.token)
    }

    async fn all(&self, objects: impl IntoIterator<Item = Value>) -> Result<()> {
        let made = stream::iter(objects).map(|object| self.make(object));
        made.buffer_unordered(PARALLEL).try_collect().await
    }

    async fn make(&self, object: Value) -> Result<()> {
        let api = objects::api(&self.client, &object);
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let parsed: DynamicObject = serde_json::from_value(object.clone())?;
        api.create(&PostParams::default(), &parsed).await.with_context(|| name.clone())?;
        if let Some(status) = object.get("status") {
            let patch = Patch::Merge(json!({ "status": status }));
            api.patch_status(&name, &PatchParams::default(), &patch).await.with_context(|| name.clone())?;
        }
        Ok(())
    }

    fn pod(&self, number: usize) -> Value {
        let app = number % self.services;
        let address = address(number);
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("p{number}"), "namespace": namespace(app),
                "labels": {"app": format!("a{app}"), "tier": format!("t{}", number % 3), "version": "one"}},
            "spec": {"nodeName": format!("node-{}", number % self.nodes), "serviceAccountName": format!("a{app}"),
                "containers": [{"name": "app", "image": "app", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
                "conditions": [{"type": "Ready", "status": "True"}]}})
    }

    fn service(&self, number: usize) -> Value {
        json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("a{number}"), "namespace": namespace(number)},
            "spec": {"selector": {"app": format!("a{number}")},
                "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}})
    }

    /// As the EndpointSlice controller writes it, which does not run here.
    fn slice(&self, number: usize, pods: usize) -> Value {
        let behind = (number..pods).step_by(self.services);
        let endpoints: Vec<Value> = behind.map(|pod| self.endpoint(pod)).collect();
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("a{number}-x"), "namespace": namespace(number),
                "labels": {"kubernetes.io/service-name": format!("a{number}")}},
            "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]})
    }

    fn endpoint(&self, pod: usize) -> Value {
        json!({"addresses": [address(pod)], "conditions": {"ready": true, "serving": true},
            "nodeName": format!("node-{}", pod % self.nodes),
            "targetRef": {"kind": "Pod", "name": format!("p{pod}"), "namespace": namespace(pod % self.services)}})
    }

    fn policy(&self, number: usize, port: u16) -> Value {
        let app = number % self.services;
        let caller = (number * 7 + 1) % self.services;
        json!({"apiVersion": "weft.mesh/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": format!("r{number}"), "namespace": namespace(app)},
            "spec": {
                "targetRefs": [{"group": "", "kind": "Pod", "selector": {"matchLabels": {"app": format!("a{app}")}}}],
                "rules": [{
                    "sources": [{"type": "ServiceAccount",
                        "serviceAccount": {"namespace": namespace(caller), "name": format!("a{caller}")}}],
                    "networkAttributes": {"ports": [port]}}]}})
    }

    /// Changes the one policy by which changes are told apart, as `kubectl apply` would.
    pub(crate) async fn mark(&self, port: u16) -> Result<()> {
        let object = self.policy(0, port);
        let patch = Patch::Merge(json!({"spec": object["spec"]}));
        objects::api(&self.client, &object).patch(MARKED, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Replaces a Pod as a rollout does: the old one goes, a new one with another name and address comes.
    pub(crate) async fn replace(&self, old: usize, new: usize) -> Result<()> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &namespace(old % self.services));
        pods.delete(&format!("p{old}"), &DeleteParams::default().grace_period(0)).await?;
        self.make(self.pod(new)).await
    }

    /// Writes a Service's endpoints anew.
    pub(crate) async fn endpoints(&self, service: usize, pods: &[usize]) -> Result<()> {
        let mut object = self.slice(service, 0);
        object["endpoints"] = pods.iter().map(|pod| self.endpoint(*pod)).collect();
        let patch = Patch::Merge(json!({"endpoints": object["endpoints"]}));
        let name = format!("a{service}-x");
        objects::api(&self.client, &object).patch(&name, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// The roots by which agents verify the operator.
    pub(crate) async fn bundle(&self) -> Result<String> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), SYSTEM);
        loop {
            let map = maps.get_opt("weft-trust-bundle").await?;
            if let Some(bundle) = map.and_then(|m| m.data?.remove("bundle.pem")) {
                return Ok(bundle);
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// How many policies say that all nodes enforce them, and how many there are.
    pub(crate) async fn programmed(&self) -> Result<(usize, usize)> {
        let kind = GroupVersionKind::gvk("weft.mesh", "v1alpha1", "AuthorizationPolicy");
        let resource = ApiResource::from_gvk_with_plural(&kind, "authorizationpolicies");
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let all = api.list(&Default::default()).await?.items;
        let done = all.iter().filter(|policy| {
            let conditions = policy.data.pointer("/status/conditions").and_then(Value::as_array);
            conditions.into_iter().flatten().any(|c| {
                let of = c["observedGeneration"].as_i64();
                c["type"] == "Programmed" && c["status"] == "True" && of == policy.metadata.generation
            })
        });
        Ok((done.count(), all.len()))
    }
}
