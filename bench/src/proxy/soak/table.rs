//! The rows, what was done, and the agents over time.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use serde_json::{Value, json};

use super::{
    super::rows::Bound,
    Cpu, Moment,
    kills::Kills,
    loads::{Kind, Load},
    rest::{GROWTH, Held},
};
use crate::load::soak::Tally;

/// A run.
#[derive(Debug)]
pub(super) struct Story {
    pub(super) date: String,
    pub(super) machine: String,
    pub(super) minutes: f64,
    pub(super) seed: u64,
    /// At rest before the load.
    pub(super) before: Vec<Held>,
    /// At rest after it.
    pub(super) after: Vec<Held>,
    /// How long that rest took to come.
    pub(super) waited: Duration,
    pub(super) moments: Vec<Moment>,
    /// During the load.
    pub(super) cpu: Cpu,
    /// How long the load was, seconds.
    pub(super) wall_s: f64,
    pub(super) loads: Vec<(Load, Tally)>,
    pub(super) kills: Kills,
}

/// One figure with its bound.
#[derive(Debug)]
struct Row {
    name: &'static str,
    value: f64,
    required: Bound,
}

impl Row {
    fn verdict(&self) -> &'static str {
        if self.required.met(self.value) { "PASS" } else { "SHORT" }
    }
}

fn rows(story: &Story) -> Vec<Row> {
    let worst = |of: &dyn Fn(&Held, &Held) -> f64| {
        let pairs = story.before.iter().zip(&story.after);
        pairs.map(|(before, after)| of(before, after)).fold(f64::NEG_INFINITY, f64::max)
    };
    let sum = |of: &dyn Fn(&Tally) -> u64| story.loads.iter().map(|(_, tally)| of(tally)).sum::<u64>() as f64;
    let row = |name, value, most| Row { name, value, required: Bound::AtMost(most) };
    vec![
        row("requests of clients that were left alone which failed", sum(&|tally| tally.failed), 0.0),
        row("ends of one side that the other saw as another kind of end", sum(&|tally| tally.untrue), 0.0),
        row("cuts after which a Pod was not answered again", story.kills.back.failed as f64, 0.0),
        row(
            "RSS after to before, worse agent",
            worst(&|before, after| after.rss_mib / before.rss_mib.max(0.1)),
            GROWTH,
        ),
        row(
            "fds after minus before, worse agent",
            worst(&|before, after| after.fds as f64 - before.fds as f64),
            0.0,
        ),
        row(
            "connections and tunnels still counted open beyond before, worse agent",
            worst(&|before, after| {
                (after.connections - before.connections).max(0.0) + (after.tunnels - before.tunnels).max(0.0)
            }),
            0.0,
        ),
        row("tasks after minus before, worse agent", worst(&|before, after| after.tasks - before.tasks), 0.0),
        row("tasks that panicked", worst(&|_, after| after.panics), 0.0),
    ]
}

/// The table as Markdown, and how many rows are short.
pub(super) fn text(story: &Story) -> (String, usize) {
    let rows = rows(story);
    let mut text = "| row | measured | required | |\n|---|---:|---:|---|\n".to_owned();
    for row in &rows {
        let (value, verdict) = (plain(row.value), row.verdict());
        let _ = writeln!(text, "| {} | {value} | {} | VERDICT: {verdict} |", row.name, row.required);
    }
    text += "\n| load | answered | failed | p50 ms | p99 ms | max ms | MiB compared |\n|---|---:|---:|---:|---:|---:|---:|\n";
    for (load, tally) in &story.loads {
        let ms = |us: u64| plain(us as f64 / 1e3);
        // What the doomed ask is not answered to its end, and what is slow is slow by itself.
        let times = if matches!(load.kind, Kind::Steady(_)) {
            [ms(tally.p50_us), ms(tally.p99_us), ms(tally.max_us)]
        } else {
            ["-".into(), "-".into(), "-".into()]
        };
        let (answered, failed) = (tally.answered, tally.failed + tally.untrue);
        let _ = writeln!(
            text,
            "| {} | {answered} | {failed} | {} | {} |",
            load.name,
            times.join(" | "),
            tally.bytes >> 20
        );
    }
    text += "\n| ended | times |\n|---|---:|\n";
    for (what, times) in did(story) {
        let _ = writeln!(text, "| {what} | {times} |");
    }
    let back = &story.kills.back;
    let _ = writeln!(
        text,
        "\nAfter {} cuts a Pod was answered again, after {} ms at most.",
        back.answered,
        plain(back.max_us as f64 / 1e3)
    );
    let why: Vec<String> = story
        .loads
        .iter()
        .map(|(load, tally)| (load.name, tally))
        .chain([("after a cut", back)])
        .flat_map(|(name, tally)| tally.why.iter().map(move |(why, n)| format!("- {name}: {n} x {why}\n")))
        .collect();
    text += &why.concat();
    text += "\n| second | RSS MiB | fds | threads | tasks | connections | tunnels | CPU of both, processors |\n|---:|---:|---:|---:|---:|---:|---:|---:|\n";
    let mut moment = |name: &str, held: &[Held], cpu: &str| {
        let both =
            |of: &dyn Fn(&Held) -> f64| held.iter().map(|one| plain(of(one))).collect::<Vec<_>>().join(" + ");
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} | {} | {} | {} | {cpu} |",
            both(&|h| h.rss_mib),
            both(&|h| h.fds as f64),
            both(&|h| h.threads as f64),
            both(&|h| h.tasks),
            both(&|h| h.connections),
            both(&|h| h.tunnels),
        );
    };
    moment("before", &story.before, "-");
    for one in &story.moments {
        moment(&plain(one.at), &one.held, &plain(one.cpu));
    }
    moment("after", &story.after, "-");
    let cores = |seconds: f64| plain(seconds / story.wall_s.max(0.1));
    let _ = writeln!(
        text,
        "\n{} minutes of load with seed {}, then {:.0} s until rest; {}, {}. Processors in use meanwhile: {} by the \
         agents, {} with clients and servers, {} of the whole machine.",
        story.minutes,
        story.seed,
        story.waited.as_secs_f64(),
        story.machine,
        story.date,
        cores(story.cpu.agents),
        cores(story.cpu.lab),
        cores(story.cpu.machine),
    );
    let short = rows.iter().filter(|row| !row.required.met(row.value)).count();
    (text, short)
}

