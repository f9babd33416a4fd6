//! The h2 library as the oracle: both ends get the same frames of a hostile peer, one by one, and must do the same.
//!
//! Where RFC 9113 leaves it open what to do, or we are stricter on purpose, a rule names the difference ([`rules`]).

use std::collections::BTreeSet;

use proptest::{prelude::*, sample::select, strategy::ValueTree as _, test_runner::TestRunner};

use self::{
    history::History,
    ours::Ours,
    rules::{Case, RULES},
    steps::{ANSWER, How, Part, REQUEST, Sent, Step, Target, step},
    theirs::Theirs,
    wire::{End as _, Frame, Verdict},
};
use super::*;
use crate::hbone::frame::{self, Code, flag, kind};

mod history;
mod ours;
mod rules;
mod steps;
mod theirs;
mod wire;

/// Streams that a client has under way from the start.
const REQUESTS: u32 = 3;
const CASES: u32 = 1_000;

/// Our first window of a stream; the pieces that bytes come in, which make no difference; and whether the application
/// keeps its half of a stream once the other has ended.
type Manner = (u32, usize, bool);

/// A conversation.
struct Talk {
    history: History,
    ours: Ours,
    theirs: Theirs,
    /// What was sent, to be shown where ends differ.
    log: Vec<String>,
    /// Rules that were needed.
    rules: Vec<&'static str>,
}

impl Talk {
    fn new(role: Role, (window, cut, keeps): Manner) -> Self {
        let settings = Settings { window, streams: 4, frame: 16_384 };
        let requests = if role == Role::Client { REQUESTS } else { 0 };
        let mut greeting = Vec::new();
        if role == Role::Server {
            greeting.extend_from_slice(frame::PREFACE);
        }
        frame::settings(&mut greeting, &[]);
        // From here on our settings hold for the oracle too (section 6.5.3).
        frame::head(&mut greeting, 0, kind::SETTINGS, flag::ACK, 0);
        Self {
            history: History::new(role, settings, requests),
            ours: Ours::new(role, settings, (cut, keeps), &greeting, requests),
            theirs: Theirs::new(role, settings, keeps, &greeting, requests),
            log: Vec::new(),
            rules: Vec::new(),
        }
    }

    /// Whether the conversation goes on.
    fn step(&mut self, step: &Step) -> bool {
        if let Some(wish) = step.wish(&self.history) {
            self.log.push(format!("the application wants {wish:?}"));
            let (ours, theirs) = (self.ours.wish(wish), self.theirs.wish(wish));
            self.history.said(&ours, &theirs);
            if !ours.same(&theirs) && !self.shared() {
                self.differ(&ours, &theirs);
            }
            return ours.over.is_none() && !self.shared();
        }
        for frame in step.frames(&self.history) {
            self.log.push(format!("{frame:?}").chars().take(400).collect());
            let bytes = frame.bytes();
            let ours = self.ours.take(&bytes);
            if frame.kind == kind::PUSH_PROMISE {
                // Not granted (section 6.6). The library is not asked: an assertion of its own fails where the
                // application had reset the stream.
                assert_eq!(ours.over, Some(Code::PROTOCOL_ERROR.0), "{}", self.log.join("\n"));
                return false;
            }
            let theirs = self.theirs.take(&bytes);
            let mut goes_on = ours.over.is_none();
            if !ours.same(&theirs) {
                goes_on = self.permitted(&frame, step.block(), &ours, &theirs);
            }
            if !goes_on {
                return false;
            }
            self.history.took(&frame, &ours, &theirs);
            if self.shared() {
                return false;
            }
        }
        true
    }

    /// Whether streams wait for the connection's credit, which each end shares among them as it likes: then their
    /// application's ends are not at the same place any more.
    fn shared(&self) -> bool {
        self.history.credit.iter().any(|credit| credit.left(0) <= 0)
    }

    fn permitted(&mut self, frame: &Frame, block: &[Part], ours: &Verdict, theirs: &Verdict) -> bool {
        let case = Case { history: &self.history, frame, block, ours, theirs };
        match RULES.iter().find(|rule| (rule.holds)(&case)) {
            Some(rule) => {
                self.rules.push(rule.name);
                rule.goes_on
            }
            None => self.differ(ours, theirs),
        }
    }

