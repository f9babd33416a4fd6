//! The images of Weft into a real registry, and back by HTTP.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers fail and speak as their test does")]

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use weft_cluster::parts::debian;

const PATIENCE: Duration = Duration::from_secs(30);

/// A program of Debian's that is unpacked in `root`, with the libraries there.
fn program(root: &Path, name: &str) -> Result<Vec<PathBuf>> {
    let libraries = root.join("usr/lib").join(format!("{}-linux-gnu", env::consts::ARCH));
    let files = fs::read_dir(&libraries)?.flatten().map(|file| file.path());
    let mut loaders =
        files.filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("ld-linux")));
    let loader = loaders.next().context("no loader in the tree")?;
    Ok(vec![loader, "--library-path".into(), libraries, root.join("usr/bin").join(name)])
}

/// A registry on a port of loopback that the kernel picked; ended when dropped.
struct Registry {
    process: Child,
    at: String,
}

impl Registry {
    fn start(root: &Path, folder: &Path) -> Result<Self> {
        let config = format!(
            "{{version: 0.1, log: {{level: info, formatter: json}}, http: {{addr: '127.0.0.1:0'}}, \
             storage: {{filesystem: {{rootdirectory: '{}'}}}}}}",
            folder.join("registry").display()
        );
        let (path, log) = (folder.join("config.yml"), folder.join("registry.log"));
        fs::write(&path, config)?;
        let words = program(root, "docker-registry")?;
        let out = fs::File::create(&log)?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg("serve").arg(&path);
        let process = command.stdin(Stdio::null()).stderr(out.try_clone()?).stdout(out).spawn()?;
        let mut registry = Self { process, at: String::new() };
        let start = Instant::now();
        loop {
            let said = fs::read_to_string(&log)?;
            let found = said.split_once("listening on ").and_then(|(_, rest)| {
                let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == ':'))?;
                Some(rest[..end].to_owned())
            });
            if let Some(at) = found {
                registry.at = at;
                return Ok(registry);
            }
            let ended = registry.process.try_wait()?;
            ensure!(ended.is_none() && start.elapsed() < PATIENCE, "the registry does not listen: {said}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What lies at a path.
    fn get(&self, path: &str) -> Result<Vec<u8>> {
        let mut stream = TcpStream::connect(&self.at)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // Of version 1.0: the answer ends with the connection.
        write!(
            stream,
            "GET /v2/{path} HTTP/1.0\r\nAccept: application/vnd.oci.image.manifest.v1+json\r\n\r\n"
        )?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let head = answer.windows(4).position(|four| four == b"\r\n\r\n").context("no answer")?;
        let status = String::from_utf8_lossy(&answer[..head]).lines().next().unwrap_or_default().to_owned();
        ensure!(status.contains(" 200 "), "{path}: {status}");
        Ok(answer.split_off(head + 4))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn sha256(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A file of an archive.
fn within(archive: &Path, name: &str) -> Result<Vec<u8>> {
    let output = Command::new("tar").arg("-xOf").arg(archive).arg(name).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

fn blob(archive: &Path, descriptor: &Value) -> Result<Vec<u8>> {
    let digest = descriptor["digest"].as_str().context("no digest")?;
    within(archive, &format!("blobs/{}", digest.replace(':', "/")))
}

fn unzipped(bytes: &[u8], folder: &Path) -> Result<Vec<u8>> {
    let path = folder.join("layer.gz");
    fs::write(&path, bytes)?;
    let output = Command::new("gzip").arg("-dc").arg(&path).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// What the registry has of an image is what the archive holds; a layer may be compressed on its way.
fn the_same(registry: &Registry, name: &str, archive: &Path, folder: &Path) -> Result<()> {
    let pulled: Value = serde_json::from_slice(&registry.get(&format!("{name}/manifests/test"))?)?;
    let index: Value = serde_json::from_slice(&within(archive, "index.json")?)?;
    let manifest: Value = serde_json::from_slice(&blob(archive, &index["manifests"][0])?)?;
    ensure!(pulled["config"]["digest"] == manifest["config"]["digest"], "{pulled} is not {manifest}");
    let config: Value = serde_json::from_slice(&blob(archive, &manifest["config"])?)?;
    let inside = config["rootfs"]["diff_ids"].as_array().context("no layers")?;
    let layers = pulled["layers"].as_array().context("no layers")?;
    ensure!(layers.len() == inside.len() && !layers.is_empty(), "{pulled}");
    for (layer, wanted) in layers.iter().chain([&pulled["config"]]).zip(inside.iter().chain([&Value::Null])) {
        let digest = layer["digest"].as_str().context("no digest")?;
        let bytes = registry.get(&format!("{name}/blobs/{digest}"))?;
        ensure!(sha256(&bytes) == digest, "{digest} came back otherwise");
        if let Some(wanted) = wanted.as_str() {
            let zipped = layer["mediaType"].as_str().is_some_and(|kind| kind.ends_with("gzip"));
            let layer = if zipped { unzipped(&bytes, folder)? } else { bytes };
            ensure!(sha256(&layer) == wanted, "the layer of {name} is another one");
        }
    }
    Ok(())
}

#[test]
fn pushed_images_come_back_as_they_are() -> Result<()> {
    let root =
        debian::tree("registry-1", "bookworm", &["docker-registry", "skopeo"], &|line| println!("{line}"))?;
    let folder = tempfile::tempdir()?;
    // skopeo as if it were installed, with a configuration that takes every image.
    let (policy, bin) = (folder.path().join("policy.json"), folder.path().join("bin"));
    fs::write(&policy, r#"{"default": [{"type": "insecureAcceptAnything"}]}"#)?;
    fs::create_dir(&bin)?;
    let words: Vec<String> =
        program(&root, "skopeo")?.iter().map(|word| format!("'{}'", word.display())).collect();
    let script = format!("#!/bin/sh\nexec {} --policy '{}' \"$@\"\n", words.join(" "), policy.display());
    fs::write(bin.join("skopeo"), script)?;
    fs::set_permissions(bin.join("skopeo"), fs::Permissions::from_mode(0o755))?;

    let registry = Registry::start(&root, folder.path())?;
    let programs = env::var_os("WEFT_BIN_DIR").context("WEFT_BIN_DIR is not set")?;
    let path = env::var("PATH").unwrap_or_default();
    let output = Command::new(env!("CARGO_BIN_EXE_weft-cluster"))
        .args([
            "images",
            "--tag",
            "test",
            "--push",
            "--registry",
            &format!("{}/weft", registry.at),
            "--programs",
        ])
        .arg(programs)
        .arg("--save")
        .arg(folder.path().join("images"))
        .env("PATH", format!("{}:{path}", bin.display()))
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for name in ["weft-agent", "weft-operator"] {
        let archive = folder.path().join(format!("images/{name}.tar"));
        the_same(&registry, &format!("weft/{name}"), &archive, folder.path())?;
    }
    Ok(())
}
