//! The program as a container runtime runs it.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use std::{
    io::{ErrorKind, Write as _},
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use serde_json::{Value, json};
use weft_cni::wire::{self, Answer, Event, Question};

fn run(command: &str, namespace: &str, network: &Value) -> (bool, Value) {
    let arguments = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web;K8S_POD_UID=u-1");
    let mut child = Command::new(env!("CARGO_BIN_EXE_weft-cni"))
        .env_clear()
        .envs([
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c0ffee"),
            ("CNI_NETNS", "/var/run/netns/cni-1"),
        ])
        .envs([("CNI_IFNAME", "eth0"), ("CNI_ARGS", &arguments), ("CNI_PATH", "/opt/cni/bin")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let written = child.stdin.take().unwrap().write_all(network.to_string().as_bytes());
    // VERSION is answered without a look at what comes in.
    assert!(written.is_ok() || written.is_err_and(|error| error.kind() == ErrorKind::BrokenPipe));
    let output = child.wait_with_output().unwrap();
    let value =
        if output.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&output.stdout).unwrap() };
    (output.status.success(), value)
}

fn network(folder: &Path) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "pods", "type": "weft-cni",
        "socket": folder.join("cni.sock"), "namespaces": folder.join("namespaces.json"),
        "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.5/24"}], "dns": {}},
    })
}

#[test]
fn without_an_agent_strict_is_held_and_the_rest_gets_its_network() {
    let folder = tempfile::tempdir().unwrap();
    let network = network(folder.path());
    let result = (true, network["prevResult"].clone());
    // No list: no agent was ever ready here.
    assert_eq!(run("ADD", "shop", &network), result);
    let list = json!({"namespaces": {"shop": {"mode": "strict"}, "out": {"mode": "disabled"}}});
    std::fs::write(folder.path().join("namespaces.json"), list.to_string()).unwrap();
    assert_eq!(run("ADD", "out", &network), result);
    assert_eq!(run("ADD", "kube-system", &network), result);
    for held in ["shop", "never-seen"] {
        let (fine, error) = run("ADD", held, &network);
        assert!(!fine && error["code"] == 11 && error["cniVersion"] == "1.0.0", "{error}");
        assert!(error["msg"].as_str().unwrap().contains("agent does not run on this node"), "{error}");
    }
    // A sandbox can always be taken down, and a node stays ready.
    for quiet in ["DEL", "CHECK", "STATUS", "GC"] {
        assert_eq!(run(quiet, "shop", &network), (true, Value::Null), "{quiet}");
    }
}

#[test]
fn the_agent_is_asked_with_all_that_it_needs() {
    let folder = tempfile::tempdir().unwrap();
    let network = network(folder.path());
    let listener = UnixListener::bind(folder.path().join("cni.sock")).unwrap();
    let agent = thread::spawn(move || {
        let answers = [Answer::Pass, Answer::Refuse { why: "not enrolled in time".into() }, Answer::Pass];
        answers.map(|answer| {
            let (stream, _) = listener.accept().unwrap();
            let question: Question = wire::read(&stream).unwrap();
            wire::write(&stream, &answer).unwrap();
            question
        })
    });
    assert_eq!(run("ADD", "shop", &network), (true, network["prevResult"].clone()));
    let (fine, error) = run("ADD", "shop", &network);
    assert!(!fine && error["msg"] == "weft: not enrolled in time", "{error}");
    assert_eq!(run("DEL", "shop", &network), (true, Value::Null));
    let [first, _, last] = agent.join().unwrap();
    let expected = Question {
        event: Event::Add,
        namespace: "shop".into(),
        name: "web".into(),
        uid: "u-1".into(),
        sandbox: "c0ffee".into(),
        netns: "/var/run/netns/cni-1".into(),
    };
    assert_eq!(first, expected);
    assert_eq!((last.event, last.sandbox), (Event::Del, expected.sandbox));
}

#[test]
fn it_speaks_as_the_specification_says() {
    let folder = tempfile::tempdir().unwrap();
    let mut network = network(folder.path());
    let (fine, versions) = run("VERSION", "shop", &json!({"cniVersion": "1.1.0"}));
    assert!(
        fine && versions["supportedVersions"].as_array().unwrap().contains(&json!("1.1.0")),
        "{versions}"
    );
    network.as_object_mut().unwrap().remove("prevResult");
    let (fine, error) = run("ADD", "shop", &network);
    assert!(!fine && error["code"] == 7, "{error}");
    let (fine, error) = run("NOTHING", "shop", &network);
    assert!(!fine && error["code"] == 4, "{error}");
}
