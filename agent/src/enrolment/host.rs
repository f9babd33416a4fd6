//! The node's own network: steered as soon as the operator has described the node.

use weft_core::{MeshState, WorkloadUid};
use weft_proxy::{PodHandle, Proxy};

use super::chain;
use crate::datapath::{Datapath, HostSpec};

/// How the node's own network is.
#[derive(Debug, Default)]
pub(super) enum Standing {
    /// Left alone.
    #[default]
    Out,
    /// Its Pods speak in the node's name.
    Steered(HostSpec),
    /// To be tried again.
    Failed,
}

impl Standing {
    /// Whether it waits for another try.
    pub(super) fn failed(&self) -> bool {
        matches!(self, Self::Failed)
    }

    /// Brings it to what `state` says of the node; with `anew`, listeners are made anew.
    pub(super) fn bring(
        &mut self,
        datapath: &Datapath,
        proxy: &Proxy,
        state: &MeshState,
        node: &str,
        anew: bool,
    ) {
        let uid = WorkloadUid::node(node);
        let wanted =
            state.node(node).map(|w| HostSpec { subject: w.subject, addresses: w.host_addresses.clone() });
        let done = match (&*self, wanted) {
            (Self::Out, None) => return,
            (Self::Steered(now), Some(wanted)) if *now == wanted && !anew => return,
            (Self::Steered(_), Some(wanted)) if !anew => {
                datapath.rename_host(&wanted).map(|()| Self::Steered(wanted)).map_err(|e| chain(&e))
            }
            (_, Some(wanted)) => steer(datapath, proxy, uid, wanted),
            (_, None) => {
                proxy.remove_pod(&uid);
                datapath.release_host().map(|()| Self::Out).map_err(|e| chain(&e))
            }
        };
        match done {
            Ok(standing) => *self = standing,
            Err(problem) => {
                if !self.failed() {
                    tracing::error!(
                        %problem,
                        "Pods of the node's own network cannot speak for the node, and strict Pods refuse them; trying \
                         again every second"
                    );
                }
                *self = Self::Failed;
            }
        }
    }
}

fn steer(datapath: &Datapath, proxy: &Proxy, uid: WorkloadUid, wanted: HostSpec) -> Result<Standing, String> {
    let host = datapath.steer_host(&wanted).map_err(|e| chain(&e))?;
    proxy
        .add_pod(PodHandle { uid, net: host.net, listeners: host.listeners })
        .map_err(|e| format!("the proxy cannot take its listeners: {e}"))?;
    tracing::info!(addresses = ?wanted.addresses, "Pods of the node's own network speak for the node");
    Ok(Standing::Steered(wanted))
}
