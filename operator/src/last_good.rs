//! The last good form of every object, kept over restarts: `<state-dir>/last-good/`, one file per object.
//!
//! Without it, a document that is broken when the operator starts would be absent, and the Pods that it protects would
//! be open. Files are 0600 and replaced whole. Those by whose loss a Pod could lose its protection (policies, and
//! Namespaces with their modes) are forced to the disk; ten thousand Pods are not, and a power cut leaves an older form
//! of them, or text that is dropped here.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use weft_runtime::durable;

use crate::objects::{self, Document, Kind, ObjectKey};

/// Most objects that are kept.
const MAX_OBJECTS: usize = 100_000;
/// Most bytes of files that are kept, together.
const MAX_BYTES: u64 = 512 << 20;
/// Largest file that is read back: an object's text, at worst every byte escaped.
const MAX_FILE: u64 = 32 << 20;

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}; --state-dir must be a folder that this user can write")]
pub struct LastGoodError {
    /// The file or folder.
    path: PathBuf,
    /// Why.
    source: io::Error,
}

/// An object as an earlier process accepted it.
#[derive(Debug, Clone)]
pub struct Kept {
    /// The place of the source that it came from.
    pub origin: Arc<str>,
    /// The object.
    pub document: Document,
}

#[derive(Serialize, Deserialize)]
struct Stored<'a> {
    origin: std::borrow::Cow<'a, str>,
    text: std::borrow::Cow<'a, str>,
}

#[derive(Debug)]
struct Held {
    origin: Arc<str>,
    generation: i64,
    size: u64,
}

/// The folder.
#[derive(Debug)]
pub struct LastGood {
    dir: PathBuf,
    held: BTreeMap<ObjectKey, Held>,
    bytes: u64,
    max_objects: usize,
    max_bytes: u64,
    problem: Option<String>,
}

impl LastGood {
    /// Opens the folder, which is made, and reads what it holds. Files that cannot be used are logged and removed.
    ///
    /// # Errors
    /// When the folder cannot be made, read or cleaned.
    pub fn open(dir: &Path) -> Result<(Self, Vec<Kept>), LastGoodError> {
        let failed = |source| LastGoodError { path: dir.into(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        let mut store = Self {
            dir: dir.into(),
            held: BTreeMap::new(),
            bytes: 0,
            max_objects: MAX_OBJECTS,
            max_bytes: MAX_BYTES,
            problem: None,
        };
        let mut kept = Vec::new();
        for entry in fs::read_dir(dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match store.recall(&path) {
                Ok(found) => kept.push(found),
                Err(why) => {
                    tracing::warn!("{}: {why}; no last good form is known by it", path.display());
                    fs::remove_file(&path).map_err(|source| LastGoodError { path, source })?;
                }
            }
        }
        kept.sort_by(|a, b| a.document.key.cmp(&b.document.key));
        Ok((store, kept))
    }

    fn recall(&mut self, path: &Path) -> Result<Kept, String> {
        let meta = fs::symlink_metadata(path).map_err(|e| e.to_string())?;
        if !meta.is_file() || meta.len() > MAX_FILE {
            return Err("it is no file of this folder's kind".into());
        }
        if self.held.len() >= self.max_objects || self.bytes + meta.len() > self.max_bytes {
            return Err("the folder holds more than is ever kept".into());
        }
        let text = fs::read_to_string(path).map_err(|e| e.to_string())?;
        let stored: Stored<'_> = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        let mut documents = objects::parse(&stored.text);
        let Some(Ok(document)) = documents.pop().filter(|_| documents.is_empty()) else {
            return Err("it holds no object that this version reads".into());
        };
        if path.file_name().is_none_or(|n| *n != *file_name(&document.key)) {
            return Err(format!("it is not the file of {}", document.key));
        }
        let origin: Arc<str> = (*stored.origin).into();
        let held = Held { origin: Arc::clone(&origin), generation: document.generation, size: meta.len() };
        self.bytes += held.size;
        self.held.insert(document.key.clone(), held);
        Ok(Kept { origin, document })
    }

    /// Keeps a form that was accepted, in place of the one before it.
    pub fn keep(&mut self, origin: &Arc<str>, key: &ObjectKey, generation: i64, text: &str) {
        let before = self.held.get(key);
        if before.is_some_and(|h| h.generation == generation && h.origin == *origin) {
            return;
        }
        let stored = Stored { origin: (&**origin).into(), text: text.into() };
        let result = serde_json::to_vec(&stored).map_err(io::Error::other).and_then(|content| {
            let size = content.len() as u64;
            let rest = self.bytes - before.map_or(0, |h| h.size);
            if rest + size > self.max_bytes || before.is_none() && self.held.len() >= self.max_objects {
                return Err(io::Error::other(format!(
                    "more than {} objects or {} MiB",
                    self.max_objects,
                    self.max_bytes >> 20
                )));
            }
            self.replace(key, &content)?;
            Ok((rest + size, size))
        });
        match result {
            Ok((bytes, size)) => {
                self.bytes = bytes;
                self.held.insert(key.clone(), Held { origin: Arc::clone(origin), generation, size });
                self.problem = None;
            }
            Err(error) => self.complain(&format!("cannot keep {key}: {error}")),
        }
    }

    /// Forgets an object that is gone.
    pub fn forget(&mut self, key: &ObjectKey) {
        let Some(held) = self.held.get(key) else { return };
        let size = held.size;
        match fs::remove_file(self.dir.join(file_name(key))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                self.complain(&format!("cannot remove {key}: {error}"));
            }
            _ => {
                self.bytes -= size;
                self.held.remove(key);
            }
        }
    }

    fn replace(&self, key: &ObjectKey, content: &[u8]) -> io::Result<()> {
        let name = file_name(key);
        if matches!(key.kind, Kind::AuthorizationPolicy | Kind::Namespace | Kind::MeshConfig) {
            return durable::replace(&self.dir.join(name), content, 0o600);
        }
        let apart = self.dir.join(format!("{name}.new"));
        match fs::remove_file(&apart) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&apart)?;
        file.write_all(content)?;
        fs::rename(apart, self.dir.join(&name))
    }

    /// Once per row of failures: a full disk would fill the log too.
    fn complain(&mut self, problem: &str) {
        if self.problem.is_none() {
            tracing::error!(
                "{}: {problem}; make the folder writable and large enough, or a broken document may lose its last good \
                 form at the next start",
                self.dir.display()
            );
        }
        self.problem = Some(problem.to_owned());
    }
}

/// Names of objects may be longer than a file's, so the file is called by their hash.
fn file_name(key: &ObjectKey) -> String {
    let hash: String = Sha256::digest(key.to_string()).iter().take(16).map(|b| format!("{b:02x}")).collect();
    format!("{}-{hash}.json", key.kind.as_str())
}

#[cfg(test)]
mod tests;
