//! The ways to install say the same: kustomize, the Helm chart and `weft install`. Needs the parts of a cluster.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers fail and speak as their test does")]

use std::{collections::BTreeMap, env, path::PathBuf, process::Command};

use serde_json::Value;
use weft_cluster::parts::{Parts, go};

/// Kind and name of each object, and the object.
fn objects(text: &str) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for document in text.split("\n---") {
        let mut object: Value = serde_yaml_ng::from_str(document).unwrap();
        whole(&mut object);
        if object.is_null() {
            continue;
        }
        let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
        assert!(found.insert(name, object).is_none());
    }
    found
}

/// Renderers differ in how they write a whole number: 1 or 1.0.
fn whole(value: &mut Value) {
    match value {
        Value::Number(number) => {
            if let Some(float) = number.as_f64().filter(|float| float.fract() == 0.0) {
                *value = Value::from(format!("{float:.0}"));
            }
        }
        Value::Array(list) => list.iter_mut().for_each(whole),
        Value::Object(fields) => fields.values_mut().for_each(whole),
        _ => {}
    }
}

fn same(one: &BTreeMap<String, Value>, other: &BTreeMap<String, Value>, what: &str) {
    assert!(one.keys().eq(other.keys()), "{what} has {:?}, deploy/ {:?}", one.keys(), other.keys());
    for (name, object) in one {
        assert!(*object == other[name], "{what} differs from deploy/ in {name}:\n{object}\n{}", other[name]);
    }
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn deploy(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

fn helm(more: &[&str]) -> Command {
    let mut helm = Command::new(go::HELM.ensure(&|line| println!("{line}")).unwrap().join("helm"));
    helm.args(["template", "weft"]).arg(deploy("helm/weft"));
    helm.args(["--namespace", "weft-system", "--kube-version", go::KUBERNETES.version]).args(more);
    helm
}

#[test]
fn the_ways_to_install_say_the_same() {
    let parts = Parts::ensure(&|line| println!("{line}")).unwrap();
    let kubectl = ["usr/bin/kubectl", "bin/kubectl"].map(|path| parts.debian.join(path));
    let kubectl = kubectl.iter().find(|path| path.is_file()).unwrap();
    let plain = objects(&output(Command::new(kubectl).arg("kustomize").arg(deploy(""))));
    assert!(plain.len() > 12, "{:?}", plain.keys());

    let program = PathBuf::from(env::var_os("WEFT_BIN_DIR").unwrap()).join("weft");
    let printed = objects(&output(Command::new(program).arg("install")));
    same(&printed, &plain, "`weft install`");

    let mut chart = objects(&output(&mut helm(&[])));
    for (name, object) in &mut chart {
        if name.starts_with("\"CustomResourceDefinition\"") {
            // With the CRDs every policy would go: the chart leaves them when it is uninstalled.
            let removed =
                object["metadata"]["annotations"].as_object_mut().unwrap().remove("helm.sh/resource-policy");
            assert_eq!(removed, Some("keep".into()));
            object["metadata"].as_object_mut().unwrap().remove("annotations");
        }
    }
    let mut expected = plain;
    // Helm makes its release's namespace itself.
    expected.remove("\"Namespace\" \"weft-system\"").unwrap();
    same(&chart, &expected, "the chart");
}

#[test]
fn a_value_that_the_chart_does_not_know_is_refused() {
    let output = helm(&["--set", "agent.sockets=1"]).output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("sockets"), "{said}");
}
