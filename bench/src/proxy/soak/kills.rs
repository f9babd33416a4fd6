//! What is killed from outside: clients, and the tunnels under them. Only Pods that no other load uses.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use weft_tests::lab::{net, run};

use super::{
    super::{beside::Beside, ground::Ground},
    loads,
    place::targets,
    until,
};
use crate::{dice::Dice, load::soak::Tally};

/// Where tunnels arrive.
const TUNNEL: u16 = 15008;
/// Pods whose clients are killed and whose tunnels are cut: the last of the client's node.
const PODS: std::ops::Range<usize> = 40..46;
/// Between two kills, milliseconds.
const PAUSE: (u64, u64) = (200, 2_500);
/// How long a Pod is cut off, milliseconds; a tunnel is given up after 30 s.
const SILENCE: (u64, u64) = (1_000, 45_000);
/// For the last checks, which take a minute each at most.
const CHECKS: Duration = Duration::from_secs(75);

/// What was killed.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Kills {
    /// What, and how often.
    pub(super) did: BTreeMap<&'static str, u64>,
    /// The first answers after a cut.
    pub(super) back: Tally,
}

#[derive(Debug)]
struct Victim {
    pod: String,
    client: Option<Beside>,
}

/// Kills at random.
#[derive(Debug)]
pub(super) struct Reaper {
    dice: Dice,
    span: Duration,
    next: Duration,
    victims: Vec<Victim>,
    /// The victim that is cut off, and until when.
    silent: Option<(usize, Duration)>,
    checks: Vec<Beside>,
    kills: Kills,
}

impl Reaper {
    /// Starts the victims of a load that lasts for `span`.
    ///
    /// # Errors
    /// When one cannot be started.
    pub(super) fn start(ground: &Ground, seed: u64, span: Duration) -> Result<Self> {
        let mut dice = Dice::new(seed);
        let mut victims = Vec::new();
        for pod in PODS.map(|index| format!("idle-a{index}")) {
            let client = Some(loads::victims(ground, &pod, &mut dice)?);
            victims.push(Victim { pod, client });
        }
        let next = dice.millis(1_000, 2_000);
        Ok(Self { dice, span, next, victims, silent: None, checks: Vec::new(), kills: Kills::default() })
    }

    /// Kills what is due `at` this time of the load.
    ///
    /// # Errors
    /// When a tool fails.
    pub(super) fn tick(&mut self, ground: &Ground, at: Duration) -> Result<()> {
        self.check()?;
        if self.silent.is_some_and(|(_, until)| at >= until) {
            self.speak(ground)?;
        }
        if at < self.next {
            return Ok(());
        }
        self.next = at + self.dice.millis(PAUSE.0, PAUSE.1);
        let index = self.dice.between(0, self.victims.len() as u64 - 1) as usize;
        if self.silent.is_some_and(|(silent, _)| silent == index) {
            return Ok(());
        }
        match self.dice.between(1, 6) {
            1 | 2 => {
                self.did("clients killed by SIGKILL", 1);
                self.replace(ground, index)
            }
            3 | 4 => {
                let port = format!(":{TUNNEL}");
                let pod = self.victims[index].pod.clone();
                self.cut(ground, index, &pod, &["dport", "=", &port])
            }
            5 => {
                let (port, from) =
                    (format!(":{TUNNEL}"), ground.address(&self.victims[index].pod)?.to_string());
                self.cut(ground, index, "server", &["sport", "=", &port, "dst", &from])
            }
            _ if self.silent.is_none() => {
                let most = self.span.saturating_sub(at).as_millis() as u64 / 2;
                let span = self.dice.millis(SILENCE.0, SILENCE.1.min(most.max(SILENCE.0)));
                let pod = ground.lab.pod(&self.victims[index].pod)?;
                route(ground, &format!("route replace blackhole {}/32\n", pod.v4))?;
                self.silent = Some((index, at + span));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Lets everybody be, and waits until whoever was cut off has been answered again.
    ///
    /// # Errors
    /// When a tool fails.
    pub(super) fn finish(mut self, ground: &Ground) -> Result<Kills> {
        if self.silent.is_some() {
            self.speak(ground)?;
        }
        self.victims.clear();
        until(CHECKS, "an answer after the last cuts", || {
            self.check()?;
            ensure!(self.checks.is_empty(), "{} are not answered yet", self.checks.len());
            Ok(())
        })?;
        Ok(self.kills)
    }

    fn did(&mut self, what: &'static str, times: u64) {
        *self.kills.did.entry(what).or_default() += times;
    }

    /// Kills a victim's client and starts another.
    fn replace(&mut self, ground: &Ground, index: usize) -> Result<()> {
        let victim = &mut self.victims[index];
        victim.client = None;
        victim.client = Some(loads::victims(ground, &victim.pod, &mut self.dice)?);
        Ok(())
    }

    /// Destroys the sockets of a Pod which that filter of ss chooses, all of them ends of a victim's tunnels.
    fn cut(&mut self, ground: &Ground, index: usize, pod: &str, filter: &[&str]) -> Result<()> {
        let mut command = ground.lab.pod(pod)?.place.command(ground.lab.bins(), "ss");
        command.args(["--kill", "--no-header", "--numeric", "--tcp"]).args(filter);
        let out = run(command, Duration::from_secs(10)).context("ss, of iproute2")?;
        ensure!(out.status.success(), "ss: {}", String::from_utf8_lossy(&out.stderr));
        let cut = String::from_utf8_lossy(&out.stdout).lines().count() as u64;
        let what = if pod == "server" {
            "tunnels cut at the server's end"
        } else {
            "tunnels cut at the client's end"
        };
        self.did(what, cut);
        self.again(ground, index)
    }

    /// Ends the silence of a Pod.
    fn speak(&mut self, ground: &Ground) -> Result<()> {
        let Some((index, _)) = self.silent.take() else { return Ok(()) };
        let pod = ground.lab.pod(&self.victims[index].pod)?;
        route(ground, &format!("route replace {}/32 dev {}\n", pod.v4, pod.veth))?;
        self.did("Pods cut off without a word, for a while", 1);
        self.again(ground, index)
    }

    /// Has a victim's Pod ask until it is answered, with other clients than were cut.
    fn again(&mut self, ground: &Ground, index: usize) -> Result<()> {
        let words = ["again".into(), targets(ground)?.http.to_string()];
        self.checks.push(Beside::start(ground.load(&self.victims[index].pod, &words)?, None)?);
        self.replace(ground, index)
    }

    /// Takes in what the checks that have ended say.
    fn check(&mut self) -> Result<()> {
        let mut going = Vec::new();
        for mut check in self.checks.drain(..) {
            if check.ended()? {
                self.kills.back.add(loads::read(check)?);
            } else {
                going.push(check);
            }
        }
        self.checks = going;
        Ok(())
    }
}

/// Changes routes of the clients' node.
fn route(ground: &Ground, commands: &str) -> Result<()> {
    net::ip_batch(Some(&ground.lab.node("node-a")?.netns_name), commands)
}
