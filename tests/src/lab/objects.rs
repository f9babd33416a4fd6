//! The objects of the lab's cluster, in the operator's directory. The lab does the work of a cluster's own
//! controllers: it gives Pods addresses, UIDs and a status, Services their cluster IPs, and writes EndpointSlices.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize as _;
use serde_json::{Value, json};

/// One file of YAML documents.
///
/// # Errors
/// When it is not YAML.
pub fn documents(text: &str) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let value = Value::deserialize(document)?;
        if !value.is_null() {
            all.push(value);
        }
    }
    Ok(all)
}

/// `metadata.name`, `metadata.namespace` (or `default`) and `kind` of an object.
pub fn name_of(object: &Value) -> (String, String, String) {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let namespace = text("/metadata/namespace");
    (text("/kind"), if namespace.is_empty() { "default".into() } else { namespace }, text("/metadata/name"))
}

/// Writes files into the operator's directory, each one whole: a reader never sees half of one.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// A new directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(path: &Path) -> Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self { path: path.into() })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `<name>.yaml`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let part = self.path.with_extension("part");
        fs::write(&part, text)?;
        fs::rename(&part, self.path.join(format!("{name}.yaml")))
            .with_context(|| format!("write {name}.yaml"))
    }

    /// Writes objects as one file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_objects(&self, name: &str, objects: &[Value]) -> Result<()> {
        let mut text = String::new();
        for object in objects {
            text.push_str("---\n");
            text.push_str(&serde_yaml_ng::to_string(object)?);
        }
        self.write(name, &text)
    }

    /// Removes `<name>.yaml`.
    ///
    /// # Errors
    /// When there is none.
    pub fn remove(&self, name: &str) -> Result<()> {
        fs::remove_file(self.path.join(format!("{name}.yaml"))).with_context(|| format!("remove {name}.yaml"))
    }

    /// The operator's status of an object: the first file below `status/` that holds its kind, namespace and name.
    ///
    /// # Errors
    /// When there is none yet.
    pub fn status(&self, kind: &str, namespace: &str, name: &str) -> Result<Value> {
        let mut folders = vec![self.path.join("status")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let text = fs::read_to_string(&path).unwrap_or_default();
                for object in documents(&text).unwrap_or_default() {
                    if name_of(&object) == (kind.into(), namespace.into(), name.into()) {
                        return Ok(object);
                    }
                }
            }
        }
        bail!("the operator has written no status of {kind} {namespace}/{name}")
    }
}

/// Completes a Pod as scheduler and kubelet would.
pub fn complete_pod(object: &mut Value, pod: &crate::lab::Pod, host: std::net::Ipv4Addr) {
    let now = "2026-01-01T00:00:00Z";
    object["metadata"]["uid"] = json!(pod.uid);
    object["metadata"]["namespace"] = json!(pod.namespace);
    object["metadata"]["annotations"]["weft.mesh/netns"] = json!(pod.place.netns);
    object["status"] = json!({
        "phase": "Running",
        "hostIP": host,
        "podIP": pod.v4,
        "podIPs": [{"ip": pod.v4}, {"ip": pod.v6}],
        "startTime": now,
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}],
    });
}

/// Gives a Service its addresses.
pub fn complete_service(object: &mut Value, index: u8) {
    let (v4, v6) = (format!("10.96.0.{index}"), format!("fd96::{index:x}"));
    object["spec"]["clusterIP"] = json!(v4);
    object["spec"]["clusterIPs"] = json!([v4, v6]);
    object["spec"]["ipFamilies"] = json!(["IPv4", "IPv6"]);
}

/// The EndpointSlices (one per family) of a Service, as the cluster's controller writes them from the selector.
pub fn slices(service: &Value, pods: &[(Value, crate::lab::Pod)]) -> Vec<Value> {
    let (_, namespace, name) = name_of(service);
    let selector: BTreeMap<String, String> = service
        .pointer("/spec/selector")
        .and_then(|value| serde_json::from_value(value.clone()).ok())
        .unwrap_or_default();
    let chosen: Vec<_> = pods
        .iter()
        .filter(|(object, pod)| {
            pod.namespace == namespace
                && !selector.is_empty()
                && selector.iter().all(|(key, value)| {
                    object.pointer("/metadata/labels").and_then(|labels| labels.get(key))
                        == Some(&json!(value))
                })
        })
        .collect();
    [false, true].map(|v6| slice(service, &namespace, &name, &chosen, v6)).into()
}

fn slice(
    service: &Value,
    namespace: &str,
    name: &str,
    chosen: &[&(Value, crate::lab::Pod)],
    v6: bool,
) -> Value {
    let ports: Vec<Value> = service
        .pointer("/spec/ports")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|port| {
            let target = &port["targetPort"];
            let number = match target.as_str() {
                Some(named) => chosen.iter().find_map(|(object, _)| container_port(object, named)),
                None => target.as_u64().or_else(|| port["port"].as_u64()),
            };
            let mut out =
                json!({"name": port["name"].as_str().unwrap_or(""), "port": number, "protocol": "TCP"});
            if !port["protocol"].is_null() {
                out["protocol"] = port["protocol"].clone();
            }
            if !port["appProtocol"].is_null() {
                out["appProtocol"] = port["appProtocol"].clone();
            }
            out
        })
        .collect();
    let endpoints: Vec<Value> = chosen
        .iter()
        .map(|(_, pod)| {
            json!({
                "addresses": [pod.address(v6)],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": pod.node,
                "targetRef": {"kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid},
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-{}", if v6 { "ipv6" } else { "ipv4" }),
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": endpoints,
    })
}

fn container_port(pod: &Value, name: &str) -> Option<u64> {
    let containers = pod.pointer("/spec/containers")?.as_array()?;
    let ports = containers.iter().filter_map(|container| container["ports"].as_array()).flatten();
    ports.into_iter().find(|port| port["name"] == name)?["containerPort"].as_u64()
}

/// What the cluster itself consists of: its nodes and the range of its Services.
pub fn cluster(nodes: &[crate::lab::Node]) -> Vec<Value> {
    let mut all: Vec<Value> = nodes
        .iter()
        .map(|node| {
            let ranges = [format!("10.77.{}.0/24", node.index), format!("fd77:0:{}::/64", node.index)];
            json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node.name},
                "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
                "status": {"addresses": [{"type": "InternalIP", "address": node.wire()}]},
            })
        })
        .collect();
    all.push(json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16", "fd96::/112"]},
    }));
    all
}
