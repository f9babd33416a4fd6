//! A small HTTP/1.1 load generator: blocking sockets, a thread for each connection, one JSON line at the end.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    ops::Range,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Subcommand;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

pub(crate) mod soak;

/// How the server is loaded. Latencies are in microseconds.
#[derive(Debug, Subcommand)]
pub(crate) enum Load {
    /// Open loop over kept connections: each request has a due time, and its latency counts from then.
    Rate {
        /// The server.
        server: SocketAddr,
        /// Connections.
        connections: u32,
        /// Requests per second, all together.
        rate: f64,
        /// For how long.
        seconds: f64,
        /// A request that takes longer has failed.
        #[arg(default_value_t = 5_000)]
        timeout_ms: u64,
    },
    /// Connect, one request, close, again.
    Connect {
        /// The server.
        server: SocketAddr,
        /// How many at once.
        threads: u32,
        /// For how long.
        seconds: f64,
    },
    /// One connection with one request to one server after the other. Says READY, and begins when a line comes in.
    Once {
        /// The servers.
        servers: Vec<SocketAddr>,
    },
    /// Closed loop over kept connections, each with a request in flight. Opens them with one request each, says READY,
    /// and begins when a line comes in, so that what it takes to open them can be told apart.
    Held {
        /// The server.
        server: SocketAddr,
        /// Connections.
        connections: u32,
        /// For how long.
        seconds: f64,
    },
    /// Opens connections with one request on each, says READY and holds them until standard input ends.
    Idle {
        /// The server.
        server: SocketAddr,
        /// Connections.
        connections: u32,
    },
    /// Opens connections, asks each for a large body, reads nothing, says READY and holds them.
    Stall {
        /// The server.
        server: SocketAddr,
        /// Connections.
        connections: u32,
    },
    /// Loads that go on until standard input ends.
    #[command(flatten)]
    Soak(soak::Soak),
}

/// Runs it.
///
/// # Errors
/// When a thread cannot be started.
pub(crate) fn run(load: &Load) -> Result<()> {
    match *load {
        Load::Soak(ref load) => soak::run(load),
        Load::Rate { server, connections, rate, seconds, timeout_ms } => {
            let timeout = Duration::from_millis(timeout_ms);
            report(paced(server, connections, rate, seconds, timeout)?, seconds)
        }
        Load::Connect { server, threads, seconds } => report(connecting(server, threads, seconds)?, seconds),
        Load::Once { ref servers } => {
            go()?;
            let mut all = (Vec::new(), 0);
            for server in servers {
                let (latencies, errors) = connecting(*server, 1, 0.0)?;
                all.0.extend(latencies);
                all.1 += errors;
            }
            report(all, 1.0)
        }
        Load::Held { server, connections, seconds } => report(held(server, connections, seconds)?, seconds),
        Load::Idle { server, connections } => {
            let request = request(server, "/", false);
            let mut buffer = vec![0; 16_384];
            hold((0..connections).filter_map(|_| {
                let mut stream = connect(server, Duration::from_secs(5)).ok()?;
                exchange(&mut stream, &request, &mut buffer).ok()?;
                Some(stream)
            }))
        }
        Load::Stall { server, connections } => {
            let request = request(server, "/big", false);
            hold((0..connections).filter_map(|_| {
                let mut stream = connect(server, Duration::from_secs(5)).ok()?;
                stream.write_all(&request).ok()?;
                Some(stream)
            }))
        }
    }
}

