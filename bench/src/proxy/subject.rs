//! What is measured: the bare path, the peers, and Weft.

use std::{ffi::OsString, fs, net::IpAddr, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use weft_tests::{
    lab::{Place, Process, net, run},
    wait,
};

use super::{
    account, envoy,
    ground::{BULK, Ground, H2, HTTP},
    haproxy,
    parts::Parts,
};

/// Where a node's proxy of a peer listens for the application's connections, and for the other node's, by port.
pub(crate) const PORTS: [(u16, u16, u16); 3] =
    [(HTTP, 15001, 15008), (H2, 15011, 15018), (BULK, 15021, 15028)];

/// Where Envoy's sockets are: on the nodes, or in the Pods' namespaces, where Weft's are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Room {
    /// On the nodes.
    Node,
    /// In the Pods.
    Pod,
}

/// One way from client to server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Subject {
    /// No proxy.
    Direct,
    /// Two HAProxies without TLS, moving bytes by splice(2).
    Splice,
    /// Envoy, one mTLS connection for each of the application's.
    EnvoyL4(Room),
    /// Envoy, HTTP/2 CONNECT over pooled mTLS.
    EnvoyHbone(Room),
    /// Envoy, HTTP at both ends.
    EnvoyL7(Room),
    /// HAProxy, one mTLS connection for each of the application's.
    HaproxyL4,
    /// HAProxy, HTTP at both ends.
    HaproxyL7,
    /// Weft with L4 policy.
    Weft,
    /// Weft with L7 policy and an HTTPRoute.
    WeftL7,
}

impl Subject {
    /// All, in the order of the table.
    pub(crate) const ALL: [Self; 12] = [
        Self::Direct,
        Self::Splice,
        Self::EnvoyHbone(Room::Node),
        Self::EnvoyHbone(Room::Pod),
        Self::EnvoyL4(Room::Node),
        Self::EnvoyL4(Room::Pod),
        Self::HaproxyL4,
        Self::Weft,
        Self::EnvoyL7(Room::Node),
        Self::EnvoyL7(Room::Pod),
        Self::HaproxyL7,
        Self::WeftL7,
    ];

    /// Those that are measured on one node, one right after the other: a few percent are looked for there, and the
    /// machine's speed changes by more from one minute to the next.
    pub(crate) const NEAR: [Self; 2] = [Self::Direct, Self::Weft];

    /// Its column's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Splice => "plain-splice",
            Self::EnvoyL4(Room::Node) => "envoy-l4",
            Self::EnvoyL4(Room::Pod) => "envoy-l4-pod",
            Self::EnvoyHbone(Room::Node) => "envoy-hbone",
            Self::EnvoyHbone(Room::Pod) => "envoy-hbone-pod",
            Self::EnvoyL7(Room::Node) => "envoy-l7",
            Self::EnvoyL7(Room::Pod) => "envoy-l7-pod",
            Self::HaproxyL4 => "haproxy-l4",
            Self::HaproxyL7 => "haproxy-l7",
            Self::Weft => "weft",
            Self::WeftL7 => "weft-l7",
        }
    }

    /// Whether it is Weft.
    pub(crate) fn is_weft(self) -> bool {
        matches!(self, Self::Weft | Self::WeftL7)
    }

    /// Whether requests, not connections, are judged and routed.
    pub(crate) fn is_l7(self) -> bool {
        matches!(self, Self::EnvoyL7(_) | Self::HaproxyL7 | Self::WeftL7)
    }
}

/// A subject that runs; ended when dropped.
#[derive(Debug)]
pub(crate) struct Running<'a> {
    /// Where.
    pub(crate) ground: &'a Ground,
    /// What.
    pub(crate) subject: Subject,
    /// Its cgroups; empty for the bare path.
    pub(crate) cgroups: Vec<PathBuf>,
    /// What the client dials for a server port.
    http: IpAddr,
    h2: IpAddr,
    bulk: IpAddr,
    processes: Vec<Process>,
    redirect: Option<Redirect>,
}

