//! Readiness of this very process. During a rolling update two agents of one node share the node's network, and with
//! it the address of `/readyz`: a probe there may be answered by the agent that is about to leave. A file in a folder
//! of the Pod's own cannot be mistaken.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use weft_runtime::{DrainWatcher, Readiness};

use crate::files;

/// Keeps `file` in being while the agent is ready, until the drain begins.
pub async fn tell(file: PathBuf, readiness: Readiness, drain: DrainWatcher) {
    tokio::select! {
        () = readiness.wait() => {}
        () = drain.draining() => return,
    }
    // Without content, for which a full disk would have no room.
    if let Err(error) = files::replace(&file, b"") {
        tracing::error!(%error, file = %file.display(), "nobody learns that the agent is ready; see --ready-file");
    }
    drain.draining().await;
    if let Err(error) = remove(&file) {
        tracing::warn!(%error, file = %file.display(), "the agent still counts as ready");
    }
}

/// Removes what an earlier process of the same Pod left.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use weft_runtime::drain;

    use super::*;

    #[tokio::test]
    async fn the_file_is_there_while_the_agent_is_ready() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ready");
        let readiness = Readiness::new();
        let guard = readiness.guard("config");
        let (trigger, watcher) = drain::channel();
        let telling = tell(file.clone(), readiness, watcher);
        let steps = async {
            tokio::task::yield_now().await;
            assert!(!file.exists());
            guard.ready();
            while !file.exists() {
                tokio::task::yield_now().await;
            }
            trigger.drain(Duration::from_secs(5)).await;
        };
        tokio::join!(telling, steps);
        assert!(!file.exists());
        remove(&file).unwrap();
    }
}
