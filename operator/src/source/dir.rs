//! Objects from the files `*.yaml` and `*.yml` of one folder (not of its subfolders).
//!
//! A file is read when its writer closes it or when it is moved into place, and by a rescan every few seconds once it
//! has rested, so that a file in the middle of being written is not taken for a removal of its objects.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures_util::{StreamExt, future::BoxFuture};
use inotify::{EventMask, Inotify, WatchMask};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep},
};
use weft_api::authorization::TargetRef;
use weft_runtime::DrainWatcher;

use super::{Batch, Change, Source};
use crate::{
    last_good::Kept,
    objects::{self, Document, ObjectKey},
};

/// How long changes are collected before they are read together.
const DEBOUNCE: Duration = Duration::from_millis(4);
/// How often the folder is read again without an event.
const RESCAN: Duration = Duration::from_secs(2);
/// How long a file must have rested before a rescan takes it.
const RESTED: Duration = Duration::from_millis(500);
/// Largest file that is read.
const MAX_FILE: u64 = 4 << 20;
/// Most files that are read.
const MAX_FILES: usize = 10_000;

/// A folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// It cannot be read.
    #[error("cannot read the folder {path}: {source}; --source dir:PATH takes a folder of YAML files")]
    Read {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be watched.
    #[error("cannot watch the folder {path}: {source}; see /proc/sys/fs/inotify/max_user_watches")]
    Watch {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The source over one folder.
#[derive(Debug)]
pub struct DirSource {
    folder: Folder,
}

impl DirSource {
    /// Takes a folder, and the last good forms of what an earlier process read there.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn new(path: &Path, kept: Vec<Kept>) -> Result<Self, DirError> {
        fs::read_dir(path).map_err(|source| DirError::Read { path: path.into(), source })?;
        Ok(Self { folder: Folder::new(path, kept) })
    }
}

impl Source for DirSource {
    fn name(&self) -> String {
        format!("dir:{}", self.folder.path.display())
    }

    fn run(
        self: Box<Self>,
        out: mpsc::Sender<Batch>,
        drain: DrainWatcher,
    ) -> BoxFuture<'static, Result<(), Box<dyn std::error::Error + Send + Sync>>> {
        Box::pin(async move {
            let mut folder = self.folder;
            let path = folder.path.clone();
            let watch = |source| DirError::Watch { path: path.clone(), source };
            let inotify = Inotify::init().map_err(watch)?;
            let mask =
                WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::MOVED_FROM | WatchMask::DELETE;
            // Watched before it is read: what changes between the two is read twice, never missed.
            inotify.watches().add(&path, mask).map_err(watch)?;
            let mut events = inotify.into_event_stream(vec![0; 16 << 10]).map_err(watch)?;
            let mut rescan = interval(RESCAN);
            rescan.set_missed_tick_behavior(MissedTickBehavior::Delay);
            if let Some(batch) = folder.read(Instant::now(), &Touched::All)
                && out.send(batch).await.is_err()
            {
                return Ok(());
            }
            loop {
                let mut touched = BTreeSet::new();
                let mut all = false;
                let mut note = |event: Option<io::Result<inotify::Event<OsString>>>| match event {
                    Some(Ok(event)) => {
                        all |= event.mask.contains(EventMask::Q_OVERFLOW);
                        touched.extend(event.name);
                        Ok(true)
                    }
                    Some(Err(error)) => Err(error),
                    None => Ok(false),
                };
                let mut periodic = false;
                let noticed = tokio::select! {
                    () = drain.draining() => return Ok(()),
                    event = events.next() => {
                        let noticed = Instant::now();
                        if !note(event)? {
                            return Err("the watch on the folder ended".into());
                        }
                        let pause = sleep(DEBOUNCE);
                        tokio::pin!(pause);
                        loop {
                            tokio::select! {
                                () = &mut pause => break,
                                event = events.next() => if !note(event)? { break },
                            }
                        }
                        noticed
                    }
                    _ = rescan.tick() => { periodic = true; Instant::now() }
                };
                let touched = match (all, periodic) {
                    (true, _) => Touched::All,
                    (_, true) => Touched::Rested,
                    _ => Touched::These(touched),
                };
                if let Some(batch) = folder.read(noticed, &touched)
                    && out.send(batch).await.is_err()
                {
                    return Ok(());
                }
            }
        })
    }
}

/// Which files are read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Touched {
    /// Every file.
    All,
    /// Files that changed and have rested since.
    Rested,
    /// These.
    These(BTreeSet<OsString>),
}

/// How a file looked when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fingerprint {
    modified: (i64, i64),
    size: u64,
    inode: u64,
}

