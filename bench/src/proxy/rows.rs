//! What is required of Weft, row by row, and whether a run shows it.

use std::collections::BTreeMap;

use super::{
    load::{Load, Sample},
    subject::{Room, Subject},
};

/// What one round measured.
pub(crate) type Round = BTreeMap<Subject, BTreeMap<Load, Sample>>;

/// What of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Metric {
    /// Requests or connections per second, or Gbit/s.
    Rate,
    /// Processor seconds per request or connection.
    Cpu,
    /// Processor seconds per GB.
    CpuPerGb,
    /// Median latency.
    P50,
    /// 99th percentile.
    P99,
    /// Share of the requests that were answered, %.
    Answered,
    /// Resident memory after it, MiB.
    Rss,
    /// What a connection adds at each end, KiB.
    Held,
}

/// One figure of one subject.
pub(crate) type Point = (Subject, Load, Metric);

/// What is asked of a figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Bound {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

impl Bound {
    /// Whether a value meets it.
    pub(crate) fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "<= {limit}"),
            Self::AtLeast(limit) => write!(f, ">= {limit}"),
        }
    }
}

/// One figure with what it must reach and what it should.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// What it says.
    pub(crate) name: &'static str,
    /// Weft's.
    pub(crate) of: Point,
    /// The peer's, from the same round; the best of several. None for a figure that stands for itself.
    pub(crate) to: Vec<Point>,
    /// What it must reach.
    pub(crate) required: Bound,
    /// What it should reach.
    pub(crate) aim: Option<Bound>,
}