impl<'a> Running<'a> {
    /// Starts `subject` for the client's way to the server on the other node.
    ///
    /// # Errors
    /// When a program does not start or does not listen in time.
    pub(crate) fn start(
        subject: Subject,
        ground: &'a Ground,
        parts: &Parts,
        certificates: &std::path::Path,
    ) -> Result<Self> {
        let server = ground.address("server")?;
        let mut running = Self {
            ground,
            subject,
            cgroups: Vec::new(),
            http: server,
            h2: server,
            bulk: server,
            processes: Vec::new(),
            redirect: None,
        };
        match subject {
            Subject::Direct => {}
            Subject::Weft => running.cgroups = ground.agents()?,
            Subject::WeftL7 => {
                ground.requests(true)?;
                running.http = ground.lab.service("bench/server", false)?;
                running.h2 = ground.lab.service("bench/server-h2", false)?;
                running.cgroups = ground.agents()?;
            }
            Subject::Splice | Subject::HaproxyL4 | Subject::HaproxyL7 => {
                let way = match subject {
                    Subject::Splice => haproxy::Way::Splice,
                    Subject::HaproxyL4 => haproxy::Way::L4,
                    _ => haproxy::Way::L7,
                };
                let words = parts.words("haproxy")?;
                running.peers(
                    Room::Node,
                    &words,
                    &["-db", "-f"],
                    "cfg",
                    |end| haproxy::config(way, end, certificates),
                    &[],
                )?;
            }
            Subject::EnvoyL4(room) | Subject::EnvoyHbone(room) | Subject::EnvoyL7(room) => {
                let way = match subject {
                    Subject::EnvoyL4(_) => envoy::Way::L4,
                    Subject::EnvoyHbone(_) => envoy::Way::Hbone,
                    _ => envoy::Way::L7,
                };
                let words = [OsString::from(parts.envoy()?)];
                running.peers(
                    room,
                    &words,
                    &["-c"],
                    "yaml",
                    |end| envoy::config(way, end, certificates),
                    &["--concurrency", "2", "--disable-hot-restart", "-l", "error"],
                )?;
            }
        }
        Ok(running)
    }

    /// Starts a proxy at either end and turns the client's connections to the first.
    fn peers(
        &mut self,
        room: Room,
        words: &[OsString],
        before: &[&str],
        extension: &str,
        config: impl Fn(&End) -> String,
        after: &[&str],
    ) -> Result<()> {
        let lab = &self.ground.lab;
        let (near, far) = (lab.node("node-a")?, lab.node("node-b")?);
        let server = self.ground.address("server")?;
        let (listen, tunnel) = match room {
            Room::Node => (IpAddr::from([0, 0, 0, 0]), IpAddr::from(far.wire())),
            Room::Pod => (IpAddr::from([127, 0, 0, 1]), server),
        };
        let netns = |pod: &str, node: &weft_tests::lab::Node| -> Result<PathBuf> {
            Ok(match room {
                Room::Node => node.place.netns.clone(),
                Room::Pod => lab.pod(pod)?.place.netns.clone(),
            })
        };
        let ends = [
            End {
                first: false,
                listen,
                tunnel,
                server,
                netns: netns("server", far)?,
                room: account::room(&far.cgroup, "peer")?,
            },
            End {
                first: true,
                listen,
                tunnel,
                server,
                netns: netns("client", near)?,
                room: account::room(&near.cgroup, "peer")?,
            },
        ];
        for end in &ends {
            let name = format!("{}-{}", self.subject.name(), if end.first { "a" } else { "b" });
            let file = lab.dir().join(format!("{name}.{extension}"));
            fs::write(&file, config(end))?;
            let place = Place { netns: end.netns.clone(), cgroup: end.room.clone() };
            let mut command = place.command(lab.bins(), &words[0]);
            command.args(&words[1..]).args(before).arg(&file).args(after);
            let log = lab.dir().join(format!("log/{name}.log"));
            self.processes.push(Process::spawn(command, &name, &log)?);
            self.cgroups.push(end.room.clone());
        }
        let [far, near] = &ends;
        let hbone = matches!(self.subject, Subject::EnvoyHbone(_));
        for (_, entry, exit) in PORTS {
            // Loopback reaches what listens on every address.
            let local = if near.listen.is_unspecified() { IpAddr::from([127, 0, 0, 1]) } else { near.listen };
            self.listening(&near.netns, local, entry)?;
            if !hbone || exit == PORTS[0].2 {
                self.listening(&far.netns, tunnel, exit)?;
            }
        }
        let from = match room {
            Room::Node => format!("iifname \"{}\" ", lab.pod("client")?.veth),
            Room::Pod => String::new(),
        };
        self.redirect = Some(Redirect::make(self.ground, near.netns.clone(), room, &from, server)?);
        Ok(())
    }

