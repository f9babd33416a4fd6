//! Files that survive a power cut: the old content or the new, never a part, and the new once this has returned.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Replaces `path` by `content` with the permission bits `mode`: written beside it, forced to the disk, renamed, and
/// the folder forced to the disk.
///
/// # Errors
/// When any of that fails; the old file is still there unless only the last step failed.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    apart(path, content, mode, |apart| fs::rename(apart, path))
}

/// Makes `path` like [`replace`], unless it exists: false then, and it is left as it is.
///
/// # Errors
/// When any of that fails.
pub fn create(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    // A link, unlike a rename, never replaces what another process has just put there.
    let linked = apart(path, content, mode, |apart| {
        fs::hard_link(apart, path)?;
        fs::remove_file(apart)
    });
    match linked {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

fn apart(
    path: &Path,
    content: &[u8],
    mode: u32,
    put: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let folder = path.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Random, so that two processes that write the same file do not meet.
    let apart = folder.join(format!(".{name}.{:016x}.new", rand::random::<u64>()));
    let written =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(&apart).and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()?;
            put(&apart)
        });
    if let Err(error) = written {
        drop(fs::remove_file(&apart));
        return Err(error);
    }
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        replace(&path, b"old", 0o600).unwrap();
        replace(&path, b"new", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let taken = dir.path().join("folder");
        fs::create_dir(&taken).unwrap();
        fs::write(taken.join("x"), "").unwrap();
        assert!(replace(&taken, b"no", 0o600).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "a failed write leaves no file beside it");
    }

    #[test]
    fn what_exists_is_not_created() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(create(&path, b"first", 0o600).unwrap());
        assert!(!create(&path, b"second", 0o600).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(create(&dir.path().join("none/key"), b"", 0o600).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
