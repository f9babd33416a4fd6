use weft_core::{
    SubjectId,
    workload::{FailMode, Mode},
};

use super::*;

fn spec(mode: Mode) -> PodSpec {
    PodSpec {
        uid: "uid-web".into(),
        subject: SubjectId(300),
        mode,
        fail_mode: FailMode::Closed,
        addresses: vec!["10.1.1.1".parse().unwrap()],
        netns: "/run/netns/web".into(),
    }
}

#[test]
fn connections_from_before_matter_where_a_running_pod_is_tightened() {
    let (strict, soft) = (Goal::Enrol(spec(Mode::Strict)), Goal::Enrol(spec(Mode::Permissive)));
    let enrolled = |mode| Standing::Enrolled(spec(mode));
    // From outside the mesh into it.
    let passed = (Goal::Pass("/run/netns/web".into()), Standing::Passed("/run/netns/web".into()));
    assert!(tighter(Some((&passed.0, &passed.1)), &soft));
    assert!(tighter(Some((&Goal::Unknown, &Standing::Out)), &strict));
    // Under a stricter mode.
    assert!(tighter(Some((&soft, &enrolled(Mode::Permissive))), &strict));
    assert!(!tighter(Some((&strict, &enrolled(Mode::Strict))), &soft));
    assert!(!tighter(Some((&strict, &enrolled(Mode::Strict))), &strict));
    // One that begins has no connections, and one that was held had none that got through.
    assert!(!tighter(None, &strict));
    assert!(!tighter(Some((&Goal::Wait, &Standing::Out)), &strict));
    assert!(!tighter(Some((&Goal::Hold(spec(Mode::Strict)), &Standing::Held(spec(Mode::Strict)))), &strict));
    // Out of the mesh.
    assert!(!tighter(Some((&strict, &enrolled(Mode::Strict))), &passed.0));
}

#[test]
fn a_refusal_is_of_a_pod_that_should_be_in_the_mesh() {
    let one = |goal: Goal, standing: Standing| {
        (Wanted { name: NamespacedName::new("shop", "web"), workload: None, sandbox: None, goal }, standing)
    };
    let failed = || Standing::Failed("a map is full".into());
    let strict = || Goal::Enrol(spec(Mode::Strict));
    assert_eq!(refusal(&one(strict(), failed())), Some("a map is full"));
    assert_eq!(refusal(&one(Goal::Hold(spec(Mode::Strict)), failed())), Some("a map is full"));
    assert_eq!(refusal(&one(Goal::Refuse("isolated".into()), Standing::Out)), Some("isolated"));
    assert_eq!(refusal(&one(strict(), Standing::Enrolled(spec(Mode::Strict)))), None);
    assert_eq!(refusal(&one(Goal::Pass("/x".into()), failed())), None);
    assert_eq!(refusal(&one(Goal::Wait, Standing::Out)), None);
}
