//! Upstream connections that wait for the next request of the same caller. They are never shared between callers.

use std::time::Duration;

use tokio::time::Instant;

use super::conn::Conn;
use crate::l7::{Io, Target};

/// The most connections that wait.
const MAX_IDLE: usize = 4;
/// How long one may wait.
const MAX_AGE: Duration = Duration::from_secs(60);

/// Waiting connections, oldest first.
pub(crate) struct Pool<I>(Vec<Idle<I>>);

struct Idle<I> {
    target: Option<Target>,
    since: Instant,
    conn: Conn<I>,
}

impl<I: Io> Pool<I> {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    /// A connection to the target that is still open as far as can be seen.
    pub(crate) fn take(&mut self, target: Option<&Target>) -> Option<Conn<I>> {
        self.0.retain(|idle| idle.since.elapsed() < MAX_AGE);
        while let Some(at) = self.0.iter().rposition(|idle| idle.target.as_ref() == target) {
            let mut idle = self.0.remove(at);
            if idle.conn.reader.is_quiet() {
                return Some(idle.conn);
            }
        }
        None
    }

    pub(crate) fn put(&mut self, target: Option<Target>, conn: Conn<I>) {
        if conn.retires.is_some_and(|at| at <= std::time::Instant::now()) {
            return;
        }
        if self.0.len() >= MAX_IDLE {
            self.0.remove(0);
        }
        self.0.push(Idle { target, since: Instant::now(), conn });
    }
}
