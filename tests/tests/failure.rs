//! Failures that two nodes without Kubernetes can have: each is provoked, and every word of its row in
//! `docs/failure-modes.md` asserted.
#![allow(clippy::unwrap_used, reason = "helpers fail as their test does")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::Signal,
};
use weft_tests::{
    Lab, LabOptions,
    failure::{
        Fate, Place, Row,
        ca::Root,
        row,
        watch::{Watched as _, in_lab},
    },
    lab::Process,
    wait,
};

const BANNER: u16 = 7001;
/// Exchanges that tell a fate; ten are made each second.
const ENOUGH: usize = 10;
/// An agent may notice a jump of its clock half a minute late.
const LIMIT: Duration = Duration::from_secs(60);

fn shop(options: LabOptions) -> Result<Lab> {
    let mut lab = Lab::shop_with(options)?;
    lab.start_server("web-v1", "banner", BANNER)?;
    Ok(lab)
}

/// New connections and one that stands, from `client` on node-a to `web-v1` on node-b.
struct Both {
    new: Process,
    running: Process,
}

impl Both {
    fn start(lab: &Lab, name: &str) -> Result<Self> {
        let to = lab.at("web-v1", BANNER, false)?;
        let new = in_lab(lab, "client", &format!("new-{name}"), &to, false)?;
        let running = in_lab(lab, "client", &format!("running-{name}"), &to, true)?;
        Ok(Self { new, running })
    }

    fn marks(&self) -> Result<(usize, usize)> {
        Ok((self.new.mark()?, self.running.mark()?))
    }

    fn fates(&self, (new, running): (usize, usize)) -> Result<(Fate, Fate)> {
        Ok((self.new.after(new, ENOUGH)?.fate()?, self.running.standing(running, ENOUGH)?))
    }
}

/// Waits until the signs of a row can be read: `agent` is the node whose agent is asked.
fn shown(lab: &Lab, agent: &str, row: &Row) -> Result<()> {
    let read = |place| match place {
        Place::Status => lab.told_status().map(|(_, text)| text),
        Place::Metrics => lab.node(agent)?.admin("/metrics"),
        Place::AgentLog => Ok(lab.node(agent)?.agent.as_ref().context("no agent")?.output()),
        Place::OperatorLog => lab.operator_log(),
        Place::Check | Place::Kubectl(_) => anyhow::bail!("there is no Kubernetes here"),
    };
    wait::until_every(Duration::from_millis(200), LIMIT, row.fault, || row.shown(read)).map(drop)
}

/// Fills a file system up; dropped, it is empty again.
struct Full(PathBuf);

