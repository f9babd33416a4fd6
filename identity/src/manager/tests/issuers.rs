//! Issuers that renew by themselves, and one that takes over from another.

use tokio::sync::{Mutex as AsyncMutex, mpsc};

use super::*;
use crate::{SvidKey, issuer::Issuer};

/// Issues when it is asked, and pushes what the test gives it.
struct Pushing {
    ca: EmbeddedCa,
    calls: AtomicUsize,
    clock: Arc<TestClock>,
    pushed: AsyncMutex<mpsc::Receiver<Result<Update, IssueError>>>,
}

impl Pushing {
    fn issued(&self, id: &SpiffeId) -> Issued {
        let key = SvidKey::generate().unwrap();
        let signed = self.ca.sign_at(id, &key.request(id).unwrap(), HOUR, self.clock.now()).unwrap();
        Issued { key, signed }
    }
}

impl Issuer for Pushing {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move { Ok(self.issued(id)) })
    }

    fn updates(&self) -> BoxStream<'_, Result<Update, IssueError>> {
        stream::unfold((), async move |()| {
            let next = self.pushed.lock().await.recv().await;
            match next {
                Some(update) => Some((update, ())),
                None => std::future::pending().await,
            }
        })
        .boxed()
    }

    fn renews(&self) -> bool {
        true
    }
}

fn pushing(clock: &Arc<TestClock>) -> (Arc<Pushing>, mpsc::Sender<Result<Update, IssueError>>) {
    let (sender, pushed) = mpsc::channel(4);
    let pushed = AsyncMutex::new(pushed);
    let issuer = Pushing { ca: ca(), calls: AtomicUsize::new(0), clock: Arc::clone(clock), pushed };
    (Arc::new(issuer), sender)
}

#[tokio::test(start_paused = true)]
async fn what_is_held_serves_until_the_new_issuer_has_given_its_own() {
    let fixture = Fixture::start(MANY, |_, _| {});
    let mut web = fixture.reader.subscribe(&id("web"));
    fixture.want(&["web"]);
    let first = some(&mut web).await;
    web.borrow_and_update();
    let (issuer, _sender) = pushing(&fixture.clock);
    fixture.manager.use_issuer(issuer.clone());
    web.changed().await.unwrap();
    let second = some(&mut web).await;
    assert_eq!(second.roots(), issuer.ca.roots(), "never without a credential, and then the new one's");
    assert_ne!(second.roots(), first.roots());
    // It renews by itself; only long after it should have is it asked again.
    let age = |since: &Credentials| fixture.clock.now().duration_since(since.obtained()).unwrap();
    web.borrow_and_update();
    web.changed().await.unwrap();
    assert!(age(&second) >= HOUR.mul_f64(0.74), "asked again after {:?}", age(&second));
    assert_eq!(issuer.calls.load(Ordering::SeqCst), 2);
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_renewal_is_taken_and_a_loss_is_told_until_the_issuer_is_back() {
    let fixture = Fixture::start(MANY, |_, _| {});
    let mut registry = Registry::default();
    fixture.manager.register(&mut registry);
    let connected = || {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text.contains("weft_issuer_connected 1")
    };
    let (issuer, sender) = pushing(&fixture.clock);
    fixture.manager.use_issuer(issuer.clone());
    let mut web = fixture.reader.subscribe(&id("web"));
    fixture.want(&["web"]);
    let first = some(&mut web).await;
    web.borrow_and_update();
    let renewed = || Ok(Update::Renewed { id: id("web"), issued: issuer.issued(&id("web")) });
    sender.send(renewed()).await.unwrap();
    web.changed().await.unwrap();
    assert!(connected() && some(&mut web).await.serial() != first.serial());
    assert_eq!(issuer.calls.load(Ordering::SeqCst), 1, "asked though it renews");

    sender.send(Err(IssueError::Unavailable("gone".into()))).await.unwrap();
    let problem = || fixture.manager.status().remove(0).problem;
    come_true(|| problem().is_some()).await;
    assert!(!connected() && fixture.reader.current(&id("web")).is_some(), "what is held goes on");
    web.borrow_and_update();
    sender.send(renewed()).await.unwrap();
    web.changed().await.unwrap();
    assert!(connected() && problem().is_none());

    // One identity alone: told, and asked for again soon.
    let failed = Update::Failed { id: id("web"), error: IssueError::Denied("taken away".into()) };
    sender.send(Ok(failed)).await.unwrap();
    web.borrow_and_update();
    web.changed().await.unwrap();
    assert!(issuer.calls.load(Ordering::SeqCst) >= 2 && problem().is_none());
    fixture.stop().await;
}
