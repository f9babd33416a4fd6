//! Connecting to a chosen endpoint: plain, straight into a Pod of this node, or through a tunnel.

use std::{net::SocketAddr, sync::Arc};

use weft_core::{
    Workload,
    flow::{Reason, Tls},
    workload::Mode,
};

use crate::{
    connections::Source,
    early::Early,
    inbound::{Arrival, plain},
    l7::{ConnectError, Target},
    metrics::{Pair, Reported, Side},
    platform::Family,
    pod::Pod,
    proxy::Shared,
    socket::{self, Socket},
    tunnel::{ConnectRequest, SourceInfo, client::Key},
    upstream::{Upstream, Way},
};

/// Whether another endpoint may do where one failed so.
pub(super) fn worth_another(error: &ConnectError) -> bool {
    !error.settled
        && matches!(
            error.reason,
            Reason::ConnectFailure | Reason::Timeout | Reason::TlsFailure | Reason::PeerReset
        )
}

/// Connects on behalf of one connection of an application.
pub(super) struct Dialler {
    /// The proxy.
    pub(super) shared: Arc<Shared>,
    /// The source Pod.
    pub(super) pod: Arc<Pod>,
    /// The source Pod, as the mesh sees it.
    pub(super) source: Arc<Workload>,
    /// The connection's id.
    pub(super) connection: u64,
    /// The application's address.
    pub(super) client: SocketAddr,
}

impl Dialler {
    /// The counters of the way to a target.
    pub(super) fn pair(&self, target: &Target) -> Arc<Pair> {
        let side = target.workload.as_deref().map_or_else(Side::outside, Side::workload);
        self.shared.metrics.pair(Reported::Source, Side::workload(&self.source), side)
    }

    /// Connects to an endpoint, and counts that in `pair`. An enrolled one is reached authenticated or not at all. What of
    /// `early` did not go along is still to be sent.
    ///
    /// # Errors
    /// When it cannot be reached, is not who it should be, or refuses.
    pub(super) async fn connect(
        &self,
        target: &Target,
        pair: Arc<Pair>,
        early: &mut Early<'_>,
    ) -> Result<Upstream, ConnectError> {
        let Some(chosen) = &target.workload else {
            let state = self.shared.state();
            if self.source.mode == Mode::Strict && state.in_ranges(target.address.ip()) {
                let text = format!("nobody described the mesh's address {}", target.address.ip());
                return Err(ConnectError::new(Reason::UnknownPeer, text));
            }
            return self.plain(target, pair).await;
        };
        // The Pod may have been enrolled or removed since it was chosen.
        let state = self.shared.state();
        let Some(workload) = state.workload(&chosen.uid) else {
            let text = format!("the Pod {} is gone", chosen.name);
            return Err(ConnectError::new(Reason::ConnectFailure, text));
        };
        if !workload.mode.enrolled() {
            return self.plain(target, pair).await;
        }
        let here = self.shared.pod(&workload.uid).filter(|_| state.shortcut(&self.source, workload));
        match here {
            Some(pod) => self.local(target, pair, &pod).await,
            None => self.tunnel(target, pair, workload, early).await,
        }
    }

    async fn plain(&self, target: &Target, pair: Arc<Pair>) -> Result<Upstream, ConnectError> {
        let failed = |error: std::io::Error| {
            ConnectError::new(
                Reason::ConnectFailure,
                format!("{} cannot be connected to: {error}", target.address),
            )
        };
        let socket = self.pod.net.socket(Family::of(target.address), None).map_err(failed)?;
        let stream = tokio::time::timeout(self.shared.config.connect_timeout, socket.connect(target.address))
            .await
            .map_err(|_| {
                ConnectError::new(Reason::Timeout, format!("{} did not answer in time", target.address))
            })?
            .map_err(failed)?;
        socket::tune(&stream);
        Ok(Upstream::new(Way::Plain(Socket::new(stream)), Tls::None, pair))
    }

    async fn local(
        &self,
        target: &Target,
        pair: Arc<Pair>,
        pod: &Arc<Pod>,
    ) -> Result<Upstream, ConnectError> {
        let port = target.address.port();
        if port == self.shared.config.tunnel_port || pod.ports.contains(&port) {
            self.shared.metrics.loops.inc();
            return Err(ConnectError::new(Reason::ProtocolError, "the port is the proxy's own"));
        }
        let arrival = Arrival {
            connection: self.connection,
            source: Source::Authenticated(self.source.identity.clone()),
            workload: Some(self.source.clone()),
            client: self.client,
            destination: target.address,
            tls: Tls::Local,
            credentials: None,
            validity: None,
        };
        plain::local(&self.shared, pod, arrival, pair).await
    }

    async fn tunnel(
        &self,
        target: &Target,
        pair: Arc<Pair>,
        workload: &Workload,
        early: &mut Early<'_>,
    ) -> Result<Upstream, ConnectError> {
        let identity = &self.source.identity;
        let Some(credentials) = self.shared.credentials.current(identity) else {
            let text = format!("no credentials for {identity} yet; is the operator reachable?");
            return Err(ConnectError::new(Reason::NoCredentials, text));
        };
        let key = Key {
            source: self.source.uid.clone(),
            identity: identity.clone(),
            destination: workload.uid.clone(),
            address: SocketAddr::new(target.address.ip(), self.shared.config.tunnel_port),
            expected: workload.identity.clone(),
        };
        let request = ConnectRequest {
            authority: target.address,
            source: SourceInfo {
                connection: self.connection,
                port: self.client.port(),
                node: self.shared.config.node.clone(),
                namespace: self.source.name.namespace.to_string(),
                owner_kind: self.source.owner.kind.to_ascii_lowercase(),
                owner: self.source.owner.name.to_string(),
                pod: self.source.name.name.to_string(),
            },
        };
        let connected = self.pod.pool().connect(&key, &credentials, &request, early).await;
        let (stream, session) = connected.inspect_err(|error| {
            if error.reason == Reason::IdentityMismatch {
                self.shared.metrics.peer_mismatches.inc();
            }
        })?;
        Ok(Upstream::new(Way::Tunnel(stream), session.tls, pair))
    }
}
