//! Clients that end in the middle of things, or whose server does. Until then they are served like all others.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use clap::ValueEnum;

use super::{
    PATIENCE, Pace, Tally,
    blob::{self, End, Order},
    rest,
};
use crate::{
    dice::Dice,
    load::{connect, request},
};

/// What a client speaks whose connections end in their middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Doomed {
    /// HTTP/1.1.
    Http,
    /// HTTP/2.
    Http2,
    /// Blobs: here the server ends some of them.
    Blobs,
    /// HTTP/1.1, for a body that it does not read before it goes.
    Stalled,
}

/// The most that is read or written before an end.
const FAR: u64 = 1 << 20;

/// One connection after another, until it is to end.
pub(super) fn one(kind: Doomed, server: SocketAddr, pace: &mut Pace, dice: &mut Dice, tally: &mut Tally) {
    while pace.wait(dice) {
        let done = match kind {
            Doomed::Http => http(server, dice, tally),
            Doomed::Blobs => blobs(server, dice, tally),
            Doomed::Stalled => stalled(server, dice, tally),
            // In `streams`.
            Doomed::Http2 => return,
        };
        if let Err(error) = done {
            tally.fail(&error);
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn open(server: SocketAddr) -> io::Result<TcpStream> {
    let stream = connect(server, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Reads that many bytes, whatever they are.
fn swallow(stream: &mut TcpStream, bytes: u64) -> io::Result<()> {
    let got = io::copy(&mut stream.take(bytes), &mut io::sink())?;
    if got == bytes { Ok(()) } else { Err(io::Error::new(ErrorKind::UnexpectedEof, "an early end")) }
}

fn http(server: SocketAddr, dice: &mut Dice, tally: &mut Tally) -> io::Result<()> {
    let mut stream = open(server)?;
    let (far, wait) = (dice.between(1, FAR), dice.millis(0, 50));
    let big = request(server, "/big", false);
    let what = match dice.between(1, 7) {
        1 => {
            blob::reset(stream);
            "connected, then RST"
        }
        2 => "connected, then closed",
        3 => {
            stream.write_all(&big[..dice.between(1, big.len() as u64 - 1) as usize])?;
            rest(wait);
            blob::reset(stream);
            "RST inside a request's head"
        }
        4 => {
            let head = format!("POST / HTTP/1.1\r\nHost: {server}\r\nContent-Length: {}\r\n\r\n", far + 1);
            stream.write_all(head.as_bytes())?;
            // The answer may come, and the end of the connection too, before all is sent.
            let _ = blob::send(&mut stream, 0, far);
            blob::reset(stream);
            "RST inside a request's body"
        }
        5 => {
            stream.write_all(&big)?;
            swallow(&mut stream, far)?;
            rest(wait);
            blob::reset(stream);
            "RST inside a response"
        }
        6 => {
            stream.write_all(&big)?;
            swallow(&mut stream, far)?;
            stream.shutdown(Shutdown::Write)?;
            rest(wait);
            // What comes after a half-close is the server's choice.
            let _ = swallow(&mut stream, far);
            blob::reset(stream);
            "half-closed inside a response, then RST"
        }
        _ => {
            stream.write_all(&big)?;
            swallow(&mut stream, far)?;
            "closed inside a response"
        }
    };
    tally.did(what);
    Ok(())
}

fn stalled(server: SocketAddr, dice: &mut Dice, tally: &mut Tally) -> io::Result<()> {
    let mut stream = open(server)?;
    stream.write_all(&request(server, "/big", false))?;
    rest(dice.millis(500, 20_000));
    if dice.once_in(2) {
        blob::reset(stream);
        tally.did("stalled reader gone by RST");
    } else {
        drop(stream);
        tally.did("stalled reader closed");
    }
    Ok(())
}

fn blobs(server: SocketAddr, dice: &mut Dice, tally: &mut Tally) -> io::Result<()> {
    let mut stream = open(server)?;
    let (seed, at) = (dice.between(0, 1 << 20), dice.between(1, FAR));
    let order = |give, bytes, end| Order { give, bytes, seed, end, at };
    let ask = |stream: &mut TcpStream, order: Order| stream.write_all(order.to_string().as_bytes());
    let what = match dice.between(1, 7) {
        1 => {
            ask(&mut stream, order(true, 2 * FAR, End::Reset))?;
            match blob::receive(&mut stream, seed, 2 * FAR, || ()) {
                Ok(got) => {
                    tally.untrue(format!("a server's RST was seen as a clean end ({} bytes)", size(got)));
                }
                Err(error) => broken(&error)?,
            }
            "the server's RST while it gave"
        }
        2 => {
            ask(&mut stream, order(true, 2 * FAR, End::Close))?;
            match blob::receive(&mut stream, seed, 2 * FAR, || ()) {
                Ok(got) if got == at => tally.bytes += got,
                Ok(_) => tally.untrue("a server's close was seen early".into()),
                Err(error) => tally.untrue(format!("a server's close was seen as: {error}")),
            }
            "the server's close while it gave"
        }
        3 => {
            ask(&mut stream, order(false, 16 * FAR, End::Reset))?;
            let sent = blob::send(&mut stream, seed, 16 * FAR);
            match sent.and_then(|()| stream.read_exact(&mut [0])) {
                Ok(()) => tally.untrue("an answer from a server that was gone".into()),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    tally.untrue("a server's RST was seen as a clean end".into());
                }
                Err(error) => broken(&error)?,
            }
            "the server's RST while it took"
        }
        4 => {
            ask(&mut stream, order(true, 64 * FAR, End::Whole))?;
            tally.bytes += blob::receive(&mut stream, seed, at, || ())?;
            blob::reset(stream);
            "RST inside a download"
        }
        5 => {
            ask(&mut stream, order(false, 2 * FAR, End::Whole))?;
            blob::send(&mut stream, seed, at)?;
            blob::reset(stream);
            "RST inside an upload"
        }
        6 => {
            ask(&mut stream, order(true, at, End::Whole))?;
            stream.shutdown(Shutdown::Write)?;
            match blob::receive(&mut stream, seed, 2 * FAR, || ()) {
                Ok(got) if got == at => tally.bytes += got,
                Ok(_) => tally.untrue("a half-close cut the answer".into()),
                Err(error) => tally.untrue(format!("a half-close was answered with: {error}")),
            }
            "half-closed, and the rest was read"
        }
        _ => {
            ask(&mut stream, order(true, 64 * FAR, End::Whole))?;
            stream.shutdown(Shutdown::Write)?;
            tally.bytes += blob::receive(&mut stream, seed, at, || ())?;
            blob::reset(stream);
            "half-closed inside a download, then RST"
        }
    };
    tally.did(what);
    Ok(())
}

/// Whether an error tells of a connection that the other side broke; one that only ran out of time does not.
fn broken(error: &io::Error) -> io::Result<()> {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => Ok(()),
        kind => Err(io::Error::new(kind, format!("instead of a reset: {error}"))),
    }
}

/// A size to tell cases apart by, not every number.
fn size(bytes: u64) -> &'static str {
    match bytes {
        0 => "no",
        1..1_024 => "few",
        1_024..65_536 => "some",
        _ => "many",
    }
}
