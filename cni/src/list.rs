//! The namespaces that the agent wrote down last: what is known on the node while no agent runs.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Largest list that is read, in bytes.
const MAX_SIZE: u64 = 16 << 20;

/// How a namespace's Pods are treated (label `weft.mesh/mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Outside the mesh.
    Disabled,
    /// Encrypted among its own; plaintext from outside is taken, and judged.
    Permissive,
    /// Encrypted or nothing.
    Strict,
}

/// What happens when nobody can judge (label `weft.mesh/fail-mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// Refuse.
    #[default]
    Closed,
    /// Let pass.
    Open,
}

/// A namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Namespace {
    /// Its mode.
    pub mode: Mode,
    /// What happens when nobody can judge.
    #[serde(default)]
    pub fail_mode: FailMode,
}

impl Namespace {
    /// Whether its Pods wait until somebody judges them.
    pub fn holds(self) -> bool {
        match self.mode {
            Mode::Disabled => false,
            Mode::Permissive => self.fail_mode == FailMode::Closed,
            // Strict never fails open.
            Mode::Strict => true,
        }
    }
}

/// Every namespace of the cluster that the agent knew of.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct List {
    /// By name.
    pub namespaces: BTreeMap<String, Namespace>,
}

/// A list that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The file cannot be read.
    #[error("the list {path} cannot be read: {source}")]
    Read {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no list.
    #[error("the list {path} is damaged: {source}")]
    Content {
        /// Where.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// Reads the list; `None` where there is none: no agent was ever ready on this node.
///
/// # Errors
/// When there is one that cannot be used.
pub fn load(path: &Path) -> Result<Option<List>, ListError> {
    let failed = |source| ListError::Read { path: path.into(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut content = Vec::new();
    file.take(MAX_SIZE).read_to_end(&mut content).map_err(failed)?;
    let list = serde_json::from_slice(&content);
    list.map(Some).map_err(|source| ListError::Content { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_whole_or_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("namespaces.json");
        assert_eq!(load(&path).unwrap(), None);
        let text = r#"{"namespaces":{"shop":{"mode":"strict"},"db":{"mode":"permissive","failMode":"open"},"x":{"mode":"disabled","failMode":"closed"}}}"#;
        std::fs::write(&path, text).unwrap();
        let list = load(&path).unwrap().unwrap();
        let holds = |name: &str| list.namespaces[name].holds();
        assert_eq!(["shop", "db", "x"].map(holds), [true, false, false]);
        assert_eq!(serde_json::from_str::<List>(&serde_json::to_string(&list).unwrap()).unwrap(), list);
        std::fs::write(&path, &text[..40]).unwrap();
        assert!(matches!(load(&path), Err(ListError::Content { .. })));
        assert!(matches!(load(dir.path()), Err(ListError::Read { .. })));
    }

    #[test]
    fn strict_never_fails_open() {
        let open = |mode| Namespace { mode, fail_mode: FailMode::Open };
        let closed = |mode| Namespace { mode, fail_mode: FailMode::Closed };
        assert!(open(Mode::Strict).holds() && closed(Mode::Permissive).holds());
        assert!(!open(Mode::Permissive).holds() && !closed(Mode::Disabled).holds());
    }
}
