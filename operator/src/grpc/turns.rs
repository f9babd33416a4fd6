//! Large messages take turns. A full state is megabytes, and after a restart of the operator a thousand agents ask for
//! theirs at once.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, Stream, future::BoxFuture};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::timeout,
};
use tonic::Status;

use crate::distribution::Encoded;

/// What of large messages may be on its way at one time, over all agents, in KiB.
const TOTAL: usize = 256 << 10;
/// From here on a message is large, in bytes.
const LARGE: usize = 128 << 10;
/// How long an agent may read a large message before it is the next one's turn.
const READ: Duration = Duration::from_secs(10);

/// The turns of all streams; clones are the same.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(TOTAL)))
    }
}

/// What a message of some size needs: nothing, or a part of [`TOTAL`].
pub(super) fn needed(bytes: usize) -> Option<u32> {
    let all = u32::try_from(TOTAL).unwrap_or(u32::MAX);
    (bytes >= LARGE).then(|| u32::try_from(bytes >> 10).unwrap_or(u32::MAX).min(all))
}

/// The right to send a large message.
pub(super) struct Turn(OwnedSemaphorePermit);

impl Turns {
    /// Waits for the turn of a message that needs that much.
    pub(super) async fn wait(&self, needed: u32) -> Option<Turn> {
        Arc::clone(&self.0).acquire_many_owned(needed).await.ok().map(Turn)
    }
}

/// A message on its way to the connection.
pub(super) struct Sent {
    message: Result<Arc<Encoded>, Status>,
    read: Option<oneshot::Sender<()>>,
}

impl Sent {
    /// A small one.
    pub(super) fn small(message: Result<Arc<Encoded>, Status>) -> Self {
        Self { message, read: None }
    }

    /// A large one, and what holds its turn until the connection has taken it.
    pub(super) fn large(message: Result<Arc<Encoded>, Status>, turn: Turn) -> (Self, BoxFuture<'static, ()>) {
        let (read, taken) = oneshot::channel();
        let held = async move {
            // Whatever came of it: an agent that does not read holds up no other.
            let _ = timeout(READ, taken).await;
            drop(turn.0);
        };
        (Self { message, read: Some(read) }, held.boxed())
    }
}

/// The messages of one stream as the connection takes them.
pub struct Outgoing {
    queue: mpsc::Receiver<Sent>,
    reading: Option<oneshot::Sender<()>>,
}

impl Outgoing {
    pub(super) fn new(queue: mpsc::Receiver<Sent>) -> Self {
        Self { queue, reading: None }
    }
}

impl Stream for Outgoing {
    type Item = Result<Arc<Encoded>, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // The connection asks for more only when it has room again, so the one before is sent.
        self.reading = None;
        let sent = std::task::ready!(self.queue.poll_recv(cx));
        Poll::Ready(sent.map(|sent| {
            self.reading = sent.read;
            sent.message
        }))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use weft_proto::control::SubscribeResponse;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_turn_ends_when_the_message_is_taken_or_the_time_is_over() {
        assert_eq!(needed(LARGE - 1), None);
        assert_eq!(needed(usize::MAX), u32::try_from(TOTAL).ok());
        let turns = Turns::default();
        let whole = needed(usize::MAX).unwrap();
        let message = Arc::new(Encoded::new(&SubscribeResponse::default(), &[]).unwrap());
        let free = || turns.0.available_permits();
        let (out, queue) = mpsc::channel(2);
        let mut outgoing = Outgoing::new(queue);
        let large = async || {
            let turn = turns.wait(whole).await.unwrap();
            let (sent, held) = Sent::large(Ok(Arc::clone(&message)), turn);
            assert!(out.send(sent).await.is_ok());
            // As it is: it is awaited later.
            (held,)
        };
        let (held,) = large().await;
        assert!(outgoing.next().await.is_some());
        assert_eq!(free(), 0);
        // The connection comes for the next one.
        let next = tokio::time::timeout(Duration::from_millis(1), outgoing.next()).await;
        assert!(next.is_err());
        held.await;
        assert_eq!(free(), TOTAL);
        // It never comes.
        let (held,) = large().await;
        assert!(outgoing.next().await.is_some());
        held.await;
        assert_eq!(free(), TOTAL);
        // The stream ends.
        let (held,) = large().await;
        drop(outgoing);
        held.await;
        assert_eq!(free(), TOTAL);
    }
}
