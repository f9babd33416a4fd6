//! Waiting for what happens often beside what hardly ever does.
//!
//! A `select!` looks at all that it waits for whenever anything of it moves. With thousands of connections each such
//! look at what rests (a timer, a channel) is memory that the processor does not have at hand.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::{future::Either, task::AtomicWaker};

/// Which of the two ends first, and with what; where both have, it is `rare`.
///
/// `rare` is looked at once in the beginning, before `often`, and then when it asks for it; not when `often` moves. It is
/// best boxed, away from the memory that `often` needs.
pub(crate) fn beside<O, R>(often: O, rare: R) -> Beside<O, R>
where
    O: Future + Unpin,
    R: Future + Unpin,
{
    let bell = Arc::new(Bell { rung: AtomicBool::new(true), owner: AtomicWaker::new() });
    Beside { often, rare, bell, owner: None }
}

/// See [`beside`].
pub(crate) struct Beside<O, R> {
    often: O,
    rare: R,
    bell: Arc<Bell>,
    /// Whom the bell wakes.
    owner: Option<Waker>,
}

impl<O, R> Future for Beside<O, R>
where
    O: Future + Unpin,
    R: Future + Unpin,
{
    type Output = Either<O::Output, R::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let known = this.owner.as_ref().is_some_and(|owner| owner.will_wake(cx.waker()));
        if !known || this.bell.rung.load(Ordering::Acquire) {
            // A ring takes the owner away. Who rings after this finds it again, who rang before is seen below.
            this.bell.owner.register(cx.waker());
            if !known {
                this.owner = Some(cx.waker().clone());
            }
            if this.bell.rung.swap(false, Ordering::AcqRel) {
                let waker = Waker::from(Arc::clone(&this.bell));
                if let Poll::Ready(output) = Pin::new(&mut this.rare).poll(&mut Context::from_waker(&waker)) {
                    return Poll::Ready(Either::Right(output));
                }
            }
        }
        Pin::new(&mut this.often).poll(cx).map(Either::Left)
    }
}

/// What wakes `rare`: it says so, and wakes the task of both.
struct Bell {
    rung: AtomicBool,
    owner: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        self.owner.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        future::{pending, poll_fn, ready},
        pin::pin,
    };

    use tokio::{
        sync::{mpsc, oneshot},
        task::yield_now,
        time::{Duration, sleep},
    };

    use super::*;

    /// Moves so often, then rests.
    async fn moves(times: usize) {
        for _ in 0..times {
            yield_now().await;
        }
        pending::<()>().await;
    }

    #[tokio::test]
    async fn what_rests_is_looked_at_once() {
        let looks = Cell::new(0);
        let (end, mut ended) = oneshot::channel();
        let rare = poll_fn(|cx| {
            looks.set(looks.get() + 1);
            pin!(&mut ended).poll(cx)
        });
        let often = Box::pin(async {
            for _ in 0..100 {
                yield_now().await;
            }
            end.send(()).expect("somebody waits");
            moves(1).await;
        });
        assert!(matches!(beside(often, rare).await, Either::Right(Ok(()))));
        assert_eq!(looks.get(), 2, "at the beginning, and at the end");
    }

    #[tokio::test]
    async fn each_of_both_ends_it() {
        assert!(matches!(beside(ready(1), ready(2)).await, Either::Right(2)), "rare goes first");
        assert!(matches!(beside(ready(1), pending::<()>()).await, Either::Left(1)));
        // Asks for a look while it is looked at, and again.
        let rare = Box::pin(async {
            yield_now().await;
            sleep(Duration::from_millis(1)).await;
            yield_now().await;
        });
        assert!(matches!(beside(Box::pin(moves(3)), rare).await, Either::Right(())));
    }

    /// The task that waits may be another one each time.
    #[tokio::test]
    async fn whoever_waits_last_is_woken() {
        let (send, mut come) = mpsc::channel(1);
        let mut both = beside(pending::<()>(), Box::pin(async move { come.recv().await }));
        for _ in 0..3 {
            let mut other = watched();
            assert!(Pin::new(&mut both).poll(&mut Context::from_waker(&other.0)).is_pending());
            assert!(!other.rung());
        }
        let mut last = watched();
        assert!(Pin::new(&mut both).poll(&mut Context::from_waker(&last.0)).is_pending());
        send.send(7).await.expect("it waits");
        assert!(last.rung());
        assert!(matches!(both.await, Either::Right(Some(7))));
    }

    /// A waker, and what shows whether it was woken.
    struct Watched(Waker, Arc<Bell>);

    impl Watched {
        fn rung(&mut self) -> bool {
            self.1.rung.swap(false, Ordering::AcqRel)
        }
    }

    fn watched() -> Watched {
        let bell = Arc::new(Bell { rung: AtomicBool::new(false), owner: AtomicWaker::new() });
        Watched(Waker::from(bell.clone()), bell)
    }
}
