//! Calls to the operator, and which connection they went over when its replica could not serve.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use tokio::sync::Notify;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{
        Service,
        http::{Request, Response},
    },
    transport::{Channel, Error},
};

/// The operator, whichever replica of it the channel has come to.
#[derive(Clone)]
pub struct Operator {
    channel: Channel,
    replicas: Arc<Replicas>,
}

/// What is known of the connections. They are numbered, so that of many calls that one replica turned away, the first
/// alone asks for another.
#[derive(Debug, Default)]
pub(super) struct Replicas {
    current: AtomicU64,
    /// The last connection over which a call was turned away, plus one.
    refused: AtomicU64,
    /// Some call was served since this was last asked.
    served: AtomicBool,
    wake: Notify,
}

impl Replicas {
    /// Returns once the current connection's replica has turned a call away.
    pub(super) async fn turned_away(&self) {
        while self.refused.load(Ordering::Acquire) <= self.current.load(Ordering::Acquire) {
            self.wake.notified().await;
        }
    }

    /// Whether a call was served since the last question.
    pub(super) fn served(&self) -> bool {
        self.served.swap(false, Ordering::Relaxed)
    }

    /// There is a new connection.
    pub(super) fn changed(&self) {
        self.current.fetch_add(1, Ordering::Release);
    }

    /// A replica answered a call that went over the connection `number`.
    fn answered<B>(&self, number: u64, answer: &Response<B>) {
        // Of a call that is refused at once the headers hold the status. Where a stream ends so later, its replica
        // served, or the connection ends too.
        let status = Status::from_header_map(answer.headers());
        if status.is_none_or(|status| status.code() != Code::Unavailable) {
            self.served.store(true, Ordering::Relaxed);
        } else {
            self.refused.fetch_max(number + 1, Ordering::Release);
            self.wake.notify_one();
        }
    }
}

impl Operator {
    pub(super) fn new(channel: Channel, replicas: Arc<Replicas>) -> Self {
        Self { channel, replicas }
    }
}

impl Service<Request<Body>> for Operator {
    type Response = Response<Body>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let number = self.replicas.current.load(Ordering::Acquire);
        let replicas = self.replicas.clone();
        let answer = self.channel.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            replicas.answered(number, &answer);
            Ok(answer)
        })
    }
}

impl fmt::Debug for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operator").field("replicas", &self.replicas).finish_non_exhaustive()
    }
}