/// The table.
pub(crate) fn all() -> Vec<Row> {
    use Bound::{AtLeast, AtMost};
    use Load::{
        Bulk1, Bulk8, Connect, H1, H2, Held64, Held1024, Held8000, Idle, Lookup, Mixed, NearBulk,
        NearConnect, NearH1, NearRate, Rate, Stalled16, Stalled200, Start, Tunnel,
    };
    use Metric::{Answered, Cpu, CpuPerGb, Held, P50, P99, Rss};
    use Subject::{Direct, HaproxyL7, Splice, Weft, WeftL7};
    let both = |subject: fn(Room) -> Subject, load, metric| {
        vec![(subject(Room::Node), load, metric), (subject(Room::Pod), load, metric)]
    };
    let hbone = |load, metric| both(Subject::EnvoyHbone, load, metric);
    let l4 = |load, metric| both(Subject::EnvoyL4, load, metric);
    let l7 = |load, metric| both(Subject::EnvoyL7, load, metric);
    let row = |name, of: Point, to: Vec<Point>, required, aim| Row { name, of, to, required, aim: Some(aim) };
    let rate = Metric::Rate;
    vec![
        row(
            "L4 mTLS, HTTP/1.1, 64 connections: CPU per request to envoy-hbone's",
            (Weft, H1, Cpu),
            hbone(H1, Cpu),
            AtMost(0.85),
            AtMost(0.65),
        ),
        row(
            "the same: requests/s to direct",
            (Weft, H1, rate),
            vec![(Direct, H1, rate)],
            AtLeast(0.42),
            AtLeast(0.55),
        ),
        row(
            "L4 mTLS, HTTP/2 8 x 32: CPU per request to envoy-hbone's",
            (Weft, H2, Cpu),
            hbone(H2, Cpu),
            AtMost(1.15),
            AtMost(0.9),
        ),
        row(
            "p50 at 1,000/s, 16 connections: to envoy-hbone's",
            (Weft, Rate, P50),
            hbone(Rate, P50),
            AtMost(0.9),
            AtMost(0.7),
        ),
        row(
            "p50 at 1,000/s beside a 500 Mbit/s stream: to envoy-hbone's",
            (Weft, Mixed, P50),
            hbone(Mixed, P50),
            AtMost(0.7),
            AtMost(0.55),
        ),
        row(
            "bulk, 1 stream: to direct",
            (Weft, Bulk1, rate),
            vec![(Direct, Bulk1, rate)],
            AtLeast(0.36),
            AtLeast(0.48),
        ),
        row(
            "bulk, 1 stream: CPU s/GB to envoy-l4's",
            (Weft, Bulk1, CpuPerGb),
            l4(Bulk1, CpuPerGb),
            AtMost(0.75),
            AtMost(0.55),
        ),
        row(
            "bulk, 8 streams: to direct",
            (Weft, Bulk8, rate),
            vec![(Direct, Bulk8, rate)],
            AtLeast(0.36),
            AtLeast(0.5),
        ),
        row(
            "bulk, 8 streams: CPU s/GB to envoy-l4's",
            (Weft, Bulk8, CpuPerGb),
            l4(Bulk8, CpuPerGb),
            AtMost(0.7),
            AtMost(0.48),
        ),
        row(
            "same node, no crypto, bulk: rate to plain splice's",
            (Weft, NearBulk, rate),
            vec![(Splice, Bulk1, rate)],
            AtLeast(1.0),
            AtLeast(1.2),
        ),
        row(
            "same node, no crypto, bulk: CPU s/GB to plain splice's",
            (Weft, NearBulk, CpuPerGb),
            vec![(Splice, Bulk1, CpuPerGb)],
            AtMost(1.0),
            AtMost(0.7),
        ),
        row(
            "new application connection on a warm tunnel: CPU to envoy-hbone's",
            (Weft, Connect, Cpu),
            hbone(Connect, Cpu),
            AtMost(0.6),
            AtMost(0.4),
        ),
        row(
            "new tunnel with full mTLS: CPU to envoy-l4's",
            (Weft, Tunnel, Cpu),
            l4(Tunnel, Cpu),
            AtMost(0.75),
            AtMost(0.55),
        ),
        row(
            "HTTP/1.1 with L7 policy and routing: CPU per request to envoy-l7's",
            (WeftL7, H1, Cpu),
            l7(H1, Cpu),
            AtMost(0.35),
            AtMost(0.25),
        ),
        row(
            "the same: to haproxy-l7's",
            (WeftL7, H1, Cpu),
            vec![(HaproxyL7, H1, Cpu)],
            AtMost(1.2),
            AtMost(0.9),
        ),
        row(
            "HTTP/2 (8 x 32) with L7 policy and routing: CPU per request to envoy-l7's",
            (WeftL7, H2, Cpu),
            l7(H2, Cpu),
            AtMost(0.4),
            AtMost(0.4),
        ),
        Row {
            name: "answered beside 16 stalled readers, %",
            of: (Weft, Stalled16, Answered),
            to: Vec::new(),
            required: AtLeast(100.0),
            aim: None,
        },
        Row {
            name: "answered beside 200 stalled readers, %",
            of: (Weft, Stalled200, Answered),
            to: Vec::new(),
            required: AtLeast(100.0),
            aim: None,
        },
        row(
            "p99 beside 16 stalled readers: to none stalled",
            (Weft, Stalled16, P99),
            vec![(Weft, Rate, P99)],
            AtMost(3.0),
            AtMost(1.5),
        ),
        row(
            "p99 beside 200 stalled readers: to none stalled",
            (Weft, Stalled200, P99),
            vec![(Weft, Rate, P99)],
            AtMost(3.0),
            AtMost(1.5),
        ),
        row(
            "RSS of both whole agents, 100 Pods enrolled, MiB",
            (Weft, Start, Rss),
            Vec::new(),
            AtMost(48.0),
            AtMost(36.0),
        ),
        row(
            "RSS beside 200 stalled readers, MiB",
            (Weft, Stalled200, Rss),
            Vec::new(),
            AtMost(160.0),
            AtMost(100.0),
        ),
        row(
            "RSS per idle connection and proxy, KiB",
            (Weft, Idle, Held),
            Vec::new(),
            AtMost(4.9),
            AtMost(2.0),
        ),
        row(
            "kernel-only path to direct: HTTP/1.1 requests/s",
            (Weft, NearH1, rate),
            vec![(Direct, NearH1, rate)],
            AtLeast(0.95),
            AtLeast(0.98),
        ),
        row(
            "kernel-only path to direct: p50 at 1,000/s",
            (Weft, NearRate, P50),
            vec![(Direct, NearRate, P50)],
            AtMost(1.05),
            AtMost(1.02),
        ),
        row(
            "kernel-only path to direct: bulk",
            (Weft, NearBulk, rate),
            vec![(Direct, NearBulk, rate)],
            AtLeast(0.95),
            AtLeast(0.98),
        ),
        row(
            "kernel-only path to direct: new connections/s",
            (Weft, NearConnect, rate),
            vec![(Direct, NearConnect, rate)],
            AtLeast(0.95),
            AtLeast(0.98),
        ),
        row(
            "kernel judgement of a packet, 100k rows, hot: µs",
            (Weft, Lookup, P50),
            Vec::new(),
            AtMost(0.18),
            AtMost(0.1),
        ),
        row("the same, cold: µs", (Weft, Lookup, P99), Vec::new(), AtMost(0.8), AtMost(0.5)),
        row(
            "64 -> 1,024 connections: CPU per request grows",
            (Weft, Held1024, Cpu),
            vec![(Weft, Held64, Cpu)],
            AtMost(1.3),
            AtMost(1.15),
        ),
        row(
            "64 -> 8,000 connections: CPU per request grows",
            (Weft, Held8000, Cpu),
            vec![(Weft, Held64, Cpu)],
            AtMost(1.3),
            AtMost(1.15),
        ),
    ]
}

