use std::os::unix::fs::symlink;

use parking_lot::Mutex;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use weft_core::config::NamespaceMode;
use weft_proto::cri::{
    self as wire,
    runtime_service_server::{RuntimeService, RuntimeServiceServer},
};
use weft_runtime::drain;

use super::*;
use crate::testing;

/// A sandbox of its own Pod.
pub(crate) fn sandbox(id: &str, uid: &str, created: i64) -> Sandbox {
    Sandbox {
        id: id.into(),
        uid: uid.into(),
        name: NamespacedName::new("shop", &format!("pod-{uid}")),
        netns: Some(PathBuf::from(format!("/run/netns/{id}"))),
        host_network: false,
        addresses: vec!["10.1.1.5".parse().unwrap()],
        mode: Mode::Disabled,
        isolated: None,
        created,
    }
}

/// A runtime with Pods that the test makes.
#[derive(Clone, Default)]
struct Runtime {
    pods: Arc<Mutex<Vec<wire::PodSandboxStatus>>>,
    changed: Arc<Notify>,
}

impl Runtime {
    fn add(&self, id: &str, uid: &str, ip: &str) {
        let metadata = wire::PodSandboxMetadata {
            name: format!("pod-{uid}"),
            uid: uid.into(),
            namespace: "shop".into(),
            attempt: 0,
        };
        let network = wire::PodSandboxNetworkStatus { ip: ip.into(), additional_ips: Vec::new() };
        self.pods.lock().push(wire::PodSandboxStatus {
            id: id.into(),
            metadata: Some(metadata),
            network: Some(network),
            created_at: 1,
            ..wire::PodSandboxStatus::default()
        });
        self.changed.notify_one();
    }

    fn stop(&self, id: &str) {
        for pod in self.pods.lock().iter_mut().filter(|p| p.id == id) {
            pod.set_state(wire::PodSandboxState::SandboxNotready);
        }
        self.changed.notify_one();
    }
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(
        &self,
        _: Request<wire::VersionRequest>,
    ) -> Result<Response<wire::VersionResponse>, Status> {
        Ok(Response::new(wire::VersionResponse { runtime_name: "test".into(), ..Default::default() }))
    }

    async fn list_pod_sandbox(
        &self,
        _: Request<wire::ListPodSandboxRequest>,
    ) -> Result<Response<wire::ListPodSandboxResponse>, Status> {
        let item = |p: &wire::PodSandboxStatus| wire::PodSandbox {
            id: p.id.clone(),
            metadata: p.metadata.clone(),
            state: p.state,
            ..wire::PodSandbox::default()
        };
        let items = self.pods.lock().iter().map(item).collect();
        Ok(Response::new(wire::ListPodSandboxResponse { items }))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<wire::PodSandboxStatusRequest>,
    ) -> Result<Response<wire::PodSandboxStatusResponse>, Status> {
        let id = request.into_inner().pod_sandbox_id;
        let status = self.pods.lock().iter().find(|p| p.id == id).cloned();
        let status = status.ok_or_else(|| Status::not_found("no such sandbox"))?;
        let json = format!(
            r#"{{"pid":0,"runtimeSpec":{{"linux":{{"namespaces":[{{"type":"network","path":"/var/run/netns/{id}"}}]}}}}}}"#
        );
        let info = HashMap::from([("info".to_owned(), json)]);
        Ok(Response::new(wire::PodSandboxStatusResponse { status: Some(status), info }))
    }

    type GetContainerEventsStream = std::pin::Pin<
        Box<dyn futures_util::Stream<Item = Result<wire::ContainerEventResponse, Status>> + Send>,
    >;

    async fn get_container_events(
        &self,
        _: Request<wire::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        let events = stream::unfold(self.changed.clone(), |changed| async move {
            changed.notified().await;
            Some((Ok(wire::ContainerEventResponse::default()), changed))
        });
        Ok(Response::new(Box::pin(events)))
    }
}

async fn known(discovered: &mut Discovered, found: impl Fn(&Sandboxes) -> bool) -> Arc<Sandboxes> {
    let matching = discovered.sandboxes.wait_for(|s| s.as_deref().is_some_and(&found));
    let matching = tokio::time::timeout(Duration::from_secs(20), matching).await;
    matching.expect("within the deadline").expect("a value").clone().expect("known")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runtimes_pods_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("run/netns")).unwrap();
    std::fs::create_dir_all(root.join("var")).unwrap();
    symlink("/run", root.join("var/run")).unwrap();
    for id in ["a", "b"] {
        std::fs::write(root.join("run/netns").join(id), "").unwrap();
    }
    let runtime = Runtime::default();
    runtime.add("a", "uid-a", "10.1.1.1");
    let socket = dir.path().join("cri.sock");
    let (tasks, mut registry) = (Tasks::new(), Registry::default());
    let (trigger, drain) = drain::channel();
    let settings =
        Settings { cri: socket.clone(), nri: Some(dir.path().join("none")), host_root: root.clone() };
    let (_state, state) = watch::channel(Arc::new(testing::state()));
    // The agent begins before the runtime listens.
    let mut discovered = start(settings, state, &tasks, &drain, &mut registry).unwrap();
    assert!(discovered.sandboxes.borrow().is_none());
    let listener = UnixListener::bind(&socket).unwrap();
    let server = Server::builder()
        .add_service(RuntimeServiceServer::new(runtime.clone()))
        .serve_with_incoming(UnixListenerStream::new(listener));
    let server = tasks.spawn("runtime", async move { server.await.unwrap() });

    discovered.first().await;
    let first = known(&mut discovered, |s| s.len() == 1).await;
    let a = &first[&WorkloadUid::from("uid-a")];
    assert_eq!(a.name, NamespacedName::new("shop", "pod-uid-a"));
    assert_eq!(a.netns.as_deref(), Some(&*root.join("run/netns/a")));
    assert_eq!(a.addresses, ["10.1.1.1".parse::<IpAddr>().unwrap()]);
    runtime.add("b", "uid-b", "10.1.1.2");
    known(&mut discovered, |s| s.len() == 2).await;
    runtime.stop("a");
    known(&mut discovered, |s| s.len() == 1 && s.contains_key(&WorkloadUid::from("uid-b"))).await;
    // The same address again, in another Pod.
    runtime.add("c", "uid-c", "10.1.1.1");
    known(&mut discovered, |s| s.contains_key(&WorkloadUid::from("uid-c"))).await;
    server.abort();
    assert!(trigger.drain(Duration::from_secs(5)).await);
    tasks.join(Duration::from_secs(5)).await;
}