fn hold(streams: impl Iterator<Item = TcpStream>) -> Result<()> {
    let held: Vec<TcpStream> = streams.collect();
    say(&format!("READY {}", held.len()))?;
    let _ = std::io::stdin().read(&mut [0]);
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// Says READY, and waits for a line.
fn go() -> Result<()> {
    say("READY")?;
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

fn request(server: SocketAddr, path: &str, close: bool) -> Vec<u8> {
    let connection = if close { "Connection: close\r\n" } else { "" };
    format!("GET {path} HTTP/1.1\r\nHost: {server}\r\n{connection}\r\n").into_bytes()
}

fn connect(server: SocketAddr, timeout: Duration) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    Ok(stream)
}

/// One request and its response with a content-length; gives where in `buffer` its body is.
fn exchange(stream: &mut TcpStream, request: &[u8], buffer: &mut Vec<u8>) -> io::Result<Range<usize>> {
    stream.write_all(request)?;
    let (mut filled, mut body) = (0, None);
    loop {
        match &body {
            Some(Range { end, .. }) if filled >= *end => return Ok(body.unwrap_or_default()),
            Some(Range { end, .. }) if buffer.len() < *end => buffer.resize(*end, 0),
            None if filled == buffer.len() => buffer.resize(filled * 2, 0),
            _ => {}
        }
        let read = stream.read(&mut buffer[filled..])?;
        if read == 0 {
            let what = if filled == 0 { "closed without an answer" } else { "closed inside an answer" };
            return Err(io::Error::new(ErrorKind::UnexpectedEof, what));
        }
        filled += read;
        if body.is_none()
            && let Some(end) = buffer[..filled].windows(4).position(|w| w == b"\r\n\r\n")
        {
            body = Some(end + 4..end + 4 + length(&buffer[..end])?);
        }
    }
}

/// The content-length of a response whose head this is.
fn length(head: &[u8]) -> io::Result<usize> {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    if !head.starts_with("http/1.1 200") {
        let line = head.lines().next().unwrap_or_default();
        return Err(io::Error::new(ErrorKind::InvalidData, format!("answered {line:?}")));
    }
    let length =
        head.split("content-length:").nth(1).and_then(|rest| rest.lines().next()?.trim().parse().ok());
    length.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "an answer without a length"))
}

type Latencies = (Vec<u64>, u64);

fn join(threads: Vec<thread::ScopedJoinHandle<'_, Latencies>>) -> Result<Latencies> {
    let mut all = (Vec::new(), 0);
    for thread in threads {
        let (latencies, errors) = thread.join().ok().context("a thread of the load panicked")?;
        all.0.extend(latencies);
        all.1 += errors;
    }
    Ok(all)
}

fn paced(
    server: SocketAddr,
    connections: u32,
    rate: f64,
    seconds: f64,
    timeout: Duration,
) -> Result<Latencies> {
    ensure!(connections > 0 && rate > 0.0, "a load needs a connection and a rate");
    let gate = Barrier::new(connections as usize);
    let base = Instant::now();
    let request = request(server, "/", false);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for index in 0..connections {
            let (gate, request) = (&gate, &request);
            let work = move || {
                let offset = f64::from(index) / f64::from(connections);
                let period = f64::from(connections) / rate;
                one(server, request, timeout, gate, base, (period, offset), seconds)
            };
            threads.push(thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, work)?);
        }
        join(threads)
    })
}

/// One connection of the open loop.
fn one(
    server: SocketAddr,
    request: &[u8],
    timeout: Duration,
    gate: &Barrier,
    base: Instant,
    (period, offset): (f64, f64),
    seconds: f64,
) -> Latencies {
    // Wake when due, not up to 50 us later.
    let _ = nix::sys::prctl::set_timerslack(1);
    let (mut buffer, mut latencies, mut errors) = (vec![0; 16_384], Vec::new(), 0);
    let mut stream = connect(server, timeout).ok();
    for _ in 0..20 {
        if stream.as_mut().and_then(|stream| exchange(stream, request, &mut buffer).ok()).is_none() {
            stream = None;
            break;
        }
    }
    gate.wait();
    let start = base.elapsed().as_secs_f64() + 0.05;
    let count = (seconds / period) as u64;
    for k in 0..count {
        // A way that stands still must not hold the run up: what is left counts as failed.
        if base.elapsed().as_secs_f64() > start + seconds + 1.0 {
            errors += count - k;
            break;
        }
        let due = base + Duration::from_secs_f64(start + period * (k as f64 + offset));
        let now = Instant::now();
        if due > now {
            thread::sleep(due - now);
        }
        // One that could be sent on time counts from when it was sent: the sleep's own lateness is no fault of the
        // server's. A late one counts from its due time.
        let begin = if now < due { Instant::now() } else { due };
        if stream.is_none() {
            stream = connect(server, timeout).ok();
        }
        match stream.as_mut().and_then(|stream| exchange(stream, request, &mut buffer).ok()) {
            Some(_) => latencies.push(begin.elapsed().as_micros() as u64),
            None => {
                errors += 1;
                stream = None;
            }
        }
    }
    (latencies, errors)
}

