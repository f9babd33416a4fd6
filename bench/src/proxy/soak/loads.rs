//! The loads, all at once.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum as _;

use super::{
    super::{beside::Beside, ground::Ground},
    place::targets,
    until,
};
use crate::{
    dice::Dice,
    load::soak::{Doomed, Steady, Tally},
};

/// Connections of which an agent keeps what kernel and proxy said (`agent/src/flow/enrich.rs`). Each is a flow at least.
const CONNECTIONS: f64 = 16_384.0;

/// What a load's connections do.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Are left alone.
    Steady(Steady),
    /// End in the middle.
    Doomed(Doomed),
}

/// One load.
#[derive(Debug, Clone)]
pub(super) struct Load {
    /// What the table calls it.
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pod: String,
    to: SocketAddr,
    connections: u32,
    /// Requests or ends per second, all together.
    rate: f64,
}

/// All of them. With servers and clients they take about one processor of two: what is slow is slow for another
/// reason than a machine that is too small.
///
/// # Errors
/// Before [`super::place::settle`].
pub(super) fn all(ground: &Ground) -> Result<Vec<Load>> {
    use Kind::{Doomed as D, Steady as S};
    let t = targets(ground)?;
    let load =
        |name, kind, to, connections, rate| Load { name, kind, pod: "client".into(), to, connections, rate };
    let mut all = vec![
        load("HTTP/1.1", S(Steady::Http), t.http, 16, 250.0),
        load("HTTP/1.1, L7", S(Steady::Http), t.l7, 16, 150.0),
        load("HTTP/1.1, L7, same node", S(Steady::Http), t.l7_near, 4, 50.0),
        load("HTTP/2", S(Steady::Http2), t.h2, 4, 200.0),
        load("HTTP/2, L7", S(Steady::Http2), t.l7_h2, 4, 100.0),
        load("new connections", S(Steady::Connect), t.http, 8, 60.0),
        load("new connections, L7", S(Steady::Connect), t.l7, 4, 20.0),
        load("downloads", S(Steady::Download), t.blobs, 4, 2.0),
        load("uploads", S(Steady::Upload), t.blobs, 4, 2.0),
        load("bodies of 1 MiB, L7", S(Steady::Fetch), t.l7, 2, 4.0),
        load("slow readers", S(Steady::Slow), t.blobs, 12, 12.0),
        load("idle connections", S(Steady::Idle), t.http, 150, 150.0),
        load("idle connections, L7", S(Steady::Idle), t.l7, 50, 50.0),
        load("doomed HTTP/1.1", D(Doomed::Http), t.http, 8, 15.0),
        load("doomed HTTP/1.1, L7", D(Doomed::Http), t.l7, 8, 10.0),
        load("doomed HTTP/2", D(Doomed::Http2), t.h2, 2, 2.0),
        load("doomed HTTP/2, L7", D(Doomed::Http2), t.l7_h2, 2, 2.0),
        load("doomed blobs", D(Doomed::Blobs), t.blobs, 8, 15.0),
        load("stalled readers", D(Doomed::Stalled), t.http, 16, 16.0),
        load("stalled readers, L7", D(Doomed::Stalled), t.l7, 8, 8.0),
    ];
    // Other Pods have tunnels of their own.
    for index in 0..8 {
        let load = load("HTTP/1.1 of eight further Pods", S(Steady::Http), t.http, 2, 5.0);
        all.push(Load { pod: format!("idle-a{index}"), ..load });
    }
    Ok(all)
}