impl Full {
    fn fill(at: &Path) -> Result<Self> {
        mount(None::<&str>, at, None::<&str>, MsFlags::MS_REMOUNT, Some("size=2m"))
            .with_context(|| format!("make {} small", at.display()))?;
        let full = Self(at.join("full"));
        let written = fs::write(&full.0, vec![0_u8; 4 << 20]);
        ensure!(written.is_err(), "{} is not small", at.display());
        Ok(full)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn policy(name: &str) -> String {
    format!(
        "apiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec:\n  targetRefs: [{{group: '', kind: Pod, selector: {{matchLabels: {{app: web}}}}}}]\n  action: ALLOW\n  \
         rules: [{{sources: [{{type: ServiceAccount, serviceAccount: {{name: client}}}}]}}]\n"
    )
}

const LATE: &str = "
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: shop, labels: {app: client}}
spec:
  nodeName: node-a
  serviceAccountName: client
  containers: [{name: app, image: 'busybox:1.37', args: [sleep, infinity]}]
";

fn full_disks(lab: &mut Lab, both: &Both) -> Result<()> {
    let told = row("disk-full")?;
    let marks = both.marks()?;
    let full = Full::fill(&lab.node("node-a")?.run_dir)?;
    lab.apply("late", &policy("late")).context("a change while the agent's disk is full")?;
    shown(lab, "node-a", told)?;
    let (new, running) = both.fates(marks)?;
    told.observed(new, running)?;
    // Enforced, and not only taken: the intruder is refused from now on.
    let to = lab.at("web-v1", BANNER, false)?;
    let intruder = lab.app("intruder", &["dial", "--to", &to, "--timeout-ms", "2000"])?;
    ensure!(intruder["heard"].as_str().unwrap_or_default().is_empty(), "the intruder was let in: {intruder}");
    let mut agent = lab.node_mut("node-a")?.agent.take().context("no agent")?;
    agent.signal(Signal::SIGKILL)?;
    agent.wait(LIMIT)?;
    lab.start_agent("node-a")?;
    lab.node_mut("node-a")?.wait_ready(LIMIT).context("an agent that starts while its disk is full")?;
    both.new.settled(Fate::GoOn, ENOUGH, LIMIT)?;
    shown(lab, "node-a", told)?;
    drop(full);
    wait::until_every(Duration::from_millis(200), LIMIT, "the end of the problem", || {
        let (_, said) = lab.told_status()?;
        ensure!(!said.contains("snapshot"), "{said}");
        Ok(())
    })?;

    let told = row("operator-disk-full")?;
    let both = Both::start(lab, "operator-disk")?;
    let marks = both.marks()?;
    let full = Full::fill(&lab.state_dir())?;
    // Nothing is removed before: that would make room.
    lab.apply("later", &policy("later")).context("a change while the operator's disk is full")?;
    shown(lab, "node-a", told)?;
    let (new, running) = both.fates(marks)?;
    drop(full);
    told.observed(new, running)?;
    lab.delete("late")?;
    lab.delete("later").map(drop)
}

fn full_map(lab: &mut Lab) -> Result<()> {
    let told = row("map-full")?;
    let both = Both::start(lab, "map")?;
    let marks = both.marks()?;
    // The node itself and its four Pods take all five places.
    lab.take_in("late-pod", LATE)?;
    shown(lab, "node-a", told)?;
    ensure!(
        lab.node("node-a")?.sample("weft_enrolment_failures_total", &[])? >= 1.0,
        "no failure is counted"
    );
    let to = lab.at("web-v1", BANNER, false)?;
    let late = lab.spawn_app("late", "late", &["watch", "--to", &to, "--timeout-ms", "2000"])?;
    told.observed(late.after(0, 5)?.fate()?, Fate::None)?;
    let (new, running) = both.fates(marks)?;
    ensure!((new, running) == (Fate::GoOn, Fate::GoOn), "others: {new:?}, {running:?}");
    lab.remove_pod("intruder")?;
    late.settled(Fate::GoOn, 3, LIMIT).context("the Pod once there is room")
}

#[test]
fn full_disks_and_a_full_map_are_told_and_harm_nobody_else() {
    let full = || -> Result<()> {
        let agent_args = ["--map-size", "PODS=5"].map(str::to_owned).into();
        let mut lab = shop(LabOptions { agent_args, ..LabOptions::default() })?;
        let both = Both::start(&lab, "disk")?;
        full_disks(&mut lab, &both)?;
        drop(both);
        full_map(&mut lab)
    };
    full().unwrap();
}

#[test]
fn an_expired_ca_closes_what_it_vouched_for_and_a_new_one_opens_it() {
    let expires = || -> Result<()> {
        let told = row("ca-expired")?;
        let root = Root::lasting(Duration::from_secs(40))?;
        let ca = Some(format!("{}{}", root.key, root.certificate));
        let mut lab = shop(LabOptions { ca, ..LabOptions::default() })?;
        let both = Both::start(&lab, "ca")?;
        both.new.settled(Fate::Refused, ENOUGH, Duration::from_secs(90))?;
        told.observed(Fate::Refused, both.running.still(ENOUGH)?)?;
        shown(&lab, "node-a", told)?;
        let root = Root::lasting(Duration::from_secs(3600))?;
        lab.stop_operator();
        lab.set_ca(&format!("{}{}", root.key, root.certificate))?;
        lab.start_operator()?;
        both.new.settled(Fate::GoOn, ENOUGH, Duration::from_secs(60)).context("with a new CA")
    };
    expires().unwrap();
}

#[test]
fn a_clock_that_is_off_closes_its_node_and_says_why() {
    let off = || -> Result<()> {
        let mut lab = shop(LabOptions { clocks: true, ..LabOptions::default() })?;
        for (told, seconds) in [(row("clock-ahead")?, 3600), (row("clock-behind")?, -3600)] {
            let both = Both::start(&lab, told.name)?;
            lab.set_clock("node-b", seconds)?;
            if seconds < 0 {
                // Nothing has to be renewed for half an hour: a restart without its memory comes to it at once.
                let mut agent = lab.node_mut("node-b")?.agent.take().context("no agent")?;
                agent.signal(Signal::SIGKILL)?;
                agent.wait(LIMIT)?;
                fs::remove_file(lab.node("node-b")?.run_dir.join("credentials"))?;
                lab.start_agent("node-b")?;
            }
            both.new.settled(Fate::Refused, ENOUGH, Duration::from_secs(60))?;
            let running = both.running.still(ENOUGH)?;
            shown(&lab, "node-b", told)?;
            told.observed(Fate::Refused, running)?;
            lab.set_clock("node-b", 0)?;
            both.new
                .settled(Fate::GoOn, ENOUGH, Duration::from_secs(90))
                .context("with the clock set right")?;
        }
        Ok(())
    };
    off().unwrap();
}
