//! Credentials in a root-only file in memory, so that a restarted agent serves while the operator is away.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustix::{
    fs::{OFlags, statfs},
    process::geteuid,
};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use weft_core::SpiffeId;
use zeroize::{Zeroize, Zeroizing};

use crate::{Credentials, Signed, SvidKey};

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// Longest file read, in bytes.
const MAX_FILE: u64 = 16 * 1024 * 1024;
const VERSION: u32 = 1;

/// Why there is no cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The folder is on a disk, and keys never go to a disk.
    #[error(
        "{0} is not in memory (tmpfs), and keys are never written to a disk: an agent that restarts while the operator is away has none; keep --run-dir below the node's /run, which systemd has in memory, or mount a tmpfs at it"
    )]
    Disk(String),
    /// The file or its folder cannot be used.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// What went wrong.
        error: io::Error,
    },
    /// Somebody else could have read or written it.
    #[error("{0} belongs to another user or can be used by others; remove it")]
    Permissions(String),
    /// Its content is not a cache of this version.
    #[error("{0} holds no credentials of this version; it is replaced at the next write")]
    Content(String),
}

/// The file, on a file system in memory.
#[derive(Debug)]
pub struct Cache {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Content {
    version: u32,
    credentials: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    id: SpiffeId,
    obtained: u64,
    key: String,
    chain: Vec<String>,
    roots: Vec<String>,
}

impl Cache {
    /// Uses the file `path`, which need not exist; its folder must.
    ///
    /// # Errors
    /// When the folder is not on a file system in memory.
    pub fn new(path: PathBuf) -> Result<Self, CacheError> {
        let kind = statfs(folder(&path)).map_err(|error| io_error(&path, error.into()))?.f_type;
        // The type's width and sign differ by architecture; the magic numbers have 32 bits.
        let kind = kind as u64 & 0xffff_ffff;
        if matches!(kind, TMPFS_MAGIC | RAMFS_MAGIC) {
            Ok(Self { path })
        } else {
            Err(CacheError::Disk(text(&path)))
        }
    }

    /// What the file holds that is valid at `now`. An entry that is not, or that is malformed, is left out.
    ///
    /// # Errors
    /// When the file is not ours alone, cannot be read, or is of another form; not when it is missing.
    pub fn load(&self, now: SystemTime) -> Result<Vec<Credentials>, CacheError> {
        let nofollow = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
        let file = match OpenOptions::new().read(true).custom_flags(nofollow).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error(&self.path, error)),
        };
        let metadata = file.metadata().map_err(|error| io_error(&self.path, error))?;
        if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
            return Err(CacheError::Permissions(text(&self.path)));
        }
        let capacity = usize::try_from(metadata.len().min(MAX_FILE)).unwrap_or(0) + 1;
        let mut content = Zeroizing::new(Vec::with_capacity(capacity));
        file.take(MAX_FILE).read_to_end(&mut content).map_err(|error| io_error(&self.path, error))?;
        // The parser's own error could quote a key.
        let content: Content =
            serde_json::from_slice(&content).map_err(|_| CacheError::Content(text(&self.path)))?;
        if content.version != VERSION {
            return Err(CacheError::Content(text(&self.path)));
        }
        Ok(content.credentials.iter().filter_map(|entry| entry.restore(now)).collect())
    }

    /// Replaces the file by these credentials: whole or not at all, mode 0600.
    ///
    /// # Errors
    /// When it cannot be written; the old file is then still there.
    pub fn store(&self, credentials: &[Arc<Credentials>]) -> Result<(), CacheError> {
        let fail = |error| io_error(&self.path, error);
        let content =
            Content { version: VERSION, credentials: credentials.iter().map(|c| Entry::new(c)).collect() };
        // In one allocation: growing would leave copies of keys behind.
        let size: usize = content.credentials.iter().map(Entry::size).sum();
        let mut json = Zeroizing::new(Vec::with_capacity(size + 64));
        serde_json::to_writer(&mut *json, &content).map_err(|error| fail(error.into()))?;
        let name =
            self.path.file_name().ok_or_else(|| fail(ErrorKind::InvalidInput.into()))?.to_string_lossy();
        let temporary = folder(&self.path).join(format!(".{name}.new"));
        // Left by a process that died in between; there is one writer only.
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file: File| file.write_all(&json))
            .and_then(|()| std::fs::rename(&temporary, &self.path))
            .map_err(fail)
    }
}

impl Entry {
    fn new(credentials: &Credentials) -> Self {
        let encode =
            |certificates: &[CertificateDer<'_>]| certificates.iter().map(|c| STANDARD.encode(c)).collect();
        let signed = credentials.signed();
        Self {
            id: credentials.id().clone(),
            obtained: credentials
                .obtained()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
            key: STANDARD.encode(credentials.key().pkcs8()),
            chain: encode(&signed.chain),
            roots: encode(&signed.roots),
        }
    }

    /// At least its length as JSON.
    fn size(&self) -> usize {
        let certificates: usize = self.chain.iter().chain(&self.roots).map(|c| c.len() + 3).sum();
        self.id.as_str().len() + self.key.len() + certificates + 128
    }

    fn restore(&self, now: SystemTime) -> Option<Credentials> {
        let decode = |certificates: &[String]| {
            certificates
                .iter()
                .map(|c| Some(CertificateDer::from(STANDARD.decode(c).ok()?)))
                .collect::<Option<_>>()
        };
        let key = SvidKey::from_pkcs8(Zeroizing::new(STANDARD.decode(&self.key).ok()?));
        let signed = Signed { chain: decode(&self.chain)?, roots: decode(&self.roots)? };
        let obtained = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.obtained))?;
        match Credentials::new(&self.id, key, signed, now) {
            Ok(credentials) => Some(credentials.obtained_at(obtained.min(now))),
            Err(error) => {
                tracing::info!(id = %self.id, %error, "a cached credential is not used");
                None
            }
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn io_error(path: &Path, error: io::Error) -> CacheError {
    CacheError::Io { path: text(path), error }
}

#[cfg(test)]
mod tests;
