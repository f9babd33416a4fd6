//! The images of Weft itself: static binaries and nothing else.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{image::Image, sh};

/// Each image, the user that it runs as, what it is, and what it holds beside its own program.
const IMAGES: [(&str, &str, &str, &[&str]); 2] = [
    // The agent puts the CNI plugin onto its node.
    (
        "weft-agent",
        "0:0",
        "Weft's node agent: BPF programs, enrolment, and the node's one proxy",
        &["weft-cni"],
    ),
    ("weft-operator", "65532:65532", "Weft's operator: policy to nodes, and identities", &[]),
];

/// The images made of the static binaries in `programs`, named `REGISTRY/weft-agent:TAG` and so on.
///
/// # Errors
/// When a binary is missing.
pub fn images(programs: &Path, registry: &str, tag: &str) -> Result<Vec<Image>> {
    let image = |(name, user, what, beside): (&str, &str, &str, &[&str])| {
        let mut image = Image::new(&format!("{}/{name}:{tag}", registry.trim_end_matches('/')));
        for held in [name].iter().chain(beside) {
            let program = programs.join(held);
            ensure!(program.is_file(), "{} is missing; build it first", program.display());
            image = image.file(program, &format!("/{held}"), 0o755);
        }
        Ok(image
            .folder("/tmp", 0o1777)
            .entrypoint(&[&format!("/{name}")])
            .user(user)
            .label("org.opencontainers.image.title", name)
            .label("org.opencontainers.image.description", what)
            .label("org.opencontainers.image.licenses", "Apache-2.0")
            .label("org.opencontainers.image.version", tag))
    };
    IMAGES.into_iter().map(image).collect()
}

/// Writes each image's archive into `folder`, and gives their paths with their names.
///
/// # Errors
/// When a binary is missing or the folder cannot be written.
pub fn save(programs: &Path, registry: &str, tag: &str, folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let mut saved = Vec::new();
    for image in images(programs, registry, tag)? {
        let name = image.name().rsplit('/').next().and_then(|n| n.split(':').next()).unwrap_or_default();
        let path = folder.join(format!("{name}.tar"));
        image.write_archive(&path)?;
        saved.push((image.name().to_owned(), path));
    }
    Ok(saved)
}

/// Uploads archives to where their names say. Registries differ in how one logs in: the tools that people have
/// configured for theirs do it.
///
/// # Errors
/// When there is no such tool, or the registry refuses.
pub fn push(saved: &[(String, PathBuf)], say: &dyn Fn(&str)) -> Result<()> {
    for (name, archive) in saved {
        let mut tool = if let Some(skopeo) = sh::which("skopeo") {
            let mut skopeo = Command::new(skopeo);
            // Without TLS, as crane and the container engines do it too.
            let plain = on_loopback(name).then_some("--dest-tls-verify=false");
            skopeo.arg("copy").args(plain).arg(format!("oci-archive:{}", archive.display()));
            skopeo.arg(format!("docker://{name}"));
            skopeo
        } else if let Some(crane) = sh::which("crane") {
            let mut crane = Command::new(crane);
            crane.arg("push").arg(archive).arg(name);
            crane
        } else {
            bail!(
                "neither skopeo nor crane is here to push {name}; install one (`apt-get install skopeo`), or take the \
                 archive {}",
                archive.display()
            );
        };
        sh::output(&mut tool, None).with_context(|| format!("push {name}"))?;
        say(&format!("pushed {name}"));
    }
    Ok(())
}

/// Whether an image's registry is on this machine.
fn on_loopback(name: &str) -> bool {
    let registry = name.split('/').next().unwrap_or_default();
    let host = match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => registry.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_registry_of_this_machine_is_on_loopback() {
        for name in ["localhost:5000/weft/a:1", "127.0.0.1:5000/a:1", "[::1]:5000/a:1", "localhost/a:1"] {
            assert!(on_loopback(name), "{name}");
        }
        for name in
            ["ghcr.io/weft-mesh/a:1", "10.0.0.1:5000/a:1", "localhost.example.org/a:1", "[fd00::1]/a:1"]
        {
            assert!(!on_loopback(name), "{name}");
        }
    }
}
