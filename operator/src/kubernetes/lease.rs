//! One of the replicas writes: the holder of a `coordination.k8s.io/v1` Lease.
//!
//! Clocks are not compared between replicas: a candidate takes the lease when the record has not changed for
//! [`EXPIRY`] by its own clock, and the holder stops writing [`TERM`] after the beginning of its last renewal that
//! worked, which is sooner.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease as Object, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use weft_runtime::DrainWatcher;

use super::{Cluster, LEASE};

/// How often the holder renews.
const RENEW: Duration = Duration::from_millis(500);
/// How often a candidate looks.
const LOOK: Duration = Duration::from_millis(200);
/// How long a holder may write after its last renewal.
const TERM: Duration = Duration::from_millis(1150);
/// How long a record stands without a change before a candidate takes it.
const EXPIRY: Duration = Duration::from_millis(1400);
/// What the record says, in seconds; for people and other tools.
const WRITTEN_DURATION: i32 = 2;
/// Longest wait for the API server.
const REQUEST: Duration = Duration::from_millis(500);

/// Whether this process may write. Clones follow the same lease.
#[derive(Debug, Clone)]
pub struct Leadership {
    until: watch::Receiver<Option<Instant>>,
}

impl Leadership {
    /// True while the lease is surely this process's.
    pub fn held(&self) -> bool {
        self.until.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Waits until the lease is this process's. Never ends where the lease's task has.
    pub async fn acquired(&mut self) {
        while !self.held() {
            if self.until.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Takes part in the election.
#[derive(Debug)]
pub struct Lease {
    api: Api<Object>,
    identity: String,
    until: watch::Sender<Option<Instant>>,
    /// The record that was seen last, and since when.
    seen: Option<(Option<LeaseSpec>, Instant)>,
}

impl Lease {
    /// A candidate, named as the cluster's Pod.
    pub fn new(cluster: &Cluster) -> (Self, Leadership) {
        let (until, receiver) = watch::channel(None);
        let api = Api::namespaced(cluster.client.clone(), &cluster.namespace);
        (Self { api, identity: cluster.pod.clone(), until, seen: None }, Leadership { until: receiver })
    }

    /// Holds the lease or stands for it, until the process drains; then it is given back at once.
    pub async fn run(mut self, drain: DrainWatcher) {
        let mut failing = false;
        loop {
            let begun = Instant::now();
            let held = match timeout(REQUEST, self.turn(begun)).await {
                Ok(Ok(held)) => {
                    failing = false;
                    held
                }
                outcome => {
                    let error = match outcome {
                        Ok(Err(error)) => error.to_string(),
                        _ => format!("no answer in {REQUEST:?}"),
                    };
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!("the lease {LEASE} cannot be held or asked for: {error}");
                    }
                    false
                }
            };
            let was = *self.until.borrow();
            if held {
                if was.is_none_or(|until| until <= begun) {
                    tracing::info!("this replica holds the lease and writes");
                }
                self.until.send_replace(Some(begun + TERM));
            } else if was.is_some_and(|until| until <= Instant::now()) {
                tracing::warn!("this replica does not hold the lease any more");
                self.until.send_replace(None);
            }
            let pause = if held { RENEW } else { LOOK };
            let mut next = begun + pause;
            if let Some((_, since)) = self.seen.as_ref().filter(|_| !held) {
                // Not later than the moment at which the record may be taken.
                let expiry = *since + EXPIRY;
                next = if expiry > begun { next.min(expiry) } else { next };
            }
            let rest = next.saturating_duration_since(Instant::now());
            tokio::select! {
                () = drain.draining() => break,
                () = sleep(rest) => {}
            }
        }
        if self.until.send_replace(None).is_some() {
            match timeout(REQUEST, self.release()).await {
                Ok(Ok(())) => tracing::info!("the lease is given back"),
                _ => tracing::warn!(
                    "the lease could not be given back; another replica takes it when it expires"
                ),
            }
        }
    }

    /// One look, and one write where it is ours to hold or to take; true where it is held after that.
    async fn turn(&mut self, now: Instant) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api.get_opt(LEASE).await? else {
            let metadata = ObjectMeta { name: Some(LEASE.into()), ..ObjectMeta::default() };
            let lease = Object { metadata, spec: Some(self.record(None)) };
            return match self.api.create(&PostParams::default(), &lease).await {
                Ok(_) => Ok(true),
                Err(error) if super::is_conflict(&error) => Ok(false),
                Err(error) => Err(error),
            };
        };
        let same = self.seen.as_ref().filter(|(record, _)| *record == lease.spec);
        let since = same.map_or(now, |(_, since)| *since);
        self.seen = Some((lease.spec.clone(), since));
        let record = lease.spec.take();
        let holder = record.as_ref().and_then(|r| r.holder_identity.as_deref()).unwrap_or_default();
        let free = holder.is_empty() || holder == self.identity || now.duration_since(since) >= EXPIRY;
        if !free {
            return Ok(false);
        }
        lease.spec = Some(self.record(record.as_ref()));
        // The resource version that was read travels with it: of two candidates, one gets a conflict.
        match self.api.replace(LEASE, &PostParams::default(), &lease).await {
            Ok(_) => Ok(true),
            Err(error) if super::is_conflict(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn record(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = Some(MicroTime(Timestamp::now()));
        let mine = before.filter(|b| b.holder_identity.as_ref() == Some(&self.identity));
        let changes = before.and_then(|b| b.lease_transitions).unwrap_or_default();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(WRITTEN_DURATION),
            acquire_time: mine.and_then(|m| m.acquire_time.clone()).or_else(|| now.clone()),
            renew_time: now,
            lease_transitions: Some(changes.saturating_add(i32::from(mine.is_none() && before.is_some()))),
            ..LeaseSpec::default()
        }
    }

    async fn release(&self) -> Result<(), kube::Error> {
        let Some(mut lease) = self.api.get_opt(LEASE).await? else { return Ok(()) };
        let Some(record) = lease.spec.as_mut().filter(|r| r.holder_identity.as_ref() == Some(&self.identity))
        else {
            return Ok(());
        };
        record.holder_identity = Some(String::new());
        record.renew_time = Some(MicroTime(Timestamp::now()));
        self.api.replace(LEASE, &PostParams::default(), &lease).await.map(drop)
    }
}
