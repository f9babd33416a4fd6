//! Objects from YAML, and the CRDs.

use std::{fs, path::Path, time::Duration};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams},
    core::{ApiResource, GroupVersionKind},
};
use serde::Deserialize;
use serde_json::{Value, json};

const CLUSTER_SCOPED: [&str; 7] = [
    "Namespace",
    "Node",
    "ServiceCIDR",
    "MeshConfig",
    "CustomResourceDefinition",
    "ClusterRole",
    "ClusterRoleBinding",
];

/// The API of the object that a manifest describes.
pub(crate) fn api(client: &Client, object: &Value) -> Api<DynamicObject> {
    let (version, kind) = (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let lower = kind.to_lowercase();
    let plural = match lower.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None if lower.ends_with('s') => format!("{lower}es"),
        None => format!("{lower}s"),
    };
    let gvk = GroupVersionKind::gvk(group, version, kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, &plural);
    if CLUSTER_SCOPED.contains(&kind) {
        return Api::all_with(client.clone(), &resource);
    }
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
    Api::namespaced_with(client.clone(), namespace, &resource)
}

/// Applies one manifest as kubectl does: fields that the schema does not know are an error.
pub(crate) async fn try_apply(client: &Client, yaml: &str) -> Result<DynamicObject, kube::Error> {
    let object: Value = serde_yaml_ng::from_str(yaml).unwrap();
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    let params = PatchParams::apply("test").force().validation_strict();
    api(client, &object).patch(&name, &params, &Patch::Apply(&object)).await
}

/// Applies every document.
pub(crate) async fn apply(client: &Client, yaml: &str) -> Vec<DynamicObject> {
    let mut applied = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(yaml) {
        let object = Value::deserialize(document).unwrap();
        if object.is_null() {
            continue;
        }
        let text = serde_yaml_ng::to_string(&object).unwrap();
        applied.push(try_apply(client, &text).await.unwrap_or_else(|e| panic!("{text}: {e}")));
        if let Some(status) = object.get("status").filter(|_| object["kind"] != "CustomResourceDefinition") {
            let name = object["metadata"]["name"].as_str().unwrap();
            let patch = Patch::Merge(json!({ "status": status }));
            api(client, &object).patch_status(name, &PatchParams::default(), &patch).await.unwrap();
        }
    }
    applied
}

/// Weft's own CRDs, from deploy/crds.
pub(crate) async fn weft_crds(client: &Client) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("weft.mesh_") {
            install(client, &fs::read_to_string(&path).unwrap()).await;
        }
    }
}

/// A CRD of the Gateway API with a schema that takes anything, as a later channel's might.
pub(crate) async fn gateway_crd(client: &Client, kind: &str, version: &str) {
    let lower = kind.to_lowercase();
    let crd = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{lower}s.gateway.networking.k8s.io"),
            "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api"},
        },
        "spec": {
            "group": "gateway.networking.k8s.io", "scope": "Namespaced",
            "names": {"kind": kind, "plural": format!("{lower}s"), "singular": lower, "listKind": format!("{kind}List")},
            "versions": [{"name": version, "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                    "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                    "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}}],
        },
    });
    install(client, &crd.to_string()).await;
}

/// Installs a CRD and waits until its kind is served.
pub(crate) async fn install(client: &Client, yaml: &str) {
    let applied = apply(client, yaml).await;
    let name = applied[0].metadata.name.clone().unwrap();
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for _ in 0..300 {
        let crd = crds.get(&name).await.unwrap();
        let conditions = crd.status.and_then(|s| s.conditions).unwrap_or_default();
        if conditions.iter().any(|c| c.type_ == "Established" && c.status == "True") {
            // Established is said a moment before every handler knows.
            let kind = json!({"apiVersion": format!("{}/{}", crd.spec.group, crd.spec.versions[0].name),
                "kind": crd.spec.names.kind, "metadata": {}});
            if api(client, &kind).list(&Default::default()).await.is_ok() {
                return;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("CRD {name} is not established");
}
