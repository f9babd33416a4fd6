//! Clients that are left alone.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use clap::ValueEnum;

use super::{
    PATIENCE, Pace, Tally,
    blob::{self, End, Order},
    rest,
};
use crate::{
    dice::Dice,
    load::{connect, exchange, request},
};

/// What a client that is left alone does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Steady {
    /// HTTP/1.1 over kept connections.
    Http,
    /// HTTP/2, with streams beside them that end early.
    Http2,
    /// A connection, one HTTP/1.1 request, its end.
    Connect,
    /// HTTP/1.1 over kept connections, for a body of 1 MiB that is compared.
    Fetch,
    /// A blob from the server, of up to 8 MiB.
    Download,
    /// A blob to the server, of up to 8 MiB.
    Upload,
    /// A blob of 1 MiB from the server, with a pause before every read.
    Slow,
    /// A connection with one HTTP/1.1 request, nothing for a while, one more request, its end.
    Idle,
}

/// The body of `/blob`: that of seed 0.
pub(crate) const BODY: u64 = 1 << 20;
/// Blobs of every size are asked for, up to this one.
const LARGEST: u64 = 8 << 20;

/// One connection's client, until it is to end.
pub(super) fn one(kind: Steady, server: SocketAddr, pace: &mut Pace, dice: &mut Dice, tally: &mut Tally) {
    let mut kept = None;
    let mut buffer = vec![0; 16_384];
    while pace.wait(dice) {
        let start = Instant::now();
        let done = match kind {
            Steady::Http | Steady::Fetch => {
                let path = if kind == Steady::Fetch { "/blob" } else { "/" };
                on(&mut kept, server, |stream| {
                    let body = exchange(stream, &request(server, path, false), &mut buffer)?;
                    if kind == Steady::Http {
                        return Ok(0);
                    }
                    blob::receive(&mut &buffer[body], 0, u64::MAX, || ()).and_then(|n| exactly(n, BODY))
                })
            }
            Steady::Connect => connect(server, PATIENCE).and_then(|mut stream| {
                exchange(&mut stream, &request(server, "/", true), &mut buffer).map(|_| 0)
            }),
            Steady::Download => {
                let order = order(true, dice.between(1, LARGEST), dice);
                if dice.once_in(4) {
                    kept = None;
                }
                on(&mut kept, server, |stream| give(stream, order, || ()))
            }
            Steady::Slow => {
                let order = order(true, 1 << 20, dice);
                let pause = dice.millis(10, 1_000);
                kept = None;
                on(&mut kept, server, |stream| give(stream, order, || rest(pause / 2)))
            }
            Steady::Upload => {
                let order = order(false, dice.between(1, LARGEST), dice);
                if dice.once_in(4) {
                    kept = None;
                }
                on(&mut kept, server, |stream| {
                    stream.write_all(order.to_string().as_bytes())?;
                    blob::send(stream, order.seed, order.bytes)?;
                    let mut answer = [0; 5];
                    stream.read_exact(&mut answer)?;
                    if answer == *b"took\n" { Ok(order.bytes) } else { Err(io::Error::other("not taken")) }
                })
            }
            Steady::Idle => {
                idle(server, dice.millis(2_000, 40_000), &mut buffer, tally);
                continue;
            }
            // In `streams`.
            Steady::Http2 => return,
        };
        tally.count(start, &done);
        match done {
            Ok(bytes) => tally.bytes += bytes,
            Err(_) => {
                kept = None;
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn order(give: bool, bytes: u64, dice: &mut Dice) -> Order {
    Order { give, bytes, seed: dice.between(0, 1 << 20), end: End::Whole, at: 0 }
}

/// Runs `work` on the connection that is kept, or on a new one that then is.
fn on<T>(
    kept: &mut Option<TcpStream>,
    server: SocketAddr,
    work: impl FnOnce(&mut TcpStream) -> io::Result<T>,
) -> io::Result<T> {
    let stream = match kept {
        Some(stream) => stream,
        None => {
            let stream = connect(server, PATIENCE)?;
            stream.set_write_timeout(Some(PATIENCE))?;
            kept.insert(stream)
        }
    };
    work(stream)
}

fn give(stream: &mut TcpStream, order: Order, pause: impl FnMut()) -> io::Result<u64> {
    stream.write_all(order.to_string().as_bytes())?;
    let got = blob::receive(stream, order.seed, order.bytes, pause)?;
    exactly(got, order.bytes)
}

fn exactly(got: u64, wanted: u64) -> io::Result<u64> {
    if got == wanted { Ok(got) } else { Err(io::Error::new(io::ErrorKind::UnexpectedEof, "an early end")) }
}

/// Two requests with a while between them.
fn idle(server: SocketAddr, span: Duration, buffer: &mut Vec<u8>, tally: &mut Tally) {
    let mut kept = None;
    for last in [false, true] {
        let start = Instant::now();
        let request = request(server, "/", last);
        let done = on(&mut kept, server, |stream| exchange(stream, &request, buffer));
        tally.count(start, &done);
        if last || done.is_err() {
            return;
        }
        rest(span);
    }
}
