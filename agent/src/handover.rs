//! Replacement: the new agent asks the old one to leave the kernel alone, takes the Pods over, and then lets the old
//! one drain. One line each way on a root-only socket; a new agent that goes away in between changes nothing.

use std::{io, path::Path, time::Duration};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    time::timeout,
};
use weft_runtime::DrainWatcher;

use crate::node::Command;

const PREPARE: &str = "prepare\n";
const TAKEOVER: &str = "takeover\n";
const OK: &str = "ok\n";
/// Longest line.
const MAX_LINE: u64 = 64;
/// How long the other side may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a new agent may take between the two steps.
const PREPARED: Duration = Duration::from_secs(120);
/// How long the old listeners go on accepting after the new ones stand: connections that the kernel gave to them
/// before are in their queues.
const SETTLE: Duration = Duration::from_millis(200);

/// The old agent, having left the kernel to us.
#[derive(Debug)]
pub struct Predecessor {
    stream: BufReader<UnixStream>,
}

impl Predecessor {
    /// Asks the agent at `path`, where there is one, to leave the kernel alone.
    ///
    /// # Errors
    /// When there is one that does not answer as it should: two agents on one node would fight.
    pub async fn prepare(path: &Path) -> io::Result<Option<Self>> {
        let stream = match UnixStream::connect(path).await {
            Ok(stream) => stream,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let mut predecessor = Self { stream: BufReader::new(stream) };
        predecessor.ask(PREPARE).await?;
        Ok(Some(predecessor))
    }

    /// Tells it that its Pods are served by us now; it drains.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn take_over(mut self) -> io::Result<()> {
        self.ask(TAKEOVER).await
    }

    async fn ask(&mut self, line: &str) -> io::Result<()> {
        let asking = async {
            self.stream.get_mut().write_all(line.as_bytes()).await?;
            read(&mut self.stream).await
        };
        match timeout(ANSWER, asking).await {
            Ok(Ok(answer)) if answer == OK => Ok(()),
            Ok(Ok(answer)) => Err(io::Error::other(format!("it answers {answer:?}"))),
            Ok(Err(e)) => Err(e),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

async fn read(stream: &mut BufReader<UnixStream>) -> io::Result<String> {
    let mut line = String::new();
    stream.take(MAX_LINE).read_line(&mut line).await?;
    Ok(line)
}

/// Answers new agents until one has taken over (then true) or the drain begins (false).
///
/// # Errors
/// When the socket cannot accept any more.
pub async fn serve(
    listener: UnixListener,
    commands: mpsc::Sender<Command>,
    drain: DrainWatcher,
) -> io::Result<bool> {
    loop {
        let stream = tokio::select! {
            () = drain.draining() => return Ok(false),
            accepted = listener.accept() => accepted?.0,
        };
        let conversation = converse(BufReader::new(stream), &commands);
        let taken = tokio::select! {
            () = drain.draining() => return Ok(false),
            taken = conversation => taken,
        };
        match taken {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "a takeover failed"),
        }
    }
}

async fn converse(mut stream: BufReader<UnixStream>, commands: &mpsc::Sender<Command>) -> io::Result<bool> {
    let gone = || io::Error::other("the node's work has ended");
    match timeout(ANSWER, read(&mut stream)).await {
        Ok(Ok(line)) if line == PREPARE => {}
        Ok(Ok(line)) => return Err(io::Error::other(format!("unknown request {line:?}"))),
        Ok(Err(e)) => return Err(e),
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    }
    let (paused, wait) = oneshot::channel();
    commands.send(Command::Pause(paused)).await.map_err(|_| gone())?;
    wait.await.map_err(|_| gone())?;
    let outcome = async {
        stream.get_mut().write_all(OK.as_bytes()).await?;
        match timeout(PREPARED, read(&mut stream)).await {
            Ok(Ok(line)) if line == TAKEOVER => Ok(true),
            Ok(Ok(_)) => Ok(false),
            Ok(Err(e)) => Err(e),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
    .await;
    if !matches!(outcome, Ok(true)) {
        commands.send(Command::Resume).await.map_err(|_| gone())?;
        return outcome;
    }
    tokio::time::sleep(SETTLE).await;
    stream.get_mut().write_all(OK.as_bytes()).await?;
    Ok(true)
}

#[cfg(test)]
mod tests;
