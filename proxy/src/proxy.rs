//! The proxy: its Pods, and their accept loops.

use std::{io, net::IpAddr, sync::Arc};

use foldhash::HashMap;
use parking_lot::RwLock;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use weft_core::{MeshState, SpiffeId, WorkloadUid, flow::FlowSink};
use weft_identity::CredentialReader;
use weft_runtime::{DrainWatcher, Tasks, Workers};

use crate::{
    ProxyConfig, accept,
    connections::Connections,
    metrics::Metrics,
    platform::PodHandle,
    pod::Pod,
    tunnel::{client::Pool, validity::Validities},
};

/// What all parts of the proxy share.
pub struct Shared {
    /// Settings.
    pub config: ProxyConfig,
    /// Our identities.
    pub credentials: CredentialReader,
    /// Where flow records go.
    pub flows: Arc<dyn FlowSink>,
    /// What is counted.
    pub metrics: Metrics,
    /// What runs.
    pub tasks: Tasks,
    /// Where connections are served.
    pub workers: Workers,
    /// Tells when to stop.
    pub drain: DrainWatcher,
    /// Live connections.
    pub connections: Connections,
    /// Until when those are proven who opened tunnels to a Pod here: by Pod, their identity and their address.
    pub proven: Validities<(WorkloadUid, SpiffeId, IpAddr)>,
    state: watch::Receiver<Arc<MeshState>>,
    pods: RwLock<HashMap<WorkloadUid, Arc<Pod>>>,
}

impl Shared {
    /// The mesh as it is now.
    pub fn state(&self) -> Arc<MeshState> {
        self.state.borrow().clone()
    }

    /// Tells of changes of the mesh from now on.
    pub fn changes(&self) -> watch::Receiver<Arc<MeshState>> {
        let mut changes = self.state.clone();
        changes.mark_unchanged();
        changes
    }

    /// An enrolled Pod of this node.
    pub fn pod(&self, uid: &WorkloadUid) -> Option<Arc<Pod>> {
        self.pods.read().get(uid).cloned()
    }

    /// Limits of HTTP serving.
    pub fn http_limits(&self) -> crate::http::Limits {
        crate::http::Limits::default()
    }

    /// Asks the state, and again after each change, until there is an answer or
    /// [`ProxyConfig::state_timeout`] passed.
    pub async fn wait<T>(&self, mut ask: impl FnMut(&MeshState) -> Option<T>) -> Option<T> {
        let mut state = self.state.clone();
        let asking = async {
            loop {
                let now = state.borrow_and_update().clone();
                if let Some(answer) = ask(&now) {
                    return Some(answer);
                }
                state.changed().await.ok()?;
            }
        };
        tokio::time::timeout(self.config.state_timeout, asking).await.ok().flatten()
    }
}

/// The node proxy. Cheap to clone.
#[derive(Clone)]
pub struct Proxy {
    shared: Arc<Shared>,
}

impl Proxy {
    /// A proxy without Pods. It begins at once to watch `state` and `credentials`.
    #[expect(clippy::too_many_arguments, reason = "each is a part of the process that only its app can make")]
    pub fn new(
        config: ProxyConfig,
        state: watch::Receiver<Arc<MeshState>>,
        credentials: CredentialReader,
        flows: Arc<dyn FlowSink>,
        registry: &mut Registry,
        tasks: Tasks,
        workers: Workers,
        drain: DrainWatcher,
    ) -> Self {
        let metrics = Metrics::new(registry, config.metric_pairs);
        let shared = Arc::new(Shared {
            config,
            credentials: credentials.clone(),
            flows,
            metrics: metrics.clone(),
            tasks,
            workers,
            drain,
            connections: Connections::default(),
            proven: Validities::default(),
            state: state.clone(),
            pods: RwLock::default(),
        });
        let watch = shared.connections.clone().watch(state.clone(), credentials, shared.drain.clone());
        shared.tasks.vital("connection-watch", async move {
            watch.await;
            Ok(())
        });
        let drain = shared.drain.clone();
        shared.tasks.vital("proxy-metrics", async move {
            tokio::select! {
                () = metrics.keep(state) => {}
                () = drain.drained() => {}
            }
            Ok(())
        });
        Self { shared }
    }

    /// Starts to serve a Pod. A Pod of the same UID that is served already is replaced: its listeners close, its
    /// connections go on.
    ///
    /// # Errors
    /// When a listener cannot be used.
    pub fn add_pod(&self, handle: PodHandle) -> io::Result<()> {
        let listeners = accept::Listeners::new(handle.listeners, &self.shared.workers)?;
        let shared = &self.shared;
        let ports = listeners.ports();
        let pool = || {
            let (tasks, credentials) = (shared.tasks.clone(), shared.credentials.clone());
            let open = shared.metrics.tunnels.clone();
            Pool::new(handle.net.clone(), shared.config.tunnel, tasks, credentials, open)
        };
        let pools = std::iter::repeat_with(pool).take(shared.workers.count()).collect();
        let pod = Pod::new(handle.uid.clone(), handle.net, ports, &shared.config, pools);
        let pod = Arc::new(pod);
        if let Some(earlier) = shared.pods.write().insert(handle.uid, pod.clone()) {
            earlier.stop_accepting();
        }
        listeners.serve(shared, &pod);
        Ok(())
    }

    /// Stops to serve a Pod and cuts its connections.
    pub fn remove_pod(&self, uid: &WorkloadUid) {
        let removed = self.shared.pods.write().remove(uid);
        self.shared.connections.cut_pod(uid);
        if let Some(pod) = removed {
            pod.close();
        }
    }

    /// The registry of live connections, for others who learn that one must end.
    pub fn registry(&self) -> Connections {
        self.shared.connections.clone()
    }

    /// Live connections, each side of a same-node connection counted.
    pub fn connections(&self) -> usize {
        self.shared.connections.len()
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }
}
