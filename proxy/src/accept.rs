//! Accept loops.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use weft_runtime::{Backoff, DrainHold, Workers};

use crate::{
    inbound, outbound,
    platform::PodListeners,
    pod::Pod,
    proxy::Shared,
    socket::{self, Socket},
};

/// The listeners of a Pod, ready to accept, on one worker.
pub(crate) struct Listeners {
    worker: Handle,
    outbound: Vec<TcpListener>,
    inbound: Vec<TcpListener>,
    tunnel: Vec<TcpListener>,
}

/// Held by each connection: its place under its Pod's limit, and the drain, which waits for it.
pub(crate) type Room = (OwnedSemaphorePermit, DrainHold);

/// The most that is taken from a queue before its listener closes: the kernel's default limit of a queue
/// (`net.core.somaxconn`), so that callers who keep on dialling cannot hold the close up.
const QUEUE: usize = 4096;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Outbound,
    Inbound,
    Tunnel,
}

impl Listeners {
    /// Takes the sockets into the runtime of a worker.
    ///
    /// # Errors
    /// When one of them cannot be used.
    ///
    /// # Panics
    /// Outside of a runtime where there are no workers.
    pub(crate) fn new(listeners: PodListeners, workers: &Workers) -> io::Result<Self> {
        let worker = workers.next().cloned().unwrap_or_else(Handle::current);
        let entered = worker.enter();
        let take = |sockets: Vec<std::net::TcpListener>| -> io::Result<Vec<TcpListener>> {
            sockets
                .into_iter()
                .map(|listener| {
                    listener.set_nonblocking(true)?;
                    // What is accepted inherits the options.
                    socket::tune(&listener);
                    TcpListener::from_std(listener)
                })
                .collect()
        };
        let (outbound, inbound, tunnel) =
            (take(listeners.outbound)?, take(listeners.inbound)?, take(listeners.tunnel)?);
        drop(entered);
        Ok(Self { worker, outbound, inbound, tunnel })
    }

    /// The ports that they listen on.
    pub(crate) fn ports(&self) -> Vec<u16> {
        let all = self.outbound.iter().chain(&self.inbound).chain(&self.tunnel);
        all.filter_map(|l| l.local_addr().ok()).map(|a| a.port()).collect()
    }

    /// Starts to accept.
    pub(crate) fn serve(self, shared: &Arc<Shared>, pod: &Arc<Pod>) {
        let kinds =
            [(Kind::Outbound, self.outbound), (Kind::Inbound, self.inbound), (Kind::Tunnel, self.tunnel)];
        for (kind, listeners) in kinds {
            for listener in listeners {
                // The drain waits until what the kernel has already taken is served.
                let hold = shared.drain.hold();
                let accept = accept(shared.clone(), pod.clone(), listener, kind, hold);
                shared.tasks.spawn_on(&self.worker, "accept", accept);
            }
        }
    }
}

async fn accept(shared: Arc<Shared>, pod: Arc<Pod>, listener: TcpListener, kind: Kind, _hold: DrainHold) {
    let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_secs(1));
    let room = match kind {
        Kind::Outbound => &pod.outbound,
        Kind::Inbound => &pod.inbound,
        Kind::Tunnel => &pod.tunnels,
    };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.drain.draining() => break,
            () = pod.accepting_stopped() => break,
        };
        match accepted {
            Ok((socket, peer)) => {
                backoff.reset();
                start(&shared, &pod, room, (socket, peer), kind);
            }
            // The peer went away before it was accepted: nothing is wrong here.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                // Descriptors or memory ran out: accepting again at once would spin.
                shared.metrics.accept_errors.inc();
                let wait = backoff.next();
                tracing::warn!(pod = %pod.uid, ?kind, %error, ?wait, "accept failed; is the file limit too low?");
                tokio::time::sleep(wait).await;
            }
        }
    }
    match queued(listener) {
        Ok(sockets) => sockets.for_each(|accepted| start(&shared, &pod, room, accepted, kind)),
        Err(error) => tracing::warn!(pod = %pod.uid, ?kind, %error, "connections not yet accepted are reset"),
    }
}

/// What waits in a listener's queue: closing the listener would reset it. The socket itself is asked, as the
/// runtime's listener knows only what its last look at the socket said.
fn queued(listener: TcpListener) -> io::Result<impl Iterator<Item = (TcpStream, SocketAddr)>> {
    let listener = listener.into_std()?;
    Ok(std::iter::from_fn(move || {
        loop {
            match listener.accept() {
                Ok(accepted) => return Some(accepted),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing is left, or nothing can be taken any more.
                Err(_) => return None,
            }
        }
    })
    .take(QUEUE)
    .filter_map(|(socket, peer)| {
        socket.set_nonblocking(true).ok()?;
        Some((TcpStream::from_std(socket).ok()?, peer))
    }))
}

/// Hands a connection to a worker, where it stays.
fn start(
    shared: &Arc<Shared>,
    pod: &Arc<Pod>,
    room: &Arc<Semaphore>,
    (socket, peer): (TcpStream, SocketAddr),
    kind: Kind,
) {
    if !matches!(kind, Kind::Outbound) {
        pod.net.accepted(&socket);
    }
    let Ok(permit) = room.clone().try_acquire_owned() else {
        shared.metrics.limited.inc();
        Socket::new(socket).cut().set(true);
        return;
    };
    let here = Handle::current();
    let worker = shared.workers.next().unwrap_or(&here);
    let moved = if worker.id() == here.id() { Ok(socket) } else { move_to(worker, socket) };
    let socket = match moved {
        Ok(socket) => socket,
        Err(error) => {
            shared.metrics.accept_errors.inc();
            tracing::warn!(pod = %pod.uid, ?kind, %error, "a connection could not be taken over");
            return;
        }
    };
    let room = (permit, shared.drain.hold());
    let (tasks, shared, pod) = (shared.tasks.clone(), shared.clone(), pod.clone());
    match kind {
        Kind::Outbound => {
            tasks.spawn_on(worker, "connection", outbound::serve(shared, pod, socket, peer, room))
        }
        Kind::Inbound => {
            tasks.spawn_on(worker, "connection", inbound::plain::serve(shared, pod, socket, peer, room))
        }
        Kind::Tunnel => {
            tasks.spawn_on(worker, "connection", inbound::tunnel::serve(shared, pod, socket, room))
        }
    };
}

/// A socket belongs to the runtime that polls it.
fn move_to(worker: &Handle, socket: TcpStream) -> io::Result<TcpStream> {
    let socket = socket.into_std()?;
    let _entered = worker.enter();
    TcpStream::from_std(socket)
}

/// What remains of a connection once it is set up. Boxed by itself: a connection lives longer than its set-up, and where
/// its bytes pass unseen, all that each of them needs lies together.
pub(crate) type Serving = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Sets a connection up, which ends with its Pod, and serves it, which looks for that where it costs least. `held` is given
/// back at the end.
pub(crate) fn connection<F>(
    pod: Arc<Pod>,
    held: impl Send,
    set_up: impl FnOnce(Arc<Pod>) -> F + Send,
) -> impl Future<Output = ()> + Send
where
    F: Future<Output = Option<Serving>> + Send,
{
    let set_up = Box::pin(async move {
        let closing = pod.clone();
        // Pinned where it is made: it is large.
        let mut set_up = pin!(set_up(pod));
        tokio::select! {
            biased;
            serving = &mut set_up => serving,
            () = closing.closed() => None,
        }
    });
    async move {
        let _held = held;
        if let Some(serving) = set_up.await {
            serving.await;
        }
    }
}