/// A Pod's clients that will be killed, and whose tunnels are cut.
///
/// # Errors
/// Before [`super::place::settle`].
pub(super) fn victims(ground: &Ground, pod: &str, dice: &mut Dice) -> Result<Beside> {
    let t = targets(ground)?;
    let kinds = [
        (Kind::Steady(Steady::Http), t.http, 8, 60.0),
        (Kind::Steady(Steady::Http), t.l7, 8, 60.0),
        (Kind::Steady(Steady::Http2), t.h2, 4, 60.0),
        (Kind::Steady(Steady::Http2), t.l7_h2, 4, 60.0),
        (Kind::Steady(Steady::Download), t.blobs, 4, 4.0),
        (Kind::Steady(Steady::Upload), t.blobs, 4, 4.0),
        (Kind::Steady(Steady::Connect), t.http, 4, 40.0),
        (Kind::Doomed(Doomed::Stalled), t.http, 8, 8.0),
    ];
    let (kind, to, connections, rate) = *dice.of(&kinds).context("no kinds")?;
    let load = Load { name: "victims", kind, pod: pod.into(), to, connections, rate };
    load.start(ground, dice.next())
}

impl Load {
    /// Starts it. What fails of the doomed counts too: until its end each is served like all others.
    fn start(&self, ground: &Ground, seed: u64) -> Result<Beside> {
        let (what, kind) = match self.kind {
            Kind::Steady(kind) => ("steady", kind.to_possible_value()),
            Kind::Doomed(kind) => ("doomed", kind.to_possible_value()),
        };
        let kind = kind.context("a kind without a name")?.get_name().to_owned();
        let mut words = vec![what.to_owned(), kind, self.to.to_string()];
        words.extend([self.connections.to_string(), self.rate.to_string(), seed.to_string()]);
        Beside::start(ground.load(&self.pod, &words)?, None)
    }
}

/// Loads that run.
#[derive(Debug)]
pub(super) struct Loads(Vec<(Load, Beside)>);

impl Loads {
    /// Starts them.
    ///
    /// # Errors
    /// When a Pod or program is missing.
    pub(super) fn start(ground: &Ground, loads: &[Load], seed: u64) -> Result<Self> {
        let mut dice = Dice::new(seed);
        let start = |load: &Load| Ok((load.clone(), load.start(ground, dice.next())?));
        loads.iter().map(start).collect::<Result<_>>().map(Self)
    }

    /// Has them end all at once, and gives what each did.
    ///
    /// # Errors
    /// When one did not run to its end.
    pub(super) fn finish(mut self) -> Result<Vec<(Load, Tally)>> {
        self.0.iter_mut().for_each(|(_, beside)| beside.ask());
        let mut told: Vec<(Load, Tally)> = Vec::new();
        for (load, beside) in self.0 {
            let tally = read(beside).with_context(|| load.name.to_owned())?;
            ensure!(tally.answered + tally.failed > 0 || !tally.did.is_empty(), "{} did nothing", load.name);
            match told.iter_mut().find(|(known, _)| known.name == load.name) {
                Some((_, sum)) => sum.add(tally),
                None => told.push((load, tally)),
            }
        }
        Ok(told)
    }
}

/// Ends a load; what it did.
///
/// # Errors
/// When it says something else.
pub(super) fn read(beside: Beside) -> Result<Tally> {
    let said = beside.finish()?;
    serde_json::from_str(&said).with_context(|| format!("it said {said:?}"))
}

/// Makes connections until what agents keep of the last ones is full, and so as large as it becomes: the records of
/// flows, and beside them what kernel and proxy said of each connection.
///
/// # Errors
/// When they do not fill.
pub(super) fn fill(ground: &Ground) -> Result<()> {
    let seen = || -> Result<Vec<f64>> {
        ground.lab.nodes().iter().map(|node| node.sample("weft_flows_total", &[])).collect()
    };
    let to = targets(ground)?.http.to_string();
    let words = ["steady", "connect", &to, "8", "2000", "1"].map(str::to_owned);
    let first = seen()?;
    let load = Beside::start(ground.load("client", &words)?, None)?;
    until(Duration::from_secs(120), "the records of flows to be full", || {
        for (node, (now, first)) in ground.lab.nodes().iter().zip(seen()?.iter().zip(&first)) {
            let room = node.sample("weft_flow_ring_capacity", &[])?.max(CONNECTIONS);
            ensure!(now - first >= room, "{} saw {} of {room}", node.name, now - first);
        }
        Ok(())
    })?;
    load.end()
}
