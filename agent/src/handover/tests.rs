use super::*;
use crate::files;
use weft_runtime::{Tasks, drain};

struct Fixture {
    commands: mpsc::Receiver<Command>,
    outcome: oneshot::Receiver<bool>,
    path: std::path::PathBuf,
    _trigger: drain::DrainTrigger,
    _tasks: Tasks,
    _dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("handover.sock");
    let listener = files::listen(&path).unwrap();
    let (commands, queue) = mpsc::channel(4);
    let (trigger, watcher) = drain::channel();
    let (done, outcome) = oneshot::channel();
    let tasks = Tasks::new();
    tasks.spawn("handover", async move {
        let _ = done.send(serve(listener, commands, watcher).await.unwrap());
    });
    Fixture { commands: queue, outcome, path, _trigger: trigger, _tasks: tasks, _dir: dir }
}

async fn pause(f: &mut Fixture) {
    match f.commands.recv().await {
        Some(Command::Pause(done)) => done.send(()).unwrap(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn both_steps() {
    let mut f = fixture();
    let path = f.path.clone();
    let (predecessor, ()) = tokio::join!(Predecessor::prepare(&path), pause(&mut f));
    predecessor.unwrap().unwrap().take_over().await.unwrap();
    assert!(f.outcome.await.unwrap());
    assert!(f.commands.recv().await.is_none());
}

#[tokio::test]
async fn a_successor_that_dies_changes_nothing() {
    let mut f = fixture();
    let path = f.path.clone();
    let (predecessor, ()) = tokio::join!(Predecessor::prepare(&path), pause(&mut f));
    drop(predecessor.unwrap().unwrap());
    assert!(matches!(f.commands.recv().await, Some(Command::Resume)));
    // And the next one is served.
    let (predecessor, ()) = tokio::join!(Predecessor::prepare(&path), pause(&mut f));
    assert!(predecessor.unwrap().is_some());
}

#[tokio::test]
async fn nobody_there() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Predecessor::prepare(&dir.path().join("none")).await.unwrap().is_none());
    // A socket that a killed agent left.
    let path = dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(Predecessor::prepare(&path).await.unwrap().is_none());
}
