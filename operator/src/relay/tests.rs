use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    Code, Request, Streaming,
    transport::{Channel, Endpoint, Server},
};
use weft_proto::{
    agent::StatusResponse as AgentState,
    flow::{self, Flow, FlowFilter},
    observer::{
        GetFlowsRequest, GetFlowsResponse, get_flows_response::ResponseTypes,
        observer_client::ObserverClient, observer_server::ObserverServer,
    },
    relay::NodeState,
    weft_relay::{
        End, Hello, ProbeRequest, StatusRequest, mesh_client::MeshClient, mesh_server::MeshServer,
        relay_client::RelayClient, relay_server::RelayServer,
    },
};
use weft_runtime::{DrainTrigger, Tasks, drain};

use super::{
    agents::RelayService,
    people::People,
    viewers::{self, Scope, Viewers},
    *,
};
use crate::{
    auth::{Authenticator, Refused},
    metrics::Metrics,
};

const WAIT: Duration = Duration::from_secs(20);

/// The token is the node's name.
#[derive(Debug)]
struct Named;

impl Authenticator for Named {
    fn node<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<String, Refused>> {
        Box::pin(
            async move { if token == "stranger" { Err(Refused::Invalid) } else { Ok(token.to_owned()) } },
        )
    }
}

impl Viewers for Named {
    fn see<'a>(
        &'a self,
        token: &'a str,
        namespace: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Scope, Refused>> {
        Box::pin(async move {
            match (token, namespace) {
                ("viewer", None) => Ok(Scope::All),
                ("viewer", Some(namespace)) | ("shop-viewer", Some(namespace @ "shop")) => {
                    Ok(Scope::Namespace(namespace.into()))
                }
                ("shop-viewer", _) => Err(Refused::Forbidden("only flows of shop".into())),
                _ => Err(Refused::Invalid),
            }
        })
    }
}

struct Fixture {
    channel: Channel,
    relay: Relay,
    _trigger: DrainTrigger,
}

async fn start() -> Fixture {
    let (trigger, drain) = drain::channel();
    let (relay, tasks) = (Relay::default(), Tasks::new());
    let metrics = Metrics::new(&mut prometheus_client::registry::Registry::default());
    let service = RelayService {
        relay: relay.clone(),
        callers: Arc::new(Named),
        metrics,
        tasks: tasks.clone(),
        drain: drain.clone(),
    };
    let people = People::new(relay.clone(), Arc::new(Named), tasks.clone(), drain);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn("server", async move {
        let served = Server::builder()
            .add_service(RelayServer::new(service))
            .add_service(ObserverServer::new(people.clone()))
            .add_service(MeshServer::new(people))
            .serve_with_incoming(TcpListenerStream::new(listener));
        served.await.unwrap();
    });
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    Fixture { channel, relay, _trigger: trigger }
}

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// An agent by hand.
struct Hand {
    out: mpsc::Sender<Answer>,
    questions: Streaming<Question>,
}

impl Hand {
    async fn question(&mut self) -> Question {
        timeout(WAIT, self.questions.message()).await.unwrap().unwrap().unwrap()
    }

    async fn say(&self, id: u64, body: Body) {
        self.out.send(Answer { id, answer: Some(body) }).await.unwrap();
    }

    async fn flows(&self, id: u64, node: &str, seconds: &[i64]) {
        for second in seconds {
            self.say(id, Body::Flow(flow(node, *second))).await;
        }
    }

    async fn done(&self, id: u64) {
        self.say(id, Body::End(End::default())).await;
    }
}

impl Fixture {
    async fn agent(&self, node: &str) -> Result<Hand, Status> {
        let (out, receiver) = mpsc::channel(8);
        let hello = Hello { agent_version: "test".into() };
        out.send(Answer { id: 0, answer: Some(Body::Hello(hello)) }).await.unwrap();
        let request = with_token(ReceiverStream::new(receiver), node);
        let questions = RelayClient::new(self.channel.clone()).serve(request).await?.into_inner();
        Ok(Hand { out, questions })
    }

    async fn ask(&self, request: GetFlowsRequest) -> Streaming<GetFlowsResponse> {
        let mut client = ObserverClient::new(self.channel.clone());
        client.get_flows(with_token(request, "viewer")).await.unwrap().into_inner()
    }

    /// As who may see only the flows of the namespace `shop`.
    async fn ask_within(
        &self,
        namespaces: &[&str],
        request: GetFlowsRequest,
    ) -> Result<Streaming<GetFlowsResponse>, Status> {
        let mut request = with_token(request, "shop-viewer");
        for namespace in namespaces {
            request.metadata_mut().append(viewers::NAMESPACE, namespace.parse().unwrap());
        }
        let mut client = ObserverClient::new(self.channel.clone());
        client.get_flows(request).await.map(tonic::Response::into_inner)
    }
}

