use serde::Deserialize as _;
use serde_json::Value;

use super::*;

fn documents(text: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(text).map(|d| Value::deserialize(d).unwrap()).collect()
}

fn args() -> InstallArgs {
    InstallArgs::default()
}

#[test]
fn kinds_come_before_what_uses_them() {
    let all = documents(&render(&Choice::default()).unwrap());
    let kinds: Vec<_> = all.iter().map(|d| d["kind"].as_str().unwrap()).collect();
    assert_eq!(
        kinds[..4],
        ["CustomResourceDefinition"; 3].map(|k| k).iter().chain(&["Namespace"]).copied().collect::<Vec<_>>()
    );
    assert!(kinds.contains(&"Deployment") && kinds.contains(&"DaemonSet"));
    assert!(all.iter().all(|d| d["apiVersion"].is_string() && d["metadata"]["name"].is_string()));
}

#[test]
fn the_same_as_the_kustomize_base() {
    // Every resource that the base lists is embedded.
    let base: Value =
        serde_yaml_ng::from_str(include_str!("../../../deploy/kustomize/base/kustomization.yaml")).unwrap();
    let listed = base["resources"].as_array().unwrap();
    assert_eq!(listed.len() - 1 + 3, MANIFESTS.len(), "{listed:?}");
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize/base");
    for name in listed.iter().filter_map(Value::as_str).filter(|n| n.ends_with(".yaml")) {
        let content = std::fs::read_to_string(folder.join(name)).unwrap();
        assert!(MANIFESTS.contains(&content.as_str()), "{name} is not embedded");
    }
}

#[test]
fn flags_change_what_they_say() {
    let given = InstallArgs {
        registry: Some("localhost:5000/weft/".into()),
        tag: Some("t1".into()),
        trust_domain: Some("example.org".into()),
        operator_replicas: Some(1),
    };
    let text = render(&Choice::default().with(&given).unwrap()).unwrap();
    let all = documents(&text);
    let find = |kind: &str| all.iter().find(|d| d["kind"] == kind).unwrap();
    let container = |kind: &str| find(kind)["spec"]["template"]["spec"]["containers"][0].clone();
    assert_eq!(container("Deployment")["image"], "localhost:5000/weft/weft-operator:t1");
    assert_eq!(container("DaemonSet")["image"], "localhost:5000/weft/weft-agent:t1");
    assert_eq!(find("Deployment")["spec"]["replicas"], 1);
    assert_eq!(find("PodDisruptionBudget")["spec"]["minAvailable"], 0);
    let args = container("Deployment")["args"].clone();
    assert!(args.as_array().unwrap().contains(&"--trust-domain=example.org".into()), "{args}");
}

#[test]
fn flags_cannot_write_yaml() {
    for bad in ["", "a b", "a\nb: c", "x{}", "a#b"] {
        let registry = InstallArgs { registry: Some(bad.into()), ..args() };
        assert!(matches!(Choice::default().with(&registry), Err(Failure::Usage(_))), "{bad:?}");
        let tag = InstallArgs { tag: Some(bad.into()), ..args() };
        assert!(matches!(Choice::default().with(&tag), Err(Failure::Usage(_))), "{bad:?}");
        let domain = InstallArgs { trust_domain: Some(bad.into()), ..args() };
        assert!(matches!(Choice::default().with(&domain), Err(Failure::Usage(_))), "{bad:?}");
    }
}