impl Fingerprint {
    fn of(m: &fs::Metadata) -> Self {
        Self { modified: (m.mtime(), m.mtime_nsec()), size: m.len(), inode: m.ino() }
    }
}

#[derive(Debug)]
struct File {
    fingerprint: Option<Fingerprint>,
    documents: BTreeMap<ObjectKey, Parsed>,
    /// What is wrong with text that names no object.
    unreadable: Option<String>,
}

#[derive(Debug, Clone)]
enum Parsed {
    Good(Document),
    Bad {
        generation: i64,
        message: String,
        target_refs: Option<Box<[TargetRef]>>,
    },
    /// Not found in the file any more, but the file has unreadable text that may be it.
    Kept,
}

/// What is known of the folder. Synchronous: tests call it directly.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    files: BTreeMap<OsString, File>,
    /// What was last sent of each object: the file and a number for the form.
    sent: BTreeMap<ObjectKey, (Arc<str>, i64, bool)>,
    unreadable: BTreeMap<Arc<str>, String>,
    /// What an earlier process knew, until the first reading.
    kept: Vec<Kept>,
    started: bool,
    problem: Option<String>,
}

impl Folder {
    pub(crate) fn new(path: &Path, kept: Vec<Kept>) -> Self {
        Self {
            path: path.into(),
            files: BTreeMap::new(),
            sent: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            kept,
            started: false,
            problem: None,
        }
    }

    /// Reads what was touched; `None` where nothing came of it.
    pub(crate) fn read(&mut self, noticed: Instant, touched: &Touched) -> Option<Batch> {
        let listing = match self.list() {
            Ok(listing) => listing,
            Err(error) => {
                // Without its folder the mesh goes on with what it knows.
                let problem = format!("cannot read the folder {}: {error}", self.path.display());
                if self.problem.as_ref() != Some(&problem) {
                    tracing::error!("{problem}; the last good state goes on");
                    self.problem = Some(problem);
                }
                return None;
            }
        };
        self.problem = None;
        let recalled = self.recall(listing.keys());
        self.files.retain(|name, _| listing.contains_key(name));
        for (name, (fingerprint, rested)) in &listing {
            let known = self.files.get(name).is_some_and(|f| f.fingerprint == Some(*fingerprint));
            let wanted = match touched {
                Touched::All => true,
                Touched::Rested => *rested && !known,
                Touched::These(names) => names.contains(name),
            };
            if wanted {
                self.read_file(name, *fingerprint);
            }
        }
        let mut batch = self.diff(noticed)?;
        batch.changes.splice(0..0, recalled);
        Some(batch)
    }

