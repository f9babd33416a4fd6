//! Bookkeeping of one request: whatever happens to it, its end is told exactly once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use weft_core::{
    flow::{Reason, Verdict},
    http::HttpRequest,
};

use super::{
    Limits,
    service::{Decision, Service},
};
use crate::l7::{LocalReply, RequestEnd, Target};

/// Counters that both directions of a request write.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Body bytes from the caller.
    pub(crate) sent: AtomicU64,
    /// Body bytes to the caller.
    pub(crate) received: AtomicU64,
    status: AtomicU16,
    latency_micros: AtomicU64,
}

impl Tally {
    pub(crate) fn add_sent(&self, count: usize) {
        self.sent.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn add_received(&self, count: usize) {
        self.received.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Notes the head of the answer; from now on no other can be given.
    pub(crate) fn answered(&self, status: u16, begun: Instant) {
        let micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        self.latency_micros.store(micros, Ordering::Relaxed);
        self.status.store(status, Ordering::Relaxed);
    }

    /// Whether the head of an answer went out.
    pub(crate) fn is_answered(&self) -> bool {
        self.status.load(Ordering::Relaxed) != 0
    }

    fn progress(&self) -> u64 {
        let moved = self.sent.load(Ordering::Relaxed) + self.received.load(Ordering::Relaxed);
        moved + u64::from(self.is_answered())
    }

    /// Resolves once nothing has moved for as long as the limits allow: long where an answer has begun, since
    /// event streams and WebSockets may be silent for a while.
    pub(crate) async fn stalled(&self, limits: &Limits) {
        let mut last = self.progress();
        loop {
            let patience = if self.is_answered() { limits.stream_idle } else { limits.stall_timeout };
            tokio::time::sleep(patience).await;
            let now = self.progress();
            if now == last {
                return;
            }
            last = now;
        }
    }
}

/// A request under way. Dropped, it reports the end: a request cut off by whoever drops the whole connection
/// counts as [`Reason::Revoked`].
pub(crate) struct Record<S: Service> {
    pub(crate) service: Arc<S>,
    end: Option<RequestEnd>,
    pub(crate) begun: Instant,
    pub(crate) tally: Arc<Tally>,
}

impl<S: Service> Record<S> {
    pub(crate) fn new(service: Arc<S>, protocol: &'static str) -> Self {
        let end = RequestEnd {
            started: SystemTime::now(),
            method: String::new(),
            host: String::new(),
            path: String::new(),
            query: String::new(),
            protocol,
            status: 0,
            headers: Vec::new(),
            sent: 0,
            received: 0,
            latency: Duration::ZERO,
            target: None,
            verdict: Verdict::Error,
            reason: Reason::Revoked,
            policy: None,
        };
        Self { service, end: Some(end), begun: Instant::now(), tally: Arc::default() }
    }

    fn with(&mut self, change: impl FnOnce(&mut RequestEnd)) {
        if let Some(end) = &mut self.end {
            change(end);
        }
    }

    /// Notes what was asked, and the headers that the mesh wants recorded.
    pub(crate) fn request(&mut self, request: &HttpRequest<'_>) {
        const LONGEST: usize = 1024;
        let wanted = self.service.settings();
        let names = wanted.iter().flat_map(|settings| &settings.telemetry.headers);
        let headers = names
            .filter_map(|name| {
                let mut value = (request.header)(name)?;
                let mut end = LONGEST.min(value.len());
                while !value.is_char_boundary(end) {
                    end -= 1;
                }
                value.truncate(end);
                Some((name.clone(), value))
            })
            .collect();
        self.with(|end| {
            end.method = request.method.to_owned();
            end.host = request.host.to_owned();
            end.path = request.path.to_owned();
            end.query = request.query.to_owned();
            end.headers = headers;
        });
    }

    pub(crate) fn decided(&mut self, decision: &Decision) {
        self.with(|end| {
            end.target.clone_from(&decision.target);
            end.policy.clone_from(&decision.policy);
            end.verdict = if decision.audited { Verdict::Audited } else { Verdict::Forwarded };
        });
    }

    pub(crate) fn target(&mut self, target: Option<&Target>) {
        self.with(|end| end.target = target.cloned());
    }

    /// It went as it should.
    pub(crate) fn done(&mut self) {
        self.with(|end| end.reason = Reason::None);
    }

    pub(crate) fn failed(&mut self, reason: Reason) {
        self.with(|end| {
            end.reason = reason;
            end.verdict = Verdict::Error;
        });
    }

    /// Policy no longer allows it.
    pub(crate) fn revoked(&mut self) {
        self.with(|end| {
            end.reason = Reason::Revoked;
            end.verdict = Verdict::Denied;
        });
    }

    /// It is answered here. The answer names the flow, whoever made it.
    pub(crate) fn replied(&mut self, reply: &mut LocalReply) {
        if reply.flow_id.is_empty() {
            reply.flow_id = self.service.flow_id();
        }
        let denied = matches!(
            reply.reason,
            Reason::PolicyDenied
                | Reason::PolicyDenyRule
                | Reason::PlaintextRefused
                | Reason::IdentityMismatch
                | Reason::UnknownPeer
        );
        self.with(|end| {
            end.reason = reply.reason;
            end.verdict = match (denied, reply.reason) {
                (true, _) => Verdict::Denied,
                (false, Reason::None) => Verdict::Forwarded,
                (false, _) => Verdict::Error,
            };
            if reply.policy.is_some() {
                end.policy.clone_from(&reply.policy);
            }
        });
    }
}

impl<S: Service> Drop for Record<S> {
    fn drop(&mut self) {
        let Some(mut end) = self.end.take() else { return };
        end.status = self.tally.status.load(Ordering::Relaxed);
        end.sent = self.tally.sent.load(Ordering::Relaxed);
        end.received = self.tally.received.load(Ordering::Relaxed);
        end.latency = match self.tally.latency_micros.load(Ordering::Relaxed) {
            0 => self.begun.elapsed(),
            micros => Duration::from_micros(micros),
        };
        if end.reason != Reason::None && matches!(end.verdict, Verdict::Forwarded | Verdict::Audited) {
            end.verdict = Verdict::Error;
        }
        self.service.finished(end);
    }
}
