//! Every developer command: `cargo xtask help`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

mod bench;
mod bpf;
mod cluster;
mod crds;
mod demo;
mod docs;
mod fuzz;
mod images;
mod kernels;
mod lint;
mod machine;
mod sh;
mod test;

const HELP: &str = "\
cargo xtask COMMAND

  setup                  find or install the BPF toolchain and the demo's programs
  build-ebpf             build the BPF object (target/bpf/weft.bpf.o)
  build [--debug]        build everything (the BPF object too where it is missing or stale)
  demo [--keep | --down] raise two nodes on this machine and tell the story
  cluster up|down|status a real Kubernetes of two nodes on this machine; `cluster help` lists more
  images --save DIR | --load kind:NAME | --push REGISTRY [--registry NAME] [--tag TAG]
                         the images of agent and operator: static binaries, made without a container engine
  test [--tier N]...     run the tests: 1 units, 2 ABI and verifier, 3 BPF test runs, 4 real attach, 5 two nodes,
                         6 API server, 7 cluster, 8 other kernels
  bench --quick | --full the node proxy beside Envoy and HAProxy: what it costs, row by row
  bench soak [--minutes 15]
                         the same under mixed load with random kills: nothing is lost, and nothing stays
  bench control-plane [OPTIONS]
                         1,000 simulated agents, 10,000 Pods and 2,000 policies against the real operator and API server
  fuzz [SECONDS]         every parser of hostile bytes under libFuzzer, 20 s each
  lint                   format, clippy, dependency direction, file length, unsafe, CRDs, licences
  docs                   write the pages of docs/ that are made from code
  crds                   write deploy/crds from the types

Exit codes: 0 done, 1 it failed, 2 wrong usage, 3 this machine cannot run it.";

/// How a command ends when it does not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It ran and found something wrong.
    Failed(String),
    /// It was called wrongly.
    Usage(String),
    /// This machine cannot run it.
    Unable(String),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// What a command gives.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// A [`Failure::Failed`] with that text.
pub(crate) fn failed<T>(text: impl Into<String>) -> Outcome<T> {
    Err(Failure::Failed(text.into()))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args.as_slice() {
        ["setup"] => bpf::setup(),
        ["build-ebpf"] => bpf::build_ebpf(),
        ["build"] => bpf::build(bpf::Profile::Quick),
        ["build", "--debug"] => bpf::build(bpf::Profile::Dev),
        ["cluster", rest @ ..] => cluster::run(rest),
        ["demo", rest @ ..] => demo::run(rest),
        ["test", rest @ ..] => test::run(rest),
        ["fuzz", rest @ ..] => fuzz::run(rest),
        ["bench", rest @ ..] => bench::run(rest),
        ["images", rest @ ..] => images::run(rest),
        ["lint"] => lint::run(),
        ["docs"] => docs::run(),
        ["crds"] => crds::run(),
        [] | ["help" | "--help" | "-h"] => {
            sh::say(HELP);
            Ok(())
        }
        other => Err(Failure::Usage(format!("there is no `cargo xtask {}`\n\n{HELP}", other.join(" ")))),
    };
    let (code, text) = match outcome {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Failed(text)) => (1, text),
        Err(Failure::Usage(text)) => (2, text),
        Err(Failure::Unable(text)) => (3, text),
    };
    sh::warn(&text);
    ExitCode::from(code)
}
