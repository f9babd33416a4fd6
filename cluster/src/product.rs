//! The images of Weft itself: static binaries and nothing else.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::image::Image;

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
