//! Threads that carry traffic: one for each core, each with a runtime of its own.
//!
//! What begins on one stays there, so a tunnel and its streams are never on two cores, and what all of them have to
//! send goes out in one write. Work that is not traffic stays on the process's own runtime.

use std::{
    cell::Cell,
    fmt, io,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use parking_lot::Mutex;
use tokio::{
    runtime::{Builder, Handle},
    sync::watch,
};

thread_local! {
    static INDEX: Cell<usize> = const { Cell::new(0) };
}

/// The threads. Clones are handles to the same; they end with the last one.
#[derive(Clone)]
pub struct Workers(Arc<Inner>);

struct Inner {
    handles: Vec<Handle>,
    next: AtomicUsize,
    stop: watch::Sender<bool>,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl Workers {
    /// None: everything stays on the runtime that it begins on.
    pub fn none() -> Self {
        Self(Arc::new(Inner {
            handles: Vec::new(),
            next: AtomicUsize::new(0),
            stop: watch::Sender::new(false),
            threads: Mutex::default(),
        }))
    }

    /// Starts so many.
    ///
    /// # Errors
    /// When a thread or its runtime cannot be made.
    pub fn start(count: NonZeroUsize) -> io::Result<Self> {
        let stop = watch::Sender::new(false);
        let (mut handles, mut threads) = (Vec::new(), Vec::new());
        for index in 0..count.get() {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            handles.push(runtime.handle().clone());
            let mut stopped = stop.subscribe();
            let work = move || {
                INDEX.set(index);
                runtime.block_on(async move {
                    // An error says that the sender is gone, which is the same.
                    let _ = stopped.wait_for(|stop| *stop).await;
                });
            };
            threads.push(thread::Builder::new().name(format!("worker-{index}")).spawn(work)?);
        }
        let (next, threads) = (AtomicUsize::new(0), Mutex::new(threads));
        Ok(Self(Arc::new(Inner { handles, next, stop, threads })))
    }

    /// How many places there are to keep things apart by [`Workers::index`]: at least one.
    pub fn count(&self) -> usize {
        self.0.handles.len().max(1)
    }

    /// The number of the worker that this runs on, from 0; 0 beside them.
    pub fn index() -> usize {
        INDEX.get()
    }

    /// The next one in turn; `None` where there are none.
    pub fn next(&self) -> Option<&Handle> {
        let turn = self.0.next.fetch_add(1, Ordering::Relaxed);
        self.0.handles.get(turn % self.count())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        for thread in self.threads.get_mut().drain(..) {
            // The last handle may be dropped by a task of the thread itself.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                tracing::error!("a worker thread panicked; please report this");
            }
        }
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("count", &self.0.handles.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::Tasks;

    #[tokio::test]
    async fn work_goes_round_and_stays() {
        let workers = Workers::start(NonZeroUsize::new(2).unwrap()).unwrap();
        let tasks = Tasks::new();
        let (send, mut seen) = mpsc::channel(8);
        for _ in 0..4 {
            let (inner, send) = (tasks.clone(), send.clone());
            tasks.spawn_on(workers.next().unwrap(), "outer", async move {
                let index = Workers::index();
                inner.spawn("inner", async move {
                    send.send((index, Workers::index())).await.unwrap();
                });
            });
        }
        drop(send);
        let mut all = Vec::new();
        while let Some((outer, inner)) = seen.recv().await {
            assert_eq!(outer, inner);
            all.push(outer);
        }
        all.sort_unstable();
        assert_eq!(all, [0, 0, 1, 1]);
        assert!(Workers::none().next().is_none());
        assert_eq!(Workers::none().count(), 1);
    }

    #[test]
    fn the_threads_end_with_the_last_handle() {
        let workers = Workers::start(NonZeroUsize::new(2).unwrap()).unwrap();
        let other = workers.clone();
        drop(workers);
        let ended = other.0.handles.clone();
        drop(other);
        // The runtimes are gone: what is spawned there is dropped at once.
        for handle in ended {
            #[expect(clippy::disallowed_methods, reason = "asks whether the runtime is gone")]
            let task = handle.spawn(async {});
            assert!(task.is_finished() || task.abort_handle().is_finished());
        }
    }
}
