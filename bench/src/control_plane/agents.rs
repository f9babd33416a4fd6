//! Simulated agents: real connections with real tokens and the streams that an agent holds, and nothing behind them. They
//! acknowledge what they are sent at once.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status,
    client::Grpc,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use tonic_prost::ProstCodec;
use weft_core::{Resource, policy::PortRef};
use weft_proto::{
    control::{
        self as wire, Ack, Hello, SubscribeRequest, TrustRequest, Version, identity_client::IdentityClient,
        subscribe_request::Message,
    },
    weft_relay::{self as relay, Answer, relay_client::RelayClient},
};
use weft_runtime::{Backoff, Tasks};

/// The name in the operator's certificate.
const SERVER_NAME: &str = "weft-operator";
const MAX_MESSAGE: usize = 256 << 20;
/// The name of policies whose port tells which change this is.
pub(crate) const MARKED: &str = "r0";

/// An operator's answer without the resources, which would only be thrown away.
#[derive(Clone, PartialEq, prost::Message)]
struct Head {
    #[prost(message, optional, tag = "1")]
    version: Option<Version>,
    #[prost(bool, tag = "2")]
    full: bool,
}

/// What one agent confirmed.
#[derive(Debug, Clone, Default)]
struct Confirmed {
    version: Version,
    /// Since [`Fleet::arm`], oldest first.
    history: Vec<(u64, Instant)>,
    /// When it held everything for the first time since it connected last.
    synced: Option<Instant>,
}

/// What is known of all agents.
#[derive(Debug, Default)]
struct Ledger {
    agents: Vec<Confirmed>,
    messages: u64,
    fulls: u64,
    /// Ports of the marked policy, each with the version that brought it.
    marks: Vec<(u16, Version)>,
    /// One full state, in bytes.
    full: usize,
    /// All that it was sent, in bytes.
    bytes: usize,
    problem: Option<String>,
}

/// How the agents reach the operator.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    /// `https://...`
    pub(crate) uri: String,
    /// The roots, PEM.
    pub(crate) bundle: String,
}

/// All agents.
#[derive(Debug, Clone)]
pub(crate) struct Fleet {
    ledger: Arc<Mutex<Ledger>>,
    tasks: Tasks,
}

impl Fleet {
    /// Starts one agent for each token; each reconnects as the real one does.
    pub(crate) fn start(way: &Way, tokens: &[String]) -> Result<Self> {
        let ledger = Ledger { agents: vec![Confirmed::default(); tokens.len()], ..Ledger::default() };
        let fleet = Self { ledger: Arc::new(Mutex::new(ledger)), tasks: Tasks::new() };
        for (number, token) in tokens.iter().enumerate() {
            let agent = Agent {
                number,
                channel: channel(way, number)?,
                token: format!("Bearer {token}").parse().context("a token of the API server")?,
                ledger: Arc::clone(&fleet.ledger),
            };
            fleet.tasks.spawn("agent", agent.clone().run());
            fleet.tasks.spawn("trust", agent.clone().trust());
            fleet.tasks.spawn("relay", agent.relay());
        }
        Ok(fleet)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.ledger.lock().agents.len()
    }

    /// Messages and full states that came so far.
    pub(crate) fn received(&self) -> (u64, u64) {
        let ledger = self.ledger.lock();
        (ledger.messages, ledger.fulls)
    }

    /// What one agent was sent so far, in KiB.
    pub(crate) fn kib(&self) -> f64 {
        self.ledger.lock().bytes as f64 / 1024.0
    }

    /// One agent's full state as it travels, in MiB.
    pub(crate) fn full_mib(&self) -> f64 {
        self.ledger.lock().full as f64 / f64::from(1 << 20)
    }

    /// Forgets the history.
    pub(crate) fn arm(&self) {
        let mut ledger = self.ledger.lock();
        ledger.marks.clear();
        ledger.agents.iter_mut().for_each(|a| a.history.clear());
    }

    /// Waits until every agent has held everything since `since`; when the last one did.
    pub(crate) async fn synced(&self, since: Instant, limit: Duration) -> Result<Instant> {
        let end = Instant::now() + limit;
        loop {
            let (missing, last, problem) = {
                let ledger = self.ledger.lock();
                let done = || ledger.agents.iter().filter_map(|a| a.synced.filter(|s| *s >= since));
                (ledger.agents.len() - done().count(), done().max(), ledger.problem.clone())
            };
            match last {
                Some(last) if missing == 0 => return Ok(last),
                _ if Instant::now() > end => {
                    bail!(
                        "{missing} agents have not everything after {limit:?}; the last problem: {problem:?}"
                    )
                }
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Waits until every agent has confirmed the change that set this port; for each, when.
    pub(crate) async fn confirmed(&self, port: u16, limit: Duration) -> Result<Vec<Instant>> {
        let end = Instant::now() + limit;
        loop {
            {
                let ledger = self.ledger.lock();
                let mark = ledger.marks.iter().find(|(p, _)| *p == port).map(|(_, version)| *version);
                if let Some(mark) = mark {
                    let when =
                        |a: &Confirmed| a.history.iter().find(|(s, _)| *s >= mark.sequence).map(|(_, t)| *t);
                    let done: Vec<Instant> = ledger.agents.iter().filter_map(when).collect();
                    if done.len() == ledger.agents.len() {
                        return Ok(done);
                    }
                }
                if Instant::now() > end {
                    bail!(
                        "not every agent confirmed a change after {limit:?}; it was seen: {}",
                        mark.is_some()
                    );
                }
            }
            sleep(Duration::from_millis(2)).await;
        }
    }
}

/// As an agent's, but from an address of its own: the operator limits what one address can hold open.
fn channel(way: &Way, number: usize) -> Result<Channel> {
    let part = |n: usize| u8::try_from(n).unwrap_or(u8::MAX);
    let own = Ipv4Addr::new(127, 1, part(number / 200), part(number % 200 + 1));
    let tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&way.bundle)).domain_name(SERVER_NAME);
    let endpoint = Endpoint::from_shared(way.uri.clone())?
        .tls_config(tls)?
        .local_address(Some(IpAddr::V4(own)))
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true);
    Ok(endpoint.connect_lazy())
}

