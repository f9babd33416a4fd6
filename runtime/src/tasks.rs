//! Named tasks: a panic is logged and counted, the end of a vital one is seen, and all are joined at shutdown.

use std::{
    collections::{HashMap, VecDeque},
    error::Error,
    fmt,
    future::Future,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::FutureExt;
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{runtime::Handle, sync::Notify, task::AbortHandle, time::timeout};

/// How long [`Tasks::join`] waits for the tasks that it aborted.
const ABORT_GRACE: Duration = Duration::from_secs(1);

/// The tasks of one process. Clones are handles to the same set.
#[derive(Clone, Default)]
pub struct Tasks {
    shared: Arc<Shared>,
}

/// A vital task came to its end.
#[derive(Debug)]
pub struct VitalEnd {
    /// The task's name.
    pub name: &'static str,
    /// How it ended.
    pub outcome: VitalOutcome,
}

/// How a vital task ended.
#[derive(Debug)]
pub enum VitalOutcome {
    /// It returned, though it should run as long as the process.
    Completed,
    /// It returned an error.
    Failed(Box<dyn Error + Send + Sync>),
    /// It panicked with this message.
    Panicked(String),
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// The last task ended.
    none: Notify,
    vital_ended: Notify,
    running: Family<TaskLabels, Gauge>,
    panics: Family<TaskLabels, Counter>,
}

#[derive(Default)]
struct State {
    next: u64,
    live: HashMap<u64, Entry>,
    ends: VecDeque<VitalEnd>,
}

struct Entry {
    name: &'static str,
    /// `None` only between the registration and the return of the runtime's spawn.
    handle: Option<AbortHandle>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TaskLabels {
    name: &'static str,
}

impl Tasks {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a short-lived or per-connection task. A panic in it is logged with `name` and counted; it harms no
    /// other task.
    ///
    /// # Panics
    /// When called outside a tokio runtime.
    pub fn spawn<F>(&self, name: &'static str, f: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_on(&Handle::current(), name, f)
    }

    /// As [`Tasks::spawn`], on that runtime.
    pub fn spawn_on<F>(&self, runtime: &Handle, name: &'static str, f: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        // Each of the futures around it would hold it twice: once until it is polled, once while it is.
        let f = Box::pin(f);
        self.start(runtime, name, |live| Caught { live, f })
    }

    /// Starts a task that must run as long as the process: its end, however it comes, is reported by
    /// [`Tasks::ended`].
    ///
    /// # Panics
    /// When called outside a tokio runtime.
    pub fn vital<F>(&self, name: &'static str, f: F)
    where
        F: Future<Output = Result<(), Box<dyn Error + Send + Sync>>> + Send + 'static,
    {
        self.start(&Handle::current(), name, |live| async move {
            let shared = &live.shared;
            let outcome = match AssertUnwindSafe(f).catch_unwind().await {
                Ok(Ok(())) => VitalOutcome::Completed,
                Ok(Err(error)) => VitalOutcome::Failed(error),
                Err(panic) => {
                    let message = message(panic.as_ref());
                    shared.panicked(name, &message);
                    VitalOutcome::Panicked(message)
                }
            };
            shared.state.lock().ends.push_back(VitalEnd { name, outcome });
            shared.vital_ended.notify_one();
        });
    }

    /// Waits for the end of a vital task; each end is reported once. `main` selects on it next to the signals.
    pub fn ended(&self) -> impl Future<Output = VitalEnd> + Send + 'static {
        let shared = Arc::clone(&self.shared);
        async move {
            loop {
                let notified = shared.vital_ended.notified();
                let end = shared.state.lock().ends.pop_front();
                match end {
                    Some(end) => return end,
                    None => notified.await,
                }
            }
        }
    }

    /// Waits until every task has ended, at most for `deadline`; then aborts the rest and returns how many that
    /// were.
    pub async fn join(&self, deadline: Duration) -> usize {
        if timeout(deadline, self.empty()).await.is_ok() {
            return 0;
        }
        let aborted: Vec<(&'static str, AbortHandle)> = {
            let state = self.shared.state.lock();
            state.live.values().filter_map(|e| Some((e.name, e.handle.clone()?))).collect()
        };
        for (name, handle) in &aborted {
            tracing::warn!(task = name, "aborted: it did not end within the deadline");
            handle.abort();
        }
        if timeout(ABORT_GRACE, self.empty()).await.is_err() {
            tracing::warn!(left = self.len(), "tasks block their thread and could not be aborted");
        }
        aborted.len()
    }

    /// Ends when no task is alive.
    async fn empty(&self) {
        let mut none = std::pin::pin!(self.shared.none.notified());
        loop {
            // Before the look, so that an end after it is heard of.
            none.as_mut().enable();
            if self.is_empty() {
                return;
            }
            none.as_mut().await;
            none.set(self.shared.none.notified());
        }
    }

    /// Tasks alive.
    pub fn len(&self) -> usize {
        self.shared.state.lock().live.len()
    }

    /// Whether no task is alive.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds `weft_tasks{name}` and `weft_task_panics_total{name}` to a registry without a prefix.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("weft_tasks", "Tasks alive, by name", self.shared.running.clone());
        registry.register("weft_task_panics", "Tasks ended by a panic, by name", self.shared.panics.clone());
    }

    fn start<F>(&self, runtime: &Handle, name: &'static str, task: impl FnOnce(Live) -> F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let live = Live::register(Arc::clone(&self.shared), name);
        let id = live.id;
        #[expect(clippy::disallowed_methods, reason = "the one place where tasks start")]
        let handle = runtime.spawn(task(live)).abort_handle();
        // The task may have ended already; then its entry is gone and must not come back.
        if let Some(entry) = self.shared.state.lock().live.get_mut(&id) {
            entry.handle = Some(handle.clone());
        }
        handle
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasks").field("live", &self.len()).finish()
    }
}

impl fmt::Display for VitalEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name;
        match &self.outcome {
            VitalOutcome::Completed => {
                write!(f, "the task `{name}` returned, though it must run as long as the process")
            }
            VitalOutcome::Failed(error) => write!(f, "the task `{name}` failed: {error}"),
            VitalOutcome::Panicked(message) => {
                write!(f, "the task `{name}` panicked: {message}; please report this with the log above")
            }
        }
    }
}

