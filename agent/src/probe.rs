//! A live probe: one connection out of a Pod of this node, made as a program of that Pod would make it, and what the
//! flows say became of it. Nothing is sent; only Pods of the mesh are dialled, one at a time, at most one a second.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Mutex, watch},
    time::{Instant, timeout},
};
use tonic::Status;
use weft_core::{MeshState, flow::Reporter, workload::Mode};
use weft_proto::weft_relay::{Probe, ProbeResult};

use crate::{
    datapath::Datapath,
    flow::{
        Entry, FlowStore, StoredFlow,
        convert::{self, Context},
    },
    node::NodeStatus,
};

/// How long the other end may take to accept.
const CONNECT: Duration = Duration::from_secs(5);
/// How long the record may take after that.
const RECORD: Duration = Duration::from_secs(3);
/// How long a probe keeps the next one waiting.
const PAUSE: Duration = Duration::from_secs(1);
/// Entries of the store that are read at once.
const BATCH: usize = 64;

/// What probes need. Clones share one turn.
#[derive(Clone)]
pub struct Prober {
    /// The node's name.
    pub node: Arc<str>,
    /// Makes the sockets.
    pub datapath: Datapath,
    /// Has the records.
    pub flows: FlowStore,
    /// Who is in the mesh.
    pub state: watch::Receiver<Arc<MeshState>>,
    /// The Pods of this node.
    pub status: watch::Receiver<Arc<NodeStatus>>,
    /// When the last probe ended.
    pub turn: Arc<Mutex<Option<Instant>>>,
}

impl Prober {
    /// Makes a probe.
    ///
    /// # Errors
    /// When the Pod is not captured here, the address is none of the mesh's, or another probe runs.
    pub async fn probe(&self, asked: &Probe) -> Result<ProbeResult, Status> {
        let to = self.destination(asked)?;
        let uid = {
            let status = self.status.borrow();
            let named = |name: &weft_core::NamespacedName| {
                *name.namespace == *asked.namespace && *name.name == *asked.pod
            };
            let pod = status.pods.iter().find(|p| named(&p.name)).ok_or_else(|| {
                Status::not_found(format!(
                    "no Pod {}/{} is captured on this node",
                    asked.namespace, asked.pod
                ))
            })?;
            if let Some(problem) = &pod.problem {
                return Err(Status::failed_precondition(problem.clone()));
            }
            pod.uid.clone()
        };
        let busy = || Status::resource_exhausted("a probe was made a moment ago; try again in a second");
        let mut turn = self.turn.try_lock().map_err(|_| busy())?;
        if turn.is_some_and(|last| last.elapsed() < PAUSE) {
            return Err(busy());
        }
        *turn = Some(Instant::now());
        let datapath = self.datapath.clone();
        // Entering a namespace takes a thread of its own.
        let made = tokio::task::spawn_blocking(move || datapath.socket_of(&uid, to.ip())).await;
        let (socket, cookie) = made
            .map_err(|_| Status::internal("the probe broke off; see the agent's log"))?
            .map_err(|e| Status::failed_precondition(e.to_string()))?;
        let (_, position) = self.flows.bounds();
        let (error, open) = match timeout(CONNECT, socket.connect(to)).await {
            Ok(Ok(stream)) => (String::new(), Some(stream)),
            Ok(Err(error)) => (error.to_string(), None),
            Err(_) => (format!("no answer within {} s", CONNECT.as_secs()), None),
        };
        let found = timeout(RECORD, self.record(cookie, position)).await.ok().flatten();
        drop(open);
        *turn = Some(Instant::now());
        let context = Context { node: &self.node, store: self.flows.id() };
        let flow = found.map(|(at, flow)| convert::response(convert::flow(&flow, at, &context)));
        Ok(ProbeResult { error, flow })
    }

    fn destination(&self, asked: &Probe) -> Result<SocketAddr, Status> {
        let address: IpAddr =
            asked.address.parse().map_err(|_| Status::invalid_argument("the address is none"))?;
        let port = u16::try_from(asked.port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| Status::invalid_argument("the port is none"))?;
        let state = self.state.borrow();
        match state.workload_at(address) {
            Some(workload) if workload.mode != Mode::Disabled => Ok(SocketAddr::new(address, port)),
            _ => Err(Status::invalid_argument("only Pods of the mesh are dialled by a probe")),
        }
    }

    /// The proxy's word about a connection, or the kernel's where it let none reach the proxy.
    async fn record(&self, connection: u64, mut position: u64) -> Option<(u64, Arc<StoredFlow>)> {
        let mut written = self.flows.watch();
        loop {
            written.mark_unchanged();
            let batch = self.flows.read(position, BATCH);
            for (at, entry) in &batch.entries {
                if let Entry::Flow(flow) = entry
                    && flow.record.connection == connection
                    && !flow.redirected
                    && matches!(flow.record.reporter, Reporter::ProxySource | Reporter::KernelSource)
                {
                    return Some((*at, Arc::clone(flow)));
                }
            }
            if batch.next == position {
                written.changed().await.ok()?;
            }
            position = batch.next;
        }
    }
}
