//! Where the parts lie: outside the checkout, keyed by version, so that a fresh clone finds them.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// The cache: `WEFT_CACHE`, else `weft` below `XDG_CACHE_HOME`, else `~/.cache/weft`.
///
/// # Errors
/// When it lies where a node covers the machine's folders with its own.
pub fn folder() -> Result<PathBuf> {
    let home =
        || env::var_os("HOME").map(PathBuf::from).context("HOME is not set; set WEFT_CACHE to a folder");
    let folder = match (env::var_os("WEFT_CACHE"), env::var_os("XDG_CACHE_HOME")) {
        (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache),
        (_, Some(cache)) if !cache.is_empty() => Path::new(&cache).join("weft"),
        _ => home()?.join(".cache/weft"),
    };
    if let Some(covered) = crate::node::COVERED.iter().find(|covered| folder.starts_with(covered)) {
        bail!(
            "the cache {} lies below {covered}, which each node replaces; set WEFT_CACHE to another folder",
            folder.display()
        );
    }
    Ok(folder)
}

/// The entry `name`: made by `make` in a folder that becomes the entry when it is complete. Two processes that want
/// the same make it once.
///
/// # Errors
/// What `make` gives, or when the cache cannot be written.
pub fn entry(
    name: &str,
    complete: impl Fn(&Path) -> bool,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let folder = folder()?;
    let done = folder.join(name);
    if complete(&done) {
        return Ok(done);
    }
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let lock = folder.join(format!("{name}.lock"));
    let lock = File::create(&lock).with_context(|| format!("write {}", lock.display()))?;
    lock.lock().context("wait for another process that makes the same part")?;
    if complete(&done) {
        return Ok(done);
    }
    let part = folder.join(format!("{name}.part"));
    remove(&part)?;
    fs::create_dir_all(&part)?;
    make(&part)?;
    if !complete(&part) {
        bail!("{name} was made, but something is missing in {}", part.display());
    }
    remove(&done)?;
    fs::rename(&part, &done).with_context(|| format!("rename {}", part.display()))?;
    Ok(done)
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    Ok(())
}
