//! The tables, the results as JSON, and a picture.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{
    load::Load,
    rows::{self, Metric, Round, Row},
    subject::Subject,
};

/// What stands above the tables.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// When it ran (UTC).
    pub(crate) date: String,
    /// Kernel, processor, cores.
    pub(crate) machine: String,
    /// Seconds per load.
    pub(crate) seconds: u32,
}

/// A row's verdict: `PASS`, `SHORT`, or why there is none.
fn verdict(row: &Row, rounds: &[Round]) -> (String, bool) {
    match rows::median(&row.values(rounds)) {
        None => ("SHORT (not measured)".into(), false),
        Some((value, _, _)) if row.required.met(value) => ("PASS".into(), true),
        Some(_) => ("SHORT".into(), false),
    }
}

/// The rows that are required, with what was measured, as Markdown; and how many of them are short.
pub(crate) fn verdicts(rows: &[Row], rounds: &[Round]) -> (String, usize) {
    let mut text = "| row | measured (spread) | required | aim | |\n|---|---:|---:|---:|---|\n".to_owned();
    let mut short = 0;
    for row in rows {
        let (verdict, pass) = verdict(row, rounds);
        short += usize::from(!pass);
        let measured = rows::median(&row.values(rounds)).map_or("-".into(), |(m, least, most)| {
            format!("{} ({} - {})", plain(m), plain(least), plain(most))
        });
        let aim = row.aim.map_or("-".into(), |aim| aim.to_string());
        let _ =
            writeln!(text, "| {} | {measured} | {} | {aim} | VERDICT: {verdict} |", row.name, row.required);
    }
    (text, short)
}

/// Lines of the table of all subjects: what, of which load, in which unit, and its factor.
const LINES: [(&str, Load, Metric, f64); 25] = [
    ("HTTP/1.1 requests/s, 64 connections", Load::H1, Metric::Rate, 1.0),
    ("- CPU µs/request", Load::H1, Metric::Cpu, 1e6),
    ("HTTP/2 requests/s, 8 x 32", Load::H2, Metric::Rate, 1.0),
    ("- CPU µs/request", Load::H2, Metric::Cpu, 1e6),
    ("p50 µs at 1,000/s, 16 connections", Load::Rate, Metric::P50, 1.0),
    ("p99 µs", Load::Rate, Metric::P99, 1.0),
    ("- CPU µs/request", Load::Rate, Metric::Cpu, 1e6),
    ("p50 µs beside a 500 Mbit/s stream", Load::Mixed, Metric::P50, 1.0),
    ("Gbit/s, 1 stream", Load::Bulk1, Metric::Rate, 1.0),
    ("- CPU s/GB", Load::Bulk1, Metric::CpuPerGb, 1.0),
    ("Gbit/s, 8 streams", Load::Bulk8, Metric::Rate, 1.0),
    ("- CPU s/GB", Load::Bulk8, Metric::CpuPerGb, 1.0),
    ("new connections/s, 8 at once", Load::Connect, Metric::Rate, 1.0),
    ("- CPU µs/connection", Load::Connect, Metric::Cpu, 1e6),
    ("CPU µs/new tunnel", Load::Tunnel, Metric::Cpu, 1e6),
    ("CPU µs/request of 64 connections", Load::Held64, Metric::Cpu, 1e6),
    ("- of 1,024", Load::Held1024, Metric::Cpu, 1e6),
    ("- of 8,000", Load::Held8000, Metric::Cpu, 1e6),
    ("same node: HTTP/1.1 requests/s", Load::NearH1, Metric::Rate, 1.0),
    ("same node: Gbit/s, 1 stream", Load::NearBulk, Metric::Rate, 1.0),
    ("answered beside 16 stalled readers, %", Load::Stalled16, Metric::Answered, 1.0),
    ("answered beside 200 stalled readers, %", Load::Stalled200, Metric::Answered, 1.0),
    ("RSS MiB of both after a first connection", Load::Start, Metric::Rss, 1.0),
    ("RSS MiB with 1,000 idle connections", Load::Idle, Metric::Rss, 1.0),
    ("KiB per idle connection and proxy", Load::Idle, Metric::Held, 1.0),
];

