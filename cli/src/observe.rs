//! `weft observe`.

use std::{
    io::Write as _,
    time::{Duration, Instant, SystemTime},
};

use tokio_stream::{StreamExt as _, StreamMap};
use tonic::Streaming;
use weft_proto::{
    flow::{self, FlowFilter},
    observer::{
        GetFlowsRequest, GetFlowsResponse, get_flows_response::ResponseTypes, observer_client::ObserverClient,
    },
    relay::NodeState,
};

use crate::{
    Failure, Outcome,
    args::{FlowOutput, ObserveArgs, ReporterArg, VerdictArg},
    connect::{self, Address},
    format::View,
    mesh::Mesh,
    text::{self, Colour, clean},
    when,
};

/// Flows shown where neither --last nor --since says how many.
const DEFAULT_LAST: u64 = 20;
/// How long a flow waits for earlier ones of other agents while following.
const REORDER: Duration = Duration::from_millis(300);
/// Most flows that wait so.
const MAX_WAITING: usize = 4096;

/// What arrived: a flow, or a word about flows that did not.
#[derive(Debug, Clone, PartialEq)]
enum Item {
    Flow(Box<View>),
    Note { at: SystemTime, text: String },
}

impl Item {
    fn at(&self) -> SystemTime {
        match self {
            Self::Flow(view) => view.at,
            Self::Note { at, .. } => *at,
        }
    }
}

/// Runs the command.
pub(crate) async fn run(args: &ObserveArgs) -> Result<Outcome, Failure> {
    let request = request(args, SystemTime::now())?;
    let mut streams = StreamMap::new();
    match connect::addresses(&args.server)? {
        Some(addresses) => {
            for address in &addresses {
                let stream = open(address, request.clone()).await?;
                streams.insert(place(address), stream);
            }
        }
        None => {
            let cluster = connect::cluster(&args.server).await?;
            let mesh = Mesh::open_for(&cluster, args.namespace.as_deref()).await?;
            for problem in &mesh.problems {
                eprintln!("weft: {}", clean(problem));
            }
            for replica in &mesh.replicas {
                let name = format!("the operator {}", replica.name);
                let stream = replica.flows(request.clone()).await.map_err(|e| refused(&name, &e))?;
                streams.insert(name, stream);
            }
        }
    }
    let mut printer =
        Printer { output: args.output, colour: text::colours(), header: false, widths: Vec::new() };
    let outcome = if args.follow {
        follow(streams, args, &mut printer).await
    } else {
        collect(streams, args, &request, &mut printer).await
    };
    match outcome {
        // Whoever read our output has seen enough.
        Err(Stop::Closed) => Ok(Outcome::Fine),
        Err(Stop::Failed(failure)) => Err(failure),
        Ok(()) => Ok(Outcome::Fine),
    }
}

enum Stop {
    Closed,
    Failed(Failure),
}

fn place(address: &Address) -> String {
    format!("the agent at {address}")
}

async fn open(address: &Address, request: GetFlowsRequest) -> Result<Streaming<GetFlowsResponse>, Failure> {
    let mut client = ObserverClient::new(connect::channel(address).await?);
    let answer = client.get_flows(request).await.map_err(|e| refused(&place(address), &e))?;
    Ok(answer.into_inner())
}

/// What is said where there is nothing to show.
fn nothing(args: &ObserveArgs) -> &'static str {
    let narrowed = !whitelist(args).is_empty() || args.since.is_some() || args.until.is_some();
    if narrowed {
        "no flow matches; agents keep only the newest ones, and a wider --since or fewer filters may show some"
    } else {
        "no flows yet; use --follow to wait for them"
    }
}

fn refused(server: &str, e: &tonic::Status) -> Failure {
    if e.code() == tonic::Code::InvalidArgument {
        Failure::Usage(brief(e.message()))
    } else {
        Failure::Unable(format!("{server} ended the answer: {} ({:?})", clean(e.message()), e.code()))
    }
}

/// An error on one line; of a regular expression's, which draws where it is wrong, the reason.
fn brief(message: &str) -> String {
    match message.split_once("regex parse error:") {
        Some((what, drawn)) => {
            let why = drawn.rsplit_once("error:").map_or(drawn, |(_, why)| why);
            format!("{}{}", clean(what), clean(why.trim()))
        }
        None => clean(message).into_owned(),
    }
}

