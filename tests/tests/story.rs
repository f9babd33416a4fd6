//! Every line of the demo's story, step by step, each on a lab of its own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use weft_tests::{
    Lab,
    demo::{self, Teller, agents, calls, policy, wire},
};

/// Tells a part of the story and fails with what was not as told.
fn tell(part: impl FnOnce(&mut Teller, &mut Lab) -> anyhow::Result<()>) {
    let mut teller = Teller::new();
    let mut lab = demo::raise(&mut teller).unwrap_or_else(|error| panic!("{error:#}"));
    let outcome = part(&mut teller, &mut lab);
    let record = lab.record().clone();
    drop(lab);
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
    assert_eq!(teller.wrong(), Vec::<String>::new());
    assert_eq!(record.leftovers(), Vec::<String>::new());
}

#[test]
fn a_canary_and_both_ends_see_the_truth() {
    tell(|teller, lab| {
        calls::canary(teller, lab)?;
        calls::truth(teller, lab)
    });
}

#[test]
fn nothing_is_readable_on_the_wire_and_the_golden_signals_count_it() {
    tell(|teller, lab| {
        let mut seen = calls::Seen::default();
        calls::canary(teller, lab)?;
        wire::secret(teller, lab, &mut seen)?;
        policy::enforce(teller, lab)?;
        calls::signals(teller, lab, &mut seen)
    });
}

#[test]
fn a_policy_is_enforced_and_observed() {
    tell(|teller, lab| {
        policy::enforce(teller, lab)?;
        policy::observe(teller, lab)
    });
}

#[test]
fn an_agent_is_replaced_under_load_then_killed() {
    tell(|teller, lab| {
        agents::replace(teller, lab)?;
        agents::kill(teller, lab)
    });
}

#[test]
fn everything_is_removed() {
    let mut teller = Teller::new();
    let lab = demo::raise(&mut teller).unwrap_or_else(|error| panic!("{error:#}"));
    demo::remove(&mut teller, lab).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(teller.wrong(), Vec::<String>::new());
}
