use std::sync::atomic::AtomicUsize;

use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};
use weft_runtime::{DrainTrigger, Tasks, drain};

use super::*;
use crate::{
    BoxFuture, Signed,
    ca::EmbeddedCa,
    testing::{HOUR, ca, connected, credentials, domain, id},
};

mod issuers;

/// Follows tokio's clock, which a paused test moves.
struct TestClock {
    base: (SystemTime, Instant),
}

impl Clock for TestClock {
    fn now(&self) -> SystemTime {
        self.base.0 + self.base.1.elapsed()
    }
}

/// Signs while it has permits to; each signature uses one up unless `free`.
struct TestIssuer {
    ca: watch::Sender<Arc<EmbeddedCa>>,
    /// Signs instead of that one.
    lagging: Mutex<Option<Arc<EmbeddedCa>>>,
    /// Whether it tells of new roots by itself.
    tells: bool,
    clock: Arc<TestClock>,
    up: AtomicBool,
    calls: AtomicUsize,
    running: AtomicUsize,
    most: AtomicUsize,
    gate: Semaphore,
    wrong_id: Option<SpiffeId>,
}

impl crate::CsrSigner for TestIssuer {
    fn sign<'a>(&'a self, id: &'a SpiffeId, csr_der: Vec<u8>) -> BoxFuture<'a, Result<Signed, IssueError>> {
        Box::pin(async move {
            self.calls.fetch_add(1, Ordering::SeqCst);
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(running, Ordering::SeqCst);
            let result = async {
                if !self.up.load(Ordering::SeqCst) {
                    return Err(IssueError::Denied("no such Pod on this node".into()));
                }
                let _pass = self.gate.acquire().await.map_err(|e| IssueError::Request(e.to_string()))?;
                tokio::task::yield_now().await;
                let id = self.wrong_id.as_ref().unwrap_or(id);
                let lagging = self.lagging.lock().clone();
                let ca = lagging.unwrap_or_else(|| Arc::clone(&self.ca.borrow()));
                ca.sign_at(id, &csr_der, HOUR, self.clock.now())
                    .map_err(|error| IssueError::Request(error.to_string()))
            }
            .await;
            self.running.fetch_sub(1, Ordering::SeqCst);
            result
        })
    }

    fn updates(&self) -> BoxStream<'_, Result<Update, IssueError>> {
        let mut ca = self.ca.subscribe();
        ca.mark_changed();
        let told = stream::unfold(ca, async |mut ca| {
            ca.changed().await.ok()?;
            let now = Arc::clone(&ca.borrow_and_update());
            let trust_domain = now.trust_domain().to_string();
            Some((Ok(Update::Roots { trust_domain, roots: now.roots() }), ca))
        });
        if self.tells { told.boxed() } else { stream::pending().boxed() }
    }
}

struct Fixture {
    issuer: Arc<TestIssuer>,
    clock: Arc<TestClock>,
    manager: CredentialManager,
    reader: CredentialReader,
    tasks: Tasks,
    trigger: DrainTrigger,
}

const MANY: usize = 1000;

impl Fixture {
    fn start(permits: usize, adjust: impl FnOnce(&mut TestIssuer, &mut ManagerConfig)) -> Self {
        let clock = Arc::new(TestClock { base: (SystemTime::now(), Instant::now()) });
        let mut issuer = TestIssuer {
            ca: watch::Sender::new(Arc::new(ca())),
            lagging: Mutex::default(),
            tells: false,
            clock: Arc::clone(&clock),
            up: AtomicBool::new(true),
            calls: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            gate: Semaphore::new(permits),
            wrong_id: None,
        };
        let mut config =
            ManagerConfig { clock: Arc::clone(&clock) as Arc<dyn Clock>, ..ManagerConfig::default() };
        adjust(&mut issuer, &mut config);
        let issuer = Arc::new(issuer);
        let (manager, reader) =
            CredentialManager::with_config(Arc::clone(&issuer) as Arc<dyn Issuer>, config);
        let (trigger, watcher) = drain::channel();
        let tasks = Tasks::new();
        tasks.spawn("credentials", manager.clone().run(watcher));
        Self { issuer, clock, manager, reader, tasks, trigger }
    }

    fn want(&self, names: &[&str]) {
        self.manager.want(names.iter().map(|name| id(name)).collect());
    }

    fn up(&self, up: bool) {
        self.issuer.up.store(up, Ordering::SeqCst);
    }

    async fn stop(self) {
        assert!(self.trigger.drain(Duration::from_secs(1)).await);
        assert_eq!(self.tasks.join(Duration::from_secs(1)).await, 0);
    }
}