impl Error for VitalEnd {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.outcome {
            VitalOutcome::Failed(error) => error.source(),
            VitalOutcome::Completed | VitalOutcome::Panicked(_) => None,
        }
    }
}

impl Shared {
    fn panicked(&self, name: &'static str, message: &str) {
        tracing::error!(task = name, message, "a task panicked; please report this");
        self.panics.get_or_create(&TaskLabels { name }).inc();
    }
}

/// One task's entry; dropped with the task, also when it is aborted or never polled.
struct Live {
    shared: Arc<Shared>,
    name: &'static str,
    id: u64,
    running: Gauge,
}

impl Live {
    fn register(shared: Arc<Shared>, name: &'static str) -> Self {
        let running = shared.running.get_or_create(&TaskLabels { name }).clone();
        running.inc();
        let id = {
            let mut state = shared.state.lock();
            let id = state.next;
            state.next += 1;
            state.live.insert(id, Entry { name, handle: None });
            id
        };
        Self { shared, name, id, running }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.running.dec();
        let none = {
            let mut state = self.shared.state.lock();
            state.live.remove(&self.id);
            state.live.is_empty()
        };
        if none {
            self.shared.none.notify_waiters();
        }
    }
}

/// A task whose panic ends it alone. Made by hand: there is one for each connection, and what holds futures of futures is
/// spread over more memory than this.
struct Caught<F> {
    f: Pin<Box<F>>,
    /// Last: a task is alive until all that it held is gone.
    live: Live,
}

impl<F> Future for Caught<F>
where
    F: Future<Output = ()>,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let f = self.f.as_mut();
        // Whatever it shared is behind locks that do not poison.
        std::panic::catch_unwind(AssertUnwindSafe(|| f.poll(cx))).unwrap_or_else(|panic| {
            self.live.shared.panicked(self.live.name, &message(panic.as_ref()));
            Poll::Ready(())
        })
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&'static str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests;
