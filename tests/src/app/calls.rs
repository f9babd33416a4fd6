//! Clients.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::server::{Checksum, block};
use crate::http::{self, Request};

/// Where to, and how long at most for each step.
#[derive(Debug, Clone, Args)]
pub struct Target {
    /// `address:port`.
    #[arg(long)]
    pub to: String,
    /// Milliseconds for each connect, read and write.
    #[arg(long, default_value_t = 10_000)]
    pub timeout_ms: u64,
}

impl Target {
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    fn dial(&self) -> Result<TcpStream> {
        http::dial(&self.to, self.timeout())
    }
}

/// The kind of an I/O error by name (`ConnectionRefused`); otherwise, and for a name that was not found, its text.
pub fn kind_of(error: &anyhow::Error) -> String {
    if error.is::<http::Lookup>() {
        return format!("{error:#}");
    }
    match error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()) {
        Some(io) => format!("{:?}", io.kind()),
        None => format!("{error:#}"),
    }
}

/// HTTP calls.
#[derive(Debug, Clone, Args)]
pub struct Calls {
    #[command(flatten)]
    target: Target,
    /// How many.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// How many at a time.
    #[arg(long, default_value_t = 1)]
    concurrency: u64,
    /// Method.
    #[arg(long, default_value = "GET")]
    method: String,
    /// Path.
    #[arg(long, default_value = "/")]
    path: String,
    /// Host header.
    #[arg(long, default_value = "web.shop.svc.cluster.local")]
    host: String,
    /// A further header, `name: value`.
    #[arg(long)]
    header: Vec<String>,
    /// Use one connection for all calls of a thread.
    #[arg(long)]
    keep_alive: bool,
    /// Milliseconds between the calls of a thread, so that they spread over a time.
    #[arg(long, default_value_t = 0)]
    pace_ms: u64,
    /// Print each call's end as it happens (one line), before the summary.
    #[arg(long)]
    progress: bool,
}

#[derive(Debug, Default)]
struct Tally {
    statuses: BTreeMap<u16, u64>,
    bodies: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    micros: Vec<u64>,
    payload: u64,
    last: Option<(http::Answer, String, String)>,
}

impl Calls {
    pub(super) fn run(self) -> Result<Value> {
        let (next, tally) = (AtomicU64::new(0), Mutex::new(Tally::default()));
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 0..self.concurrency {
                scope.spawn(|| self.work(&next, &tally));
            }
        });
        let tally = tally.into_inner().map_err(|_| anyhow::anyhow!("a caller panicked"))?;
        let (answer, local, peer) = tally.last.unwrap_or_default();
        Ok(json!({
            "calls": self.count,
            "ok": tally.statuses.iter().filter(|(code, _)| **code < 400).map(|(_, n)| n).sum::<u64>(),
            "failed": tally.errors.values().sum::<u64>(),
            "statuses": tally.statuses,
            "bodies": tally.bodies,
            "errors": tally.errors,
            "micros": tally.micros,
            "payload_bytes": tally.payload,
            "local": local,
            "peer": peer,
            "headers": answer.headers,
            "elapsed_ms": start.elapsed().as_millis() as u64,
        }))
    }

    fn work(&self, next: &AtomicU64, tally: &Mutex<Tally>) {
        let mut open: Option<TcpStream> = None;
        let request = self.request();
        while next.fetch_add(1, Ordering::Relaxed) < self.count {
            let start = Instant::now();
            let result = self.call(&request, &mut open);
            let micros = start.elapsed().as_micros() as u64;
            if let Ok(mut tally) = tally.lock() {
                match result {
                    Ok((answer, local, peer)) => {
                        *tally.statuses.entry(answer.status).or_default() += 1;
                        let body = answer.text().lines().next().unwrap_or_default().to_owned();
                        *tally.bodies.entry(body).or_default() += 1;
                        tally.micros.push(micros);
                        tally.payload += (request.len() + answer.body.len()) as u64;
                        tally.last = Some((answer, local, peer));
                    }
                    Err(error) => {
                        open = None;
                        *tally.errors.entry(kind_of(&error)).or_default() += 1;
                    }
                }
            }
            if self.progress {
                super::say("call");
            }
            if self.pace_ms > 0 {
                thread::sleep(Duration::from_millis(self.pace_ms));
            }
        }
    }

    fn request(&self) -> Request {
        let headers = self.header.iter().filter_map(|line| line.split_once(':'));
        Request {
            method: self.method.clone(),
            path: self.path.clone(),
            host: self.host.clone(),
            headers: headers.map(|(name, value)| (name.into(), value.trim().into())).collect(),
            body: Vec::new(),
            keep_alive: self.keep_alive,
        }
    }

    fn call(
        &self,
        request: &Request,
        open: &mut Option<TcpStream>,
    ) -> Result<(http::Answer, String, String)> {
        let stream = match open.take() {
            Some(stream) => stream,
            None => self.target.dial()?,
        };
        let (local, peer) = (stream.local_addr()?.to_string(), stream.peer_addr()?.to_string());
        let answer = http::exchange(&stream, request)?;
        let closes = answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        if self.keep_alive && !closes {
            *open = Some(stream);
        }
        Ok((answer, local, peer))
    }
}