    fn differ(&self, ours: &Verdict, theirs: &Verdict) -> ! {
        panic!(
            "as {:?}:\n{}\nours   {ours:?}\ntheirs {theirs:?}\n{:?}",
            self.history.role,
            self.log.join("\n"),
            self.history.streams,
        );
    }
}

fn talk(role: Role, manner: Manner, steps: &[Step]) -> Vec<&'static str> {
    let mut talk = Talk::new(role, manner);
    for step in steps {
        if !talk.step(step) {
            break;
        }
    }
    talk.rules
}

fn case(server: bool) -> impl Strategy<Value = (Manner, Vec<Step>)> {
    let window = select(vec![1_000_u32, 12_000, 65_535, 200_000]);
    let cut = select(vec![1_usize, 5, 9, 17, 20_000]);
    ((window, cut, any::<bool>()), prop::collection::vec(step(server), 1..25))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, ..ProptestConfig::default() })]

    #[test]
    fn a_server_does_as_the_library_does((manner, steps) in case(true)) {
        talk(Role::Server, manner, &steps);
    }

    #[test]
    fn a_client_does_as_the_library_does((manner, steps) in case(false)) {
        talk(Role::Client, manner, &steps);
    }
}

fn headers_of(target: Target, block: &[Part], end: bool, cuts: &[usize]) -> Step {
    let (block, cuts) = (block.to_vec(), cuts.to_vec());
    Step::Sent(target, Sent::Headers { block, end, pad: None, priority: false, cuts, within: None })
}

fn data(length: usize) -> Step {
    Step::Sent(Target::Used(0), Sent::Data { length, end: false, pad: None })
}

/// What chance seldom draws.
fn rare() -> Vec<(Role, u32, Vec<Step>)> {
    let connect = || headers_of(Target::Next(0), &REQUEST, false, &[]);
    let field = |name, value| Part::Field(name, value, How::Plain);
    let [method, authority] = REQUEST;
    let get = [field(":method", "GET"), authority.clone()];
    let window = Sent::Window { increment: 0x7fff_ffff, length: 4 };
    let sizes = [method, authority.clone(), Part::Raw(&[0x20])];
    let large = [&REQUEST[..], &[Part::Long(16_260), field("x-one", "1")]].concat();
    let bad = [&REQUEST[..], &[field("X-Capital", "1")]].concat();
    let used = Target::Used(0);
    vec![
        (Role::Server, 12_000, vec![connect(), data(5_000), data(9_000)]),
        (Role::Server, 12_000, vec![connect(), Step::Finish(0), Step::Sent(used, window)]),
        (Role::Server, 12_000, vec![headers_of(Target::Next(0), &get, false, &[])]),
        (
            Role::Server,
            12_000,
            vec![connect(), connect(), connect(), connect(), headers_of(Target::Next(0), &bad, false, &[])],
        ),
        (Role::Server, 12_000, vec![headers_of(Target::Next(0), &large, false, &[])]),
        (Role::Server, 12_000, vec![headers_of(Target::Next(0), &sizes, false, &[41])]),
        (
            Role::Client,
            12_000,
            vec![headers_of(used, &[ANSWER[0].clone(), field("", "1")], false, &[9, 9, 9])],
        ),
        (
            Role::Client,
            12_000,
            vec![headers_of(used, &ANSWER, true, &[]), Step::Sent(used, Sent::Reset { code: 0, length: 4 })],
        ),
        (Role::Client, 12_000, vec![Step::Finish(0), headers_of(used, &[field("x-one", "1")], true, &[])]),
        (Role::Client, 12_000, vec![headers_of(used, &[field(":status", "103")], true, &[])]),
        (Role::Client, 12_000, vec![headers_of(used, &[ANSWER[0].clone(), authority], false, &[])]),
    ]
}

/// A rule that nothing needs any more would hide the next difference.
#[test]
fn every_rule_is_needed() {
    let mut needed = BTreeSet::new();
    for (role, window, steps) in rare() {
        needed.extend(talk(role, (window, 20_000, true), &steps));
    }
    let mut runner = TestRunner::deterministic();
    for role in [Role::Server, Role::Client] {
        let case = case(role == Role::Server);
        for _ in 0..CASES {
            let (manner, steps) = case.new_tree(&mut runner).unwrap().current();
            needed.extend(talk(role, manner, &steps));
        }
    }
    let all: BTreeSet<&str> = RULES.iter().map(|rule| rule.name).collect();
    assert_eq!(all.difference(&needed).collect::<Vec<_>>(), Vec::<&&str>::new());
}