type Receiver = watch::Receiver<Option<Arc<Credentials>>>;

/// Waits for it, at most a minute of paused time.
async fn come_true(mut condition: impl FnMut() -> bool) {
    let poll = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), poll).await.unwrap();
}

async fn some(receiver: &mut Receiver) -> Arc<Credentials> {
    receiver.wait_for(Option::is_some).await.unwrap().clone().unwrap()
}

async fn none(receiver: &mut Receiver) {
    receiver.wait_for(Option::is_none).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn fetched_when_wanted_and_renewed_at_half_life() {
    let fixture = Fixture::start(MANY, |_, _| {});
    let mut web = fixture.reader.subscribe(&id("web"));
    assert!(web.borrow_and_update().is_none() && fixture.reader.current(&id("web")).is_none());
    fixture.want(&["web"]);
    let mut last = some(&mut web).await;
    assert_eq!(last.id(), &id("web"));
    assert_eq!(fixture.reader.current(&id("web")).unwrap().generation(), last.generation());
    for _ in 0..20 {
        web.borrow_and_update();
        web.changed().await.unwrap();
        let next = some(&mut web).await;
        let age = next.obtained().duration_since(last.obtained()).unwrap();
        assert!(age >= HOUR.mul_f64(0.449) && age <= HOUR.mul_f64(0.551), "renewed after {age:?}");
        assert!(next.generation() > last.generation() && next.serial() != last.serial());
        last = next;
    }
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_no_longer_wanted_is_dropped_at_once() {
    let fixture = Fixture::start(MANY, |_, _| {});
    let (mut web, mut api) = (fixture.reader.subscribe(&id("web")), fixture.reader.subscribe(&id("api")));
    fixture.want(&["web", "api"]);
    let held = some(&mut web).await;
    some(&mut api).await;
    fixture.want(&["api"]);
    assert!(web.borrow().is_none() && fixture.reader.current(&id("web")).is_none());
    assert!(fixture.reader.current(&id("api")).is_some());
    assert_eq!(fixture.manager.status().len(), 1);
    // Wanted again, it is a new one.
    fixture.want(&["web", "api"]);
    assert!(some(&mut web).await.generation() > held.generation());
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_for_what_is_no_longer_wanted_is_thrown_away() {
    let fixture = Fixture::start(0, |_, _| {});
    fixture.want(&["web"]);
    while fixture.issuer.calls.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let mut api = fixture.reader.subscribe(&id("api"));
    let web = fixture.reader.subscribe(&id("web"));
    fixture.want(&["api"]);
    fixture.issuer.gate.add_permits(1);
    some(&mut api).await;
    assert!(!web.has_changed().unwrap() && web.borrow().is_none());
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn failures_are_seen_and_tried_again() {
    let fixture = Fixture::start(MANY, |issuer, _| issuer.up = AtomicBool::new(false));
    let mut web = fixture.reader.subscribe(&id("web"));
    fixture.want(&["web"]);
    let start = Instant::now();
    come_true(|| fixture.issuer.calls.load(Ordering::SeqCst) >= 6).await;
    // 250, 500, 1000, 2000 and 4000 ms, each shortened by up to a half.
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(3_800) && waited <= Duration::from_millis(8_000), "{waited:?}");
    let status = fixture.manager.status();
    let problem = status[0].problem.as_deref().unwrap();
    assert!(problem.contains("no such Pod") && status[0].not_after.is_none(), "{problem}");
    fixture.up(true);
    let held = some(&mut web).await;
    let expected = SvidStatus {
        id: id("web"),
        not_after: Some(held.not_after()),
        issued_by: Some(held.issued_by().to_owned()),
        serial: Some(held.serial().to_owned()),
        problem: None,
    };
    assert_eq!(fixture.manager.status(), [expected]);
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn expiry_takes_it_back_and_recovery_brings_a_new_one() {
    let fixture = Fixture::start(MANY, |_, _| {});
    let mut web = fixture.reader.subscribe(&id("web"));
    fixture.want(&["web"]);
    let held = some(&mut web).await;
    fixture.up(false);
    none(&mut web).await;
    let late = fixture.clock.now().duration_since(held.not_after()).expect("not before its end");
    assert!(late <= Duration::from_secs(1), "{late:?} after its end");
    assert!(fixture.manager.status()[0].problem.is_some());
    fixture.up(true);
    assert!(some(&mut web).await.generation() > held.generation());
    let mut registry = Registry::default();
    fixture.manager.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains("weft_svid_expired_total 1\n") && text.contains("weft_svids 1\n"), "{text}");
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_issuer_is_given_up_on() {
    let fixture = Fixture::start(0, |_, _| {});
    fixture.want(&["web"]);
    come_true(|| fixture.manager.status()[0].problem.is_some()).await;
    let problem = fixture.manager.status()[0].problem.clone().unwrap();
    assert!(problem.contains("no answer within 15 s"), "{problem}");
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_for_somebody_else_is_refused() {
    let fixture = Fixture::start(MANY, |issuer, _| issuer.wrong_id = Some(id("admin")));
    fixture.want(&["web"]);
    come_true(|| fixture.manager.status()[0].problem.is_some()).await;
    let problem = fixture.manager.status()[0].problem.clone().unwrap();
    assert!(problem.contains("sa/admin") && problem.contains("sa/web"), "{problem}");
    assert!(fixture.reader.current(&id("web")).is_none() && fixture.reader.current(&id("admin")).is_none());
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn few_signatures_are_asked_for_at_a_time() {
    let fixture = Fixture::start(MANY, |_, config| config.concurrency = 3);
    let names: Vec<String> = (0..20).map(|n| format!("app-{n}")).collect();
    let mut receivers: Vec<_> = names.iter().map(|name| fixture.reader.subscribe(&id(name))).collect();
    fixture.want(&names.iter().map(String::as_str).collect::<Vec<_>>());
    for receiver in &mut receivers {
        some(receiver).await;
    }
    assert_eq!(fixture.issuer.most.load(Ordering::SeqCst), 3);
    assert_eq!(fixture.issuer.calls.load(Ordering::SeqCst), 20);
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_serves_from_the_cache_while_the_issuer_is_away() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("credentials");
    let before = Fixture::start(MANY, |_, config| config.cache = Some(path.clone()));
    let (mut web, mut api) = (before.reader.subscribe(&id("web")), before.reader.subscribe(&id("api")));
    before.want(&["web", "api"]);
    let held = some(&mut web).await;
    some(&mut api).await;
    before.stop().await;

    let after = Fixture::start(MANY, |issuer, config| {
        config.cache = Some(path.clone());
        issuer.up = AtomicBool::new(false);
    });
    assert!(after.reader.current(&id("web")).is_none(), "nothing is handed out before it is wanted");
    after.want(&["web"]);
    assert_eq!(after.reader.current(&id("web")).unwrap().serial(), held.serial());
    // The other one is gone for good, from the file too.
    after.want(&["web", "api"]);
    assert!(after.reader.current(&id("api")).is_none());
    after.stop().await;
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("sa/web") && !text.contains("sa/api"));
}

#[tokio::test(start_paused = true)]
async fn a_cache_on_disk_is_done_without() {
    let fixture = Fixture::start(MANY, |_, config| config.cache = Some("/proc/credentials".into()));
    let mut web = fixture.reader.subscribe(&id("web"));
    fixture.want(&["web"]);
    some(&mut web).await;
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn churn_leaves_no_channels_behind() {
    let fixture = Fixture::start(MANY, |_, _| {});
    for n in 0..200 {
        drop(fixture.reader.subscribe(&id(&format!("gone-{n}"))));
    }
    assert!(format!("{:?}", fixture.reader).contains("channels: 1 "), "{:?}", fixture.reader);
    fixture.stop().await;
}

#[test]
fn debug_shows_no_key() {
    let held = credentials(&ca(), &id("web"));
    let shown = format!("{held:?} {:?}", held.client_config(&id("api")));
    let key = format!("{:?}", &held.key().pkcs8()[36..60]);
    assert!(!shown.contains(key.trim_matches(['[', ']'])), "{shown}");
}

/// `signs` with the roots of the other beside its own.
fn trusting(signs: &EmbeddedCa, other: &EmbeddedCa) -> Arc<EmbeddedCa> {
    let pem = format!("{}{}", *signs.to_pem(), other.roots_pem());
    Arc::new(EmbeddedCa::from_pem(&pem, domain()).unwrap())
}

/// Every id of one node calls every id of the other.
async fn all_connect(nodes: &[(&Fixture, &[&str])]) {
    for (from, callers) in nodes {
        for (to, called) in nodes {
            for (caller, called) in callers.iter().flat_map(|a| called.iter().map(move |b| (a, b))) {
                let client = from.reader.current(&id(caller)).unwrap();
                let server = to.reader.current(&id(called)).unwrap();
                connected(client.client_config(&id(called)), server.server_config()).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn new_roots_come_at_once_and_no_handshake_is_refused_meanwhile() {
    let (old, new) = (Arc::new(ca()), Arc::new(ca()));
    let start = || {
        Fixture::start(MANY, |issuer, _| {
            issuer.tells = true;
            issuer.ca.send_replace(Arc::clone(&old));
        })
    };
    let (one, two) = (start(), start());
    let (mut web, mut api) = (one.reader.subscribe(&id("web")), two.reader.subscribe(&id("api")));
    one.want(&["web"]);
    two.want(&["api"]);
    let first = some(&mut web).await;
    some(&mut api).await;
    let nodes: [(&Fixture, &[&str]); 2] = [(&one, &["web"]), (&two, &["api"])];
    all_connect(&nodes).await;

    // Both roots are trusted before the new one signs: first on one node, then on the other.
    let before = Instant::now();
    for (node, changed) in [(&one, &mut web), (&two, &mut api)] {
        changed.borrow_and_update();
        node.issuer.ca.send_replace(trusting(&old, &new));
        changed.changed().await.unwrap();
        all_connect(&nodes).await;
    }
    assert!(before.elapsed() < Duration::from_secs(1), "at once, not with the next renewal");
    let second = some(&mut web).await;
    assert_eq!(second.signed().roots.len(), 2);
    assert!(second.generation() > first.generation());
    let kept = |c: &Credentials| (c.serial().to_owned(), c.obtained(), c.key().pkcs8().to_vec());
    assert!(kept(&second) == kept(&first), "the key and the time of renewal stay");
    assert_eq!(one.issuer.calls.load(Ordering::SeqCst), 1);

    // The new root signs; what the old one signed goes on beside it.
    let mut late = one.reader.subscribe(&id("late"));
    one.issuer.ca.send_replace(trusting(&new, &old));
    one.want(&["web", "late"]);
    some(&mut late).await;
    let nodes: [(&Fixture, &[&str]); 2] = [(&one, &["web", "late"]), (&two, &["api"])];
    all_connect(&nodes).await;
    two.issuer.ca.send_replace(trusting(&new, &old));

    // Signed again by the new one, nobody needs the old one. (Renewals would be of the test's clock, which the
    // verifier does not follow.)
    for ((node, ids), changed) in nodes.iter().zip([&mut web, &mut api]) {
        node.want(&[]);
        node.want(ids);
        changed.wait_for(|c| c.as_ref().is_some_and(|c| c.roots()[0] == new.roots()[0])).await.unwrap();
    }
    some(&mut late).await;
    for (node, changed) in [(&one, &mut web), (&two, &mut api)] {
        node.issuer.ca.send_replace(Arc::clone(&new));
        let alone =
            |c: &Option<Arc<Credentials>>| c.as_ref().is_some_and(|c| c.signed().roots == new.roots());
        changed.wait_for(alone).await.unwrap();
        all_connect(&nodes).await;
    }
    one.stop().await;
    two.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_credential_whose_root_went_is_replaced_at_once() {
    let fixture = Fixture::start(MANY, |issuer, _| issuer.tells = true);
    let mut web = fixture.reader.subscribe(&id("web"));
    fixture.want(&["web"]);
    let first = some(&mut web).await;
    let new = Arc::new(ca());
    let before = Instant::now();
    fixture.issuer.ca.send_replace(Arc::clone(&new));
    web.wait_for(|c| c.as_ref().is_some_and(|c| c.signed().roots == new.roots())).await.unwrap();
    assert!(before.elapsed() < Duration::from_secs(1));
    assert_ne!(some(&mut web).await.serial(), first.serial());
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_older_than_the_roots_is_mended() {
    let fixture = Fixture::start(MANY, |issuer, _| issuer.tells = true);
    let (mut web, mut api) = (fixture.reader.subscribe(&id("web")), fixture.reader.subscribe(&id("api")));
    fixture.want(&["api"]);
    some(&mut api).await;
    let old = Arc::clone(&fixture.issuer.ca.borrow());
    let new = ca();
    let both = trusting(&old, &new);
    fixture.issuer.ca.send_replace(Arc::clone(&both));
    api.wait_for(|c| c.as_ref().is_some_and(|c| c.signed().roots.len() == 2)).await.unwrap();
    // Signed by a replica of the issuer that does not know the new root yet.
    *fixture.issuer.lagging.lock() = Some(old);
    fixture.want(&["api", "web"]);
    web.wait_for(|c| c.as_ref().is_some_and(|c| c.signed().roots.len() == 2)).await.unwrap();
    assert_eq!(fixture.issuer.calls.load(Ordering::SeqCst), 2, "it is not signed again for that");
    fixture.stop().await;
}