#[derive(Clone)]
struct Agent {
    number: usize,
    channel: Channel,
    token: MetadataValue<Ascii>,
    ledger: Arc<Mutex<Ledger>>,
}

impl Agent {
    async fn run(self) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            if let Err(status) = self.follow(&mut backoff).await {
                self.ledger.lock().problem = Some(format!("{:?}: {}", status.code(), status.message()));
            }
            sleep(backoff.next()).await;
        }
    }

    fn request<T>(&self, body: T) -> Request<T> {
        let mut request = Request::new(body);
        request.metadata_mut().insert("authorization", self.token.clone());
        request
    }

    fn held(&self) -> Version {
        self.ledger.lock().agents.get(self.number).map(|a| a.version).unwrap_or_default()
    }

    async fn follow(&self, backoff: &mut Backoff) -> Result<(), Status> {
        let (out, requests) = mpsc::channel(16);
        let send = async |message| {
            let request = SubscribeRequest { message: Some(message) };
            out.send(request).await.map_err(|_| Status::unavailable("the stream ended"))
        };
        send(Message::Hello(Hello { version: Some(self.held()), agent_version: "bench".into() })).await?;
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
        let path = http::uri::PathAndQuery::from_static("/weft.control.v1.Control/Subscribe");
        let request = self.request(ReceiverStream::new(requests));
        // One agent reads what it is sent, so that a change is known by what it says.
        if self.number == 0 {
            let codec = ProstCodec::<SubscribeRequest, wire::SubscribeResponse>::default();
            let mut answers = grpc.streaming(request, path, codec).await?.into_inner();
            backoff.reset();
            while let Some(answer) = answers.message().await? {
                self.ledger.lock().bytes += answer.encoded_len();
                if answer.full {
                    self.ledger.lock().full = answer.encoded_len();
                } else {
                    self.read(&answer);
                }
                self.confirm(answer.version.unwrap_or_default(), answer.full);
                send(Message::Ack(Ack { version: answer.version, rejected: Vec::new() })).await?;
            }
        } else {
            let codec = ProstCodec::<SubscribeRequest, Head>::default();
            let mut answers = grpc.streaming(request, path, codec).await?.into_inner();
            backoff.reset();
            while let Some(answer) = answers.message().await? {
                self.confirm(answer.version.unwrap_or_default(), answer.full);
                send(Message::Ack(Ack { version: answer.version, rejected: Vec::new() })).await?;
            }
        }
        Err(Status::unavailable("the operator ended the stream"))
    }

    fn read(&self, answer: &wire::SubscribeResponse) {
        for resource in &answer.upserted {
            let Ok(Resource::Policy(policy)) = serde_json::from_slice(&resource.json) else { continue };
            let mut ports = policy.rules.iter().flat_map(|rule| &rule.ports);
            if *policy.name.name == *MARKED
                && let Some(PortRef::Number(port)) = ports.next()
            {
                self.ledger.lock().marks.push((*port, answer.version.unwrap_or_default()));
            }
        }
    }

    /// Notes what is about to be acknowledged.
    fn confirm(&self, version: Version, full: bool) {
        let now = Instant::now();
        let mut ledger = self.ledger.lock();
        ledger.messages += 1;
        ledger.fulls += u64::from(full);
        if let Some(agent) = ledger.agents.get_mut(self.number) {
            if full || agent.version.epoch != version.epoch {
                agent.synced = Some(now);
            }
            agent.version = version;
            agent.history.push((version.sequence, now));
        }
    }

    /// The stream by which an agent follows the roots.
    async fn trust(self) {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
        loop {
            let mut client = IdentityClient::new(self.channel.clone());
            if let Ok(answers) = client.trust(self.request(TrustRequest {})).await {
                backoff.reset();
                let mut answers = answers.into_inner();
                while let Ok(Some(_)) = answers.message().await {}
            }
            sleep(backoff.next()).await;
        }
    }

    /// The stream over which people's questions would come.
    async fn relay(self) {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
        loop {
            let (out, requests) = mpsc::channel(1);
            let hello = relay::Hello { agent_version: "bench".into() };
            let hello = Answer { id: 0, answer: Some(relay::answer::Answer::Hello(hello)) };
            // There is room for one.
            let _ = out.send(hello).await;
            let mut client = RelayClient::new(self.channel.clone());
            if let Ok(questions) = client.serve(self.request(ReceiverStream::new(requests))).await {
                backoff.reset();
                let mut questions = questions.into_inner();
                while let Ok(Some(_)) = questions.message().await {}
            }
            sleep(backoff.next()).await;
        }
    }
}
