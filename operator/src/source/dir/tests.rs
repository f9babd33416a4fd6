use super::*;

const GOOD: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";

struct Fixture {
    dir: tempfile::TempDir,
    folder: Folder,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), Vec::new());
        Self { dir, folder }
    }
    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }
    fn read(&mut self) -> Option<Batch> {
        self.folder.read(Instant::now(), &Touched::All)
    }
}

fn summary(batch: &Batch) -> Vec<String> {
    (batch.changes.iter())
        .map(|(place, change)| match change {
            Change::Apply(d) => format!("{place} +{}", d.key),
            Change::Bad { key, .. } => format!("{place} !{key}"),
            Change::Remove(key) => format!("{place} -{key}"),
        })
        .collect()
}

#[test]
fn objects_come_change_and_go() {
    let mut f = Fixture::new();
    assert!(f.read().unwrap().changes.is_empty(), "the first batch comes even from an empty folder");
    f.write("a.yaml", GOOD);
    f.write("ignored.txt", GOOD);
    f.write(".hidden.yaml", GOOD);
    assert_eq!(summary(&f.read().unwrap()), ["a.yaml +Namespace shop"]);
    assert!(f.read().is_none());
    f.write("a.yaml", &GOOD.replace("{name: shop}", "{name: shop, labels: {a: b}}"));
    assert_eq!(summary(&f.read().unwrap()), ["a.yaml +Namespace shop"]);
    // Moved to another file, unchanged: the object stays.
    fs::rename(f.dir.path().join("a.yaml"), f.dir.path().join("b.yml")).unwrap();
    assert_eq!(summary(&f.read().unwrap()), ["b.yml +Namespace shop"]);
    fs::remove_file(f.dir.path().join("b.yml")).unwrap();
    assert_eq!(summary(&f.read().unwrap()), ["b.yml -Namespace shop"]);
}

#[test]
fn a_bad_document_leaves_the_others() {
    let mut f = Fixture::new();
    let bad = "---\napiVersion: weft.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: {sameNode: Maybe}\n";
    f.write("a.yaml", &format!("{GOOD}{bad}"));
    let batch = f.read().unwrap();
    assert_eq!(summary(&batch), ["a.yaml +Namespace shop", "a.yaml !MeshConfig default"]);
    let Change::Bad { message, .. } = &batch.changes[1].1 else { panic!("not bad") };
    assert!(message.starts_with("spec.sameNode: unknown variant `Maybe`"), "{message}");
}

#[test]
fn text_that_cannot_be_read_takes_nothing_away() {
    let mut f = Fixture::new();
    f.write("a.yaml", &format!("{GOOD}---\n{}", GOOD.replace("shop", "other")));
    f.read().unwrap();
    f.write("a.yaml", &format!("{GOOD}---\n: [broken"));
    let batch = f.read().unwrap();
    assert!(batch.changes.is_empty(), "{batch:?}");
    assert!(batch.unreadable["a.yaml"].starts_with("the document at line 5: "), "{batch:?}");
    f.write("a.yaml", GOOD);
    let batch = f.read().unwrap();
    assert_eq!(summary(&batch), ["a.yaml -Namespace other"]);
    assert!(batch.unreadable.is_empty());
}

#[test]
fn a_new_file_without_any_usable_object_says_that_nothing_of_it_is_enforced() {
    let mut f = Fixture::new();
    f.write("a.yaml", GOOD);
    let policy = "apiVersion: weft.mesh/v1alpha1\nkind: AuthorisationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {}\n";
    f.write("misspelt.yaml", policy);
    f.write("torn.yaml", ": : [broken");
    let batch = f.read().unwrap();
    assert_eq!(summary(&batch), ["a.yaml +Namespace shop"]);
    for (file, why) in [
        ("misspelt.yaml", "weft.mesh has no kind \"AuthorisationPolicy\"; write AuthorizationPolicy"),
        ("torn.yaml", "the document at line 1: "),
    ] {
        let message = &batch.unreadable[file];
        assert!(
            message.starts_with("nothing of this file is enforced: the document at line 1: "),
            "{message}"
        );
        assert!(message.contains(why), "{message}");
        assert!(message.ends_with("; correct the file and save it again"), "{message}");
    }
    // Where one of its objects is good, that one is.
    f.write("misspelt.yaml", &format!("{policy}---\n{}", GOOD.replace("shop", "other")));
    let batch = f.read().unwrap();
    assert_eq!(summary(&batch), ["misspelt.yaml +Namespace other"]);
    assert!(batch.unreadable["misspelt.yaml"].starts_with("the document at line 1: "), "{batch:?}");
}

#[test]
fn an_object_in_two_files_counts_once() {
    let mut f = Fixture::new();
    f.write("a.yaml", GOOD);
    f.write("b.yaml", GOOD);
    let batch = f.read().unwrap();
    assert_eq!(summary(&batch), ["a.yaml +Namespace shop"]);
    assert_eq!(batch.unreadable["b.yaml"], "Namespace shop is in a.yaml already, which counts; remove one");
    fs::remove_file(f.dir.path().join("a.yaml")).unwrap();
    assert_eq!(summary(&f.read().unwrap()), ["b.yaml +Namespace shop"]);
}

#[test]
fn a_file_in_the_middle_of_being_written_is_not_taken() {
    let mut f = Fixture::new();
    f.write("a.yaml", GOOD);
    f.read().unwrap();
    // Truncated, not closed yet: a rescan and another file's event leave it alone.
    f.write("a.yaml", "");
    assert!(f.folder.read(Instant::now(), &Touched::Rested).is_none());
    assert!(f.folder.read(Instant::now(), &Touched::These(BTreeSet::from(["b.yaml".into()]))).is_none());
}

#[test]
fn a_folder_that_vanished_takes_nothing_away() {
    let mut f = Fixture::new();
    f.write("a.yaml", GOOD);
    f.read().unwrap();
    fs::remove_dir_all(f.dir.path()).unwrap();
    assert!(f.read().is_none());
}

#[test]
fn a_secret_of_the_ca_is_refused() {
    let mut f = Fixture::new();
    let config = "apiVersion: weft.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\n";
    f.write("a.yaml", &format!("{config}spec: {{}}\n"));
    assert_eq!(summary(&f.read().unwrap()), ["a.yaml +MeshConfig default"]);
    let named = "spec: {issuer: {embedded: {secretRef: {namespace: pki, name: mesh}}}}\n";
    f.write("a.yaml", &format!("{config}{named}"));
    let batch = f.read().unwrap();
    let Change::Bad { message, .. } = &batch.changes[0].1 else { panic!("taken: {batch:?}") };
    assert!(message.starts_with("spec.issuer.embedded.secretRef: there is no Secret pki/mesh"), "{message}");
}
