use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::watch,
};
use weft_core::MeshState;
use weft_proto::{
    nri::{LinuxNamespace, LinuxPodSandbox},
    ttrpc::Response,
};

use super::{
    wire::tests::{frame, message},
    *,
};
use crate::{discovery::Placements, testing};

/// The runtime's end.
struct Runtime(DuplexStream);

impl Runtime {
    async fn call(&mut self, stream: u32, method: &str, payload: Vec<u8>) {
        let request = Request { service: PLUGIN.into(), method: method.into(), payload, timeout_nano: 0 };
        let bytes = frame(1, &message(stream, 1, &request.encode_to_vec()));
        self.0.write_all(&bytes).await.unwrap();
    }

    /// The next message: logical connection, stream, type, data.
    async fn next(&mut self) -> (u32, u32, u8, Vec<u8>) {
        let mut head = [0; 18];
        self.0.read_exact(&mut head).await.unwrap();
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let mut data = vec![0; number(8) as usize];
        assert_eq!(number(4) as usize, data.len() + 10, "one frame for a short message");
        self.0.read_exact(&mut data).await.unwrap();
        (number(0), number(12), head[16], data)
    }

    async fn answer(&mut self, stream: u32) -> Result<Vec<u8>, Status> {
        let (connection, answered, kind, data) = self.next().await;
        assert_eq!((connection, answered, kind), (1, stream, 2));
        let response = Response::decode(&*data).unwrap();
        match response.status {
            Some(status) => Err(status),
            None => Ok(response.payload),
        }
    }

    async fn registered(&mut self) {
        let (connection, stream, kind, data) = self.next().await;
        assert_eq!((connection, stream, kind), (2, REGISTRATION, 1));
        let request = Request::decode(&*data).unwrap();
        assert_eq!((request.service.as_str(), request.method.as_str()), (RUNTIME, "RegisterPlugin"));
        let plugin = RegisterPluginRequest::decode(&*request.payload).unwrap();
        assert_eq!((plugin.plugin_name.as_str(), plugin.plugin_idx.as_str()), NAME);
        let accepted = frame(2, &message(stream, 2, &Response::default().encode_to_vec()));
        self.0.write_all(&accepted).await.unwrap();
        let configure =
            ConfigureRequest { runtime_version: "2.2".into(), request_timeout: 2000, ..Default::default() };
        self.call(1, "Configure", configure.encode_to_vec()).await;
        let answer = ConfigureResponse::decode(&*self.answer(1).await.unwrap()).unwrap();
        assert_eq!(answer.events, 0b111);
    }
}

fn plugin() -> (Plugin, mpsc::Receiver<Event>, watch::Sender<Arc<Placements>>) {
    let (events, queue) = mpsc::channel(8);
    let placements = watch::Sender::new(Arc::default());
    let state = watch::Sender::new(Arc::new(MeshState::default().apply(&testing::delta([]))));
    let verdicts = Verdicts { placements: placements.subscribe(), state: state.subscribe() };
    (Plugin { root: "/".into(), events, verdicts }, queue, placements)
}

fn pod(id: &str) -> PodSandbox {
    PodSandbox {
        id: id.into(),
        name: "web".into(),
        uid: "uid-web".into(),
        namespace: "shop".into(),
        linux: Some(LinuxPodSandbox {
            namespaces: vec![LinuxNamespace { r#type: "network".into(), path: "/nonexistent/netns".into() }],
        }),
        ips: vec!["10.1.1.1".into(), "fe80::1".into()],
        ..PodSandbox::default()
    }
}

#[tokio::test]
async fn a_pod_starts_once_it_is_placed() {
    let (plugin, mut queue, placements) = plugin();
    let (near, far) = tokio::io::duplex(64 << 10);
    let mut runtime = Runtime(far);
    let told = Arc::new(parking_lot::Mutex::new(String::new()));
    let version = told.clone();
    let serve = async move { plugin.serve(near, |v| *version.lock() = v.to_owned()).await };
    let talk = async {
        runtime.registered().await;
        assert_eq!(*told.lock(), "2.2");
        runtime.call(3, "Synchronize", SynchronizeRequest { more: true }.encode_to_vec()).await;
        let answer = SynchronizeResponse::decode(&*runtime.answer(3).await.unwrap()).unwrap();
        assert!(answer.more);
        let request = PodSandboxRequest { pod: Some(pod("a")) }.encode_to_vec();
        runtime.call(5, "RunPodSandbox", request).await;
        let Some(Event::Began(began)) = queue.recv().await else { panic!("no sandbox began") };
        assert_eq!((&*began.id, began.name.to_string().as_str()), ("a", "shop/web"));
        assert_eq!(began.addresses, ["10.1.1.1".parse::<std::net::IpAddr>().unwrap()]);
        placements.send_replace(Arc::new(Placements::from([(
            "a".to_owned(),
            crate::discovery::Placement::Passed,
        )])));
        runtime.answer(5).await.unwrap();
        // An older runtime says it in another way.
        let mut change = StateChangeEvent { pod: Some(pod("a")), ..StateChangeEvent::default() };
        change.set_event(Happened::StopPodSandbox);
        runtime.call(7, "StateChange", change.encode_to_vec()).await;
        runtime.answer(7).await.unwrap();
        assert!(matches!(queue.recv().await, Some(Event::Ended(id)) if id == "a"));
        runtime.call(9, "CreateContainer", Vec::new()).await;
        assert_eq!(runtime.answer(9).await.unwrap_err().code, UNIMPLEMENTED);
        runtime.call(11, "RunPodSandbox", vec![0xff]).await;
        assert_eq!(runtime.answer(11).await.unwrap_err().code, INVALID_ARGUMENT);
        drop(runtime);
    };
    let (end, ()) = tokio::join!(serve, talk);
    assert!(matches!(end, Err(NriError::Wire(WireError::Io(_)))));
}

#[tokio::test(start_paused = true)]
async fn a_runtime_that_says_nothing_is_left() {
    let (plugin, _queue, _placements) = plugin();
    let (near, _far) = tokio::io::duplex(64 << 10);
    assert!(matches!(plugin.serve(near, |_| {}).await, Err(NriError::Silent)));
}

#[test]
fn the_hosts_network_is_recognised() {
    let shared = PodSandbox {
        linux: Some(LinuxPodSandbox {
            namespaces: vec![LinuxNamespace { r#type: "pid".into(), path: String::new() }],
        }),
        ..pod("a")
    };
    assert!(describe(Path::new("/"), shared).unwrap().host_network);
    let own = PodSandbox { linux: None, pid: std::process::id(), ..pod("a") };
    assert!(describe(Path::new("/"), own).unwrap().host_network);
    assert!(!describe(Path::new("/"), pod("a")).unwrap().host_network);
}

#[test]
fn the_runtimes_own_limit_is_kept() {
    assert_eq!(patience(0), ENROL);
    assert_eq!(patience(2000), Duration::from_millis(1200));
    assert_eq!(patience(500), Duration::from_millis(300));
    assert_eq!(patience(-1), ENROL);
}
