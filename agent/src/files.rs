//! Files and sockets of the run folder: for root only, and replaced as a whole.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;
use weft_runtime::durable;

/// Makes the run folder (0700) where it is missing.
///
/// # Errors
/// When it cannot be made, or belongs to others.
pub fn run_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let mut permissions = fs::metadata(dir)?.permissions();
    if permissions.mode() & 0o077 != 0 {
        permissions.set_mode(0o700);
        fs::set_permissions(dir, permissions)?;
    }
    Ok(())
}

/// Listens on a socket file (0600). An older process's socket of that name keeps its listener and loses its name,
/// so two agents may overlap.
///
/// # Errors
/// When the folder cannot be written.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let beside = beside(path);
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
    fs::rename(&beside, path)?;
    Ok(listener)
}

/// Writes a file (0600) so that readers see the old or the new content, never a part, after a power cut too.
///
/// # Errors
/// When the folder cannot be written.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    durable::replace(path, content, 0o600)
}

/// Removes the run folder with what is in it, and the other folders where nothing is left in them.
///
/// # Errors
/// When one cannot be removed.
pub fn remove<const N: usize>(run_dir: Option<&Path>, empty: [Option<&Path>; N]) -> io::Result<()> {
    if let Some(folder) = run_dir {
        gone(fs::remove_dir_all(folder))?;
    }
    empty.into_iter().flatten().try_for_each(|folder| gone(fs::remove_dir(folder)))
}

/// What was not there, or holds something of somebody else's, is fine.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Ok(()),
        other => other,
    }
}

fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_replaced_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_second_listener_takes_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _first = listen(&path).unwrap();
        let second = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (_client, accepted) = tokio::join!(tokio::net::UnixStream::connect(&path), second.accept());
        accepted.unwrap();
    }
}