/// One TCP connection.
#[derive(Debug, Clone, Args)]
pub struct Dial {
    #[command(flatten)]
    target: Target,
    /// Send this line after connecting.
    #[arg(long)]
    send: Option<String>,
    /// Read until the peer closes.
    #[arg(long)]
    to_end: bool,
    /// After the first answer hold the connection until the peer ends it.
    #[arg(long)]
    hold: bool,
    /// Reset the connection after the first answer, instead of closing it.
    #[arg(long)]
    reset: bool,
}

impl Dial {
    pub(super) fn run(self) -> Result<Value> {
        let start = Instant::now();
        let stream = match self.target.dial() {
            Ok(stream) => stream,
            Err(error) => {
                return Ok(
                    json!({"connected": false, "error": kind_of(&error), "micros": start.elapsed().as_micros() as u64}),
                );
            }
        };
        let micros = start.elapsed().as_micros() as u64;
        let (local, peer) = (stream.local_addr()?.to_string(), stream.peer_addr()?.to_string());
        let mut heard = Vec::new();
        let result = self.talk(&stream, &mut heard);
        if self.reset {
            super::server::reset(stream)?;
        }
        Ok(json!({
            "connected": true,
            "micros": micros,
            "local": local,
            "peer": peer,
            "heard": String::from_utf8_lossy(&heard),
            "error": result.err().map(|error| kind_of(&error)),
            "held_ms": start.elapsed().as_millis() as u64,
        }))
    }

    fn talk(&self, stream: &TcpStream, heard: &mut Vec<u8>) -> Result<()> {
        let mut stream = stream;
        if let Some(line) = &self.send {
            stream.write_all(format!("{line}\n").as_bytes())?;
        }
        let mut buffer = [0; 4096];
        loop {
            let n = stream.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            let first = heard.is_empty();
            heard.extend_from_slice(&buffer[..n]);
            if !self.to_end && !self.hold {
                return Ok(());
            }
            if first && self.hold {
                super::say("established");
            }
        }
    }
}

/// Many connections at once.
#[derive(Debug, Clone, Args)]
pub struct Many {
    #[command(flatten)]
    target: Target,
    /// How many.
    #[arg(long)]
    count: usize,
    /// Threads that open them.
    #[arg(long, default_value_t = 16)]
    threads: usize,
    /// Milliseconds between the connections of a thread.
    #[arg(long, default_value_t = 0)]
    pace_ms: u64,
    /// Print a line for each connection.
    #[arg(long)]
    progress: bool,
    /// Keep each open until all have exchanged; else close each after its exchange.
    #[arg(long)]
    together: bool,
}

impl Many {
    pub(super) fn run(self) -> Result<Value> {
        let next = AtomicU64::new(0);
        let state = Mutex::new((Vec::new(), BTreeMap::<String, u64>::new(), 0_u64));
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 0..self.threads {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= self.count as u64 {
                            return;
                        }
                        let result = self.exchange(number);
                        if self.progress {
                            super::say("call");
                        }
                        if self.pace_ms > 0 {
                            thread::sleep(Duration::from_millis(self.pace_ms));
                        }
                        let Ok(mut state) = state.lock() else { return };
                        match result {
                            Ok(stream) => {
                                state.2 += 1;
                                if self.together {
                                    state.0.push(stream);
                                }
                            }
                            Err(error) => *state.1.entry(kind_of(&error)).or_default() += 1,
                        }
                    }
                });
            }
        });
        let (open, errors, ok) = state.into_inner().map_err(|_| anyhow::anyhow!("a caller panicked"))?;
        // All stand now: each must still echo.
        let mut alive = 0;
        for stream in &open {
            if echo(stream, "again").is_ok() {
                alive += 1;
            }
        }
        Ok(json!({
            "ok": ok,
            "failed": errors.values().sum::<u64>(),
            "errors": errors,
            "together": open.len(),
            "alive": alive,
            "elapsed_ms": start.elapsed().as_millis() as u64,
        }))
    }

    /// Reads the banner, sends a line of its own and expects it back.
    fn exchange(&self, number: u64) -> Result<TcpStream> {
        let stream = self.target.dial()?;
        let banner = read_line(&stream)?;
        ensure!(banner.starts_with("220 "), "banner {banner:?}");
        echo(&stream, &format!("line {number}"))?;
        Ok(stream)
    }
}

