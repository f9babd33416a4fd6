use std::{path::Path, time::Duration};

use futures_util::StreamExt as _;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use weft_proto::{
    flow::FlowFilter,
    health::health_client::HealthClient,
    observer::{
        GetFlowsRequest, GetFlowsResponse, get_flows_response::ResponseTypes,
        observer_client::ObserverClient, observer_server::ObserverServer,
    },
};
use weft_runtime::{DrainTrigger, Tasks, drain};

use super::*;
use crate::{
    files,
    flow::convert::tests::{request, stored},
    testing,
};

struct Fixture {
    store: FlowStore,
    client: ObserverClient<Channel>,
    channel: Channel,
    trigger: DrainTrigger,
    _tasks: Tasks,
    _dir: tempfile::TempDir,
}

async fn connect(path: &Path) -> Channel {
    let path = path.to_owned();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://agent").connect_with_connector(connector).await.unwrap()
}

async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("observer.sock");
    let listener = files::listen(&path).unwrap();
    let store = FlowStore::new(16);
    let (trigger, watcher) = drain::channel();
    let (_, state) = watch::channel(Arc::new(testing::state()));
    let observer = Observer::new("node-a", store.clone(), state, watcher.clone());
    let tasks = Tasks::new();
    tasks.spawn("observer", async move {
        Server::builder()
            .add_service(ObserverServer::new(observer))
            .add_service(health_server::HealthServer::new(Health))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
                watcher.draining().await;
            })
            .await
            .unwrap();
    });
    let channel = connect(&path).await;
    Fixture {
        store,
        client: ObserverClient::new(channel.clone()),
        channel,
        trigger,
        _tasks: tasks,
        _dir: dir,
    }
}

impl Fixture {
    fn push(&self, statuses: std::ops::Range<u16>) {
        for status in statuses {
            self.store.push(stored(request("/", status)));
        }
    }

    async fn all(&mut self, request: GetFlowsRequest) -> Vec<u32> {
        let stream = self.client.get_flows(request).await.unwrap().into_inner();
        stream.map(|r| status(&r.unwrap())).collect().await
    }
}

/// The status of a flow; 10,000 and more for lost events.
fn status(answer: &GetFlowsResponse) -> u32 {
    match answer.response_types.as_ref().unwrap() {
        ResponseTypes::Flow(flow) => match flow.l7.as_ref().unwrap().record.as_ref().unwrap() {
            weft_proto::flow::layer7::Record::Http(http) => http.code,
        },
        ResponseTypes::LostEvents(lost) => 10_000 + u32::try_from(lost.num_events_lost).unwrap(),
        ResponseTypes::NodeStatus(_) => panic!("no node status expected"),
    }
}

#[tokio::test]
async fn last_first_and_all() {
    let mut f = fixture().await;
    f.push(100..120);
    let d = GetFlowsRequest::default;
    assert_eq!(f.all(GetFlowsRequest { number: 3, ..d() }).await, [117, 118, 119]);
    assert_eq!(f.all(GetFlowsRequest { number: 2, first: true, ..d() }).await, [104, 105]);
    assert_eq!(f.all(d()).await, (104..120).collect::<Vec<_>>());
    let teapot = FlowFilter { http_status_code: vec!["105".into(), "107".into()], ..Default::default() };
    let filtered = GetFlowsRequest { number: 1, whitelist: vec![teapot.clone()], ..d() };
    assert_eq!(f.all(filtered).await, [107]);
    let without = GetFlowsRequest { number: 20, blacklist: vec![teapot], ..d() };
    assert!(!f.all(without).await.contains(&107));
}

#[tokio::test]
async fn since_and_until() {
    let mut f = fixture().await;
    let base = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    for n in 0..10_u16 {
        let mut record = request("/", 200 + n);
        record.time = base + Duration::from_secs(n.into());
        f.store.push(stored(record));
    }
    let at = |s: u64| Some((base + Duration::from_secs(s)).into());
    let d = GetFlowsRequest::default;
    assert_eq!(f.all(GetFlowsRequest { since: at(7), ..d() }).await, [207, 208, 209]);
    assert_eq!(f.all(GetFlowsRequest { until: at(1), ..d() }).await, [200, 201]);
    assert_eq!(f.all(GetFlowsRequest { since: at(2), until: at(6), number: 2, ..d() }).await, [205, 206]);
}

#[tokio::test]
async fn following_ends_with_the_drain() {
    let mut f = fixture().await;
    f.push(200..203);
    let request = GetFlowsRequest { number: 1, follow: true, ..Default::default() };
    let mut stream = f.client.get_flows(request).await.unwrap().into_inner();
    assert_eq!(status(&stream.message().await.unwrap().unwrap()), 202);
    f.push(300..301);
    assert_eq!(status(&stream.message().await.unwrap().unwrap()), 300);
    f.store.lost_in_kernel(5, SystemTime::now());
    assert_eq!(status(&stream.message().await.unwrap().unwrap()), 10_005);
    f.trigger.drain(Duration::ZERO).await;
    assert!(stream.message().await.unwrap().is_none());
}

#[tokio::test]
async fn a_reader_that_stalls_is_told_what_it_missed() {
    let f = fixture().await;
    let (_, state) = watch::channel(Arc::new(testing::state()));
    let (_trigger, drain) = drain::channel();
    let observer = Observer::new("node-a", f.store.clone(), state, drain);
    let request = GetFlowsRequest { follow: true, ..Default::default() };
    let mut cursor = Cursor::new(&observer, &request).unwrap();
    // The reader sleeps while 1,000 flows pass through 16 places.
    f.push(0..1000);
    let mut got = Vec::new();
    while got.len() < 17 {
        got.push(status(&cursor.next().await.unwrap()));
    }
    assert_eq!(got[0], 10_984);
    assert_eq!(got[1..], (984..1000).collect::<Vec<_>>());
    let totals = f.store.totals();
    assert_eq!((totals.seen, totals.lost_readers), (1000, 984));
}

#[tokio::test]
async fn bad_requests_say_so() {
    let mut f = fixture().await;
    let request = GetFlowsRequest { first: true, follow: true, ..Default::default() };
    assert_eq!(f.client.get_flows(request).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    let bad = FlowFilter { http_path: vec!["(".into()], ..Default::default() };
    let request = GetFlowsRequest { whitelist: vec![bad], ..Default::default() };
    assert_eq!(f.client.get_flows(request).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    let debug = f.client.get_debug_events(observer::GetDebugEventsRequest::default()).await;
    assert_eq!(debug.unwrap_err().code(), tonic::Code::Unimplemented);
}

#[tokio::test]
async fn what_a_stock_client_asks_first() {
    let mut f = fixture().await;
    f.push(200..220);
    let mut health = HealthClient::new(f.channel.clone());
    let ask = |service: &str| health::HealthCheckRequest { service: service.into() };
    let answer = health.check(ask("hubble.server.Observer")).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    assert_eq!(health.check(ask("nobody")).await.unwrap_err().code(), tonic::Code::NotFound);
    let status = f.client.server_status(observer::ServerStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.num_flows, status.max_flows, status.seen_flows), (16, 16, 20));
    assert_eq!(status.num_connected_nodes, Some(1));
    let nodes = f.client.get_nodes(observer::GetNodesRequest {}).await.unwrap().into_inner().nodes;
    assert_eq!((nodes[0].name.as_str(), nodes[0].state()), ("node-a", NodeState::NodeConnected));
    let spaces = f.client.get_namespaces(observer::GetNamespacesRequest {}).await.unwrap().into_inner();
    assert_eq!(spaces.namespaces[0].namespace, "shop");
}
