//! Files and sockets of the run folder: for root only, and replaced as a whole; and how many files may be open.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
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

/// Allows as many open files as the system does: each connection is at least two, and runtimes start containers with
/// room for 1024.
pub fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let files = max_open();
    match raised {
        Ok(()) => tracing::info!(files, "that many files, and half as many connections, may be open"),
        Err(error) => tracing::warn!(files, %error, "the limit of open files cannot be raised"),
    }
}

/// How many files this process may have open.
pub fn max_open() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many it has open; 0 where the kernel does not tell.
pub fn open() -> u64 {
    // The folder itself is one of them while it is read.
    fs::read_dir("/proc/self/fd").map_or(0, |files| files.count().saturating_sub(1) as u64)
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

    #[test]
    fn open_files_are_counted_and_as_many_as_the_system_allows() {
        raise_limit();
        assert_eq!(Some(max_open()), getrlimit(Resource::Nofile).maximum.or(Some(u64::MAX)));
        let before = open();
        let more: Vec<_> = (0..50).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        // Other tests of this process open and close files too.
        assert!(open() + 25 > before + more.len() as u64, "{} after {before}", open());
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
