//! A server of several ports in one process, as Pods have them: HTTP/1.1, gRPC's health protocol, a banner over TCP and
//! an echo over UDP. It ends as a well-behaved server does: after SIGTERM it goes on for a while, and asks its clients
//! to leave.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv6Addr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

use super::{grpc, server::Listen};

/// Longest line of a request's head, and most of them.
const HEAD: (u64, usize) = (16_384, 100);

/// Which ports. Without any it only waits for its end.
#[derive(Debug, Clone, Args)]
pub struct Serve {
    /// Answers HTTP/1.1 here: its name, whom it saw, and the request line. `/slow/N` takes N ms,
    /// `/crash` ends the process.
    #[arg(long)]
    http: Vec<u16>,
    /// Answers `grpc.health.v1.Health/Check` here.
    #[arg(long)]
    grpc: Vec<u16>,
    /// Speaks first on each connection, then echoes.
    #[arg(long)]
    tcp: Vec<u16>,
    /// Echoes datagrams.
    #[arg(long)]
    udp: Vec<u16>,
    /// Milliseconds to go on after SIGTERM.
    #[arg(long, default_value_t = 0)]
    linger_ms: u64,
}

impl Serve {
    pub(super) fn run(self) -> Result<Value> {
        let mut term = SigSet::empty();
        term.add(Signal::SIGTERM);
        term.thread_block().context("keep SIGTERM for this thread")?;
        let leaving = Arc::new(AtomicBool::new(false));
        for port in self.http {
            let leaving = leaving.clone();
            each(port, move |stream| http(&stream, &leaving))?;
        }
        for port in self.grpc {
            each(port, grpc::serve)?;
        }
        for port in self.tcp {
            thread::spawn(move || Listen { port }.banner());
        }
        for port in self.udp {
            thread::spawn(move || Listen { port }.udp_echo());
        }
        term.wait().context("wait for SIGTERM")?;
        leaving.store(true, Ordering::Release);
        thread::sleep(Duration::from_millis(self.linger_ms));
        Ok(json!({"ended": "SIGTERM"}))
    }
}

/// Serves every connection of a port on a thread of its own.
fn each(port: u16, serve: impl Fn(TcpStream) -> Result<()> + Clone + Send + 'static) -> Result<()> {
    let listener =
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).with_context(|| format!("port {port}"))?;
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let serve = serve.clone();
            // One that cannot be served is closed.
            let _ = thread::Builder::new().stack_size(1 << 18).spawn(move || serve(stream));
        }
    });
    Ok(())
}

fn http(stream: &TcpStream, leaving: &AtomicBool) -> Result<()> {
    stream.set_nodelay(true)?;
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let (name, peer) = (name.trim(), stream.peer_addr()?.ip().to_canonical());
    let mut input = BufReader::new(stream);
    while let Some(request) = head(&mut input)? {
        super::say(&format!("{} {}", request.method, request.path));
        if let Some(pause) = request.path.strip_prefix("/slow/").and_then(|ms| ms.parse().ok()) {
            thread::sleep(Duration::from_millis(pause));
        }
        if request.path == "/crash" {
            std::process::exit(1);
        }
        let body = format!("{name} saw {peer} {} {}\n", request.method, request.path);
        let close = request.close || leaving.load(Ordering::Acquire);
        let connection = if close { "close" } else { "keep-alive" };
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: {connection}\r\n\r\n{body}",
            body.len()
        );
        (&*stream).write_all(answer.as_bytes())?;
        if close {
            break;
        }
    }
    Ok(())
}

struct Head {
    method: String,
    path: String,
    close: bool,
}

/// Reads one request with its body; `None` at the end of the connection.
fn head(input: &mut BufReader<&TcpStream>) -> Result<Option<Head>> {
    let mut line = String::new();
    if input.by_ref().take(HEAD.0).read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (mut close, mut length) = (words.next().as_deref() == Some("HTTP/1.0"), 0_u64);
    for _ in 0..HEAD.1 {
        line.clear();
        input.by_ref().take(HEAD.0).read_line(&mut line)?;
        let Some((key, value)) = line.trim_end().split_once(':') else { break };
        match key.to_ascii_lowercase().as_str() {
            "connection" => close |= value.trim().eq_ignore_ascii_case("close"),
            "content-length" => length = value.trim().parse()?,
            _ => {}
        }
    }
    std::io::copy(&mut input.by_ref().take(length), &mut std::io::sink())?;
    Ok(Some(Head { method, path, close }))
}
