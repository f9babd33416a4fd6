use std::sync::Arc;

use tokio::time::Instant;
use weft_core::MeshState;

use super::*;
use crate::discovery::{Placements, tests::gate};

fn question(namespace: &str) -> Question {
    Question {
        event: Happened::Add,
        namespace: namespace.into(),
        name: "web".into(),
        uid: "uid-web".into(),
        sandbox: "a".into(),
        netns: format!("/proc/{}/ns/net", std::process::id()),
    }
}

/// Not the namespace of this process: that would be a Pod on the host's network.
fn elsewhere(dir: &std::path::Path) -> Question {
    std::fs::write(dir.join("netns"), "").unwrap();
    Question { netns: "/netns".into(), ..question("shop") }
}

#[tokio::test(start_paused = true)]
async fn what_is_outside_the_mesh_is_not_kept_waiting() {
    let (gate, mut queue, _placements) = gate(Mode::Disabled);
    let began = Instant::now();
    assert_eq!(gate.answer(question("shop")).await, Answer::Pass);
    for system in ALWAYS_PASS {
        assert_eq!(gate.answer(question(system)).await, Answer::Pass);
    }
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert!(queue.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_the_mesh_goes_on_once_the_kernel_has_it() {
    let dir = tempfile::tempdir().unwrap();
    for (placement, passes) in [
        (Some(Placement::Enrolled), true),
        (Some(Placement::Held), true),
        (Some(Placement::Refused("a map is full".into())), false),
        (Some(Placement::Unknown), false),
        (None, false),
    ] {
        let (mut gate, mut queue, placements) = gate(Mode::Strict);
        gate.root = dir.path().into();
        let place = async {
            let Some(Event::Began(sandbox)) = queue.recv().await else { panic!("no sandbox") };
            assert_eq!((&*sandbox.id, &*sandbox.uid.to_string()), ("cni:a", "uid-web"));
            let placed = placement.clone().map(|p| (sandbox.id.clone(), p));
            placements.send_replace(Arc::new(Placements::from_iter(placed)));
        };
        let (answer, ()) = tokio::join!(gate.answer(elsewhere(dir.path())), place);
        assert_eq!(answer == Answer::Pass, passes, "{placement:?} {answer:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_judged_is_not_let_pass() {
    let (gate, _queue, _placements) = gate(Mode::Strict);
    assert!(
        matches!(gate.answer(question("never-seen")).await, Answer::Refuse { why } if why.contains("never-seen"))
    );
    let nameless = Question { uid: String::new(), ..question("shop") };
    assert!(matches!(gate.answer(nameless).await, Answer::Refuse { why } if why.contains("UID")));
    let empty = tokio::sync::watch::Sender::new(Arc::new(MeshState::default()));
    let verdicts = Verdicts { state: empty.subscribe(), ..gate.verdicts.clone() };
    let young = Gate { verdicts, ..gate };
    assert!(matches!(young.answer(question("shop")).await, Answer::Unsure { .. }));
}

#[tokio::test]
async fn an_end_is_passed_on() {
    let (gate, mut queue, _placements) = gate(Mode::Strict);
    let end = Question { event: Happened::Del, ..question("shop") };
    assert_eq!(gate.answer(end).await, Answer::Pass);
    assert!(matches!(queue.recv().await, Some(Event::Ended(id)) if id == "a"));
}
