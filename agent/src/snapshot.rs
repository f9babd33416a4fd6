//! The last configuration on disk: what an agent starts from while the operator is away.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use weft_core::{Delta, MeshState};

use crate::files;

/// Largest snapshot that is read, in bytes.
const MAX_SIZE: u64 = 512 << 20;

/// A snapshot that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file cannot be read or written.
    #[error(
        "the snapshot {path} cannot be used; check the run folder, and whether its file system is full (df)"
    )]
    File {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not hold a configuration.
    #[error("the snapshot {path} is not whole; it is left alone until the operator sends a new one")]
    Content {
        /// Where.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// Reads the snapshot; `None` where there is none.
///
/// # Errors
/// When there is one that cannot be used.
pub fn load(path: &Path) -> Result<Option<Delta>, SnapshotError> {
    let failed = |source| SnapshotError::File { path: path.into(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut content = Vec::new();
    file.take(MAX_SIZE).read_to_end(&mut content).map_err(failed)?;
    serde_json::from_slice(&content)
        .map(Some)
        .map_err(|source| SnapshotError::Content { path: path.into(), source })
}

/// Writes the snapshot of a state.
///
/// # Errors
/// When it cannot be written.
pub fn store(path: &Path, state: &MeshState) -> Result<(), SnapshotError> {
    let content = serde_json::to_vec(&state.to_delta())
        .map_err(|source| SnapshotError::Content { path: path.into(), source })?;
    files::replace(path, &content).map_err(|source| SnapshotError::File { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_state_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot.json");
        assert!(load(&path).unwrap().is_none());
        let state = testing::state();
        store(&path, &state).unwrap();
        let back = MeshState::default().apply(&load(&path).unwrap().unwrap());
        assert_eq!(back.to_delta(), state.to_delta());
        std::fs::write(&path, b"{\"version\":").unwrap();
        assert!(matches!(load(&path), Err(SnapshotError::Content { .. })));
    }
}
