//! The CRDs as YAML files, generated from the types.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

use crate::{AuthorizationPolicy, MeshConfig, TrafficPolicy};

const HEADER: &str = "# Generated from api/src by `cargo xtask crds`; do not edit.\n";

/// Every CRD: the file's name and its text.
///
/// # Errors
/// When a schema does not serialise.
pub fn all() -> Result<Vec<(String, String)>, serde_yaml_ng::Error> {
    [AuthorizationPolicy::crd(), MeshConfig::crd(), TrafficPolicy::crd()]
        .iter()
        .map(|crd| Ok((format!("{}_{}.yaml", crd.spec.group, crd.spec.names.plural), yaml(crd)?)))
        .collect()
}

fn yaml(crd: &CustomResourceDefinition) -> Result<String, serde_yaml_ng::Error> {
    let text = serde_yaml_ng::to_string(crd)?;
    // Kubernetes reads YAML 1.1, where a bare Off is the boolean false.
    let text: String = text
        .lines()
        // Formats that the API server does not know and warns about; the bounds are said beside them.
        .filter(|line| !line.trim_start().starts_with("format: uint"))
        .map(|line| match line.strip_suffix("Off") {
            Some(start) if start.ends_with(": ") || start.ends_with("- ") => format!("{start}'Off'\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    Ok(format!("{HEADER}{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_files_are_current() {
        for (name, text) in all().unwrap() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/crds/").to_owned() + &name;
            let found = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(found == text, "deploy/crds/{name} is stale; run `cargo xtask crds`");
        }
    }

    #[test]
    fn schemas_are_structural() {
        for (name, text) in all().unwrap() {
            assert!(!text.contains("additionalProperties: false"), "{name}: a CRD must not say so");
            assert!(!text.contains("anyOf") || text.contains("x-kubernetes-int-or-string"), "{name}");
            assert!(!text.contains("format: uint"), "{name}: a format that the API server warns about");
            assert!(!text.contains(": Off\n"), "{name}: a bare Off is a boolean to Kubernetes");
            assert!(text.contains("x-kubernetes-validations"), "{name}");
        }
    }
}
