//! One enrolled Pod inside the proxy.

use std::sync::Arc;

use tokio::sync::{Semaphore, watch};
use weft_core::WorkloadUid;
use weft_runtime::Workers;

use crate::{ProxyConfig, balance::Balancer, platform::PodNet, tunnel::client::Pool};

/// What the proxy keeps of an enrolled Pod.
pub struct Pod {
    /// Which Pod.
    pub uid: WorkloadUid,
    /// Its network namespace.
    pub net: Arc<dyn PodNet>,
    /// Its tunnels to others, by worker.
    pools: Vec<Pool>,
    /// What it has active at each endpoint.
    pub balancer: Balancer,
    /// Room for outbound connections.
    pub outbound: Arc<Semaphore>,
    /// Room for plain inbound connections.
    pub inbound: Arc<Semaphore>,
    /// Room for inbound tunnels.
    pub tunnels: Arc<Semaphore>,
    /// The proxy's own ports in the namespace: nothing may be dialled there.
    pub ports: Vec<u16>,
    stage: watch::Sender<Stage>,
}

impl Pod {
    /// A Pod whose listeners use `ports`; `pools` has one for each worker, and at least one.
    pub fn new(
        uid: WorkloadUid,
        net: Arc<dyn PodNet>,
        ports: Vec<u16>,
        config: &ProxyConfig,
        pools: Vec<Pool>,
    ) -> Self {
        Self {
            uid,
            pools,
            net,
            balancer: Balancer::default(),
            outbound: Arc::new(Semaphore::new(config.outbound_limit)),
            inbound: Arc::new(Semaphore::new(config.inbound_limit)),
            tunnels: Arc::new(Semaphore::new(config.tunnel_limit)),
            ports,
            stage: watch::Sender::new(Stage::Serving),
        }
    }

    /// The tunnels of the worker that asks: a stream stays on the worker of its tunnel.
    pub fn pool(&self) -> &Pool {
        &self.pools[Workers::index() % self.pools.len()]
    }

    #[cfg(test)]
    pub(crate) fn pools(&self) -> &[Pool] {
        &self.pools
    }

    /// Stops everything that belongs to it.
    pub fn close(&self) {
        self.stage.send_replace(Stage::Closed);
    }

    /// Stops to accept; connections go on.
    pub fn stop_accepting(&self) {
        self.stage.send_if_modified(|stage| {
            let serving = *stage == Stage::Serving;
            if serving {
                *stage = Stage::Replaced;
            }
            serving
        });
    }

    /// Ends when the Pod was closed.
    pub async fn closed(&self) {
        self.reached(Stage::Closed).await;
    }

    /// Ends when the Pod accepts no more.
    pub async fn accepting_stopped(&self) {
        self.reached(Stage::Replaced).await;
    }

    async fn reached(&self, stage: Stage) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.stage.subscribe().wait_for(|now| *now >= stage).await;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Serving,
    Replaced,
    Closed,
}
