use weft_proto::agent as wire;

use super::*;

fn report() -> Report {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let stamp = |s| Some(prost_types::Timestamp { seconds: s, nanos: 0 });
    let answer = StatusResponse {
        node: "node-a".into(),
        agent_version: "0.1.0".into(),
        kernel: "6.8.0".into(),
        started: stamp(999_690),
        programs: vec![wire::Program {
            name: "weft_connect4".into(),
            id: 12,
            attached_to: "/sys/fs/cgroup".into(),
            healthy: true,
            ..Default::default()
        }],
        pods: vec![wire::Pod {
            namespace: "shop".into(),
            name: "web".into(),
            identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
            mode: "strict".into(),
            addresses: vec!["10.1.1.1".into()],
            ..Default::default()
        }],
        svids: vec![wire::Svid {
            identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
            not_after: stamp(1_003_600),
            ..Default::default()
        }],
        config: Some(wire::Config { version: "0000000a.3".into(), connected: true, ..Default::default() }),
        open_files: 80,
        max_open_files: 524_288,
        ..Default::default()
    };
    Report { agents: vec![agent("unix:/x".into(), answer, now)], unknown: Vec::new(), operator: None }
}

#[test]
fn all_is_well() {
    let report = report();
    let problems = problems(&report);
    assert!(problems.is_empty(), "{problems:?}");
    let expected = "\
node-a ready, up 5m10s
  Agent     0.1.0 on Linux 6.8.0
  Operator  connected
  Config    version 0000000a.3
  Flows     0 held of 0, 0 seen, 0 lost
  Files     80 open, 524288 may be
  Programs  1 of 1 attached and healthy

  PROGRAM        ID  ATTACHED TO     REPAIRS  STATE
  weft_connect4  12  /sys/fs/cgroup  0        healthy

  POD       MODE    IDENTITY                               ADDRESSES  STATE
  shop/web  strict  spiffe://cluster.local/ns/shop/sa/web  10.1.1.1   enrolled

  SVID                                   EXPIRES               IN    STATE
  spiffe://cluster.local/ns/shop/sa/web  1970-01-12T14:46:40Z  1h0m  valid

Nothing is wrong.
";
    assert_eq!(table(&report, &problems, false), expected);
}

#[test]
fn what_is_no_program_is_not_counted_as_one() {
    let mut report = report();
    let beside = |name: &str, problem: &str| Program {
        name: name.into(),
        id: 0,
        attached_to: "strict Pods".into(),
        healthy: false,
        repairs: 0,
        problem: problem.into(),
    };
    report.agents[0]
        .programs
        .push(beside("kubelet-probes", "the kubelet is not recognised; give it a cgroup"));
    report.agents[0].programs.push(beside("weft_sock_ops", "detached"));
    let found = problems(&report);
    assert_eq!(
        found,
        [
            "node-a: the kubelet is not recognised; give it a cgroup",
            "node-a: program weft_sock_ops at strict Pods: detached"
        ]
    );
    let text = table(&report, &found, false);
    assert!(text.contains("1 of 2 attached") && !text.contains("kubelet-probes"), "{text}");
}

#[test]
fn what_is_wrong_is_named() {
    let mut report = report();
    report.agents[0].config.operator_connected = false;
    report.agents[0].not_ready = vec!["credentials".into()];
    report.agents[0].ready = false;
    report.agents[0].svids[0].left = None;
    report.agents[0].open_files = 471_860;
    report.agents[0].maps = vec![Map { name: "POLICY".into(), entries: 90, capacity: 100 }];
    report.operator = Some(serde_json::json!({
        "nodes": [{"node": "node-b", "connected": false}],
        "unreadable": {"b.yaml": "it is no YAML"},
        "objects": [{"kind": "AuthorizationPolicy", "namespace": "shop", "name": "p", "file": "a.yaml", "conditions": [
            {"type": "Accepted", "status": "False", "message": "spec.action: write ALLOW"},
            {"type": "Programmed", "status": "Unknown", "message": "0 of 2 nodes"},
        ]}],
    }));
    let found = problems(&report);
    assert_eq!(
        found,
        [
            "node-a: not ready, missing: credentials",
            "node-a: no link to the operator; the last configuration goes on",
            "node-a: SVID spiffe://cluster.local/ns/shop/sa/web: expired",
            "node-a: map POLICY is nearly full: 90 of 100; make room with --map-size POLICY=ENTRIES of weft-agent",
            "node-a: 471860 of 524288 files are open, and beyond that new connections wait or fail; raise the container runtime's limit of \
             open files (LimitNOFILE of its service)",
            "operator: b.yaml: it is no YAML",
            "operator: a.yaml: AuthorizationPolicy shop/p: not Accepted: spec.action: write ALLOW",
            "operator: node node-b is not connected",
        ]
    );
}
