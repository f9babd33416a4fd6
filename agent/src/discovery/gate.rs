//! What the node's CNI plugin is answered: a Pod of the mesh goes on only once the kernel has it. Beside NRI, which asks
//! later and knows the Pod's labels, it closes what comes in to a Pod that starts while the agent goes away, and to any
//! Pod where the runtime has no NRI.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use tokio::{sync::mpsc, time::timeout};
use weft_cni::{
    judge::ALWAYS_PASS,
    wire::{Answer, Event as Happened, Question},
};
use weft_core::{
    NamespacedName,
    config::NamespaceMode,
    workload::{FailMode, Mode},
};

use super::{Event, Placement, Sandbox, Verdicts, early, netns, uid};

/// How long a namespace that was made a moment ago may be unknown here.
const KNOWN: Duration = Duration::from_secs(2);
/// How long a Pod waits for its place in the kernel.
const PLACED: Duration = Duration::from_secs(4);

/// Answers the plugin.
#[derive(Debug, Clone)]
pub struct Gate {
    /// The runtime's root folder as we see it.
    pub(super) root: PathBuf,
    /// Where sandboxes go.
    pub(super) events: mpsc::Sender<Event>,
    /// What became of them.
    pub(super) verdicts: Verdicts,
}

impl Gate {
    /// Answers a question, within seconds.
    pub fn answer(&self, question: Question) -> impl Future<Output = Answer> + use<> {
        let this = self.clone();
        async move {
            match question.event {
                Happened::Add => this.add(question).await,
                Happened::Del => {
                    // A failure is the end of the agent.
                    let _ = this.events.send(Event::Ended(question.sandbox)).await;
                    Answer::Pass
                }
            }
        }
    }

    async fn add(&self, question: Question) -> Answer {
        if ALWAYS_PASS.contains(&question.namespace.as_str()) {
            return Answer::Pass;
        }
        let namespace = match self.namespace(&question.namespace).await {
            Ok(namespace) => namespace,
            Err(answer) => return answer,
        };
        if namespace.mode == Mode::Disabled {
            // Its own label may ask for more: that NRI tells, or the runtime's list.
            return Answer::Pass;
        }
        let holds = namespace.mode == Mode::Strict || namespace.fail_mode == FailMode::Closed;
        let refuse = |why: &str| if holds { Answer::Refuse { why: why.into() } } else { Answer::Pass };
        let root = self.root.clone();
        let found = tokio::task::spawn_blocking(move || sandbox(&root, &question)).await;
        let Ok(Some(sandbox)) = found else {
            return refuse(
                "the container runtime tells neither UID nor network namespace of the Pod; containerd from 1.6 and \
                 CRI-O do. Update it, or install Weft without its CNI plugin (agent.cni.enabled=false)",
            );
        };
        if sandbox.host_network {
            return Answer::Pass;
        }
        let id = sandbox.id.clone();
        if self.events.send(Event::Began(Box::new(sandbox))).await.is_err() {
            return refuse("the agent of this node is ending; the Pod is tried again");
        }
        match self.verdicts.placed(&id, PLACED).await {
            Some(Placement::Enrolled | Placement::Held | Placement::Passed) => Answer::Pass,
            Some(Placement::Refused(why)) if namespace.mode == Mode::Strict => Answer::Refuse { why },
            Some(Placement::Refused(_)) => Answer::Pass,
            Some(Placement::Unknown) | None => {
                refuse("the agent of this node has not enrolled the Pod in time; it is tried again")
            }
        }
    }

    /// What the operator says of a namespace.
    async fn namespace(&self, name: &str) -> Result<NamespaceMode, Answer> {
        let mut state = self.verdicts.state.clone();
        let known = |state: &weft_core::MeshState| {
            let namespaces = &state.config()?.namespaces;
            (!namespaces.is_empty()).then(|| namespaces.get(name).copied())
        };
        if known(&state.borrow()).is_none() {
            let why = "Weft's agent on this node has no configuration yet: does it reach the operator?";
            return Err(Answer::Unsure { why: why.into() });
        }
        let wait = state.wait_for(|state| known(state).flatten().is_some());
        let found =
            timeout(KNOWN, wait).await.ok().and_then(Result::ok).and_then(|state| known(&state).flatten());
        found.ok_or_else(|| Answer::Refuse {
            why: format!(
                "the operator has not told this node of the namespace {name} yet; the Pod is tried again. If that stays: \
                 does the operator run (kubectl -n weft-system get pods)?"
            ),
        })
    }
}

/// The sandbox, under an id of its own: what was made of it says nothing to NRI, which knows more of the Pod. Blocks for
/// a moment.
fn sandbox(root: &std::path::Path, question: &Question) -> Option<Sandbox> {
    let netns = netns::locate(root, Some(&question.netns), None)?;
    let host_network = netns::is_host(&netns);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Some(Sandbox {
        id: early(&question.sandbox),
        uid: uid(&question.uid)?,
        name: NamespacedName::new(&question.namespace, &question.name),
        created: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        ..Sandbox::network(Some(netns), host_network, Vec::new())
    })
}

#[cfg(test)]
mod tests;
