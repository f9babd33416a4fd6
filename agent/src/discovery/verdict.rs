//! What the runtime is answered when it asks whether a Pod may start.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};
use weft_core::{MeshState, workload::Mode};

use super::{Placement, Placements, Sandbox};

/// What the runtime is answered.
#[derive(Debug, Clone)]
pub(super) struct Verdicts {
    /// What became of the sandboxes.
    pub(super) placements: watch::Receiver<Arc<Placements>>,
    /// What is known of the mesh.
    pub(super) state: watch::Receiver<Arc<MeshState>>,
}

impl Verdicts {
    /// Waits until a sandbox is where it belongs, or may start as it is; an error is why it must not start.
    pub(super) async fn wait(&self, sandbox: &Sandbox, limit: Duration) -> Result<(), String> {
        if self.state.borrow().config().is_none() {
            // Before the first configuration nobody can say what belongs to the mesh; nothing is in it.
            return Ok(());
        }
        let mut placements = self.placements.clone();
        let settled = |p: &Arc<Placements>| {
            matches!(
                p.get(&sandbox.id),
                Some(Placement::Enrolled | Placement::Passed | Placement::Refused(_))
            )
        };
        let _ = timeout(limit, async { placements.wait_for(settled).await.is_ok() }).await;
        let placement = placements.borrow().get(&sandbox.id).cloned();
        match placement {
            Some(Placement::Refused(why)) if self.strict(sandbox) => Err(why),
            None if self.strict(sandbox) => {
                Err("the agent of this node has not enrolled the Pod in time; it is tried again".into())
            }
            _ => Ok(()),
        }
    }

    /// Waits until the kernel has a sandbox, open or closed; what became of it, also where that is not the case in time.
    pub(super) async fn placed(&self, id: &str, limit: Duration) -> Option<Placement> {
        let mut placements = self.placements.clone();
        let settled = |p: &Arc<Placements>| !matches!(p.get(id), None | Some(Placement::Unknown));
        let _ = timeout(limit, async { placements.wait_for(settled).await.is_ok() }).await;
        placements.borrow().get(id).cloned()
    }

    fn strict(&self, sandbox: &Sandbox) -> bool {
        let state = self.state.borrow();
        match state.workload(&sandbox.uid) {
            Some(workload) => workload.mode == Mode::Strict,
            None => expected(&state, sandbox) == Some(Mode::Strict),
        }
    }
}

/// The mode that a Pod will have, from its namespace and its own label; `None` where its namespace is not known.
pub(crate) fn expected(state: &MeshState, sandbox: &Sandbox) -> Option<Mode> {
    let namespace = state.config()?.namespaces.get(&*sandbox.name.namespace)?;
    Some(namespace.mode.max(sandbox.mode))
}
