//! Container images without a container engine: one layer, written as an archive that is a docker-archive and an OCI
//! layout at once, or as an OCI layout in a folder. The same content gives the same bytes.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

#[derive(Debug, Clone)]
enum Entry {
    File { source: PathBuf, mode: u32 },
    Text { bytes: Vec<u8>, mode: u32 },
    Folder { mode: u32 },
    Link { target: PathBuf },
}

/// An image to be written. Every file belongs to root unless [`Self::tree_as`] says otherwise.
#[derive(Debug, Clone)]
pub struct Image {
    name: String,
    entries: BTreeMap<PathBuf, (Entry, u64)>,
    entrypoint: Vec<String>,
    command: Vec<String>,
    env: Vec<String>,
    labels: BTreeMap<String, String>,
    user: String,
    folder: String,
}

/// The parts of a finished image: blobs by their SHA-256.
struct Blobs {
    layer: PathBuf,
    layer_digest: String,
    layer_size: u64,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

impl Image {
    /// An empty image of that name with its tag, such as `registry.test/weft/agent:0.1.0`.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            entries: BTreeMap::new(),
            entrypoint: Vec::new(),
            command: Vec::new(),
            env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()],
            labels: BTreeMap::new(),
            user: String::new(),
            folder: "/".into(),
        }
    }

    /// Its name with its tag.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a file of this machine; links are followed.
    #[must_use]
    pub fn file(self, source: impl Into<PathBuf>, at: &str, mode: u32) -> Self {
        self.add(at, Entry::File { source: source.into(), mode }, 0)
    }

    /// Adds a file with that content.
    #[must_use]
    pub fn text(self, content: &str, at: &str, mode: u32) -> Self {
        self.add(at, Entry::Text { bytes: content.as_bytes().to_vec(), mode }, 0)
    }

    /// Adds a folder, such as `/tmp` with mode 0o1777.
    #[must_use]
    pub fn folder(self, at: &str, mode: u32) -> Self {
        self.add(at, Entry::Folder { mode }, 0)
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn link(self, target: &str, at: &str) -> Self {
        self.add(at, Entry::Link { target: target.into() }, 0)
    }

    /// Adds everything below a folder of this machine.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn tree(self, source: &Path, at: &str) -> Result<Self> {
        self.tree_as(source, at, 0)
    }

    /// As [`Self::tree`], owned by that user and group number.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn tree_as(mut self, source: &Path, at: &str, owner: u64) -> Result<Self> {
        let list = fs::read_dir(source).with_context(|| format!("read {}", source.display()))?;
        for item in list {
            let path = item?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let inside = format!("{}/{name}", at.trim_end_matches('/'));
            let found = fs::symlink_metadata(&path)?;
            let mode = found.permissions().mode() & 0o7777;
            self = if found.is_symlink() {
                self.add(&inside, Entry::Link { target: fs::read_link(&path)? }, owner)
            } else if found.is_dir() {
                self.add(&inside, Entry::Folder { mode }, owner).tree_as(&path, &inside, owner)?
            } else if found.is_file() {
                self.add(&inside, Entry::File { source: path, mode }, owner)
            } else {
                // Devices and sockets: the container runtime makes those that a container needs.
                self
            };
        }
        Ok(self)
    }

    /// What runs.
    #[must_use]
    pub fn entrypoint(mut self, words: &[&str]) -> Self {
        self.entrypoint = words.iter().map(ToString::to_string).collect();
        self
    }

    /// Its arguments, where a Pod gives none.
    #[must_use]
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(ToString::to_string).collect();
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.retain(|old| old.split('=').next() != Some(name));
        self.env.push(format!("{name}={value}"));
        self
    }

    /// The user it runs as; a number, or a Pod with `runAsNonRoot` is refused.
    #[must_use]
    pub fn user(mut self, user: &str) -> Self {
        user.clone_into(&mut self.user);
        self
    }

    /// The folder it runs in.
    #[must_use]
    pub fn workdir(mut self, at: &str) -> Self {
        at.clone_into(&mut self.folder);
        self
    }

    /// Adds a label, such as `org.opencontainers.image.source`.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), value.to_owned());
        self
    }

    fn add(mut self, at: &str, entry: Entry, owner: u64) -> Self {
        let path = PathBuf::from(at.trim_matches('/'));
        self.entries.insert(path, (entry, owner));
        self
    }

    /// Writes a tar archive for `ctr images import`, `docker load`, `skopeo copy docker-archive:` or `oci-archive:`.
    ///
    /// # Errors
    /// When a source cannot be read, or the archive not be written.
    pub fn write_archive(&self, out: &Path) -> Result<()> {
        let blobs = self.blobs(&scratch(out))?;
        let result = self.archive(out, &blobs);
        let _ = fs::remove_file(&blobs.layer);
        result
    }

    /// Writes an OCI layout: `oci-layout`, `index.json` and `blobs/sha256`. An older one there is replaced.
    ///
    /// # Errors
    /// When a source cannot be read, or the folder not be written.
    pub fn write_layout(&self, out: &Path) -> Result<()> {
        if out.exists() {
            ensure!(out.join("oci-layout").is_file(), "{} exists and is no OCI layout", out.display());
            fs::remove_dir_all(out)?;
        }
        let folder = out.join("blobs/sha256");
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let blobs = self.blobs(&scratch(&folder.join("layer")))?;
        fs::rename(&blobs.layer, folder.join(&blobs.layer_digest))?;
        for bytes in [&blobs.config, &blobs.manifest] {
            fs::write(folder.join(digest(bytes)), bytes)?;
        }
        fs::write(out.join("index.json"), self.index(&blobs)?)?;
        fs::write(out.join("oci-layout"), LAYOUT)?;
        Ok(())
    }

    fn archive(&self, out: &Path, blobs: &Blobs) -> Result<()> {
        let part = out.with_extension("tar.part");
        let file = File::create(&part).with_context(|| format!("write {}", part.display()))?;
        let mut tar = tar::Builder::new(BufWriter::new(file));
        let blob = |digest: &str| format!("blobs/sha256/{digest}");
        let config = blob(&digest(&blobs.config));
        let layer = blob(&blobs.layer_digest);
        put(&mut tar, "oci-layout", LAYOUT)?;
        put(&mut tar, "index.json", &self.index(blobs)?)?;
        let docker = json!([{"Config": config, "RepoTags": [self.name], "Layers": [layer]}]);
        put(&mut tar, "manifest.json", &serde_json::to_vec(&docker)?)?;
        put(&mut tar, &config, &blobs.config)?;
        put(&mut tar, &blob(&digest(&blobs.manifest)), &blobs.manifest)?;
        let mut header = header(0o644, 0);
        header.set_size(blobs.layer_size);
        tar.append_data(&mut header, &layer, File::open(&blobs.layer)?)?;
        tar.into_inner()?.flush()?;
        fs::rename(&part, out).with_context(|| format!("write {}", out.display()))
    }

    fn blobs(&self, scratch: &Path) -> Result<Blobs> {
        let (layer_digest, layer_size) = self.layer(scratch)?;
        let mut inner = json!({"Env": self.env, "WorkingDir": self.folder});
        let mut set = |key: &str, value: Value, given: bool| {
            if given {
                inner[key] = value;
            }
        };
        set("Entrypoint", json!(self.entrypoint), !self.entrypoint.is_empty());
        set("Cmd", json!(self.command), !self.command.is_empty());
        set("User", json!(self.user), !self.user.is_empty());
        set("Labels", json!(self.labels), !self.labels.is_empty());
        let config = serde_json::to_vec(&json!({
            "created": "1970-01-01T00:00:00Z",
            "architecture": architecture(),
            "os": "linux",
            "config": inner,
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_digest}")]},
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &digest(&config), config.len() as u64),
            "layers": [descriptor(LAYER, &layer_digest, layer_size)],
        }))?;
        Ok(Blobs { layer: scratch.to_path_buf(), layer_digest, layer_size, config, manifest })
    }

    fn index(&self, blobs: &Blobs) -> Result<Vec<u8>> {
        let mut manifest = descriptor(MANIFEST, &digest(&blobs.manifest), blobs.manifest.len() as u64);
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest["platform"] = json!({"architecture": architecture(), "os": "linux"});
        manifest["annotations"] =
            json!({"io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag});
        Ok(serde_json::to_vec(&json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest]}))?)
    }

    /// Writes the layer to `out`; gives its digest and size.
    fn layer(&self, out: &Path) -> Result<(String, u64)> {
        let file = File::create(out).with_context(|| format!("write {}", out.display()))?;
        let mut tar =
            tar::Builder::new(Hashing { inner: BufWriter::new(file), hash: Sha256::new(), size: 0 });
        for (path, (entry, owner)) in &self.with_parents()? {
            let at = path.display();
            match entry {
                Entry::Folder { mode } => {
                    let mut header = header(*mode, *owner);
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_size(0);
                    tar.append_data(&mut header, path, std::io::empty())?;
                }
                Entry::Link { target } => {
                    let mut header = header(0o777, *owner);
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_size(0);
                    tar.append_link(&mut header, path, target)?;
                }
                Entry::Text { bytes, mode } => {
                    let mut header = header(*mode, *owner);
                    header.set_size(bytes.len() as u64);
                    tar.append_data(&mut header, path, bytes.as_slice())?;
                }
                Entry::File { source, mode } => {
                    let file =
                        File::open(source).with_context(|| format!("{at}: open {}", source.display()))?;
                    let mut header = header(*mode, *owner);
                    header.set_size(file.metadata()?.size());
                    tar.append_data(&mut header, path, file).with_context(|| format!("write {at}"))?;
                }
            }
        }
        let mut hashing = tar.into_inner()?;
        hashing.inner.flush()?;
        Ok((hex(&hashing.hash.finalize()), hashing.size))
    }

    /// Every entry, and the folders above it that were not added themselves.
    fn with_parents(&self) -> Result<BTreeMap<PathBuf, (Entry, u64)>> {
        let mut all = self.entries.clone();
        for path in self.entries.keys() {
            if path.components().any(|part| !matches!(part, Component::Normal(_))) {
                bail!("{} is no path inside an image", path.display());
            }
            for above in path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()) {
                all.entry(above.to_path_buf()).or_insert((Entry::Folder { mode: 0o755 }, 0));
            }
        }
        Ok(all)
    }
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// The processor's name as image indices write it.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Where the layer is written before its digest is known; beside the result, so that it can be renamed.
fn scratch(out: &Path) -> PathBuf {
    out.with_extension("layer.part")
}

fn header(mode: u32, owner: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_uid(owner);
    header.set_gid(owner);
    header.set_mtime(0);
    header
}

fn put<W: Write>(tar: &mut tar::Builder<W>, path: &str, bytes: &[u8]) -> Result<()> {
    let mut header = header(0o644, 0);
    header.set_size(bytes.len() as u64);
    Ok(tar.append_data(&mut header, path, bytes)?)
}

fn descriptor(kind: &str, digest: &str, size: u64) -> Value {
    json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": size})
}

fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
