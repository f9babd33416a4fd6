//! HTTP/2 connections to upstreams, for the streams of one caller's connection.

use std::{
    future::{Future as _, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use h2::client::SendRequest;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use weft_core::flow::Reason;

use super::{
    super::service::Service, CONNECTION_WINDOW, HEADER_LIST, SEND_BUFFER, STREAM_WINDOW, gather::Gather,
};
use crate::l7::{ConnectError, Io as _, Target};

/// The most upstream connections of one caller's connection; the oldest gives way, its streams go on.
const MAX_CONNECTIONS: usize = 16;

/// Moves a connection's frames; it is to be polled until it ends.
pub(crate) type Driver = BoxFuture<'static, ()>;
type Connecting = Shared<BoxFuture<'static, Result<Opened, ConnectError>>>;

#[derive(Clone)]
struct Opened {
    sender: SendRequest<Bytes>,
    /// From when on it takes no further requests.
    retires: Option<Instant>,
}

/// Connections by target.
pub(crate) struct Pool<S> {
    service: Arc<S>,
    drivers: mpsc::Sender<Driver>,
    entries: Mutex<Vec<Entry>>,
    next_id: AtomicU64,
}

struct Entry {
    id: u64,
    target: Option<Target>,
    connecting: Connecting,
}

impl<S: Service> Pool<S> {
    /// The pool, and where the drivers of its new connections come out.
    pub(crate) fn new(service: Arc<S>) -> (Self, mpsc::Receiver<Driver>) {
        let (drivers, opened) = mpsc::channel(MAX_CONNECTIONS);
        let pool = Self { service, drivers, entries: Mutex::default(), next_id: AtomicU64::new(0) };
        (pool, opened)
    }

    /// A sender that takes a request now; opens a connection where there is none that lives.
    pub(crate) async fn sender(&self, target: Option<&Target>) -> Result<SendRequest<Bytes>, ConnectError> {
        for _ in 0..2 {
            let (id, connecting) = self.entry(target);
            let opened = match connecting.await {
                Ok(opened) => opened,
                Err(error) => {
                    self.forget(id);
                    return Err(error);
                }
            };
            if opened.retires.is_some_and(|at| at <= Instant::now()) {
                self.forget(id);
                continue;
            }
            match opened.sender.ready().await {
                Ok(sender) => return Ok(sender),
                Err(_) => self.forget(id),
            }
        }
        Err(ConnectError::new(Reason::PeerReset, "the upstream closes its connections at once"))
    }

    fn forget(&self, id: u64) {
        self.entries.lock().retain(|entry| entry.id != id);
    }

    /// The number of the connection to a target, and how it comes about.
    fn entry(&self, target: Option<&Target>) -> (u64, Connecting) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.iter().find(|entry| entry.target.as_ref() == target) {
            return (entry.id, entry.connecting.clone());
        }
        if entries.len() >= MAX_CONNECTIONS {
            entries.remove(0);
        }
        let (service, drivers, target) = (self.service.clone(), self.drivers.clone(), target.cloned());
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let connecting = open(service, drivers, target.clone()).boxed().shared();
        entries.push(Entry { id, target, connecting: connecting.clone() });
        (id, connecting)
    }
}

async fn open<S: Service>(
    service: Arc<S>,
    drivers: mpsc::Sender<Driver>,
    target: Option<Target>,
) -> Result<Opened, ConnectError> {
    let io = service.connect(target.as_ref()).await?;
    let retires = io.retires();
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .enable_push(false);
    let refused = |_| ConnectError::new(Reason::ProtocolError, "the upstream does not speak HTTP/2");
    let io = Gather::new(io);
    let (sender, connection) = builder.handshake::<_, Bytes>(io.clone()).await.map_err(refused)?;
    let driver = async move {
        let mut connection = pin!(connection);
        if let Err(error) = poll_fn(|cx| io.turn(cx, |cx| connection.as_mut().poll(cx))).await {
            tracing::debug!(%error, "an upstream HTTP/2 connection broke");
        }
    };
    let gone = |_| ConnectError::new(Reason::PeerReset, "the caller is gone");
    drivers.send(driver.boxed()).await.map_err(gone)?;
    Ok(Opened { sender, retires })
}
