use prometheus_client::metrics::counter::Counter;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::*;
use crate::{DrainTrigger, Tasks, drain};

struct Endpoint {
    address: std::net::SocketAddr,
    readiness: Readiness,
    tasks: Tasks,
    trigger: DrainTrigger,
    watcher: DrainWatcher,
}

async fn start() -> Endpoint {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut registry = Registry::default();
    let counter = Counter::<u64>::default();
    counter.inc();
    registry.register("weft_test", "For the test", counter);
    let (trigger, watcher) = drain::channel();
    let readiness = Readiness::new();
    let (tasks, admin) = (Tasks::new(), Admin::new(registry, readiness.clone()));
    let serving = watcher.clone();
    tasks.vital("admin", async move { Ok(serve(listener, admin, serving).await?) });
    Endpoint { address, readiness, tasks, trigger, watcher }
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, method: &str, path: &str) -> String {
    let request = format!("{method} {path} HTTP/1.1\r\nhost: weft\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

impl Endpoint {
    async fn get(&self, path: &str) -> String {
        ask(TcpStream::connect(self.address).await.unwrap(), "GET", path).await
    }
}

#[tokio::test]
async fn metrics_are_openmetrics() {
    let endpoint = start().await;
    let answer = endpoint.get("/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains(OPENMETRICS), "{answer}");
    assert!(answer.contains("weft_test_total 1\n") && answer.ends_with("# EOF\n"), "{answer}");
}

#[tokio::test]
async fn readyz_names_what_is_missing() {
    let endpoint = start().await;
    let (state, kernel) = (endpoint.readiness.guard("state"), endpoint.readiness.guard("datapath"));
    assert!(endpoint.get("/healthz").await.starts_with("HTTP/1.1 200"));
    let answer = endpoint.get("/readyz").await;
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("waiting for: datapath, state"),
        "{answer}"
    );
    state.ready();
    kernel.ready();
    assert!(endpoint.get("/readyz").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn unknown_paths_and_methods_are_told_what_there_is() {
    let endpoint = start().await;
    let answer = endpoint.get("/").await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(["/metrics", "/healthz", "/readyz"].iter().all(|path| answer.contains(path)), "{answer}");
    let stream = TcpStream::connect(endpoint.address).await.unwrap();
    assert!(ask(stream, "POST", "/metrics").await.starts_with("HTTP/1.1 405"));
}

#[tokio::test]
async fn serves_through_the_drain_and_ends_after_it() {
    let endpoint = start().await;
    assert!(endpoint.get("/readyz").await.starts_with("HTTP/1.1 200"));
    let hold = endpoint.watcher.hold();
    let address = endpoint.address;
    let during = async move {
        endpoint.watcher.draining().await;
        let answer = ask(TcpStream::connect(address).await.unwrap(), "GET", "/readyz").await;
        drop(hold);
        answer
    };
    let (in_time, answer) = tokio::join!(endpoint.trigger.drain(Duration::from_secs(30)), during);
    assert!(in_time);
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("draining"), "{answer}");
    assert_eq!(endpoint.tasks.join(Duration::from_secs(30)).await, 0);
}

#[tokio::test]
async fn serves_a_socket_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (_trigger, watcher) = drain::channel();
    let admin = Admin::new(Registry::default(), Readiness::new());
    let tasks = Tasks::new();
    tasks.vital("admin", async move { Ok(serve(listener, admin, watcher).await?) });
    let answer = ask(UnixStream::connect(&path).await.unwrap(), "GET", "/healthz").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// The header timeout and the connection limit together: silent peers take every place, and lose them in time.
#[tokio::test(start_paused = true)]
async fn silent_peers_do_not_keep_their_place() {
    let endpoint = start().await;
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        silent.push(TcpStream::connect(endpoint.address).await.unwrap());
    }
    assert!(endpoint.get("/healthz").await.starts_with("HTTP/1.1 200"));
}
