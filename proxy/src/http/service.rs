//! One face for both directions: an outbound handler routes a request, an inbound one judges it.

use std::{
    future::{Future, pending},
    sync::Arc,
    time::Duration,
};

use tokio::sync::watch;
use weft_core::{MeshConfig, MeshState, NamespacedName, http::HttpRequest, route::HeaderChanges};

use crate::{
    balance::Lease,
    l7::{ConnectError, InboundHandler, Io, LocalReply, OutboundHandler, RequestEnd, Target},
};

/// What was decided about a request that may go on.
#[derive(Debug, Default)]
pub(crate) struct Decision {
    pub(crate) target: Option<Target>,
    pub(crate) alternate: Option<Target>,
    pub(crate) request_headers: HeaderChanges,
    pub(crate) response_headers: HeaderChanges,
    pub(crate) timeout: Option<Duration>,
    pub(crate) policy: Option<NamespacedName>,
    pub(crate) audited: bool,
    /// Held, never read: its drop says that the request ended.
    pub(crate) _lease: Option<Lease>,
}

/// What serving needs to know of either side.
pub(crate) trait Service: Send + Sync + 'static {
    type Upstream: Io;
    /// Whether answers come from an application, whose words about the mesh are dropped, and not from a proxy.
    const UPSTREAM_IS_APPLICATION: bool;

    fn decide(&self, request: &HttpRequest<'_>) -> Result<Decision, LocalReply>;
    fn connect(
        &self,
        target: Option<&Target>,
    ) -> impl Future<Output = Result<Self::Upstream, ConnectError>> + Send;
    /// After which changes a request is to be judged again; `None` where this side does not judge.
    fn changes(&self) -> Option<Changes>;
    fn still_allows(&self, request: &HttpRequest<'_>) -> bool;
    fn flow_id(&self) -> String;
    fn settings(&self) -> Option<Arc<MeshConfig>>;
    fn finished(&self, end: RequestEnd);
}

pub(crate) type Changes = watch::Receiver<Arc<MeshState>>;

/// Ends once a request under way is no longer allowed: it is asked again after every change.
pub(crate) async fn revoked(changes: Option<&mut Changes>, still_allowed: impl Fn() -> bool) {
    if let Some(changes) = changes {
        while changes.changed().await.is_ok() {
            if !still_allowed() {
                return;
            }
        }
    }
    pending::<()>().await;
}

/// Requests of an application of ours.
pub(crate) struct Outbound<H>(pub(crate) Arc<H>);

impl<H: OutboundHandler> Service for Outbound<H> {
    type Upstream = H::Upstream;
    const UPSTREAM_IS_APPLICATION: bool = false;

    fn decide(&self, request: &HttpRequest<'_>) -> Result<Decision, LocalReply> {
        let routed = self.0.route(request)?;
        Ok(Decision {
            target: Some(routed.target),
            alternate: routed.alternate,
            request_headers: routed.request_headers,
            response_headers: routed.response_headers,
            timeout: routed.timeout,
            _lease: routed.lease,
            ..Decision::default()
        })
    }

    async fn connect(&self, target: Option<&Target>) -> Result<Self::Upstream, ConnectError> {
        match target {
            Some(target) => self.0.connect(target).await,
            None => {
                Err(ConnectError::new(weft_core::flow::Reason::NoEndpoint, "the route chose no endpoint"))
            }
        }
    }

    fn changes(&self) -> Option<Changes> {
        None
    }

    fn still_allows(&self, _: &HttpRequest<'_>) -> bool {
        true
    }

    fn flow_id(&self) -> String {
        self.0.flow_id()
    }

    fn settings(&self) -> Option<Arc<MeshConfig>> {
        self.0.settings()
    }

    fn finished(&self, end: RequestEnd) {
        self.0.finished(end);
    }
}

/// Requests towards an application of ours.
pub(crate) struct Inbound<H>(pub(crate) Arc<H>);

impl<H: InboundHandler> Service for Inbound<H> {
    type Upstream = H::Upstream;
    const UPSTREAM_IS_APPLICATION: bool = true;

    fn decide(&self, request: &HttpRequest<'_>) -> Result<Decision, LocalReply> {
        let permit = self.0.authorize(request)?;
        Ok(Decision { policy: permit.policy, audited: permit.audited, ..Decision::default() })
    }

    async fn connect(&self, _: Option<&Target>) -> Result<Self::Upstream, ConnectError> {
        self.0.connect().await
    }

    fn changes(&self) -> Option<Changes> {
        Some(self.0.changes())
    }

    fn still_allows(&self, request: &HttpRequest<'_>) -> bool {
        self.0.still_allows(request)
    }

    fn flow_id(&self) -> String {
        self.0.flow_id()
    }

    fn settings(&self) -> Option<Arc<MeshConfig>> {
        self.0.settings()
    }

    fn finished(&self, end: RequestEnd) {
        self.0.finished(end);
    }
}