/// A figure of a round; `None` where it was not measured.
pub(crate) fn take(round: &Round, (subject, load, metric): Point) -> Option<f64> {
    let sample = round.get(&subject)?.get(&load)?;
    let per = |value: f64| (sample.n > 0.0).then(|| value / sample.n);
    match metric {
        Metric::Rate => Some(sample.per_s),
        Metric::Cpu => per(sample.cpu_s),
        Metric::CpuPerGb => per(sample.cpu_s * 1e9),
        Metric::P50 => Some(sample.p50_us),
        Metric::P99 => Some(sample.p99_us),
        Metric::Answered => Some(100.0 * sample.n / (sample.n + sample.errors).max(1.0)),
        Metric::Rss => Some(sample.rss_mib),
        Metric::Held => per((sample.rss_mib - sample.rss_before_mib) * 1024.0 / 2.0),
    }
}

impl Row {
    /// Its value in each round in which everything that it needs was measured.
    pub(crate) fn values(&self, rounds: &[Round]) -> Vec<f64> {
        rounds.iter().filter_map(|round| self.value(round)).collect()
    }

    fn value(&self, round: &Round) -> Option<f64> {
        let own = take(round, self.of)?;
        if self.to.is_empty() {
            return Some(own);
        }
        // The peer's better figure counts: its cheaper place, or its faster.
        let peers = self.to.iter().filter_map(|point| take(round, *point)).filter(|value| *value > 0.0);
        let best = match self.required {
            Bound::AtMost(_) => peers.reduce(f64::min),
            Bound::AtLeast(_) => peers.reduce(f64::max),
        }?;
        Some(own / best)
    }
}

/// The middle of some values, and the spread: their least and their greatest.
pub(crate) fn median(values: &[f64]) -> Option<(f64, f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (first, last) = (*sorted.first()?, *sorted.last()?);
    let half = sorted.len() / 2;
    let middle =
        if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) };
    Some((middle, first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(weft: f64, node: f64, pod: f64) -> Round {
        let sample =
            |cpu_s| BTreeMap::from([(Load::H1, Sample { n: 1.0, cpu_s, per_s: 1.0, ..Sample::default() })]);
        BTreeMap::from([
            (Subject::Weft, sample(weft)),
            (Subject::EnvoyHbone(Room::Node), sample(node)),
            (Subject::EnvoyHbone(Room::Pod), sample(pod)),
        ])
    }

    #[test]
    fn the_peers_cheaper_place_counts_in_each_round() {
        let row = all().remove(0);
        assert_eq!(row.values(&[round(1.0, 2.0, 4.0), round(1.0, 4.0, 1.0)]), [0.5, 1.0]);
        assert!(row.values(&[Round::new()]).is_empty());
    }

    #[test]
    fn the_middle_of_an_even_number_is_between() {
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some((2.5, 1.0, 4.0)));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn bounds_include_their_edge() {
        assert!(Bound::AtMost(1.0).met(1.0) && !Bound::AtMost(1.0).met(1.01));
        assert!(Bound::AtLeast(1.0).met(1.0) && !Bound::AtLeast(1.0).met(0.99));
    }
}
