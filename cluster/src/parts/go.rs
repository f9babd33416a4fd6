//! Programs from Go modules. Each has a module of its own below `tests/cluster` with its versions and their sums;
//! nothing of their source is here.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{cache, sh};

/// Programs built from one module.
#[derive(Debug, Clone, Copy)]
pub struct Tool {
    /// Its folder below `tests/cluster`, and its name in the cache.
    pub name: &'static str,
    /// The version that its go.mod requires.
    pub version: &'static str,
    /// The packages; each gives a program with the name of its last part.
    pub packages: &'static [&'static str],
    /// Whether it needs a C compiler.
    pub cgo: bool,
    /// Linker flags beside `-s -w`.
    pub ldflags: &'static str,
    /// What it costs on two cores when nothing is cached.
    pub cost: &'static str,
}

/// The Kubernetes programs. kubectl refuses a server that does not know its own version.
pub const KUBERNETES: Tool = Tool {
    name: "kubernetes",
    version: "1.37.2",
    packages: &[
        "k8s.io/kubernetes/cmd/kube-apiserver",
        "k8s.io/kubernetes/cmd/kube-controller-manager",
        "k8s.io/kubernetes/cmd/kube-proxy",
        "k8s.io/kubernetes/cmd/kube-scheduler",
        "k8s.io/kubernetes/cmd/kubelet",
    ],
    cgo: false,
    ldflags: "-X k8s.io/component-base/version.gitVersion=v1.37.2 -X k8s.io/component-base/version.gitMajor=1 \
              -X k8s.io/component-base/version.gitMinor=37",
    cost: "7 to 15 min",
};

/// In-cluster DNS.
pub const COREDNS: Tool = Tool {
    name: "coredns",
    version: "1.14.7",
    packages: &["github.com/coredns/coredns"],
    cgo: false,
    ldflags: "",
    cost: "2 min",
};

/// SPIRE's server and agent.
pub const SPIRE: Tool = Tool {
    name: "spire",
    version: "1.15.3",
    packages: &["github.com/spiffe/spire/cmd/spire-agent", "github.com/spiffe/spire/cmd/spire-server"],
    cgo: true,
    ldflags: "",
    cost: "5 min",
};

/// Helm, which renders the chart.
pub const HELM: Tool = Tool {
    name: "helm",
    version: "3.22.0",
    packages: &["helm.sh/helm/v3/cmd/helm"],
    cgo: false,
    ldflags: "",
    cost: "3 min",
};

/// Every tool.
pub const TOOLS: [Tool; 4] = [KUBERNETES, COREDNS, SPIRE, HELM];

impl Tool {
    /// The names of its programs.
    pub fn programs(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.packages.iter().filter_map(|package| package.rsplit('/').next())
    }

    /// The folder with its programs; builds them where the cache has them not.
    ///
    /// # Errors
    /// When Go is missing, or the build fails.
    pub fn ensure(&self, say: &dyn Fn(&str)) -> Result<PathBuf> {
        let complete = |folder: &Path| self.programs().all(|name| folder.join("bin").join(name).is_file());
        let name = format!("{}-{}", self.name, self.version);
        let entry = cache::entry(&name, complete, |folder| {
            say(&format!("building {name} from its Go modules at low priority (about {}, once)", self.cost));
            self.build(&folder.join("bin"))
        })?;
        Ok(entry.join("bin"))
    }

    fn build(&self, out: &Path) -> Result<()> {
        let go = sh::need("go", "golang-go (1.26 or newer, or from https://go.dev/dl)")?;
        std::fs::create_dir_all(out)?;
        let mut build = Command::new("nice");
        build.args(["-n", "19"]).arg(go).current_dir(self.module()?);
        build.args(["build", "-trimpath", "-buildvcs=false", "-mod=readonly", "-ldflags"]);
        build.arg(format!("-s -w {}", self.ldflags)).arg("-o").arg(format!("{}/", out.display()));
        build.args(self.packages).env("CGO_ENABLED", if self.cgo { "1" } else { "0" }).env("GOWORK", "off");
        sh::output(&mut build, None)
            .map(drop)
            .with_context(|| format!("build {}; it needs the Go module proxy (GOPROXY) once", self.name))
    }

    fn module(&self) -> Result<PathBuf> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        Ok(here.parent().context("the checkout")?.join("tests/cluster").join(self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_those_of_the_modules() {
        for tool in TOOLS {
            let text = std::fs::read_to_string(tool.module().unwrap().join("go.mod")).unwrap();
            let text = text.replace(" // indirect", "");
            for package in tool.packages {
                let parts: Vec<&str> = package.split('/').collect();
                let module = parts[..if parts[0] == "k8s.io" { 2 } else { 3 }].join("/");
                assert!(text.contains(&format!("{module} v{}\n", tool.version)), "{module}");
                assert!(
                    text.contains(&format!("\t{package}\n")) || text.contains(&format!("tool {package}\n"))
                );
            }
        }
    }
}
