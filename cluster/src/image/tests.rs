use std::{collections::BTreeMap, io::Read as _};

use super::*;

fn example(folder: &Path) -> Image {
    fs::write(folder.join("program"), b"#!/bin/sh\n").unwrap();
    Image::new("registry.test/a/b:1.2")
        .file(folder.join("program"), "/usr/bin/program", 0o755)
        .text("x:x:1:1::/:/\n", "/etc/passwd", 0o644)
        .folder("/tmp", 0o1777)
        .link("program", "/usr/bin/other")
        .entrypoint(&["/usr/bin/program"])
        .user("65532:65532")
        .label("org.opencontainers.image.title", "b")
}

fn members(bytes: impl std::io::Read) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut out = BTreeMap::new();
    let mut archive = tar::Archive::new(bytes);
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mode = entry.header().mode().unwrap();
        assert_eq!(entry.header().mtime().unwrap(), 0);
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        out.insert(name.trim_end_matches('/').to_owned(), (mode, bytes));
    }
    out
}

#[test]
fn an_archive_is_a_docker_archive_and_an_oci_layout() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("image.tar");
    example(folder.path()).write_archive(&out).unwrap();
    let files = members(File::open(&out).unwrap());
    let json = |name: &str| -> Value { serde_json::from_slice(&files[name].1).unwrap() };
    let docker = json("manifest.json");
    assert_eq!(docker[0]["RepoTags"][0], "registry.test/a/b:1.2");
    let config = json(docker[0]["Config"].as_str().unwrap());
    assert_eq!(config["config"]["User"], "65532:65532");
    assert_eq!(config["config"]["Entrypoint"][0], "/usr/bin/program");
    let blob = |digest: &Value| format!("blobs/{}", digest.as_str().unwrap().replace(':', "/"));
    let manifest = json(&blob(&json("index.json")["manifests"][0]["digest"]));
    assert_eq!(blob(&manifest["config"]["digest"]), docker[0]["Config"]);
    assert_eq!(manifest["layers"][0]["digest"], config["rootfs"]["diff_ids"][0]);
    for (name, (_, bytes)) in files.iter().filter(|(name, _)| name.starts_with("blobs/")) {
        assert!(name.ends_with(&digest(bytes)), "{name}");
    }
    let layer = members(files[docker[0]["Layers"][0].as_str().unwrap()].1.as_slice());
    assert_eq!(layer["usr/bin/program"].0, 0o755);
    assert_eq!(layer["tmp"].0, 0o1777);
    // Parents come by themselves.
    assert_eq!(layer["usr"].0, 0o755);
    assert!(layer.contains_key("usr/bin/other"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside the archive");
}

#[test]
fn the_same_content_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a.tar"), folder.path().join("b.tar"));
    example(folder.path()).write_archive(&a).unwrap();
    example(folder.path()).write_archive(&b).unwrap();
    assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
}

#[test]
fn a_layout_replaces_an_older_one_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("layout");
    let image = example(folder.path());
    image.write_layout(&out).unwrap();
    image.write_layout(&out).unwrap();
    assert_eq!(fs::read_dir(out.join("blobs/sha256")).unwrap().count(), 3);
    let error = image.write_layout(folder.path()).unwrap_err().to_string();
    assert!(error.contains("no OCI layout"), "{error}");
}

#[test]
fn a_tree_keeps_modes_and_links() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir_all(tree.join("a")).unwrap();
    fs::write(tree.join("a/b"), "b").unwrap();
    std::os::unix::fs::symlink("b", tree.join("a/c")).unwrap();
    let out = folder.path().join("layer");
    let image = Image::new("t:1").tree_as(&tree, "/data", 999).unwrap();
    image.layer(&out).unwrap();
    let mut archive = tar::Archive::new(File::open(&out).unwrap());
    let found: Vec<_> = archive
        .entries()
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.path().unwrap().display().to_string(), entry.header().uid().unwrap())
        })
        .collect();
    let expected = [("data", 0), ("data/a", 999), ("data/a/b", 999), ("data/a/c", 999)];
    assert_eq!(found, expected.map(|(path, owner)| (path.to_owned(), owner)));
}

#[test]
fn a_path_that_leaves_the_image_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let image = Image::new("t:1").text("", "/../etc/passwd", 0o644);
    assert!(image.write_archive(&folder.path().join("x.tar")).is_err());
}
