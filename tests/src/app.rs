//! What `weft-lab-app` does: it is the application, the attacker and the server inside the lab's Pods. Every
//! subcommand prints one JSON object.

use std::{
    ffi::OsString,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::Subcommand;
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::SigSet,
    },
};
use serde_json::Value;

pub mod attack;
pub mod calls;
pub mod grpc;
pub mod resolve;
pub mod serve;
pub mod server;
pub mod tunnel;
pub mod udp;

/// A subcommand.
#[derive(Debug, Subcommand)]
pub enum App {
    /// Enter a network namespace and a cgroup, then become a program.
    Enter {
        /// The network namespace.
        #[arg(long)]
        netns: PathBuf,
        /// The cgroup.
        #[arg(long)]
        cgroup: PathBuf,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// HTTP calls.
    Http(calls::Calls),
    /// One TCP connection: who it says the peer is, and what the peer says.
    Dial(calls::Dial),
    /// Many TCP connections that stand at the same time, each with one exchange.
    Many(calls::Many),
    /// Send a stream to a `sink` server, close the sending side, read back its count and checksum.
    Stream(calls::Stream),
    /// Read a stream of a `source` server slowly.
    Slow(calls::Slow),
    /// Send a datagram and wait for its echo, or go on as long as there is one.
    Udp(udp::Udp),
    /// Speaks first on each connection, then echoes.
    Banner(server::Listen),
    /// Speaks first on each connection, and resets it once something came.
    Resets(server::Listen),
    /// Speaks first on each connection, and prints how it ended.
    Hears(server::Listen),
    /// Counts and checksums what it gets until the sender closes its side, then answers.
    Sink(server::Listen),
    /// Sends a stream of the length that the first eight bytes ask for.
    Source(server::Listen),
    /// Closes its sending side after a word, then counts and checksums what it gets, and prints it.
    Farewell(server::Listen),
    /// Echoes datagrams.
    UdpEcho(server::Listen),
    /// Sends datagrams for half a minute to whoever sent one.
    UdpPour(server::Listen),
    /// Sends a TCP SYN with a source address that is not this Pod's.
    Forge(attack::Forge),
    /// Sends bytes that are no protocol of any of Weft's ports.
    Garbage(attack::Garbage),
    /// Opens a tunnel with a certificate of a foreign CA.
    Tunnel(tunnel::Tunnel),
    /// Exchanges lines with a `banner` server while something fails, and tells how each exchange went.
    Watch(crate::failure::watch::Watch),
    /// Runs a program under a clock that is off.
    Clock(crate::failure::clock::Clock),
    /// Serves several ports until SIGTERM, as a Pod's server does.
    Serve(serve::Serve),
    /// Asks a gRPC server for its health.
    Health(grpc::Health),
    /// Asks name servers for addresses.
    Resolve(resolve::Resolve),
}

impl App {
    /// Does it.
    ///
    /// # Errors
    /// What went wrong; a refusal that was asked for is an answer, not an error.
    pub fn run(self) -> Result<Value> {
        match self {
            Self::Enter { netns, cgroup, command } => Err(enter(&netns, &cgroup, &command)),
            Self::Http(calls) => calls.run(),
            Self::Dial(dial) => dial.run(),
            Self::Many(many) => many.run(),
            Self::Stream(stream) => stream.run(),
            Self::Slow(slow) => slow.run(),
            Self::Udp(udp) => udp.run(),
            Self::Banner(listen) => listen.banner(),
            Self::Resets(listen) => listen.resets(),
            Self::Hears(listen) => listen.hears(),
            Self::Sink(listen) => listen.sink(),
            Self::Source(listen) => listen.source(),
            Self::Farewell(listen) => listen.farewell(),
            Self::UdpEcho(listen) => listen.udp_echo(),
            Self::UdpPour(listen) => listen.udp_pour(),
            Self::Forge(forge) => forge.run(),
            Self::Garbage(garbage) => garbage.run(),
            Self::Tunnel(tunnel) => tunnel.run(),
            Self::Watch(watch) => watch.run(),
            Self::Clock(clock) => clock.run(),
            Self::Serve(serve) => serve.run(),
            Self::Health(health) => health.run(),
            Self::Resolve(resolve) => resolve.run(),
        }
    }
}

fn enter(netns: &Path, cgroup: &Path, command: &[OsString]) -> anyhow::Error {
    let moved = || -> Result<()> {
        // "0" is the writing process. First the cgroup: its hooks must see every socket of this process.
        fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("enter {}", cgroup.display()))?;
        let file = File::open(netns).with_context(|| format!("open {}", netns.display()))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", netns.display()))?;
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        // Who started us may take signals itself, with those blocked that the program is to end by.
        SigSet::empty().thread_set_mask()?;
        Ok(())
    };
    if let Err(error) = moved() {
        return error;
    }
    let Some((program, args)) = command.split_first() else { return anyhow::anyhow!("no program") };
    anyhow::Error::new(Command::new(program).args(args).exec())
        .context(format!("become {}", program.display()))
}

/// Prints a line at once, for whoever follows the process.
pub(crate) fn say(line: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}
