use std::time::Instant;

use tokio::sync::watch;
use weft_core::{
    NamespacedName, Resource, ResourceKey, TrustDomain, Workload, policy::Action, workload::Mode,
};

use super::*;
use crate::{
    controller::{Controller, Overview},
    distribution::Distribution,
    index::{Index, Report},
    metrics::Metrics,
    objects::Kind,
    source::dir::{Folder, Touched},
};

const SHOP: &str =
    "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {weft.mesh/mode: permissive}}\n";
const WEB: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {app: web}}\nspec: {nodeName: a, containers: []}\n";
const POLICY: &str = "apiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec:\n  targetRefs: [{kind: Pod, selector: {matchLabels: {app: web}}}]\n  action: DENY\n";

/// A folder of objects, and the state that outlives operators.
struct Fixture {
    objects: tempfile::TempDir,
    state: tempfile::TempDir,
}

/// One life of an operator.
struct Operator {
    controller: Controller,
    folder: Folder,
}

impl Fixture {
    fn new() -> Self {
        let fixture = Self { objects: tempfile::tempdir().unwrap(), state: tempfile::tempdir().unwrap() };
        fixture.write("shop.yaml", SHOP);
        fixture.write("web.yaml", &(WEB.to_owned() + "---\n" + &WEB.replace("web", "other")));
        fixture
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.objects.path().join(name), text).unwrap();
    }

    fn dir(&self) -> PathBuf {
        self.state.path().join("last-good")
    }

    fn start(&self) -> Operator {
        let (last_good, kept) = LastGood::open(&self.dir()).unwrap();
        let controller = Controller {
            index: Index::new(TrustDomain::new("cluster.local").unwrap()),
            last_good: Some(last_good),
            distribution: Arc::new(Distribution::new()),
            metrics: Metrics::new(&mut prometheus_client::registry::Registry::default()),
            overview: watch::channel(Arc::new(Overview::default())).0,
        };
        let mut operator = Operator { controller, folder: Folder::new(self.objects.path(), kept) };
        operator.read();
        operator
    }
}

impl Operator {
    fn read(&mut self) {
        if let Some(batch) = self.folder.read(Instant::now(), &Touched::All) {
            self.controller.take(batch);
        }
    }

    fn resource(&self, key: &ResourceKey) -> Option<Resource> {
        self.controller.distribution.current().unwrap().resources.get(key).map(|p| p.resource.clone())
    }

    fn action(&self) -> Option<Action> {
        match self.resource(&ResourceKey::Policy(NamespacedName::new("shop", "p")))? {
            Resource::Policy(policy) => Some(policy.action),
            other => panic!("{other:?}"),
        }
    }

    fn pod(&self, name: &str) -> Arc<Workload> {
        let snapshot = self.controller.distribution.current().unwrap();
        let pod = snapshot.resources.values().find_map(|p| match &p.resource {
            Resource::Workload(w) if *w.name.name == *name => Some(Arc::clone(w)),
            _ => None,
        });
        pod.unwrap_or_else(|| panic!("no Pod {name}"))
    }

    /// How many policies select the Pod.
    fn selected(&self, pod: &str) -> usize {
        self.pod(pod).policies.len()
    }

    fn report(&self, kind: Kind) -> Report {
        let overview = self.controller.overview.borrow().clone();
        Report::clone(&overview.objects.iter().find(|(k, _)| k.kind == kind).unwrap().1.0)
    }
}

#[test]
fn a_broken_document_keeps_its_last_good_form_over_restarts() {
    let breakages = [
        ("a wrong value", POLICY.replace("DENY", "NEVER"), "spec.action: unknown variant `NEVER`"),
        (
            "a failed check",
            POLICY.to_owned() + "  rules: [{networkAttributes: {ports: [0]}}]\n",
            "0 is no port",
        ),
        ("no YAML", POLICY.replace("DENY", "[DENY"), "last good form goes on"),
    ];
    for (what, broken, message) in breakages {
        let f = Fixture::new();
        f.write("p.yaml", POLICY);
        drop(f.start());
        f.write("p.yaml", &broken);
        for life in 2..4 {
            let operator = f.start();
            assert_eq!(operator.action(), Some(Action::Deny), "{what}, life {life}");
            assert_eq!((operator.selected("web"), operator.selected("other")), (1, 0), "{what}");
            let accepted = operator.report(Kind::AuthorizationPolicy).accepted;
            assert!(!accepted.ok && accepted.message.contains(message), "{what}: {accepted:?}");
            assert!(accepted.message.contains("last good form goes on"), "{what}: {accepted:?}");
        }
        // Corrected to another form: that one counts, at once and after the next start.
        f.write("p.yaml", &POLICY.replace("DENY", "AUDIT"));
        assert_eq!(f.start().action(), Some(Action::Audit), "{what}");
        assert_eq!(f.start().action(), Some(Action::Audit), "{what}");
    }
}

#[test]
fn text_that_names_no_object_takes_nothing_away_over_a_restart() {
    let f = Fixture::new();
    f.write("p.yaml", POLICY);
    drop(f.start());
    for name in ["shop.yaml", "web.yaml", "p.yaml"] {
        f.write(name, ": : [broken");
    }
    let mut operator = f.start();
    assert_eq!((operator.action(), operator.selected("web")), (Some(Action::Deny), 1));
    assert_eq!(operator.pod("web").mode, Mode::Permissive);
    assert_eq!(operator.controller.overview.borrow().unreadable.len(), 3);
    // Readable again, without one of the Pods.
    f.write("web.yaml", WEB);
    operator.read();
    assert_eq!(
        operator.controller.overview.borrow().objects.keys().filter(|k| k.kind == Kind::Pod).count(),
        1
    );
}

