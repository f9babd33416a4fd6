use std::collections::BTreeMap;

use serde_json::{Value, json};
use weft_proto::{agent as wire, flow, observer::GetFlowsResponse, weft_flow, weft_relay::NodeStatus};

use super::*;
use crate::{check::Level, mesh::States};

#[expect(clippy::needless_pass_by_value, reason = "a literal at every call")]
fn pod(namespace: &str, name: &str, node: &str, more: Value) -> Pod {
    let mut object = json!({
        "metadata": {"namespace": namespace, "name": name, "uid": format!("u-{name}")},
        "spec": {"nodeName": node, "containers": [{"name": "c", "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 80}]}]},
        "status": {"phase": "Running", "podIP": "10.1.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        object[field] = value.clone();
    }
    serde_json::from_value(object).unwrap()
}

fn facts(pods: Vec<Pod>) -> Facts {
    let enrolled = |pod: &Pod| wire::Pod { uid: pod.metadata.uid.clone().unwrap(), ..Default::default() };
    let agent = wire::StatusResponse { pods: pods.iter().map(enrolled).collect(), ..Default::default() };
    let status = NodeStatus { agent: Some(agent), ..Default::default() };
    let namespace = |name: &str| {
        serde_json::from_value(json!({"metadata": {"name": name, "labels": {"weft.mesh/mode": "strict"}}}))
            .unwrap()
    };
    Facts {
        states: Ok(States {
            nodes: BTreeMap::from([("a".into(), ("op".into(), status))]),
            problems: Vec::new(),
        }),
        namespaces: Ok(vec![namespace("shop"), namespace("till")]),
        pods: Ok(pods),
        ..Facts::default()
    }
}

#[test]
fn the_other_node_comes_first_then_the_own_namespace() {
    let own = pod("shop", "client", "a", json!({}));
    let near = pod("shop", "near", "a", json!({}));
    let far = pod("shop", "far", "b", json!({}));
    let farther = pod("till", "cash", "b", json!({}));
    let silent =
        pod("shop", "silent", "b", json!({"spec": {"nodeName": "b", "containers": [{"name": "c"}]}}));
    let name = |pods: &[&Pod]| {
        let pods = pods.iter().map(|p| (*p).clone()).collect();
        target(&facts(pods), "shop", "client", "a").map(|t| t.name)
    };
    assert_eq!(name(&[&own, &near, &farther, &far]).unwrap(), "shop/far (10.1.0.1:80)");
    assert_eq!(name(&[&own, &near, &farther]).unwrap(), "till/cash (10.1.0.1:80)");
    assert_eq!(name(&[&own, &near, &silent]).unwrap(), "shop/near (10.1.0.1:80)");
    assert_eq!(name(&[&own, &silent]), None);
    let known = facts(vec![own.clone()]);
    assert_eq!(node_of(&known, "shop", "client").as_deref(), Some("a"));
    assert_eq!(node_of(&known, "shop", "gone"), None);
}

fn record(verdict: flow::Verdict, mode: weft_flow::tls::Mode) -> GetFlowsResponse {
    let tls =
        weft_flow::Tls { mode: mode.into(), key_exchange: "X25519MLKEM768".into(), ..Default::default() };
    let ours = weft_flow::Flow { tls: Some(tls), ..Default::default() };
    let any = prost_types::Any {
        type_url: weft_flow::TYPE_URL.into(),
        value: prost::Message::encode_to_vec(&ours),
    };
    let flow = flow::Flow { verdict: verdict.into(), extensions: Some(any), ..Default::default() };
    GetFlowsResponse { response_types: Some(ResponseTypes::Flow(flow)), ..Default::default() }
}

#[test]
fn only_what_the_record_proves_is_said() {
    use weft_flow::tls::Mode;
    let target = Target { name: "shop/web".into(), address: "10.1.0.1:80".parse().unwrap() };
    let say =
        |error: &str, flow| judged("shop/client", &target, Ok(ProbeResult { error: error.into(), flow }));
    let through = |mode| say("", Some(record(flow::Verdict::Forwarded, mode)));
    for (finding, level, words) in [
        (through(Mode::Mutual), Level::Ok, "captured and encrypted"),
        (through(Mode::Local), Level::Ok, "never left the node"),
        (through(Mode::None), Level::Error, "in plaintext"),
        (say("", None), Level::Error, "it is not captured"),
        (say("refused", None), Level::Warning, "no record"),
        (say("refused", Some(record(flow::Verdict::Dropped, Mode::None))), Level::Info, "was refused"),
        (say("", Some(record(flow::Verdict::Error, Mode::None))), Level::Warning, "it failed"),
        (
            judged("shop/client", &target, Err(Status::unimplemented("no"))),
            Level::Warning,
            "could not be made",
        ),
    ] {
        assert_eq!(finding.level, level, "{finding:#?}");
        assert!(finding.message.contains(words), "{finding:#?}");
        assert!(level == Level::Ok || !finding.remedy.is_empty(), "{finding:#?}");
    }
}