/// Medians of every subject, with the ratio to direct where it was measured, as Markdown.
pub(crate) fn table(subjects: &[Subject], rounds: &[Round]) -> String {
    let names: Vec<&str> = subjects.iter().map(|subject| subject.name()).collect();
    let mut text = format!("| | {} |\n|---|{}\n", names.join(" | "), "---:|".repeat(names.len()));
    for (name, load, metric, factor) in LINES {
        let _ = write!(text, "| {name} |");
        for subject in subjects {
            let values: Vec<f64> =
                rounds.iter().filter_map(|round| rows::take(round, (*subject, load, metric))).collect();
            let direct: Vec<f64> = rounds
                .iter()
                .filter_map(|round| {
                    let own = rows::take(round, (*subject, load, metric))?;
                    Some(own / rows::take(round, (Subject::Direct, load, metric)).filter(|v| *v > 0.0)?)
                })
                .collect();
            let compared = metric == Metric::Rate && *subject != Subject::Direct;
            match rows::median(&values) {
                None => text += " - |",
                Some((0.0, _, _)) => text += " - |",
                Some((value, _, _)) => {
                    let ratio = rows::median(&direct).filter(|_| compared);
                    let ratio = ratio.map(|(r, _, _)| format!(" ({r:.2}x)")).unwrap_or_default();
                    let _ = write!(text, " {}{ratio} |", plain(value * factor));
                }
            }
        }
        text.push('\n');
    }
    text
}

/// Share of the machine that something else used while it was measured: what spoils a rate.
pub(crate) fn others(rounds: &[Round]) -> f64 {
    let shares: Vec<f64> =
        rounds.iter().flat_map(|r| r.values()).flat_map(|l| l.values()).map(|s| s.others).collect();
    rows::median(&shares).map_or(0.0, |(m, _, _)| m)
}

/// Everything as JSON.
pub(crate) fn json(machine: &Machine, rows: &[Row], rounds: &[Round]) -> Value {
    let named: Vec<Value> = rounds
        .iter()
        .map(|round| {
            let subjects = round.iter().map(|(subject, loads)| {
                let loads = loads.iter().map(|(load, sample)| (format!("{load:?}"), json!(sample)));
                (subject.name().to_owned(), Value::Object(loads.collect()))
            });
            Value::Object(subjects.collect())
        })
        .collect();
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({"row": row.name, "values": row.values(rounds), "required": row.required.to_string(),
                   "aim": row.aim.map(|aim| aim.to_string()), "verdict": verdict(row, rounds).0})
        })
        .collect();
    json!({"date": machine.date, "machine": machine.machine, "seconds": machine.seconds, "rows": rows, "rounds": named})
}

/// Processor time per HTTP/1.1 request and per GB, as bars.
pub(crate) fn picture(subjects: &[Subject], rounds: &[Round]) -> String {
    let panels = [
        ("CPU µs per HTTP/1.1 request, both proxies", Load::H1, Metric::Cpu, 1e6),
        ("CPU s per GB, one stream", Load::Bulk1, Metric::CpuPerGb, 1.0),
        ("p50 µs at 1,000 requests/s", Load::Rate, Metric::P50, 1.0),
    ];
    let mut body = String::new();
    let mut y = 20.0;
    for (title, load, metric, factor) in panels {
        let bars: Vec<(&str, f64, bool)> = subjects
            .iter()
            .filter_map(|subject| {
                let values: Vec<f64> =
                    rounds.iter().filter_map(|round| rows::take(round, (*subject, load, metric))).collect();
                let (value, _, _) = rows::median(&values)?;
                (value > 0.0).then_some((subject.name(), value * factor, subject.is_weft()))
            })
            .collect();
        let most = bars.iter().map(|(_, value, _)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(body, "<text x='10' y='{y}' font-weight='bold'>{title}</text>");
        y += 10.0;
        for (name, value, weft) in bars {
            let width = 420.0 * value / most;
            let fill = if weft { "#0b7285" } else { "#adb5bd" };
            let _ = writeln!(
                body,
                "<text x='130' y='{}' text-anchor='end'>{name}</text><rect x='140' y='{y}' width='{width:.1}' height='14' \
                 fill='{fill}'/><text x='{:.1}' y='{}'>{}</text>",
                y + 11.0,
                146.0 + width,
                y + 11.0,
                plain(value)
            );
            y += 19.0;
        }
        y += 22.0;
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='640' height='{y}' font-family='sans-serif' font-size='11'>\n\
         <rect width='100%' height='100%' fill='white'/>\n{body}</svg>\n"
    )
}

/// Three digits that count.
fn plain(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.01 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.5}"),
    }
}