#[test]
fn what_was_deleted_is_forgotten() {
    let f = Fixture::new();
    f.write("p.yaml", POLICY);
    let mut operator = f.start();
    assert_eq!(fs::read_dir(f.dir()).unwrap().count(), 4);
    // While it runs, and while none runs.
    fs::remove_file(f.objects.path().join("web.yaml")).unwrap();
    operator.read();
    assert_eq!(fs::read_dir(f.dir()).unwrap().count(), 2);
    drop(operator);
    fs::remove_file(f.objects.path().join("p.yaml")).unwrap();
    let operator = f.start();
    assert_eq!(operator.action(), None);
    assert_eq!(fs::read_dir(f.dir()).unwrap().count(), 1);
    drop(operator);
    // A broken document of the old name is a new object.
    f.write("web.yaml", WEB);
    f.write("p.yaml", &POLICY.replace("DENY", "NEVER"));
    let operator = f.start();
    assert_eq!((operator.action(), operator.selected("web")), (None, 1));
}

#[test]
fn a_policy_that_was_never_good_denies() {
    let whole = "every enrolled Pod of namespace shop";
    let some = "the enrolled Pods that its targetRefs select";
    let cases = [
        ("a wrong value", POLICY.replace("DENY", "NEVER"), 0, some),
        ("a wrong target", POLICY.replace("kind: Pod", "kind: Pot"), 1, whole),
        ("an ambiguous target", POLICY.replace("kind: Pod,", "kind: Pod, name: x,"), 1, whole),
        ("no target", POLICY.replace("targetRefs", "targets"), 1, whole),
        ("no YAML", POLICY.replace("DENY", "[DENY"), 1, whole),
        ("no YAML in its head", POLICY.replace("shop}", "shop"), 1, whole),
        ("no name", POLICY.replace("name: p,", "name: P_,"), 0, some),
        ("a wrong version", POLICY.replace("v1alpha1", "v1"), 0, some),
    ];
    for (what, text, other, message) in cases {
        let f = Fixture::new();
        f.write("p.yaml", &text);
        let mut operator = f.start();
        assert_eq!((operator.selected("web"), operator.selected("other")), (1, other), "{what}");
        assert_eq!(operator.action(), None, "{what}: it is named, not sent");
        let report = operator.report(Kind::AuthorizationPolicy);
        assert!(!report.accepted.ok && report.accepted.message.contains(message), "{what}: {report:?}");
        assert!(report.accepted.message.contains("so everything is denied"), "{what}: {report:?}");
        assert!(matches!(report.programmable, Some(Err(p)) if p.message.contains(message)), "{what}");
        f.write("p.yaml", POLICY);
        operator.read();
        assert_eq!((operator.selected("web"), operator.selected("other")), (1, 0), "{what}");
        assert_eq!(operator.action(), Some(Action::Deny), "{what}");
    }
}

#[test]
fn a_torn_namespace_is_strict() {
    let f = Fixture::new();
    f.write("shop.yaml", &(SHOP.to_owned() + "spec: [\n"));
    assert_eq!(f.start().pod("web").mode, Mode::Strict);
}

#[test]
fn files_are_private_and_bad_ones_are_dropped() {
    let f = Fixture::new();
    f.write("p.yaml", POLICY);
    drop(f.start());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&f.dir()), 0o700);
    let files = || fs::read_dir(f.dir()).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    assert!(files().iter().all(|p| mode(p) == 0o600));
    let policy = files().into_iter().find(|p| p.to_string_lossy().contains("AuthorizationPolicy-")).unwrap();
    // A form under another object's name, half a file, and one that was never put into place.
    fs::copy(&policy, f.dir().join("AuthorizationPolicy-0.json")).unwrap();
    fs::write(f.dir().join("Pod-1.json.new"), "{").unwrap();
    fs::write(&policy, "{\"origin\":\"p.yaml\",\"te").unwrap();
    let (_, kept) = LastGood::open(&f.dir()).unwrap();
    let kinds: Vec<Kind> = kept.iter().map(|k| k.document.key.kind).collect();
    assert_eq!(kinds, [Kind::Namespace, Kind::Pod, Kind::Pod]);
    assert_eq!(files().len(), 3);
}

#[test]
fn the_folder_is_bounded() {
    let f = Fixture::new();
    let (mut store, _) = LastGood::open(&f.dir()).unwrap();
    (store.max_objects, store.max_bytes) = (2, 400);
    let key = |name: &str| ObjectKey { kind: Kind::Pod, namespace: "shop".into(), name: name.into() };
    let count = || fs::read_dir(f.dir()).unwrap().count();
    for name in ["a", "b", "c"] {
        store.keep(&"f".into(), &key(name), 1, "text");
    }
    assert_eq!((count(), store.held.len()), (2, 2));
    assert!(store.problem.as_ref().is_some_and(|p| p.contains("more than 2 objects")));
    store.keep(&"f".into(), &key("a"), 2, &"x".repeat(500));
    assert_eq!(store.held[&key("a")].generation, 1, "the form before it stays");
    store.forget(&key("a"));
    store.keep(&"f".into(), &key("c"), 1, "text");
    assert_eq!((count(), store.problem.is_none()), (2, true));
}
