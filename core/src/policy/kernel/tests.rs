use proptest::prelude::*;

use super::*;
use crate::{
    policy::Action,
    testing::{
        NODE,
        generate::{CALLERS, From, SERVER, case},
        outside_subject, policy, row_verdict as lookup, state, workload,
    },
    workload::Mode,
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_500))]

    /// Four flows in each of 2,500 policy sets.
    #[test]
    fn rows_say_what_the_interpreter_says(case in case(4)) {
        let state = case.mesh();
        let compiled = compile(&state, NODE);
        let web = state.workload(&SERVER.0.into()).expect("the server");
        for flow in &case.flows {
            let (caller, source) = match flow.from {
                From::Pod(pod, _) => {
                    let caller = state.workload(&CALLERS[pod].0.into()).expect("the caller");
                    (Caller::Authenticated(&caller.identity), caller.subject)
                }
                From::Outside(ip) => (Caller::Unauthenticated(ip), outside_subject(&compiled, ip)),
            };
            let access = Access { caller, destination: web, port: flow.port, protocol: flow.protocol };
            let decision = eval::judge(&state, &access);
            prop_assert!(decision.outcome != Outcome::JudgeHttp || flow.protocol == eval::TCP);
            if policed(web) {
                let got = lookup(&compiled, source, web.subject, flow.port, flow.protocol);
                prop_assert_eq!(got, super::row_verdict(&decision, flow.protocol), "{:?}", flow);
            }
        }
    }
}

#[test]
fn two_pods_of_one_account_with_different_policies_have_rows_of_their_own() {
    let mut canary = workload("web", 301, Mode::Strict, &["p"]);
    canary.uid = "canary".into();
    let plain = workload("web", 300, Mode::Strict, &[]);
    let state = state(
        vec![plain, canary, workload("a", 400, Mode::Strict, &[])],
        vec![policy("p", Action::Deny, vec![])],
    );
    let compiled = compile(&state, NODE);
    assert!(compiled.rows.iter().all(|r| r.destination == SubjectId(301)));
}

#[test]
fn a_remote_destination_has_rows_for_local_sources_only() {
    let mut far = workload("web", 300, Mode::Strict, &["p"]);
    far.node = "node-b".into();
    let mut stranger = workload("b", 401, Mode::Strict, &[]);
    stranger.node = "node-b".into();
    let state = state(
        vec![far, stranger, workload("a", 400, Mode::Strict, &[])],
        vec![policy("p", Action::Allow, vec![])],
    );
    let compiled = compile(&state, NODE);
    assert!(!compiled.rows.is_empty() && compiled.rows.iter().all(|r| r.source == SubjectId(400)));
}
