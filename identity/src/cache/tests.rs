use std::{fs, os::unix::fs::PermissionsExt};

use super::*;
use crate::testing::{HOUR, ca, credentials, id};

/// A folder in memory: these tests need one, as the agent does.
fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("/dev/shm is a tmpfs on every Linux")
}

#[test]
fn a_disk_is_refused() {
    let error = Cache::new("/proc/credentials".into()).unwrap_err();
    assert!(matches!(error, CacheError::Disk(_)) && error.to_string().contains("--run-dir"), "{error}");
    assert!(matches!(Cache::new("/nonexistent/credentials".into()), Err(CacheError::Io { .. })));
}

#[test]
fn what_was_stored_is_loaded() {
    let folder = memory();
    let path = folder.path().join("credentials");
    let cache = Cache::new(path.clone()).unwrap();
    assert!(cache.load(SystemTime::now()).unwrap().is_empty());
    let ca = ca();
    let stored: Vec<_> = ["web", "api"].map(|name| Arc::new(credentials(&ca, &id(name)))).into();
    cache.store(&stored).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let loaded = cache.load(SystemTime::now()).unwrap();
    assert_eq!(loaded.len(), 2);
    for (stored, loaded) in stored.iter().zip(&loaded) {
        assert_eq!(
            (stored.id(), stored.serial(), stored.not_after()),
            (loaded.id(), loaded.serial(), loaded.not_after())
        );
        assert!(stored.obtained().duration_since(loaded.obtained()).unwrap() < Duration::from_secs(1));
    }
    // Storing less forgets the rest, and leaves no other file.
    cache.store(&stored[..1]).unwrap();
    assert_eq!(cache.load(SystemTime::now()).unwrap().len(), 1);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_left_over_temporary_file_does_not_block() {
    let folder = memory();
    fs::write(folder.path().join(".credentials.new"), "half").unwrap();
    let cache = Cache::new(folder.path().join("credentials")).unwrap();
    cache.store(&[Arc::new(credentials(&ca(), &id("web")))]).unwrap();
    assert_eq!(cache.load(SystemTime::now()).unwrap().len(), 1);
}

#[test]
fn expired_and_spoiled_entries_are_left_out() {
    let folder = memory();
    let path = folder.path().join("credentials");
    let cache = Cache::new(path.clone()).unwrap();
    let ca = ca();
    cache.store(&["web", "api"].map(|name| Arc::new(credentials(&ca, &id(name))))).unwrap();
    assert!(cache.load(SystemTime::now() + HOUR * 2).unwrap().is_empty());
    // One entry under another's name: its certificate says otherwise.
    let text = fs::read_to_string(&path).unwrap().replace("sa/web", "sa/admin");
    fs::write(&path, text).unwrap();
    let ids: Vec<_> = cache.load(SystemTime::now()).unwrap().iter().map(|c| c.id().clone()).collect();
    assert_eq!(ids, [id("api")]);
}

#[test]
fn a_key_that_does_not_fit_is_left_out() {
    let folder = memory();
    let cache = Cache::new(folder.path().join("credentials")).unwrap();
    let ca = ca();
    let (web, other) = (credentials(&ca, &id("web")), credentials(&ca, &id("web")));
    let mut entry = Entry::new(&web);
    entry.key = STANDARD.encode(other.key().pkcs8());
    let content = Content { version: VERSION, credentials: vec![entry] };
    fs::write(&cache.path, serde_json::to_vec(&content).unwrap()).unwrap();
    fs::set_permissions(&cache.path, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(cache.load(SystemTime::now()).unwrap().is_empty());
}

#[test]
fn a_file_that_others_can_use_is_refused() {
    let folder = memory();
    let path = folder.path().join("credentials");
    let cache = Cache::new(path.clone()).unwrap();
    cache.store(&[]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(cache.load(SystemTime::now()), Err(CacheError::Permissions(_))));
    // A link could lead to somebody else's file.
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(Cache::new(link).unwrap().load(SystemTime::now()), Err(CacheError::Io { .. })));
}

#[test]
fn other_content_is_an_error_that_quotes_nothing() {
    let folder = memory();
    let path = folder.path().join("credentials");
    let cache = Cache::new(path.clone()).unwrap();
    cache.store(&[]).unwrap();
    for content in
        ["", "SECRET", "{\"version\":2,\"credentials\":[]}", "{\"version\":1,\"credentials\":\"SECRET\"}"]
    {
        fs::write(&path, content).unwrap();
        let error = cache.load(SystemTime::now()).unwrap_err();
        assert!(matches!(error, CacheError::Content(_)) && !error.to_string().contains("SECRET"), "{error}");
    }
}
