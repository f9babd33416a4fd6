use std::{fs, os::unix::fs::PermissionsExt as _};

use tokio::sync::watch;
use weft_core::{Resource, config::NamespaceMode};
use weft_runtime::drain;

use super::*;
use crate::{discovery::tests::lone_gate, testing};

fn state(namespaces: &[(&str, workload::Mode)]) -> Arc<MeshState> {
    let mut delta = testing::delta([]);
    for resource in &mut delta.upserted {
        if let Resource::Config(config) = resource {
            let named = |(name, mode): &(&str, workload::Mode)| {
                ((*name).into(), NamespaceMode { mode: *mode, ..NamespaceMode::default() })
            };
            Arc::make_mut(config).namespaces = namespaces.iter().map(named).collect();
        }
    }
    Arc::new(MeshState::default().apply(&delta))
}

async fn eventually(what: &str, check: impl Fn() -> bool) {
    let all = async {
        while !check() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), all).await.is_ok(), "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_follows_the_mesh_and_the_chain_follows_the_cni() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for folder in ["net.d", "bin"] {
        fs::create_dir(root.join(folder)).unwrap();
    }
    let own = root.join("net.d/10-pods.conflist");
    fs::write(&own, r#"{"name":"pods","plugins":[{"type":"bridge"}]}"#).unwrap();
    fs::write(root.join("weft-cni"), "program").unwrap();
    let settings = Settings {
        conf_dir: root.join("net.d"),
        bin_dir: root.join("bin"),
        state_dir: root.join("lib/weft"),
        socket: root.join("cni.sock"),
        program: root.join("weft-cni"),
    };
    let (ours, list) = (root.join("net.d/00-weft.conflist"), settings.list());
    let (tasks, mut registry) = (Tasks::new(), Registry::default());
    let (trigger, drain) = drain::channel();
    let (mesh, told) = watch::channel(Arc::new(MeshState::default()));
    let guard = start(
        &settings.socket,
        lone_gate(workload::Mode::Strict),
        Some(settings.clone()),
        told,
        &tasks,
        &drain,
        &mut registry,
    )
    .unwrap();

    mesh.send_replace(state(&[("shop", workload::Mode::Strict), ("out", workload::Mode::Disabled)]));
    eventually("the chain", || ours.exists()).await;
    let holds = |name: &str| {
        let list = weft_cni::list::load(&list).unwrap().expect("a list");
        list.namespaces.get(name).map(|n| n.holds())
    };
    assert_eq!((holds("shop"), holds("out"), holds("new")), (Some(true), Some(false), None));
    assert_eq!(fs::metadata(&list).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(guard.problem(), None);

    mesh.send_replace(state(&[("shop", workload::Mode::Disabled), ("new", workload::Mode::Permissive)]));
    eventually("the new list", || holds("new") == Some(true)).await;
    assert_eq!((holds("shop"), holds("out")), (Some(false), None));
    fs::write(&own, r#"{"name":"pods","plugins":[{"type":"ptp"}]}"#).unwrap();
    eventually("the CNI's change", || fs::read_to_string(&ours).unwrap().contains("ptp")).await;
    fs::remove_file(&own).unwrap();
    eventually("the problem", || guard.problem().is_some_and(|p| p.contains("holds no CNI configuration")))
        .await;
    assert!(!ours.exists());

    // Hung up with the drain: the plugin asks the successor, which has the socket's name.
    let socket = settings.socket.clone();
    assert!(trigger.drain(Duration::from_secs(5)).await);
    eventually("the end of the answers", || std::os::unix::net::UnixStream::connect(&socket).is_err()).await;
    tasks.join(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn nothing_is_installed_before_the_first_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let settings = Settings {
        conf_dir: root.join("none"),
        bin_dir: root.join("none"),
        state_dir: root.join("lib"),
        socket: root.join("cni.sock"),
        program: root.join("none"),
    };
    let (told, problem) = watch::channel(None);
    let mut keeper =
        Keeper { installer: Installer::new(settings.clone()), settings, told, installed: Gauge::default() };
    let (_, outcome) = keeper.look(None);
    assert!(matches!(outcome, Ok(false)));
    keeper.tell(outcome);
    assert_eq!((keeper.installed.get(), problem.borrow().is_some()), (0, false));
    let (kept, outcome) = keeper.look(Some(&List::default()));
    assert!(kept);
    keeper.tell(outcome);
    let said = problem.borrow().clone().unwrap();
    assert!(said.contains("is not held") && said.contains("--cni-bin-dir"), "{said}");
}