fn flow(node: &str, seconds: i64) -> GetFlowsResponse {
    let time = Some(prost_types(seconds));
    GetFlowsResponse {
        response_types: Some(ResponseTypes::Flow(Flow { time, ..Flow::default() })),
        node_name: node.into(),
        time,
    }
}

fn prost_types(seconds: i64) -> ::prost_types::Timestamp {
    ::prost_types::Timestamp { seconds, nanos: 0 }
}

async fn next(stream: &mut Streaming<GetFlowsResponse>) -> Option<GetFlowsResponse> {
    timeout(WAIT, stream.message()).await.unwrap().unwrap()
}

/// Who said it and when; or the word about a node.
fn told(answer: &GetFlowsResponse) -> (String, i64) {
    match &answer.response_types {
        Some(ResponseTypes::NodeStatus(s)) => {
            (format!("{:?} {}: {}", s.state_change(), s.node_names.join(","), s.message), 0)
        }
        _ => (answer.node_name.clone(), answer.time.map_or(0, |t| t.seconds)),
    }
}

#[tokio::test]
async fn flows_of_all_nodes_come_in_the_order_of_time() {
    let fixture = start().await;
    let (mut a, mut b) = (fixture.agent("a").await.unwrap(), fixture.agent("b").await.unwrap());
    let request = GetFlowsRequest { number: 3, ..GetFlowsRequest::default() };
    let asked = fixture.ask(request.clone());
    let answers = async {
        let (qa, qb) = tokio::join!(a.question(), b.question());
        let Some(Asked::Flows(flows)) = qa.question else { panic!("no question for flows") };
        assert_eq!(flows.request, Some(request));
        a.flows(qa.id, "a", &[1, 4, 6]).await;
        b.flows(qb.id, "b", &[2, 3, 5]).await;
        a.done(qa.id).await;
        b.done(qb.id).await;
    };
    let (mut stream, ()) = tokio::join!(asked, answers);
    let mut found = Vec::new();
    while let Some(answer) = next(&mut stream).await {
        found.push(told(&answer));
    }
    assert_eq!(found, [("a".into(), 4), ("b".into(), 5), ("a".into(), 6)]);
}

#[tokio::test]
async fn a_node_that_went_away_is_named_and_the_others_answer() {
    let fixture = start().await;
    let (mut a, mut b) = (fixture.agent("a").await.unwrap(), fixture.agent("b").await.unwrap());
    let asked = fixture.ask(GetFlowsRequest::default());
    let answers = async {
        let (_, qb) = tokio::join!(a.question(), b.question());
        drop(a);
        b.flows(qb.id, "b", &[1]).await;
        b.done(qb.id).await;
    };
    let (mut stream, ()) = tokio::join!(asked, answers);
    let first = told(&next(&mut stream).await.unwrap()).0;
    assert!(first.starts_with("NodeUnavailable a: its agent went away"), "{first}");
    assert_eq!(told(&next(&mut stream).await.unwrap()), ("b".into(), 1));
    assert_eq!(next(&mut stream).await, None);
}

#[tokio::test]
async fn an_agent_that_comes_later_is_followed() {
    let fixture = start().await;
    let mut stream = fixture.ask(GetFlowsRequest { follow: true, number: 5, ..Default::default() }).await;
    let mut a = fixture.agent("a").await.unwrap();
    let question = a.question().await;
    let Some(Asked::Flows(flows)) = question.question else { panic!("no question for flows") };
    assert_eq!(flows.request.unwrap().number, 0, "it is followed from now on");
    let word = next(&mut stream).await.unwrap();
    let Some(ResponseTypes::NodeStatus(status)) = word.response_types else { panic!("no word") };
    assert_eq!(status.state_change(), NodeState::NodeConnected);
    a.flows(question.id, "a", &[7]).await;
    assert_eq!(told(&next(&mut stream).await.unwrap()), ("a".into(), 7));
    // Nobody listens any more: the agent is told.
    drop(stream);
    let cancelled = a.question().await;
    assert_eq!((cancelled.id, cancelled.question), (question.id, Some(Asked::Cancel(Cancel {}))));
}

