//! The life of one connection of the pool.

use std::{
    convert::Infallible,
    sync::{Weak, atomic::Ordering},
    time::{Duration, SystemTime},
};

use futures_util::future::Either;
use rand::Rng;

use super::{
    super::{PARTING, Times, keep_alive, passed, validity::Validity},
    Inner, Key,
    slot::{Slot, Tunnel},
};
use crate::{
    beside::beside,
    hbone::{Connection, Control},
};

/// How long an idle connection may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(5);
/// Least time between two attempts to prove the ends anew.
const BACK_OFF: Duration = Duration::from_millis(100);
/// Between two looks for a connection without bulk.
const SPARE: Duration = Duration::from_secs(1);

/// What drives a connection, beside itself.
pub(super) struct Driver {
    pub(super) pool: Weak<Inner>,
    pub(super) key: Key,
    pub(super) slot: Weak<Slot>,
    pub(super) tunnel: Weak<Tunnel>,
    pub(super) times: Times,
    /// The validities that this connection shares, and until when its own certificates are valid.
    pub(super) proof: Proof,
}

/// What a handshake proved.
pub(super) struct Proof {
    pub(super) theirs: (Validity, SystemTime),
    pub(super) ours: (Validity, SystemTime),
}

/// Why a connection ends that could go on.
enum End {
    /// The peer stopped to answer pings.
    Silent,
    /// The peer's certificate ended.
    Expired,
    /// It was not used.
    Idle,
}

impl Proof {
    fn extend(&self) {
        for (validity, until) in [&self.theirs, &self.ours] {
            validity.extend(*until);
        }
    }
}

impl Driver {
    /// Runs a connection until it fails, the peer stops to answer pings, the peer's certificate ends without another
    /// handshake that proved it anew, or it was idle for long enough.
    pub(super) async fn run(self, control: Control, mut connection: Connection) {
        let Self { pool, key, slot, tunnel, times, proof } = self;
        // In TLS 1.3 the dialling end is done before the other one has looked at its certificate. Its first answer
        // shows that it took us.
        let validity = proof.theirs.0.clone();
        let rare = Box::pin(async {
            tokio::select! {
                biased;
                // First, and before the connection, so that the first ping goes along with the first frames.
                () = keep_alive(control.clone(), times, move || proof.extend()) => End::Silent,
                () = validity.passed() => End::Expired,
                () = idle(tunnel.clone(), slot.clone(), times.idle) => End::Idle,
                ((), never) = async {
                    tokio::join!(attest(&pool, &key, &tunnel), spare(control.clone(), &pool, &key))
                } => match never {},
            }
        });
        let end = beside(&mut connection, rare).await;
        match end {
            Either::Left(Ok(())) => {}
            Either::Left(Err(error)) => tracing::debug!(%error, "a tunnel ended"),
            Either::Right(End::Silent) => tracing::debug!("a tunnel's peer stopped to answer pings"),
            Either::Right(End::Expired) => {
                tracing::info!(peer = %key.expected, "a tunnel was closed: the certificate of its peer has expired");
                // It retired long before, so nothing new begins; what is left is cut for its own reason meanwhile.
                let _ = tokio::time::timeout(PARTING, &mut connection).await;
            }
            Either::Right(End::Idle) => {
                if let Some(slot) = slot.upgrade() {
                    slot.forget(&tunnel);
                }
                // With its last handle gone the connection says goodbye and ends by itself.
                let _ = tokio::time::timeout(GOODBYE, &mut connection).await;
                return;
            }
        }
        if let Some(tunnel) = tunnel.upgrade() {
            tunnel.closed.store(true, Ordering::Release);
        }
        if let Some(slot) = slot.upgrade() {
            slot.forget(&tunnel);
        }
    }
}

/// Makes a further connection of the same ends while this one has streams and before a certificate of either ends;
/// see [`super::super::validity`]. Where that brings nothing the next attempt comes after about half of the time that
/// is left. Ends when that time is over, or the connection or the pool is gone, which ends nothing else.
async fn attest(pool: &Weak<Inner>, key: &Key, tunnel: &Weak<Tunnel>) {
    let Some(mut known) = tunnel.upgrade().map(|t| t.ends()) else { return };
    let mut due = due(known, 0.65..0.75);
    loop {
        passed(due).await;
        let Some(now) = tunnel.upgrade() else { return };
        let (ends, busy) = (now.ends(), now.streams.load(Ordering::Acquire) > 0);
        let validity = now.session.validity.clone();
        // It would not say goodbye while somebody holds it.
        drop(now);
        if ends > known {
            known = ends;
            due = self::due(ends, 0.65..0.75);
            continue;
        }
        if ends <= SystemTime::now() {
            return;
        }
        if busy && let Some(_turn) = validity.turn() {
            let Some(pool) = pool.upgrade() else { return };
            if let Err(error) = pool.attest(key.clone()).await {
                tracing::warn!(
                    peer = %key.expected, %error,
                    "connections will end with the certificate of one of their ends: it could not be proven anew"
                );
            }
        }
        due = self::due(ends, 0.4..0.6);
    }
}

/// Has a connection without bulk at hand for as long as this one carries some. Never ends.
async fn spare(control: Control, pool: &Weak<Inner>, key: &Key) -> Infallible {
    loop {
        control.bulk().await;
        if let Some(pool) = pool.upgrade() {
            pool.spare(key.clone()).await;
        }
        tokio::time::sleep(SPARE).await;
    }
}

/// When a random part of the time up to `ends` has passed.
fn due(ends: SystemTime, part: std::ops::Range<f64>) -> SystemTime {
    let now = SystemTime::now();
    let left = ends.duration_since(now).unwrap_or_default();
    now + left.mul_f64(rand::rng().random_range(part)).max(BACK_OFF)
}

/// Ends when the connection had no stream at two ticks of the idle time in a row, or its pool is gone.
async fn idle(tunnel: Weak<Tunnel>, slot: Weak<Slot>, limit: Duration) {
    let mut was_unused = false;
    loop {
        tokio::time::sleep(limit / 2).await;
        let (Some(tunnel), Some(slot)) = (tunnel.upgrade(), slot.upgrade()) else { return };
        let unused = tunnel.streams.load(Ordering::Acquire) == 0;
        if unused && was_unused && slot.close_if_unused(&tunnel) {
            return;
        }
        was_unused = unused;
    }
}
