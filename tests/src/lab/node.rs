//! A node: a network namespace with its end of the wire, a cgroup that holds its Pods, and an agent.

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    http,
    lab::{
        machine::Bins,
        net,
        process::{Place, Process},
    },
    wait,
};

/// A node of the lab.
#[derive(Debug)]
pub struct Node {
    /// `node-a`, `node-b`.
    pub name: String,
    /// 1 or 2: the third byte of its Pods' addresses.
    pub index: u8,
    /// The name of its network namespace.
    pub netns_name: String,
    /// The cgroup that its Pods and its agent are children of.
    pub cgroup: PathBuf,
    /// Where its agent lives.
    pub place: Place,
    /// The agent's sockets and snapshot.
    pub run_dir: PathBuf,
    /// The agent's pins.
    pub bpffs: PathBuf,
    /// The agent.
    pub agent: Option<Process>,
    pub(super) starts: u32,
}

/// Where the agent's admin server listens, inside the node's namespace.
pub const ADMIN: &str = "127.0.0.1:15020";

/// What every agent of a lab is started with.
#[derive(Debug, Clone)]
pub(super) struct AgentSetup {
    pub(super) bins: Bins,
    pub(super) operator: String,
    pub(super) state_dir: PathBuf,
    pub(super) logs: PathBuf,
    pub(super) drain_seconds: u32,
    pub(super) filter: String,
    pub(super) args: Vec<String>,
    /// The folder of the files that say how far clocks are off, where they are.
    pub(super) clocks: Option<PathBuf>,
}

impl Node {
    /// Its address on the wire.
    pub fn wire(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, 0, self.index)
    }

    /// The observer socket, as `weft --server` takes it.
    pub fn server(&self) -> String {
        format!("unix:{}", self.run_dir.join("observer.sock").display())
    }

    /// Makes the namespace, the wire's end where it is the second of two, and the control link.
    pub(super) fn raise(&self, control: &str) -> Result<()> {
        for dir in [&self.cgroup, &self.place.cgroup, &self.run_dir, &self.bpffs] {
            fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        }
        let (ns, n) = (&self.netns_name, self.index);
        net::ip_batch(None, &format!("netns add {ns}\n"))?;
        net::sysctls(
            &self.place.netns,
            &[
                "net/ipv6/conf/default/accept_dad=0",
                "net/ipv4/ip_forward=1",
                "net/ipv6/conf/all/forwarding=1",
                "net/ipv4/conf/all/rp_filter=0",
                "net/ipv4/conf/default/rp_filter=0",
            ],
        )?;
        net::ip_batch(
            Some(control),
            &format!(
                "link add c{n} type veth peer name ctl0 netns {ns}\nlink set c{n} master br0\nlink set c{n} up\n"
            ),
        )?;
        net::ip_batch(
            Some(ns),
            &format!("link set lo up\naddr add 172.29.0.{}/24 dev ctl0\nlink set ctl0 up\n", n + 1),
        )
    }

    /// Gives the two ends of the wire their addresses and the routes to the other node's Pods.
    pub(super) fn join_wire(&self, other: u8) -> Result<()> {
        let n = self.index;
        net::ip_batch(
            Some(&self.netns_name),
            &format!(
                "addr add 172.30.0.{n}/24 dev wire0\n\
                 addr add fd77:0:f::{n}/64 dev wire0 nodad\n\
                 link set wire0 up\n\
                 route add 10.77.{other}.0/24 via 172.30.0.{other}\n\
                 route add fd77:0:{other}::/64 via fd77:0:f::{other}\n"
            ),
        )
    }

    /// Starts an agent beside the one that may run, and gives the older one back.
    pub(super) fn start_agent(&mut self, setup: &AgentSetup) -> Result<Option<Process>> {
        let agent = setup.bins.path("weft-agent");
        let mut command = match &setup.clocks {
            None => self.place.command(&setup.bins, agent),
            Some(folder) => {
                let mut clock = self.place.command(&setup.bins, setup.bins.path("weft-lab-app"));
                clock.arg("clock").arg("--offset").arg(folder.join(format!("clock-{}", self.name)));
                clock.arg("--").arg(agent);
                clock
            }
        };
        command.args(["--node", &self.name, "--operator", &setup.operator, "--admin", ADMIN]);
        command.arg("--token-file").arg(setup.state_dir.join("tokens").join(&self.name));
        command.arg("--bundle-file").arg(setup.state_dir.join("bundle.pem"));
        command.arg("--run-dir").arg(&self.run_dir).arg("--bpffs").arg(&self.bpffs);
        command.arg("--cgroup-root").arg(&self.cgroup);
        command.args(["--drain-seconds", &setup.drain_seconds.to_string()]);
        command.args(&setup.args).env("WEFT_LOG", &setup.filter);
        self.starts += 1;
        let log = setup.logs.join(format!("agent-{}-{}.log", self.name, self.starts));
        let agent = Process::spawn(command, &format!("agent of {}", self.name), &log)?;
        Ok(self.agent.replace(agent))
    }

    /// The body of a page of the agent's admin server.
    ///
    /// # Errors
    /// When it does not answer, or not with 200.
    pub fn admin(&self, path: &str) -> Result<String> {
        let path = path.to_owned();
        net::within(&self.place.netns, move || {
            let answer = http::get(ADMIN, "localhost", &path, Duration::from_secs(2))?;
            ensure!(answer.status == 200, "{path} says {}: {}", answer.status, answer.text().trim());
            Ok(answer.text())
        })
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time; with the end of its log.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Duration> {
        let start = Instant::now();
        let what = format!("the agent of {} to be ready", self.name);
        let ready = wait::until(limit, &what, || {
            let died = self.agent.as_mut().and_then(|agent| agent.check().err());
            match died {
                Some(error) => Ok(Err(error)),
                None => self.admin("/readyz").map(|_| Ok(())),
            }
        });
        let tail = || self.agent.as_ref().map(|agent| agent.tail(15)).unwrap_or_default();
        ready.with_context(|| format!("its log ends:\n{}", tail()))?.0?;
        Ok(start.elapsed())
    }
}
