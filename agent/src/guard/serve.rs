//! The socket at which the node's CNI plugin asks.

use std::{io, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    time::{sleep, timeout},
};
use weft_cni::wire::{Answer, MAX_LINE, Question};

/// Questions that are answered at one time; further ones wait in the socket's queue.
const MAX_OPEN: usize = 128;
/// How long a question or an answer may take on its way.
const LINE: Duration = Duration::from_secs(2);
/// Pause where no connection can be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers without end.
pub(super) async fn serve<F, A>(listener: UnixListener, answer: A)
where
    A: Fn(Question) -> F,
    F: Future<Output = Answer>,
{
    let mut open = FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if open.len() < MAX_OPEN => match accepted {
                Ok((stream, _)) => open.push(talk(stream, &answer)),
                Err(error) => {
                    tracing::warn!(%error, "a question of the CNI plugin is not taken");
                    sleep(PAUSE).await;
                }
            },
            Some(end) = open.next() => {
                if let Err(error) = end {
                    tracing::warn!(%error, "a question of the CNI plugin is not answered");
                }
            }
        }
    }
}

async fn talk<F, A>(mut stream: UnixStream, answer: &A) -> io::Result<()>
where
    A: Fn(Question) -> F,
    F: Future<Output = Answer>,
{
    let (reader, mut writer) = stream.split();
    let mut line = Vec::new();
    timeout(LINE, BufReader::new(reader.take(MAX_LINE)).read_until(b'\n', &mut line)).await??;
    let question: Question = serde_json::from_slice(&line)?;
    let mut told = serde_json::to_vec(&answer(question).await)?;
    told.push(b'\n');
    timeout(LINE, writer.write_all(&told)).await?
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream as Plain, time::Instant};

    use weft_cni::{ask, wire::Event};

    use super::*;

    fn question(name: &str) -> Question {
        Question {
            event: Event::Add,
            namespace: "shop".into(),
            name: name.into(),
            uid: "u".into(),
            sandbox: "s".into(),
            netns: "/n".into(),
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_plugin_is_answered_whatever_others_send() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let judge = |q: Question| async move {
            if &*q.name == "slow" {
                sleep(Duration::from_secs(60)).await;
            }
            Answer::Refuse { why: format!("no {}", q.name) }
        };
        let asked = tokio::task::spawn_blocking(move || {
            use std::io::Write as _;
            let _silent = Plain::connect(&path).unwrap();
            let mut noise = Plain::connect(&path).unwrap();
            noise.write_all(&[b'x'; 1024]).unwrap();
            noise.write_all(b"\n").unwrap();
            let slow = path.clone();
            std::thread::spawn(move || ask::ask(&slow, &question("slow"), Duration::from_secs(20)));
            let began = Instant::now();
            let answer = ask::ask(&path, &question("web"), Duration::from_secs(10)).unwrap();
            assert_eq!(answer, Answer::Refuse { why: "no web".into() });
            assert!(began.elapsed() < Duration::from_secs(5));
        });
        tokio::select! {
            () = serve(listener, judge) => unreachable!(),
            asked = asked => asked.unwrap(),
        }
    }
}