fn connecting(server: SocketAddr, threads: u32, seconds: f64) -> Result<Latencies> {
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let request = request(server, "/", true);
    thread::scope(|scope| {
        let work = || {
            let (mut buffer, mut latencies, mut errors) = (vec![0; 16_384], Vec::new(), 0);
            loop {
                let start = Instant::now();
                let done = connect(server, Duration::from_secs(5))
                    .and_then(|mut stream| exchange(&mut stream, &request, &mut buffer));
                match done {
                    Ok(_) => latencies.push(start.elapsed().as_micros() as u64),
                    Err(_) => {
                        errors += 1;
                        thread::sleep(Duration::from_millis(1));
                    }
                }
                if Instant::now() >= end {
                    return (latencies, errors);
                }
            }
        };
        join((0..threads).map(|_| scope.spawn(work)).collect())
    })
}

/// All connections on one thread, by epoll.
fn held(server: SocketAddr, connections: u32, seconds: f64) -> Result<Latencies> {
    let request = request(server, "/", false);
    let (mut buffer, mut streams, mut length) = (vec![0; 16_384], Vec::new(), 0);
    for _ in 0..connections {
        let mut stream = connect(server, Duration::from_secs(5))?;
        length = exchange(&mut stream, &request, &mut buffer).context("a first request failed")?.end;
        stream.set_nonblocking(true)?;
        streams.push((stream, 0_usize, Instant::now()));
    }
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (index, (stream, _, _)) in streams.iter().enumerate() {
        epoll.add(stream, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
    }
    go()?;
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let (mut latencies, mut errors) = (Vec::new(), 0);
    for (stream, _, began) in &mut streams {
        *began = Instant::now();
        stream.write_all(&request)?;
    }
    let mut events = [EpollEvent::empty(); 256];
    while Instant::now() < end {
        let count = epoll.wait(&mut events, 100_u8)?;
        for event in &events[..count] {
            let Some((stream, filled, began)) = streams.get_mut(event.data() as usize) else { continue };
            match stream.read(&mut buffer) {
                Ok(read) if read > 0 => *filled += read,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                _ => {
                    errors += 1;
                    epoll.delete(&*stream)?;
                    continue;
                }
            }
            // Every response is as long as the first.
            if *filled >= length {
                latencies.push(began.elapsed().as_micros() as u64);
                (*filled, *began) = (0, Instant::now());
                errors += u64::from(stream.write_all(&request).is_err());
            }
        }
    }
    Ok((latencies, errors))
}

fn report((mut latencies, errors): Latencies, seconds: f64) -> Result<()> {
    latencies.sort_unstable();
    let last = latencies.len().saturating_sub(1);
    let quantile =
        |q: f64| latencies.get(((latencies.len() as f64 * q) as usize).min(last)).copied().unwrap_or(0);
    say(&serde_json::json!({
        "n": latencies.len(),
        "errors": errors,
        "per_s": latencies.len() as f64 / seconds,
        "p50_us": quantile(0.5),
        "p99_us": quantile(0.99),
        "max_us": latencies.last(),
    })
    .to_string())
}