fn echo(mut stream: &TcpStream, line: &str) -> Result<()> {
    stream.write_all(format!("{line}\n").as_bytes())?;
    let back = read_line(stream)?;
    ensure!(back == line, "sent {line:?}, got {back:?}");
    Ok(())
}

fn read_line(mut stream: &TcpStream) -> Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        ensure!(stream.read(&mut byte)? == 1, "closed after {:?}", String::from_utf8_lossy(&line));
        if byte[0] == b'\n' {
            return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        line.push(byte[0]);
    }
}

/// A stream up and its checksum back.
#[derive(Debug, Clone, Args)]
pub struct Stream {
    #[command(flatten)]
    target: Target,
    /// Bytes.
    #[arg(long)]
    bytes: u64,
    /// Read until the server closes its sending side, and only then send; nothing is read afterwards.
    #[arg(long)]
    after_end: bool,
}

impl Stream {
    pub(super) fn run(self) -> Result<Value> {
        let start = Instant::now();
        let mut stream = self.target.dial()?;
        let mut heard = String::new();
        if self.after_end {
            stream.read_to_string(&mut heard).context("read until the server closes its sending side")?;
        }
        let mut sum = Checksum::default();
        let mut sent = 0;
        while sent < self.bytes {
            let block = block(sent, self.bytes);
            stream.write_all(&block).with_context(|| format!("after {sent} bytes"))?;
            sum.add(&block);
            sent += block.len() as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        if self.after_end {
            return Ok(json!({"sent": sent, "checksum": sum.to_string(), "heard": heard}));
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("read the answer after closing the sending side")?;
        Ok(json!({
            "sent": sent,
            "checksum": sum.to_string(),
            "answer": answer.trim(),
            "matches": answer.trim() == format!("{sent} {sum}"),
            "elapsed_ms": start.elapsed().as_millis() as u64,
        }))
    }
}

/// A reader that takes its time.
#[derive(Debug, Clone, Args)]
pub struct Slow {
    #[command(flatten)]
    target: Target,
    /// Bytes.
    #[arg(long)]
    bytes: u64,
    /// Read nothing until this file exists.
    #[arg(long)]
    until: std::path::PathBuf,
    /// Close the sending side once the request is sent.
    #[arg(long)]
    half: bool,
}

impl Slow {
    pub(super) fn run(self) -> Result<Value> {
        let mut stream = self.target.dial()?;
        stream.write_all(&self.bytes.to_be_bytes())?;
        if self.half {
            stream.shutdown(Shutdown::Write)?;
        }
        super::say("asked");
        crate::wait::until(Duration::from_secs(120), "leave to read", || {
            self.until.exists().then_some(()).context("not yet")
        })?;
        let (mut sum, mut wanted, mut got) = (Checksum::default(), Checksum::default(), 0_u64);
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = stream.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            sum.add(&buffer[..n]);
            got += n as u64;
        }
        let mut at = 0;
        while at < self.bytes {
            let block = block(at, self.bytes);
            wanted.add(&block);
            at += block.len() as u64;
        }
        Ok(json!({"received": got, "matches": got == self.bytes && sum == wanted}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_an_address_is_told_as_such() {
        let target = |to: &str| Target { to: to.to_owned(), timeout_ms: 1000 };
        let told = |to: &str| target(to).dial().err().map(|error| kind_of(&error)).unwrap_or_default();
        // Not even a port: no resolver is asked.
        let name = told("db-0.db");
        assert!(name.starts_with("look up db-0.db: "), "{name}");
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        assert_eq!(told(&free.map(|at| at.to_string()).unwrap_or_default()), "ConnectionRefused");
    }
}