    fn listening(&mut self, netns: &std::path::Path, address: IpAddr, port: u16) -> Result<()> {
        let what = format!("{} to listen at {address}:{port}", self.subject.name());
        let processes = &mut self.processes;
        wait::until(Duration::from_secs(20), &what, || {
            if let Some(error) = processes.iter_mut().find_map(|process| process.check().err()) {
                return Ok(Err(error));
            }
            net::within(netns, || Ok(std::net::TcpStream::connect((address, port))?))?;
            Ok(Ok(()))
        })?
        .0
    }

    /// What the client dials for a port of the server.
    pub(crate) fn target(&self, port: u16) -> (IpAddr, u16) {
        match port {
            HTTP => (self.http, port),
            H2 => (self.h2, port),
            _ => (self.bulk, port),
        }
    }

    /// Ends it.
    ///
    /// # Errors
    /// When Weft does not take its former policy again.
    pub(crate) fn stop(mut self) -> Result<()> {
        if self.subject == Subject::WeftL7 {
            self.ground.requests(false)?;
        }
        for process in &mut self.processes {
            process.stop(Duration::from_secs(2));
        }
        Ok(())
    }
}

/// One end of a peer's pair.
#[derive(Debug)]
pub(crate) struct End {
    /// The client's end.
    pub(crate) first: bool,
    /// Where the client's end listens.
    pub(crate) listen: IpAddr,
    /// Where the server's end listens.
    pub(crate) tunnel: IpAddr,
    /// The server's own address.
    pub(crate) server: IpAddr,
    netns: PathBuf,
    room: PathBuf,
}

/// NAT rules that turn the client's connections to a peer's proxy; removed when dropped.
#[derive(Debug)]
struct Redirect {
    place: Place,
    words: Vec<OsString>,
    bins: weft_tests::lab::Bins,
}

impl Redirect {
    fn make(ground: &Ground, netns: PathBuf, room: Room, from: &str, server: IpAddr) -> Result<Self> {
        let hook = match room {
            Room::Node => "prerouting priority dstnat",
            Room::Pod => "output priority -100",
        };
        let rules: Vec<String> = PORTS
            .iter()
            .map(|(port, entry, _)| {
                format!("{from}ip daddr {server} tcp dport {port} redirect to :{entry}\n")
            })
            .collect();
        let table = format!(
            "table ip bench {{\nchain turn {{\ntype nat hook {hook}; policy accept;\n{}}}\n}}\n",
            rules.concat()
        );
        let redirect = Self {
            place: Place { netns, cgroup: ground.lab.node("node-a")?.cgroup.clone() },
            words: ground.words("nft")?,
            bins: ground.lab.bins().clone(),
        };
        let made = redirect.nft(&table);
        made.map(|()| redirect)
    }

    fn nft(&self, text: &str) -> Result<()> {
        let mut command: Command = self.place.command(&self.bins, &self.words[0]);
        command.args(&self.words[1..]).arg(text);
        let out = run(command, Duration::from_secs(5)).context("nft")?;
        ensure!(out.status.success(), "nft {text}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }
}

impl Drop for Redirect {
    fn drop(&mut self) {
        if let Err(error) = self.nft("delete table ip bench") {
            complain(&error);
        }
    }
}

/// A subject by its column's name.
///
/// # Errors
/// When there is none.
pub(crate) fn by_name(name: &str) -> Result<Subject> {
    match Subject::ALL.into_iter().find(|subject| subject.name() == name) {
        Some(subject) => Ok(subject),
        None => {
            bail!("there is no subject {name:?}; there are {}", Subject::ALL.map(Subject::name).join(", "))
        }
    }
}

fn complain(error: &anyhow::Error) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "the redirection was not taken away: {error:#}");
}
