//! The plugin: one command of the runtime, from its parameters to what goes to standard output.

use std::{
    io::{self, Read},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    ask, judge, list,
    spec::{Command, Failure, Network, Parameters, VERSIONS},
    wire::{Event, Question},
};

/// Largest configuration that is read, in bytes.
const MAX_INPUT: u64 = 4 << 20;
/// How long the runtime has to hand it over.
const INPUT: Duration = Duration::from_secs(5);

/// What goes to standard output, and whether the command succeeded.
pub fn run() -> (Option<Value>, bool) {
    let newest = VERSIONS[VERSIONS.len() - 1];
    let mut version = newest.to_owned();
    match command(&mut version) {
        Ok(output) => (output, true),
        Err(failure) => (Some(failure.object(&version)), false),
    }
}

fn command(version: &mut String) -> Result<Option<Value>, Failure> {
    let parameters = Parameters::read()?;
    if parameters.command == Command::Version {
        return Ok(Some(json!({"cniVersion": *version, "supportedVersions": VERSIONS})));
    }
    let network = Network::parse(&input()?)?;
    version.clone_from(&network.cni_version);
    match parameters.command {
        Command::Add => add(&parameters, network).map(Some),
        Command::Del => {
            if let Some(question) = question(Event::Del, &parameters) {
                ask::tell(&network.socket, &question);
            }
            Ok(None)
        }
        // Nothing was made. A node whose agent is away is still ready: Pods outside the mesh start there.
        Command::Check | Command::Status | Command::Gc | Command::Version => Ok(None),
    }
}

fn add(parameters: &Parameters, network: Network) -> Result<Value, Failure> {
    let result = network.prev_result.ok_or(Failure::Alone)?;
    // A container that belongs to no Pod is not the mesh's business.
    let Some(question) = question(Event::Add, parameters) else { return Ok(result) };
    if !judge::ALWAYS_PASS.contains(&question.namespace.as_str()) {
        let answer = ask::ask(&network.socket, &question, ask::PATIENCE);
        judge::judge(&question.namespace, answer, || list::load(&network.namespaces))
            .map_err(Failure::Held)?;
    }
    Ok(result)
}

fn question(event: Event, parameters: &Parameters) -> Option<Question> {
    let pod = parameters.pod.clone()?;
    Some(Question {
        event,
        namespace: pod.namespace,
        name: pod.name,
        uid: pod.uid,
        sandbox: parameters.sandbox.clone(),
        netns: parameters.netns.clone(),
    })
}

/// Standard input, limited in size and time.
fn input() -> io::Result<Vec<u8>> {
    let (sender, content) = mpsc::sync_channel(1);
    thread::spawn(move || {
        let mut content = Vec::new();
        let read = io::stdin().lock().take(MAX_INPUT).read_to_end(&mut content);
        let _ = sender.send(read.map(|_| content));
    });
    content.recv_timeout(INPUT).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