async fn collect(
    mut streams: StreamMap<String, Streaming<GetFlowsResponse>>,
    args: &ObserveArgs,
    request: &GetFlowsRequest,
    printer: &mut Printer,
) -> Result<(), Stop> {
    let mut items = Vec::new();
    while let Some((server, answer)) = streams.next().await {
        let answer = answer.map_err(|e| Stop::Failed(refused(&server, &e)))?;
        items.extend(item(answer).filter(|i| reported(i, args.reporter)));
    }
    items.sort_by_key(Item::at);
    let skip = match usize::try_from(request.number) {
        Ok(number) if number > 0 => items.len().saturating_sub(number),
        _ => 0,
    };
    let items = items.split_off(skip);
    if items.is_empty() {
        // Not a flow, so not on stdout.
        eprintln!("weft: {}", nothing(args));
    }
    printer.measure(&items);
    for item in &items {
        printer.print(item).map_err(|_| Stop::Closed)?;
    }
    Ok(())
}

async fn follow(
    mut streams: StreamMap<String, Streaming<GetFlowsResponse>>,
    args: &ObserveArgs,
    printer: &mut Printer,
) -> Result<(), Stop> {
    let hold = if streams.len() > 1 { REORDER } else { Duration::ZERO };
    let mut waiting: Vec<(Instant, Item)> = Vec::new();
    loop {
        let due = waiting.first().map(|(at, _)| *at + hold);
        tokio::select! {
            next = streams.next() => match next {
                Some((server, Ok(answer))) => {
                    let _ = &server;
                    if let Some(item) = item(answer).filter(|i| reported(i, args.reporter)) {
                        waiting.push((Instant::now(), item));
                    }
                }
                Some((server, Err(e))) => {
                    eprintln!("weft: {}", refused(&server, &e));
                    streams.remove(&server);
                }
                None => {
                    release(&mut waiting, Instant::now() + hold, hold, printer)?;
                    return Err(Stop::Failed(Failure::Unable(
                        "every agent has ended its stream; run the command again once they are back".into(),
                    )));
                }
            },
            () = sleep_until(due) => {}
        }
        let now = Instant::now();
        let now = if waiting.len() > MAX_WAITING { now + hold } else { now };
        release(&mut waiting, now, hold, printer)?;
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Prints what has waited long enough, in the order of its time.
fn release(
    waiting: &mut Vec<(Instant, Item)>,
    now: Instant,
    hold: Duration,
    printer: &mut Printer,
) -> Result<(), Stop> {
    let ready = waiting.iter().take_while(|(came, _)| *came + hold <= now).count();
    let mut items: Vec<Item> = waiting.drain(..ready).map(|(_, item)| item).collect();
    items.sort_by_key(Item::at);
    for item in &items {
        printer.print(item).map_err(|_| Stop::Closed)?;
    }
    Ok(())
}

fn item(answer: GetFlowsResponse) -> Option<Item> {
    let at = answer.time.and_then(|t| SystemTime::try_from(t).ok()).unwrap_or_else(SystemTime::now);
    match answer.response_types? {
        ResponseTypes::Flow(flow) => Some(Item::Flow(Box::new(View::of(&flow)))),
        ResponseTypes::LostEvents(lost) => {
            let place = match lost.source() {
                flow::LostEventSource::PerfEventRingBuffer => "the kernel's ring was full",
                flow::LostEventSource::ObserverEventsQueue => "the agent did not keep up",
                flow::LostEventSource::HubbleRingBuffer => "they were overwritten before they could be shown",
                flow::LostEventSource::UnknownLostEventSource => "the agent does not say where",
            };
            let text = format!("{} flows lost on {}: {place}", lost.num_events_lost, answer.node_name);
            Some(Item::Note { at, text })
        }
        ResponseTypes::NodeStatus(status) if status.state_change() != NodeState::NodeConnected => {
            Some(Item::Note {
                at,
                text: format!("nodes {}: {}", status.node_names.join(", "), status.message),
            })
        }
        ResponseTypes::NodeStatus(_) => None,
    }
}

fn reported(item: &Item, wanted: Option<ReporterArg>) -> bool {
    let suffix = match wanted {
        None => return true,
        Some(ReporterArg::Source) => "-source",
        Some(ReporterArg::Destination) => "-destination",
    };
    match item {
        Item::Flow(view) => view.reporter.ends_with(suffix),
        Item::Note { .. } => true,
    }
}

struct Printer {
    output: FlowOutput,
    colour: bool,
    header: bool,
    widths: Vec<usize>,
}

impl Printer {
    /// Fits the table's columns to what will be printed.
    fn measure(&mut self, items: &[Item]) {
        let mut rows = vec![View::HEADER.map(String::from).to_vec()];
        rows.extend(items.iter().filter_map(|i| match i {
            Item::Flow(view) => Some(view.row()),
            Item::Note { .. } => None,
        }));
        self.widths = text::widths(&rows);
    }

    fn print(&mut self, item: &Item) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        for line in self.lines(item) {
            writeln!(out, "{line}")?;
        }
        out.flush()
    }

    fn lines(&mut self, item: &Item) -> Vec<String> {
        let view = match item {
            Item::Flow(view) => view,
            Item::Note { text, .. } if self.output == FlowOutput::Json => {
                return vec![serde_json::json!({ "note": text }).to_string()];
            }
            Item::Note { text, .. } => {
                return vec![text::paint(self.colour, Colour::Warn, &format!("-- {}", clean(text)))];
            }
        };
        match self.output {
            FlowOutput::Compact => vec![view.compact(self.colour)],
            FlowOutput::Json => vec![serde_json::to_string(view).unwrap_or_default()],
            FlowOutput::Table => {
                let mut rows = Vec::new();
                if !self.header {
                    self.header = true;
                    rows.push(View::HEADER.map(String::from).to_vec());
                }
                rows.push(view.row());
                for (width, new) in self.widths.iter_mut().zip(text::widths(&rows)) {
                    *width = (*width).max(new);
                }
                if self.widths.is_empty() {
                    self.widths = text::widths(&rows);
                }
                text::columns(&rows, &self.widths)
            }
        }
    }
}

/// The request that the arguments stand for.
fn request(args: &ObserveArgs, now: SystemTime) -> Result<GetFlowsRequest, Failure> {
    let time = |text: &Option<String>| {
        text.as_deref().map(|t| when::parse(t, now).map_err(Failure::Usage)).transpose()
    };
    let (since, until) = (time(&args.since)?, time(&args.until)?);
    let default = if since.is_some() || args.follow { 0 } else { DEFAULT_LAST };
    Ok(GetFlowsRequest {
        number: args.last.unwrap_or(default),
        follow: args.follow,
        whitelist: whitelist(args),
        blacklist: Vec::new(),
        since: since.map(Into::into),
        until: until.map(Into::into),
        first: false,
        field_mask: None,
    })
}

fn whitelist(args: &ObserveArgs) -> Vec<FlowFilter> {
    let qualify = |pods: &[String]| -> Vec<String> {
        let one = |p: &String| match &args.namespace {
            Some(namespace) if !p.contains('/') => format!("{namespace}/{p}"),
            _ => p.clone(),
        };
        pods.iter().map(one).collect()
    };
    let verdict = |v: &VerdictArg| match v {
        VerdictArg::Forwarded => flow::Verdict::Forwarded,
        VerdictArg::Denied => flow::Verdict::Dropped,
        VerdictArg::Error => flow::Verdict::Error,
        VerdictArg::Audited => flow::Verdict::Audit,
        VerdictArg::Redirected => flow::Verdict::Redirected,
    };
    let reporter = args.reporter.map(|r| match r {
        ReporterArg::Source => flow::TrafficDirection::Egress,
        ReporterArg::Destination => flow::TrafficDirection::Ingress,
    });
    let base = FlowFilter {
        source_pod: qualify(&args.from_pod),
        destination_pod: qualify(&args.to_pod),
        verdict: args.verdict.iter().map(|v| verdict(v).into()).collect(),
        protocol: args.protocol.clone(),
        destination_port: args.port.iter().map(ToString::to_string).collect(),
        http_status_code: args.http_status.clone(),
        http_method: args.http_method.clone(),
        http_path: args.http_path.clone(),
        traffic_direction: reporter.into_iter().map(Into::into).collect(),
        ..Default::default()
    };
    let either = if !args.pod.is_empty() {
        qualify(&args.pod)
    } else if args.from_pod.is_empty() && args.to_pod.is_empty() {
        args.namespace.iter().map(|n| format!("{n}/")).collect()
    } else {
        Vec::new()
    };
    if !either.is_empty() {
        return vec![
            FlowFilter { source_pod: either.clone(), ..base.clone() },
            FlowFilter { destination_pod: either, ..base },
        ];
    }
    if base == FlowFilter::default() { Vec::new() } else { vec![base] }
}

#[cfg(test)]
mod tests;
