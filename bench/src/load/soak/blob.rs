//! A server that gives and takes bytes whose every place is known, and ends in the middle where it is asked to.
//!
//! A client sends a line, `give BYTES SEED END AT` or `take BYTES SEED END AT`. `whole` is the end of an exchange that
//! succeeds: after `give` the client has BYTES bytes, after `take` it has sent as many and hears `took`. With `close` or
//! `reset` the server ends the connection so after AT bytes. After a whole one the next line may follow.

use std::{
    fmt,
    io::{self, BufRead as _, BufReader, ErrorKind, Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream},
    str::FromStr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt::Linger};

/// The most that is read or written at a time.
const PIECE: usize = 1 << 16;
/// A prime, so that no place of one piece has the bytes of the next one's.
const ROUND: usize = 65_521;
/// Clients at a time; more are closed.
const CLIENTS: usize = 2_048;

static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dice = crate::dice::Dice::new(1);
    let mut table: Vec<u8> = (0..ROUND).map(|_| dice.next() as u8).collect();
    table.extend_from_within(..);
    table.extend_from_within(..PIECE - ROUND);
    table
});

/// At most [`PIECE`] bytes of the blob of that seed, from `at` on and before `end`.
pub(crate) fn piece(seed: u64, at: u64, end: u64) -> &'static [u8] {
    let from = (seed.wrapping_add(at) % ROUND as u64) as usize;
    &TABLE[from..from + (end - at).min(PIECE as u64) as usize]
}

/// How an exchange ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// As it should.
    Whole,
    /// With the server's close after some bytes.
    Close,
    /// With the server's reset after some bytes.
    Reset,
}

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Order {
    /// From the server to the client.
    pub(super) give: bool,
    pub(super) bytes: u64,
    pub(super) seed: u64,
    pub(super) end: End,
    /// Where it ends, if it does not as it should.
    pub(super) at: u64,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.give { "give" } else { "take" };
        let end = match self.end {
            End::Whole => "whole",
            End::Close => "close",
            End::Reset => "reset",
        };
        writeln!(f, "{verb} {} {} {end} {}", self.bytes, self.seed, self.at)
    }
}

impl FromStr for Order {
    type Err = io::Error;

    fn from_str(line: &str) -> io::Result<Self> {
        let wrong = || io::Error::new(ErrorKind::InvalidData, "not an order");
        let words: Vec<&str> = line.split_whitespace().collect();
        let [verb, bytes, seed, end, at] = words[..] else { return Err(wrong()) };
        let number = |word: &str| word.parse::<u64>().map_err(|_| wrong());
        let give = match verb {
            "give" => true,
            "take" => false,
            _ => return Err(wrong()),
        };
        let end = match end {
            "whole" => End::Whole,
            "close" => End::Close,
            "reset" => End::Reset,
            _ => return Err(wrong()),
        };
        Ok(Self { give, bytes: number(bytes)?, seed: number(seed)?, end, at: number(at)? })
    }
}

/// Reads a blob's bytes up to `end`, or to a clean end, and compares each; gives where it came to. `pause` is called
/// before every read.
pub(super) fn receive(
    stream: &mut impl Read,
    seed: u64,
    end: u64,
    mut pause: impl FnMut(),
) -> io::Result<u64> {
    let (mut at, mut buffer) = (0, vec![0; PIECE]);
    while at < end {
        pause();
        let most = (end - at).min(PIECE as u64) as usize;
        let n = stream.read(&mut buffer[..most])?;
        if n == 0 {
            break;
        }
        if buffer[..n] != piece(seed, at, at + n as u64)[..n] {
            return Err(io::Error::new(ErrorKind::InvalidData, "other bytes than were sent"));
        }
        at += n as u64;
    }
    Ok(at)
}

/// Writes a blob's bytes up to `end`.
pub(super) fn send(stream: &mut impl Write, seed: u64, end: u64) -> io::Result<()> {
    let mut at = 0;
    while at < end {
        let piece = piece(seed, at, end);
        stream.write_all(piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// Ends a connection by a reset.
pub(super) fn reset(stream: TcpStream) {
    let _ = setsockopt(&stream, Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 });
    drop(stream);
}

/// Serves until it is killed.
///
/// # Errors
/// When it cannot listen.
pub(super) fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("listen")?;
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let (stream, _) = listener.accept().context("accept")?;
        if clients.load(Ordering::Relaxed) >= CLIENTS {
            continue;
        }
        clients.fetch_add(1, Ordering::Relaxed);
        let clients = clients.clone();
        thread::Builder::new().stack_size(256 << 10).spawn(move || {
            // A client that ended is no news.
            let _ = client(stream);
            clients.fetch_sub(1, Ordering::Relaxed);
        })?;
    }
}

fn client(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    loop {
        line.clear();
        if reader.by_ref().take(128).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let order: Order = line.parse()?;
        let upto = if order.end == End::Whole { order.bytes } else { order.at.min(order.bytes) };
        if order.give {
            send(&mut &stream, order.seed, upto)?;
        } else {
            let got = receive(&mut reader, order.seed, upto, || ())?;
            if got < upto {
                return Ok(());
            }
        }
        match order.end {
            End::Whole if order.give => {}
            End::Whole => (&stream).write_all(b"took\n")?,
            End::Close => return Ok(()),
            End::Reset => {
                drop(reader);
                reset(stream);
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_read_as_written() {
        for (give, end) in [(true, End::Whole), (false, End::Close), (true, End::Reset)] {
            let order = Order { give, bytes: 70_000, seed: 9, end, at: 12 };
            assert_eq!(order.to_string().parse::<Order>().unwrap(), order);
        }
        assert!("give 1 2 whole".parse::<Order>().is_err());
        assert!("give 1 2 whole x".parse::<Order>().is_err());
    }

    #[test]
    fn a_piece_may_begin_anywhere() {
        for seed in (0..ROUND as u64).step_by(7).chain([ROUND as u64 - 1]) {
            let whole = piece(seed, 0, u64::MAX);
            assert_eq!(whole.len(), PIECE);
            assert_eq!(whole[PIECE - 1], piece(seed, PIECE as u64 - 1, u64::MAX)[0]);
        }
    }

    #[test]
    fn a_byte_that_is_wrong_or_out_of_place_is_seen() {
        let mut bytes = Vec::new();
        send(&mut bytes, 5, 200_000).unwrap();
        assert_eq!(receive(&mut bytes.as_slice(), 5, 200_000, || ()).unwrap(), 200_000);
        assert_eq!(receive(&mut &bytes[..100_000], 5, 200_000, || ()).unwrap(), 100_000, "a clean end");
        assert!(receive(&mut bytes.as_slice(), 6, 200_000, || ()).is_err());
        bytes.remove(150_000);
        assert!(receive(&mut bytes.as_slice(), 5, 199_999, || ()).is_err());
    }
}
