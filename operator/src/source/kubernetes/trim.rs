//! Takes off what the index does not use, before anything is kept: of ten thousand Pods, most bytes are.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::DynamicObject;
use serde_json::{Map, Value, json};

use super::observed::carries_status;
use crate::objects::Kind;

/// An object in its short form.
pub(super) struct Trimmed {
    /// As one line of JSON.
    pub(super) json: String,
    /// `metadata.generation`, of the kinds to which a status is written.
    pub(super) generation: Option<i64>,
}

/// Cuts an object down.
pub(super) fn trim(kind: Kind, object: DynamicObject) -> Trimmed {
    let DynamicObject { metadata, mut data, .. } = object;
    let generation = carries_status(kind).then(|| metadata.generation.unwrap_or_default());
    match kind {
        Kind::Pod => pod(&mut data),
        Kind::Node => {
            only(&mut data, &["spec", "status"]);
            at(&mut data, "spec", |spec| only(spec, &["podCIDR", "podCIDRs"]));
            // What the kubelet reports each few seconds is not among them.
            at(&mut data, "status", |status| only(status, &["addresses"]));
        }
        Kind::Namespace => only(&mut data, &[]),
        // The two that have no spec and no status.
        Kind::EndpointSlice => {}
        Kind::Service => at(&mut data, "status", |status| only(status, &["loadBalancer"])),
        _ => drop(data.as_object_mut().map(|data| data.remove("status"))),
    }
    let mut whole = Map::new();
    whole.insert("apiVersion".into(), kind.api_version().into());
    whole.insert("kind".into(), kind.as_str().into());
    whole.insert("metadata".into(), meta(kind, metadata));
    if let Value::Object(data) = data {
        // What an object of a loosened schema calls so must not replace the above.
        whole.extend(
            data.into_iter().filter(|(k, _)| !matches!(k.as_str(), "apiVersion" | "kind" | "metadata")),
        );
    }
    Trimmed { json: Value::Object(whole).to_string(), generation }
}

/// Annotations are left out altogether: those that the index knows are the directory's only, and here any user who may
/// make a Pod could write them.
fn meta(kind: Kind, meta: ObjectMeta) -> Value {
    let mut labels = meta.labels;
    if kind == Kind::Node {
        labels.iter_mut().for_each(|l| l.retain(|k, _| k == "topology.kubernetes.io/zone"));
    }
    let mut short = json!({ "name": meta.name, "uid": meta.uid });
    let mut put = |key: &str, value: Value| {
        if !value.is_null() {
            short[key] = value;
        }
    };
    put("namespace", json!(meta.namespace));
    put("labels", json!(labels));
    if kind == Kind::Pod {
        put("creationTimestamp", json!(meta.creation_timestamp));
        put("deletionTimestamp", json!(meta.deletion_timestamp));
        let owners = meta.owner_references.filter(|o| !o.is_empty());
        put("ownerReferences", json!(owners));
    }
    short
}

fn pod(data: &mut Value) {
    only(data, &["spec", "status"]);
    at(data, "spec", |spec| {
        only(
            spec,
            &[
                "nodeName",
                "serviceAccountName",
                "serviceAccount",
                "hostNetwork",
                "containers",
                "initContainers",
                "restartPolicy",
            ],
        );
        for field in ["containers", "initContainers"] {
            each(spec, field, |container| {
                only(container, &["name", "ports", "restartPolicy"]);
            });
        }
    });
    at(data, "status", |status| {
        only(status, &["phase", "podIP", "podIPs", "hostIP", "conditions"]);
        let Some(Value::Array(conditions)) = status.get_mut("conditions") else { return };
        conditions.retain(|c| c.get("type").and_then(Value::as_str) == Some("Ready"));
        for condition in conditions {
            only(condition, &["type", "status"]);
        }
    });
}

fn only(value: &mut Value, fields: &[&str]) {
    if let Value::Object(map) = value {
        map.retain(|key, _| fields.contains(&key.as_str()));
    }
}

fn at(value: &mut Value, field: &str, change: impl FnOnce(&mut Value)) {
    if let Some(value) = value.get_mut(field) {
        change(value);
    }
}

fn each(value: &mut Value, field: &str, change: impl Fn(&mut Value)) {
    if let Some(Value::Array(items)) = value.get_mut(field) {
        items.iter_mut().for_each(change);
    }
}
