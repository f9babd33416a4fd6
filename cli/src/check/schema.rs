//! Whether the kinds in the cluster know every field that this program's manifests have.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::Deserialize as _;
use serde_json::Value;

use crate::install::MANIFESTS;

/// The fields that this version has and the cluster's kind does not, as paths.
pub(super) fn lacking(kind: &CustomResourceDefinition) -> Vec<String> {
    let Some(own) = own(kind.metadata.name.as_deref().unwrap_or_default()) else { return Vec::new() };
    let Ok(theirs) = serde_json::to_value(kind) else { return Vec::new() };
    let mut found = Vec::new();
    if let (Some(own), Some(theirs)) = (schema(&own), schema(&theirs)) {
        compare(own, theirs, "", &mut found);
    }
    found
}

/// The manifest of a kind.
fn own(name: &str) -> Option<Value> {
    let documents = MANIFESTS.iter().flat_map(|m| serde_yaml_ng::Deserializer::from_str(m));
    let mut kinds = documents.filter_map(|d| Value::deserialize(d).ok());
    kinds.find(|d| d["kind"] == "CustomResourceDefinition" && d["metadata"]["name"] == name)
}

/// The schema of the version that is stored.
fn schema(kind: &Value) -> Option<&Value> {
    let versions = kind["spec"]["versions"].as_array()?;
    let stored = versions.iter().find(|v| v["storage"] == true)?;
    Some(&stored["schema"]["openAPIV3Schema"])
}

fn compare(own: &Value, theirs: &Value, path: &str, found: &mut Vec<String>) {
    for (name, field) in own["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        match theirs["properties"].get(name) {
            Some(same) => compare(field, same, &path, found),
            None => found.push(path),
        }
    }
    for inner in ["items", "additionalProperties"] {
        if own[inner].is_object() && theirs[inner].is_object() {
            compare(&own[inner], &theirs[inner], &format!("{path}[]"), found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(change: impl FnOnce(&mut Value)) -> CustomResourceDefinition {
        let mut kind = own("trafficpolicies.weft.mesh").unwrap();
        change(&mut kind);
        serde_json::from_value(kind).unwrap()
    }

    #[test]
    fn fields_that_the_cluster_does_not_know_are_named() {
        assert_eq!(lacking(&kind(|_| {})), Vec::<String>::new());
        let older = kind(|k| {
            let schema = &mut k["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
            let spec = schema["properties"]["spec"]["properties"].as_object_mut().unwrap();
            spec.remove("targetRefs").unwrap();
        });
        assert_eq!(lacking(&older), ["spec.targetRefs"]);
    }
}
