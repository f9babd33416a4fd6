//! Datagrams.

use std::{
    io::ErrorKind,
    net::UdpSocket,
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use super::calls::Target;

/// Between two datagrams of a conversation.
const PACE: Duration = Duration::from_millis(5);

/// A datagram and its echo, or a conversation that lasts as long as it is answered.
#[derive(Debug, Clone, Args)]
pub struct Udp {
    #[command(flatten)]
    target: Target,
    /// What the datagrams say.
    #[arg(long, default_value = "ping")]
    word: String,
    /// Send a datagram every five milliseconds, until none was answered for this many milliseconds.
    #[arg(long)]
    until_silent_ms: Option<u64>,
    /// With `--until-silent-ms`: send one datagram only, and listen.
    #[arg(long)]
    once: bool,
}

impl Udp {
    pub(super) fn run(self) -> Result<Value> {
        let local = if self.target.to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let socket = UdpSocket::bind(local)?;
        socket.connect(&self.target.to)?;
        match self.until_silent_ms {
            Some(silent) => self.converse(&socket, Duration::from_millis(silent)),
            None => self.ask(&socket),
        }
    }

    fn ask(&self, socket: &UdpSocket) -> Result<Value> {
        socket.set_read_timeout(Some(self.target.timeout()))?;
        let mut buffer = [0; 64];
        let result = socket.send(self.word.as_bytes()).and_then(|_| socket.recv(&mut buffer));
        Ok(match result {
            Ok(n) => json!({"answered": true, "heard": String::from_utf8_lossy(&buffer[..n])}),
            Err(error) => json!({"answered": false, "error": format!("{:?}", error.kind())}),
        })
    }

    fn converse(&self, socket: &UdpSocket, silent: Duration) -> Result<Value> {
        socket.set_read_timeout(Some(PACE))?;
        let mut buffer = [0; 2048];
        let (mut sent, mut answers) = (0_u64, 0_u64);
        let (mut heard, mut heard_at) = (Instant::now(), SystemTime::now());
        while heard.elapsed() < silent {
            if !self.once || sent == 0 {
                // Refused by an ICMP error: as good as silence.
                let _ = socket.send(self.word.as_bytes());
                sent += 1;
            }
            match socket.recv(&mut buffer) {
                Ok(_) => {
                    (heard, heard_at) = (Instant::now(), SystemTime::now());
                    answers += 1;
                    if answers == 1 {
                        super::say("answered");
                    }
                    if !self.once {
                        thread::sleep(PACE);
                    }
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let last = heard_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(json!({"sent": sent, "answers": answers, "last_answer_unix_ms": last.as_millis() as u64}))
    }
}
