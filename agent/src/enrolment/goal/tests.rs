use weft_core::{Resource, config::NamespaceMode};

use super::*;
use crate::testing;

fn state(namespaces: &[(&str, Mode)], workloads: Vec<Workload>) -> MeshState {
    let mut delta = testing::delta(workloads);
    for resource in &mut delta.upserted {
        if let Resource::Config(config) = resource {
            Arc::make_mut(config).namespaces = namespaces
                .iter()
                .map(|(name, mode)| {
                    ((*name).into(), NamespaceMode { mode: *mode, ..NamespaceMode::default() })
                })
                .collect();
        }
    }
    MeshState::default().apply(&delta)
}

fn sandbox(uid: &str, namespace: &str, name: &str) -> Sandbox {
    Sandbox {
        name: NamespacedName::new(namespace, name),
        ..crate::discovery::tests::sandbox(&format!("id-{uid}"), uid, 1)
    }
}

fn one(state: &MeshState, sandbox: Sandbox) -> Wanted {
    let uid = sandbox.uid.clone();
    let found = Sandboxes::from([(uid.clone(), Arc::new(sandbox))]);
    goals(state, "node-a", Some(&found)).remove(&uid).expect("the Pod")
}

#[test]
fn a_described_pod_is_enrolled_with_what_the_runtime_set_up() {
    let mut web = testing::workload("web", "node-a", "10.1.1.9", 300);
    let goal =
        |web: &Workload| one(&state(&[], vec![web.clone()]), sandbox("uid-web", "shop", "web-abc")).goal;
    let Goal::Enrol(spec) = goal(&web) else { panic!("not enrolled") };
    // The API server's address is late, or an old one.
    assert_eq!(spec.addresses, ["10.1.1.5".parse::<IpAddr>().unwrap()]);
    assert_eq!(spec.netns, PathBuf::from("/run/netns/id-uid-web"));
    assert_eq!((spec.subject, spec.mode), (SubjectId(300), Mode::Strict));
    web.mode = Mode::Disabled;
    assert_eq!(goal(&web), Goal::Pass("/run/netns/id-uid-web".into()));
    // A Pod of another node is none of ours, whatever the runtime says: its namespace decides.
    web.node = "node-b".into();
    assert_eq!(goal(&web), Goal::Unknown);
}

#[test]
fn before_the_operator_speaks_the_namespace_decides() {
    let modes = [
        ("open", Mode::Disabled),
        ("shop", Mode::Strict),
        ("soft", Mode::Permissive),
        ("kube-system", Mode::Strict),
    ];
    let state = state(&modes, Vec::new());
    let goal = |namespace: &str| one(&state, sandbox("u", namespace, "p")).goal;
    assert!(matches!(goal("open"), Goal::Pass(_)));
    assert!(matches!(goal("kube-system"), Goal::Pass(_)));
    assert!(matches!(goal("weft-system"), Goal::Pass(_)));
    assert_eq!(goal("new"), Goal::Unknown);
    for namespace in ["shop", "soft"] {
        let Goal::Hold(spec) = goal(namespace) else { panic!("{namespace} is not held") };
        assert_eq!((spec.subject, spec.mode), (SubjectId::UNKNOWN, Mode::Strict));
    }
    // The Pod's own label tightens.
    let labelled = Sandbox { mode: Mode::Strict, ..sandbox("u", "open", "p") };
    assert!(matches!(one(&state, labelled).goal, Goal::Hold(_)));
}

#[test]
fn without_any_configuration_only_the_meshs_own_namespaces_pass() {
    let state = MeshState::default();
    assert!(matches!(one(&state, sandbox("u", "kube-system", "p")).goal, Goal::Pass(_)));
    assert_eq!(one(&state, sandbox("u", "shop", "p")).goal, Goal::Unknown);
}