    /// Before the first reading: what an earlier process knew counts as if this one had read it, so that broken text
    /// keeps the forms before it, and what went away meanwhile is removed.
    fn recall<'a>(&mut self, names: impl Iterator<Item = &'a OsString>) -> Vec<(Arc<str>, Change)> {
        let mut places: BTreeMap<Arc<str>, BTreeMap<ObjectKey, Parsed>> = BTreeMap::new();
        let mut changes = Vec::new();
        for Kept { origin, document } in std::mem::take(&mut self.kept) {
            let form = (Arc::clone(&origin), document.generation, true);
            self.sent.insert(document.key.clone(), form);
            places.entry(Arc::clone(&origin)).or_default().insert(document.key.clone(), Parsed::Kept);
            changes.push((origin, Change::Apply(document)));
        }
        for name in names {
            if let Some(documents) = places.remove(&*name.to_string_lossy()) {
                self.files.insert(name.clone(), File { fingerprint: None, documents, unreadable: None });
            }
        }
        changes
    }

    fn list(&self) -> io::Result<BTreeMap<OsString, (Fingerprint, bool)>> {
        let mut listing = BTreeMap::new();
        let now = SystemTime::now();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            let hidden = name.as_encoded_bytes().starts_with(b".");
            let yaml = Path::new(&name).extension().is_some_and(|e| e == "yaml" || e == "yml");
            if hidden || !yaml {
                continue;
            }
            // Gone between the listing and here, or a link to nowhere: not there.
            let Ok(meta) = fs::metadata(entry.path()) else { continue };
            if !meta.is_file() {
                continue;
            }
            let age = meta.modified().ok().and_then(|m| now.duration_since(m).ok());
            listing.insert(name, (Fingerprint::of(&meta), age.is_none_or(|a| a >= RESTED)));
        }
        if listing.len() > MAX_FILES {
            return Err(io::Error::other(format!("it holds more than {MAX_FILES} YAML files")));
        }
        Ok(listing)
    }

    fn read_file(&mut self, name: &OsStr, fingerprint: Fingerprint) {
        let text = if fingerprint.size > MAX_FILE {
            Err(format!("the file is larger than {} MiB; split it", MAX_FILE >> 20))
        } else {
            fs::read_to_string(self.path.join(name)).map_err(|e| format!("the file cannot be read: {e}"))
        };
        let before = self.files.remove(name);
        let mut file = File { fingerprint: Some(fingerprint), documents: BTreeMap::new(), unreadable: None };
        let mut complain = |message: String| {
            let all = file.unreadable.get_or_insert_default();
            if !all.is_empty() {
                all.push_str("; ");
            }
            all.push_str(&message);
        };
        let documents = match text {
            Ok(text) => objects::parse(&text),
            Err(message) => {
                complain(message);
                Vec::new()
            }
        };
        for document in documents {
            let (key, parsed) = match document {
                Ok(document) => {
                    let (key, generation) = (document.key.clone(), document.generation);
                    match objects::without_secrets(&document.object) {
                        None => (key, Parsed::Good(document)),
                        Some(message) => (key, Parsed::Bad { generation, message, target_refs: None }),
                    }
                }
                Err(bad) => {
                    if bad.torn || bad.key.is_none() {
                        complain(format!("the document at line {}: {}", bad.line, bad.message));
                    }
                    let Some(key) = bad.key else { continue };
                    let (generation, message, target_refs) = (bad.generation, bad.message, bad.target_refs);
                    (key, Parsed::Bad { generation, message, target_refs })
                }
            };
            if let Some(second) = file.documents.insert(key.clone(), parsed)
                && let Parsed::Good(_) | Parsed::Bad { .. } = second
            {
                complain(format!("{key} is written twice; the later one counts, remove one"));
            }
        }
        if file.unreadable.is_some() {
            for key in before.into_iter().flat_map(|f| f.documents.into_keys()) {
                file.documents.entry(key).or_insert(Parsed::Kept);
            }
        }
        // No object carries what is wrong, and none of an earlier form goes on.
        if let Some(message) = file.unreadable.as_mut().filter(|_| file.documents.is_empty()) {
            *message =
                format!("nothing of this file is enforced: {message}; correct the file and save it again");
        }
        self.files.insert(name.to_owned(), file);
    }

    fn diff(&mut self, noticed: Instant) -> Option<Batch> {
        let mut changes = Vec::new();
        let mut unreadable: BTreeMap<Arc<str>, String> = BTreeMap::new();
        let mut now: BTreeMap<ObjectKey, (Arc<str>, i64, bool)> = BTreeMap::new();
        for (name, file) in &self.files {
            let place: Arc<str> = name.to_string_lossy().into();
            if let Some(message) = &file.unreadable {
                unreadable.insert(Arc::clone(&place), message.clone());
            }
            for (key, parsed) in &file.documents {
                if let Some((first, ..)) = now.get(key) {
                    let message = format!("{key} is in {first} already, which counts; remove one");
                    unreadable
                        .entry(Arc::clone(&place))
                        .and_modify(|m| *m = format!("{m}; {message}"))
                        .or_insert(message);
                    continue;
                }
                let form = match parsed {
                    Parsed::Good(document) => (Arc::clone(&place), document.generation, true),
                    Parsed::Bad { generation, .. } => (Arc::clone(&place), *generation, false),
                    Parsed::Kept => match self.sent.get(key) {
                        Some(sent) => sent.clone(),
                        None => continue,
                    },
                };
                if self.sent.get(key) != Some(&form) {
                    match parsed {
                        Parsed::Good(document) => {
                            changes.push((Arc::clone(&place), Change::Apply(document.clone())));
                        }
                        Parsed::Bad { generation, message, target_refs } => {
                            let (key, generation, message) = (key.clone(), *generation, message.clone());
                            let target_refs = target_refs.clone();
                            let change = Change::Bad { key, generation, message, target_refs };
                            changes.push((Arc::clone(&place), change));
                        }
                        Parsed::Kept => {}
                    }
                }
                now.insert(key.clone(), form);
            }
        }
        for (key, (place, ..)) in &self.sent {
            if !now.contains_key(key) {
                changes.push((Arc::clone(place), Change::Remove(key.clone())));
            }
        }
        let quiet = changes.is_empty() && unreadable == self.unreadable && self.started;
        self.sent = now;
        self.unreadable.clone_from(&unreadable);
        self.started = true;
        (!quiet).then_some(Batch { noticed, changes, unreadable })
    }
}

#[cfg(test)]
mod tests;
