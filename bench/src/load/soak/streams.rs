//! HTTP/2: streams that are left alone beside some that are reset, and connections that end under their streams.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use parking_lot::Mutex;
use tokio::{net::TcpStream, task::AbortHandle, time::timeout};
use weft_runtime::Tasks;

use super::{PATIENCE, Pace, Tally, ending};
use crate::dice::Dice;

/// Of these many streams one is reset.
const RESET: u64 = 20;
/// The most that is read of a stream before its reset.
const FAR: u64 = 1 << 18;
/// What a stream and a connection may bring before it is read.
const WINDOW: u32 = 1 << 20;
/// The body of `/`.
const BODY: u64 = 1_024;

type Shared = Arc<Mutex<Tally>>;

/// Connections with paced streams; one in [`RESET`] is for a large body and reset in its middle.
pub(super) fn steady(server: SocketAddr, connections: u32, rate: f64, seed: u64) -> Result<Tally> {
    run(connections, rate, seed, move |tasks, mut pace, mut dice, tally| async move {
        while !ending() {
            let (requests, driver) = match open(server, &tasks, false).await {
                Ok(both) => both,
                Err(error) => {
                    tally.lock().fail(&error);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            };
            while !driver.is_finished() && wait(&mut pace, &mut dice).await {
                let victim = dice.once_in(RESET).then(|| dice.between(1, FAR));
                let (requests, tally) = (requests.clone(), tally.clone());
                tasks.spawn("stream", async move {
                    let start = Instant::now();
                    let path = if victim.is_some() { "/big" } else { "/" };
                    let done = timeout(PATIENCE, ask(requests, server, path, victim)).await;
                    let done = done.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                    let done = done.and_then(|got| match victim {
                        None if got != BODY => Err(io::Error::other("a body of another length")),
                        _ => Ok(()),
                    });
                    let mut tally = tally.lock();
                    match (&done, victim) {
                        (Ok(()), Some(_)) => tally.did("HTTP/2 stream reset inside a response"),
                        _ => tally.count(start, &done),
                    }
                });
            }
        }
    })
}

/// Connections with eight streams for large bodies and eight for small ones, ended under them.
pub(super) fn doomed(server: SocketAddr, connections: u32, rate: f64, seed: u64) -> Result<Tally> {
    run(connections, rate, seed, move |tasks, mut pace, mut dice, tally| async move {
        while wait(&mut pace, &mut dice).await {
            let reset = dice.once_in(2);
            let (requests, driver) = match open(server, &tasks, reset).await {
                Ok(both) => both,
                Err(error) => {
                    tally.lock().fail(&error);
                    continue;
                }
            };
            for index in 0..16 {
                let path = if index % 2 == 0 { "/big" } else { "/" };
                let (requests, far) = (requests.clone(), dice.between(1, FAR));
                tasks.spawn("stream", async move {
                    // It ends with the connection.
                    let _ = ask(requests, server, path, Some(far)).await;
                });
            }
            drop(requests);
            tokio::time::sleep(dice.millis(0, 300)).await;
            driver.abort();
            tally.lock().did(if reset {
                "HTTP/2 connection ended under its streams by RST"
            } else {
                "HTTP/2 connection closed under its streams"
            });
        }
    })
}

/// Runs a client for each connection on one thread, and waits for what they began.
fn run<F: Future<Output = ()> + Send + 'static>(
    connections: u32,
    rate: f64,
    seed: u64,
    client: impl Fn(Tasks, Pace, Dice, Shared) -> F,
) -> Result<Tally> {
    let tally = Shared::default();
    let tasks = Tasks::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let clients = Tasks::new();
        for index in 0..connections {
            let mut dice = Dice::new(seed.wrapping_add(u64::from(index) << 32));
            let pace = Pace::new(connections, rate, &mut dice);
            clients.spawn("client", client(tasks.clone(), pace, dice, tally.clone()));
        }
        while !clients.is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tasks.join(PATIENCE).await;
    });
    Ok(std::mem::take(&mut *tally.lock()))
}

/// As [`Pace::wait`].
async fn wait(pace: &mut Pace, dice: &mut Dice) -> bool {
    let due = pace.due(dice);
    while let Some(left) = due.checked_duration_since(Instant::now())
        && !ending()
    {
        tokio::time::sleep(left.min(Duration::from_millis(100))).await;
    }
    !ending()
}

async fn open(
    server: SocketAddr,
    tasks: &Tasks,
    reset: bool,
) -> io::Result<(SendRequest<Bytes>, AbortHandle)> {
    let stream = timeout(PATIENCE, TcpStream::connect(server)).await??;
    stream.set_nodelay(true)?;
    if reset {
        stream.set_zero_linger()?;
    }
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(WINDOW).initial_connection_window_size(WINDOW);
    let shaken = timeout(PATIENCE, builder.handshake(stream)).await?;
    let (requests, connection) = shaken.map_err(io::Error::other)?;
    let driver = tasks.spawn("connection", async move {
        // Its streams say how it ended.
        let _ = connection.await;
    });
    Ok((requests, driver))
}

/// Asks, and reads the body to its end or up to `far`, where it resets the stream. Gives how much was read.
async fn ask(
    requests: SendRequest<Bytes>,
    server: SocketAddr,
    path: &str,
    far: Option<u64>,
) -> io::Result<u64> {
    let mut requests = requests.ready().await.map_err(io::Error::other)?;
    let request = http::Request::get(format!("http://{server}{path}")).body(()).map_err(io::Error::other)?;
    let (response, _) = requests.send_request(request, true).map_err(io::Error::other)?;
    body(response, far).await.map_err(io::Error::other)?
}

async fn body(response: ResponseFuture, far: Option<u64>) -> Result<io::Result<u64>, h2::Error> {
    let response = response.await?;
    if response.status() != http::StatusCode::OK {
        return Ok(Err(io::Error::other(format!("status {}", response.status().as_u16()))));
    }
    let (mut body, mut got) = (response.into_body(), 0);
    while far.is_none_or(|far| got < far)
        && let Some(part) = body.data().await
    {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        got += part.len() as u64;
    }
    Ok(Ok(got))
}