#[test]
fn pods_with_a_network_of_their_own_are_refused_in_the_mesh_only() {
    let isolated =
        |namespace| Sandbox { isolated: Some("gvisor".into()), ..sandbox("uid-web", namespace, "web-abc") };
    let modes = [("open", Mode::Disabled), ("shop", Mode::Strict)];
    let described = state(&modes, vec![testing::workload("web", "node-a", "10.1.1.9", 300)]);
    for state in [described, state(&modes, Vec::new())] {
        let Goal::Refuse(why) = one(&state, isolated("shop")).goal else { panic!("not refused") };
        assert!(why.contains("runtimeClassName"), "{why}");
    }
    assert!(matches!(one(&state(&modes, Vec::new()), isolated("open")).goal, Goal::Pass(_)));
}

#[test]
fn the_hosts_network_is_left_alone() {
    let host = Sandbox { host_network: true, ..sandbox("u", "shop", "p") };
    let found = Sandboxes::from([("u".into(), Arc::new(host))]);
    assert!(goals(&state(&[("shop", Mode::Strict)], Vec::new()), "node-a", Some(&found)).is_empty());
}

#[test]
fn a_pod_without_a_sandbox_waits_and_one_of_the_kubelets_own_files_is_found_by_name() {
    let state = state(&[], vec![testing::workload("web", "node-a", "10.1.1.9", 300)]);
    let uid = WorkloadUid::from("uid-web");
    assert_eq!(goals(&state, "node-a", Some(&Sandboxes::new()))[&uid].goal, Goal::Wait);
    let found = Sandboxes::from([("other".into(), Arc::new(sandbox("other", "shop", "web-abc")))]);
    let wanted = goals(&state, "node-a", Some(&found));
    assert_eq!(wanted.len(), 1);
    assert!(matches!(&wanted[&uid].goal, Goal::Enrol(spec) if spec.uid == uid));
}

#[test]
fn an_unusable_namespace_is_said() {
    let bare = Sandbox { netns: None, ..sandbox("uid-web", "shop", "web-abc") };
    let described = state(&[], vec![testing::workload("web", "node-a", "10.1.1.9", 300)]);
    assert!(matches!(one(&described, bare.clone()).goal, Goal::Refuse(why) if why.contains("hostPID")));
    assert!(matches!(one(&state(&[("shop", Mode::Strict)], Vec::new()), bare.clone()).goal, Goal::Refuse(_)));
    assert_eq!(one(&state(&[("shop", Mode::Disabled)], Vec::new()), bare).goal, Goal::Unknown);
}

#[test]
fn in_directory_mode_the_description_names_the_namespace() {
    let mut web = testing::workload("web", "node-a", "10.1.1.9", 300);
    let goal = |web: &Workload| {
        goals(&state(&[], vec![web.clone()]), "node-a", None).remove(&web.uid).map(|w| w.goal)
    };
    assert!(matches!(goal(&web), Some(Goal::Enrol(spec)) if spec.netns.to_str() == Some("/run/netns/web")));
    web.netns = None;
    assert!(matches!(goal(&web), Some(Goal::Refuse(why)) if why.contains("weft.mesh/netns")));
}

#[test]
fn why_a_pod_was_refused_is_remembered_until_it_is_tried_again() {
    let state = state(&[], vec![testing::workload("web", "node-a", "10.1.1.9", 300)]);
    let waiting = || {
        goals(&state, "node-a", Some(&Sandboxes::new()))
            .remove(&WorkloadUid::from("uid-web"))
            .expect("the Pod")
    };
    let mut now = waiting();
    now.keep_refusal(Some("a map is full"));
    assert_eq!(now.goal, Goal::Refuse("a map is full".into()));
    let mut now = waiting();
    now.keep_refusal(None);
    assert_eq!(now.goal, Goal::Wait);
    let mut tried = one(&state, sandbox("uid-web", "shop", "web-abc"));
    tried.keep_refusal(Some("a map is full"));
    assert!(matches!(tried.goal, Goal::Enrol(_)));
}
