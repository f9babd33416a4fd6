use clap::Parser as _;

use super::*;
use crate::{
    args::{Cli, Command},
    format::tests::message,
};

fn args(line: &str) -> ObserveArgs {
    let words = ["weft", "observe"].into_iter().chain(line.split_whitespace());
    match Cli::try_parse_from(words).unwrap().command {
        Command::Observe(args) => *args,
        other => panic!("{other:?}"),
    }
}

fn of(line: &str) -> GetFlowsRequest {
    request(&args(line), SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)).unwrap()
}

#[test]
fn how_many() {
    assert_eq!(of("").number, 20);
    assert_eq!(of("--last 5").number, 5);
    assert_eq!(of("--since 5m").number, 0);
    assert_eq!(of("-f").number, 0);
    let request = of("-f --last 3");
    assert_eq!((request.number, request.follow), (3, true));
    assert_eq!(of("--since 100s").since.unwrap().seconds, 999_900);
}

#[test]
fn filters() {
    assert!(of("").whitelist.is_empty());
    let both = of("-n shop --verdict denied --port 80 --http-status 5+").whitelist;
    assert_eq!(both.len(), 2);
    assert_eq!(both[0].source_pod, ["shop/"]);
    assert_eq!(both[1].destination_pod, ["shop/"]);
    for f in &both {
        assert_eq!(f.verdict, [i32::from(flow::Verdict::Dropped)]);
        assert_eq!(
            (f.destination_port.as_slice(), f.http_status_code.as_slice()),
            (&["80".to_owned()][..], &["5+".to_owned()][..])
        );
    }
    let one = of("-n shop --from-pod client --to-pod other/web").whitelist;
    assert_eq!(one.len(), 1);
    assert_eq!(
        (one[0].source_pod.as_slice(), one[0].destination_pod.as_slice()),
        (&["shop/client".to_owned()][..], &["other/web".to_owned()][..])
    );
    assert_eq!(of("--pod shop/web").whitelist.len(), 2);
    assert_eq!(of("--reporter source").whitelist[0].traffic_direction, [2]);
    assert!(Cli::try_parse_from(["weft", "observe", "--pod", "a", "--from-pod", "b"]).is_err());
    assert!(request(&args("--since never"), SystemTime::now()).is_err());
    assert!(Cli::try_parse_from(["weft", "observe", "--last", "0"]).is_err());
}

#[test]
fn an_empty_answer_says_what_may_help() {
    assert!(nothing(&args("")).contains("--follow"));
    for narrowed in ["--since 5m", "-n shop", "--verdict denied"] {
        assert!(nothing(&args(narrowed)).contains("fewer filters"), "{narrowed}");
    }
}

fn printer(output: FlowOutput) -> Printer {
    Printer { output, colour: false, header: false, widths: Vec::new() }
}

fn flow_item() -> Item {
    Item::Flow(Box::new(View::of(&message())))
}

#[test]
fn a_table_has_one_header() {
    let mut p = printer(FlowOutput::Table);
    let first = p.lines(&flow_item());
    assert_eq!(first.len(), 2);
    assert!(first[0].starts_with("TIME          SOURCE"), "{}", first[0]);
    assert_eq!(p.lines(&flow_item()).len(), 1);
    let column = first[0].find("VERDICT").unwrap();
    assert_eq!(first[1].find("DENIED"), Some(column));
}

#[test]
fn losses_are_said_aloud() {
    let lost = GetFlowsResponse {
        node_name: "node-a".into(),
        time: None,
        response_types: Some(ResponseTypes::LostEvents(flow::LostEvent {
            source: flow::LostEventSource::HubbleRingBuffer.into(),
            num_events_lost: 7,
            cpu: None,
        })),
    };
    let note = item(lost).unwrap();
    assert!(reported(&note, Some(ReporterArg::Source)));
    let text = "7 flows lost on node-a: they were overwritten before they could be shown";
    assert_eq!(printer(FlowOutput::Compact).lines(&note), [format!("-- {text}")]);
    assert_eq!(printer(FlowOutput::Json).lines(&note), [format!("{{\"note\":\"{text}\"}}")]);
}

#[test]
fn reporters_are_told_apart() {
    assert!(reported(&flow_item(), Some(ReporterArg::Destination)));
    assert!(!reported(&flow_item(), Some(ReporterArg::Source)));
}

#[test]
fn a_bad_expression_is_told_on_one_line() {
    let drawn = "bad flow filter: \"(\" is no regular expression: regex parse error:\n    (\n    ^\nerror: unclosed group";
    assert_eq!(brief(drawn), "bad flow filter: \"(\" is no regular expression: unclosed group");
    assert_eq!(brief("first cannot be used with follow"), "first cannot be used with follow");
}
