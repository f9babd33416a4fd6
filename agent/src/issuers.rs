//! Which issuer this node's credentials come from: what the MeshConfig says, also when it changes.

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::watch};
use weft_core::{MeshState, SpiffeId, config};
use weft_identity::{
    CredentialManager, Issuer,
    client::OperatorIssuer,
    spire::{PodUids, SpireIssuer},
};

use crate::bundle::Operator;

/// The issuers that there are, and the one that is used.
pub struct Issuers {
    credentials: CredentialManager,
    operator: Arc<OperatorIssuer<Operator>>,
    pods: PodUids,
    used: Mutex<config::Issuer>,
    runtime: Handle,
}

impl Issuers {
    /// `credentials` work with `operator` until a configuration says otherwise. Make it inside a Tokio runtime.
    pub fn new(
        credentials: CredentialManager,
        operator: Arc<OperatorIssuer<Operator>>,
        node: &str,
        state: watch::Receiver<Arc<MeshState>>,
    ) -> Self {
        let node: Arc<str> = node.into();
        let pods: PodUids = Arc::new(move |id: &SpiffeId| {
            let state = Arc::clone(&state.borrow());
            let ours = state.workloads().filter(|w| w.node == node && w.identity == *id);
            ours.map(|w| Arc::clone(&w.uid.0)).collect()
        });
        Self { credentials, operator, pods, used: Mutex::default(), runtime: Handle::current() }
    }

    /// Uses what the configuration says. What is held serves until the new issuer has given its own.
    pub fn choose(&self, wanted: &config::Issuer) {
        let mut used = self.used.lock();
        if *used == *wanted {
            return;
        }
        let issuer: Arc<dyn Issuer> = match wanted {
            config::Issuer::Embedded => {
                tracing::info!("the operator signs this node's credentials");
                self.operator.clone()
            }
            config::Issuer::Spire { socket } => {
                tracing::info!(%socket, "the SPIRE agent issues this node's credentials");
                let _inside = self.runtime.enter();
                Arc::new(SpireIssuer::new(&**socket, Arc::clone(&self.pods)))
            }
        };
        self.credentials.use_issuer(issuer);
        used.clone_from(wanted);
    }
}

impl fmt::Debug for Issuers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issuers").field("used", &*self.used.lock()).finish_non_exhaustive()
    }
}