fn verdicts(mode: Mode) -> (Verdicts, watch::Sender<Arc<Placements>>) {
    let mut delta = testing::delta([]);
    for resource in &mut delta.upserted {
        if let weft_core::Resource::Config(config) = resource {
            let namespace = NamespaceMode { mode, ..NamespaceMode::default() };
            Arc::make_mut(config).namespaces = [("shop".into(), namespace)].into();
        }
    }
    let placements = watch::Sender::new(Arc::default());
    let state = watch::Sender::new(Arc::new(MeshState::default().apply(&delta)));
    (Verdicts { placements: placements.subscribe(), state: state.subscribe() }, placements)
}

/// A gate that nobody stands behind.
pub(crate) fn lone_gate(mode: Mode) -> Gate {
    gate(mode).0
}

/// A gate for the namespace `shop` of that mode, with the other ends of what it speaks to.
pub(super) fn gate(mode: Mode) -> (Gate, mpsc::Receiver<Event>, watch::Sender<Arc<Placements>>) {
    let (events, queue) = mpsc::channel(8);
    let (verdicts, placements) = verdicts(mode);
    (Gate { root: "/".into(), events, verdicts }, queue, placements)
}

#[tokio::test(start_paused = true)]
async fn a_strict_pod_does_not_start_without_the_mesh() {
    let limit = Duration::from_secs(1);
    let pod = sandbox("a", "uid-a", 1);
    let placed = |p: Placement| Arc::new(Placements::from([("a".to_owned(), p)]));
    for (mode, placement, starts) in [
        (Mode::Strict, None, false),
        (Mode::Permissive, None, true),
        (Mode::Disabled, None, true),
        (Mode::Strict, Some(Placement::Enrolled), true),
        (Mode::Strict, Some(Placement::Held), true),
        (Mode::Strict, Some(Placement::Passed), true),
        (Mode::Strict, Some(Placement::Refused("why".into())), false),
        (Mode::Permissive, Some(Placement::Refused("why".into())), true),
    ] {
        let (verdicts, placements) = verdicts(mode);
        if let Some(placement) = &placement {
            placements.send_replace(placed(placement.clone()));
        }
        let verdict = verdicts.wait(&pod, limit).await;
        assert_eq!(verdict.is_ok(), starts, "{mode:?} {placement:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_runtime_waits_for_the_enrolment_and_not_longer() {
    let (verdicts, placements) = verdicts(Mode::Strict);
    let pod = sandbox("a", "uid-a", 1);
    placements.send_replace(Arc::new(Placements::from([("a".to_owned(), Placement::Held)])));
    let began = tokio::time::Instant::now();
    let enrol = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        placements.send_replace(Arc::new(Placements::from([("a".to_owned(), Placement::Enrolled)])));
    };
    let (verdict, ()) = tokio::join!(verdicts.wait(&pod, Duration::from_secs(1)), enrol);
    assert_eq!(verdict, Ok(()));
    assert_eq!(began.elapsed(), Duration::from_millis(100));
}

#[test]
fn runtimes_with_a_network_of_their_own_are_known_by_handler_or_type() {
    assert_eq!(isolation("", None), None);
    assert_eq!(isolation("runc", Some("io.containerd.runc.v2")), None);
    assert_eq!(isolation("kata-qemu", None).as_deref(), Some("kata-qemu"));
    assert_eq!(isolation("sandboxed", Some("io.containerd.runsc.v1")).as_deref(), Some("sandboxed"));
    assert_eq!(isolation("", Some("io.containerd.kata.v2")).as_deref(), Some("io.containerd.kata.v2"));
}

#[test]
fn a_label_asks_for_a_mode() {
    let labels = |mode: &str| HashMap::from([(MODE.to_owned(), mode.to_owned())]);
    assert_eq!(asked(&labels("strict")), Mode::Strict);
    assert_eq!(asked(&labels("permissive")), Mode::Permissive);
    assert_eq!(asked(&labels("nonsense")), Mode::Disabled);
    assert_eq!(asked(&HashMap::new()), Mode::Disabled);
}
