//! Asking the node's agent.

use std::{
    io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use crate::wire::{self, Answer, Event, Question};

/// How long the agent has to answer. It needs less itself; one that is being replaced is asked again within it.
pub const PATIENCE: Duration = Duration::from_secs(12);
/// How long it is told of an end.
const FAREWELL: Duration = Duration::from_secs(1);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(100);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Silence {
    /// Nobody listens.
    #[error("Weft's agent does not run on this node")]
    Absent,
    /// Somebody listens and does not answer.
    #[error("Weft's agent on this node does not answer ({0})")]
    Mute(String),
}

/// Asks the agent that listens at `socket`, for at most `patience`.
///
/// # Errors
/// When it does not answer.
pub fn ask(socket: &Path, question: &Question, patience: Duration) -> Result<Answer, Silence> {
    let (sender, answer) = mpsc::sync_channel(1);
    let (socket, question) = (PathBuf::from(socket), question.clone());
    // A connect to a full queue waits without end: the thread may, the process ends without it.
    thread::spawn(move || {
        let _ = sender.send(attempts(&socket, &question, Instant::now() + patience));
    });
    let late = || Silence::Mute(format!("nothing within {} s", patience.as_secs()));
    answer.recv_timeout(patience).unwrap_or_else(|_| Err(late()))
}

/// Tells the agent of an end, where there is one.
pub fn tell(socket: &Path, question: &Question) {
    debug_assert_eq!(question.event, Event::Del);
    // Where no agent runs, the next one finds the sandbox gone.
    let _ = ask(socket, question, FAREWELL);
}

fn attempts(socket: &Path, question: &Question, until: Instant) -> Result<Answer, Silence> {
    loop {
        let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Silence::Absent,
            _ => Silence::Mute(error.to_string()),
        })?;
        match talk(&stream, question, until) {
            Ok(answer) => return Ok(answer),
            // An agent that hands over to its successor hangs up: the successor has the socket's name.
            Err(error) if hung_up(&error) && Instant::now() + PAUSE < until => thread::sleep(PAUSE),
            Err(error) => return Err(Silence::Mute(error.to_string())),
        }
    }
}

fn talk(stream: &UnixStream, question: &Question, until: Instant) -> io::Result<Answer> {
    let left = until.saturating_duration_since(Instant::now()).max(PAUSE);
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))?;
    wire::write(stream, question)?;
    wire::read(stream)
}

fn hung_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn question() -> Question {
        Question {
            event: Event::Add,
            namespace: "shop".into(),
            name: "web".into(),
            uid: "u".into(),
            sandbox: "s".into(),
            netns: "/run/netns/x".into(),
        }
    }

    #[test]
    fn an_agent_that_is_not_there_is_known_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.sock");
        assert!(matches!(ask(&path, &question(), PATIENCE), Err(Silence::Absent)));
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(ask(&path, &question(), PATIENCE), Err(Silence::Absent)));
    }

    #[test]
    fn a_successor_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = thread::spawn(move || {
            let (first, _) = listener.accept().unwrap();
            assert_eq!(wire::read::<Question>(&first).unwrap(), question());
            drop(first);
            let (second, _) = listener.accept().unwrap();
            assert_eq!(wire::read::<Question>(&second).unwrap(), question());
            wire::write(&second, &Answer::Pass).unwrap();
        });
        assert_eq!(ask(&path, &question(), PATIENCE).unwrap(), Answer::Pass);
        agent.join().unwrap();
    }

    #[test]
    fn a_silent_agent_does_not_hold_the_runtime_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let began = Instant::now();
        let patience = Duration::from_millis(300);
        assert!(matches!(ask(&path, &question(), patience), Err(Silence::Mute(_))));
        assert!(began.elapsed() < Duration::from_secs(5));
        drop(listener);
    }
}