#[tokio::test]
async fn credit_comes_back_as_flows_are_taken() {
    let fixture = start().await;
    let mut a = fixture.agent("a").await.unwrap();
    let asked = fixture.ask(GetFlowsRequest::default());
    let (mut stream, question) = tokio::join!(asked, a.question());
    let many: Vec<i64> = (0..i64::from(CREDIT)).collect();
    let sending = async {
        a.flows(question.id, "a", &many).await;
        a.question().await
    };
    let taking = async {
        for _ in 0..CREDIT {
            next(&mut stream).await.unwrap();
        }
    };
    let (credit, ()) = tokio::join!(sending, taking);
    assert_eq!(credit.question, Some(Asked::Credit(Credit { count: RETURN })));
}

#[tokio::test]
async fn more_than_the_credit_ends_the_stream() {
    let relay = Relay::default();
    let (joined, _questions) = relay.join("a");
    let ask = joined.agent.ask(flows_question(GetFlowsRequest::default())).unwrap();
    let answer = || Answer { id: ask.id, answer: Some(Body::Flow(flow("a", 1))) };
    for _ in 0..=CREDIT {
        joined.agent.answered(answer()).unwrap();
    }
    assert_eq!(joined.agent.answered(answer()).unwrap_err().code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn questions_are_bounded() {
    let relay = Relay::default();
    let (joined, _questions) = relay.join("a");
    let ask = || joined.agent.ask(flows_question(GetFlowsRequest::default()));
    let held: Vec<_> = (0..MAX_ASKED).map(|_| ask().unwrap()).collect();
    assert_eq!(ask().unwrap_err(), Busy);
    drop(held);
    ask().unwrap();
}

#[tokio::test]
async fn the_newest_stream_of_a_node_is_asked() {
    let relay = Relay::default();
    let (old, _a) = relay.join("a");
    let (new, _b) = relay.join("a");
    assert!(Arc::ptr_eq(&relay.agents()[0], &new.agent));
    drop(new);
    assert!(Arc::ptr_eq(&relay.agents()[0], &old.agent));
    drop(old);
    assert!(relay.agents().is_empty());
}

#[tokio::test]
async fn states_are_told_and_silence_is_named() {
    let fixture = start().await;
    let (mut a, mut b) = (fixture.agent("a").await.unwrap(), fixture.agent("b").await.unwrap());
    let mut client = MeshClient::new(fixture.channel.clone());
    let asked = client.status(with_token(StatusRequest {}, "viewer"));
    let answers = async {
        let (qa, qb) = tokio::join!(a.question(), b.question());
        let agent = Some(AgentState { node: "a".into(), ..AgentState::default() });
        a.say(qa.id, Body::Status(NodeStatus { agent, mtu: 1500, ..NodeStatus::default() })).await;
        a.done(qa.id).await;
        b.say(qb.id, Body::End(End { code: Code::Internal.into(), message: "broken".into() })).await;
    };
    let (answer, ()) = tokio::join!(asked, answers);
    let answer = answer.unwrap().into_inner();
    assert_eq!(answer.nodes[0].mtu, 1500);
    assert_eq!((answer.silent[0].node.as_str(), answer.silent[0].problem.as_str()), ("b", "broken"));
}

#[tokio::test]
async fn a_probe_is_made_by_its_nodes_agent_for_who_may_see_flows() {
    let fixture = start().await;
    let mut a = fixture.agent("a").await.unwrap();
    let mut client = MeshClient::new(fixture.channel.clone());
    let probe = Probe { namespace: "shop".into(), pod: "web".into(), address: "10.1.1.1".into(), port: 80 };
    let request = |node: &str| ProbeRequest { node: node.into(), probe: Some(probe.clone()) };
    let refused = client.probe(with_token(request("a"), "a")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(client.probe(with_token(request("b"), "viewer")).await.unwrap_err().code(), Code::NotFound);
    let outcome = ProbeResult { error: "connection refused".into(), flow: Some(flow("a", 1)) };
    for end in [Code::Ok, Code::FailedPrecondition] {
        let asked = client.probe(with_token(request("a"), "viewer"));
        let answers = async {
            let question = a.question().await;
            assert_eq!(question.question, Some(Asked::Probe(probe.clone())));
            // Something that only a later version knows.
            a.out.send(Answer { id: question.id, answer: None }).await.unwrap();
            if end == Code::Ok {
                a.say(question.id, Body::Probe(outcome.clone())).await;
            }
            a.say(question.id, Body::End(End { code: end.into(), message: "held".into() })).await;
        };
        let (answer, ()) = tokio::join!(asked, answers);
        match end {
            Code::Ok => assert_eq!(answer.unwrap().into_inner(), outcome),
            _ => assert_eq!(answer.unwrap_err().code(), end),
        }
    }
}

#[tokio::test]
async fn strangers_are_refused_on_both_ends() {
    let fixture = start().await;
    assert_eq!(fixture.agent("stranger").await.err().unwrap().code(), Code::Unauthenticated);
    let mut client = ObserverClient::new(fixture.channel.clone());
    for request in [with_token(GetFlowsRequest::default(), "a"), Request::new(GetFlowsRequest::default())] {
        assert_eq!(client.get_flows(request).await.unwrap_err().code(), Code::Unauthenticated);
    }
    assert!(fixture.relay.agents().is_empty());
}

#[tokio::test]
async fn a_callers_own_fault_ends_the_call() {
    let fixture = start().await;
    let mut a = fixture.agent("a").await.unwrap();
    let asked = fixture.ask(GetFlowsRequest::default());
    let answers = async {
        let question = a.question().await;
        let end = End { code: Code::InvalidArgument.into(), message: "no regular expression".into() };
        a.say(question.id, Body::End(end)).await;
    };
    let (mut stream, ()) = tokio::join!(asked, answers);
    let error = timeout(WAIT, stream.message()).await.unwrap().unwrap_err();
    assert_eq!((error.code(), error.message()), (Code::InvalidArgument, "no regular expression"));
}

#[test]
fn changes_are_noticed() {
    let relay = Relay::default();
    let changes: watch::Receiver<u64> = relay.changes();
    let (joined, _questions) = relay.join("a");
    assert!(changes.has_changed().unwrap());
    drop(joined);
}

#[tokio::test]
async fn a_namespaces_viewer_sees_only_its_flows() {
    let fixture = start().await;
    let mut agent = fixture.agent("a").await.unwrap();
    for namespaces in [&[] as &[&str], &["bank"]] {
        let refused = fixture.ask_within(namespaces, GetFlowsRequest::default()).await.err().unwrap();
        assert_eq!(refused.code(), Code::PermissionDenied, "{namespaces:?}");
    }
    for namespaces in [&["shop", "bank"] as &[&str], &["*"], &[""], &["shop/"]] {
        let refused = fixture.ask_within(namespaces, GetFlowsRequest::default()).await.err().unwrap();
        assert_eq!(refused.code(), Code::InvalidArgument, "{namespaces:?}");
    }
    let mut mesh = MeshClient::new(fixture.channel.clone());
    let status = mesh.status(with_token(StatusRequest {}, "shop-viewer"));
    assert_eq!(status.await.unwrap_err().code(), Code::PermissionDenied);

    // Whatever the agent answers, it is asked for less, and looked at again.
    let between = |source: &str, destination: &str, seconds| {
        let end = |namespace: &str| {
            Some(flow::Endpoint { namespace: namespace.into(), ..flow::Endpoint::default() })
        };
        let mut answer = self::flow("a", seconds);
        if let Some(ResponseTypes::Flow(flow)) = &mut answer.response_types {
            (flow.source, flow.destination) = (end(source), end(destination));
        }
        Body::Flow(answer)
    };
    for follow in [false, true] {
        let request = GetFlowsRequest { follow, ..GetFlowsRequest::default() };
        let mut answers = fixture.ask_within(&["shop"], request).await.unwrap();
        let question = agent.question().await;
        let Some(Asked::Flows(flows)) = question.question else { panic!("{question:?}") };
        let asked = flows.request.unwrap().whitelist;
        assert_eq!(asked.len(), 2);
        assert!(
            asked.iter().all(|f| f.source_pod == ["shop/"] || f.destination_pod == ["shop/"]),
            "{asked:?}"
        );
        for (source, destination, seconds) in
            [("bank", "bank", 1), ("shop", "bank", 2), ("", "", 3), ("bank", "shop", 4)]
        {
            agent.say(question.id, between(source, destination, seconds)).await;
        }
        agent.done(question.id).await;
        let mut seen = Vec::new();
        while seen.len() < 2 {
            let answer = next(&mut answers).await.unwrap();
            if matches!(answer.response_types, Some(ResponseTypes::Flow(_))) {
                seen.push(told(&answer).1);
            }
        }
        assert_eq!(seen, [2, 4]);
        if !follow {
            assert!(next(&mut answers).await.is_none());
        }
    }

    // What lies between others can be asked for, and there is nothing.
    let pods = |pod: &str| vec![pod.to_owned()];
    let other =
        FlowFilter { source_pod: pods("bank/a"), destination_pod: pods("bank/b"), ..FlowFilter::default() };
    let request = GetFlowsRequest { whitelist: vec![other], ..GetFlowsRequest::default() };
    let mut answers = fixture.ask_within(&["shop"], request).await.unwrap();
    assert!(next(&mut answers).await.is_none());
}