/// Everything that was ended, by what it was.
fn did(story: &Story) -> BTreeMap<&str, u64> {
    let mut all: BTreeMap<&str, u64> = story.kills.did.iter().map(|(what, n)| (*what, *n)).collect();
    for (what, n) in story.loads.iter().flat_map(|(_, tally)| &tally.did) {
        *all.entry(what).or_default() += n;
    }
    all
}

/// Everything as JSON.
pub(super) fn json(story: &Story) -> Value {
    let rows: Vec<Value> = rows(story)
        .iter()
        .map(|row| {
            json!({"row": row.name, "value": row.value, "required": row.required.to_string(),
                   "verdict": row.verdict()})
        })
        .collect();
    let loads: BTreeMap<&str, &Tally> = story.loads.iter().map(|(load, tally)| (load.name, tally)).collect();
    let moments: Vec<Value> = story
        .moments
        .iter()
        .map(|one| json!({"second": one.at, "agents": one.held, "cpu": one.cpu}))
        .collect();
    json!({
        "date": story.date, "machine": story.machine, "minutes": story.minutes, "seed": story.seed, "rows": rows,
        "before": story.before, "after": story.after, "rest_s": story.waited.as_secs_f64(), "moments": moments,
        "cpu_s": {"agents": story.cpu.agents, "lab": story.cpu.lab, "machine": story.cpu.machine},
        "wall_s": story.wall_s, "loads": loads, "kills": story.kills,
    })
}

/// What agents hold, on one line.
pub(super) fn line(held: &[Held]) -> String {
    let one = |h: &Held| {
        format!(
            "{}: {:.1} MiB, {} fds, {} threads, {} tasks, {} connections, {} tunnels",
            h.node, h.rss_mib, h.fds, h.threads, h.tasks, h.connections, h.tunnels
        )
    };
    held.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// The same, with the use of processors.
pub(super) fn moment(moment: &Moment) -> String {
    format!("{}; {:.2} processors", line(&moment.held), moment.cpu)
}

/// Whole numbers as such, others with three digits that count.
fn plain(value: f64) -> String {
    match value.abs() {
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(rss_mib: f64, fds: u64, connections: f64) -> Held {
        Held {
            node: "a".into(),
            rss_mib,
            fds,
            threads: 4,
            tasks: 9.0,
            connections,
            tunnels: 0.0,
            panics: 0.0,
        }
    }

    fn story(after: Vec<Held>) -> Story {
        Story {
            date: String::new(),
            machine: String::new(),
            minutes: 1.0,
            seed: 1,
            before: vec![held(10.0, 50, 0.0), held(20.0, 50, 0.0)],
            after,
            waited: Duration::ZERO,
            moments: Vec::new(),
            cpu: Cpu { agents: 0.0, lab: 0.0, machine: 0.0 },
            wall_s: 1.0,
            loads: Vec::new(),
            kills: Kills::default(),
        }
    }

    fn short(story: &Story) -> Vec<&'static str> {
        rows(story).iter().filter(|row| row.verdict() == "SHORT").map(|row| row.name).collect()
    }

    #[test]
    fn what_stays_in_either_agent_is_short() {
        let same = story(vec![held(10.5, 50, 0.0), held(20.0, 48, 0.0)]);
        assert_eq!((short(&same), text(&same).1), (Vec::new(), 0));
        let grown = story(vec![held(11.5, 50, 0.0), held(20.0, 50, 0.0)]);
        assert_eq!((short(&grown), text(&grown).1), (vec!["RSS after to before, worse agent"], 1));
        let leaks = story(vec![held(10.0, 49, 0.0), held(20.0, 51, 1.0)]);
        assert_eq!(short(&leaks).len(), 2, "{:?}", short(&leaks));
    }

    #[test]
    fn what_was_not_answered_is_short() {
        let mut cut = story(vec![held(10.0, 50, 0.0), held(20.0, 50, 0.0)]);
        cut.kills.back.failed = 1;
        assert_eq!(short(&cut), ["cuts after which a Pod was not answered again"]);
    }
}
