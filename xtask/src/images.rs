//! `cargo xtask images`: static binaries, packed without a container engine.

use std::{fs, path::Path, process::Command};

use crate::{
    Failure, Outcome,
    bpf::{self, Profile},
    failed, sh,
};

const USAGE: &str =
    "images takes --save DIR, --load kind:NAME or --push REGISTRY; and --registry NAME, --tag TAG";
/// What stands before the images' names where nothing else is said; the manifests in deploy/ name it too.
const REGISTRY: &str = "ghcr.io/weft-mesh";

#[derive(Debug, Default)]
struct Wanted<'a> {
    save: Option<&'a str>,
    load: Option<&'a str>,
    push: Option<&'a str>,
    registry: Option<&'a str>,
    tag: Option<&'a str>,
}

/// Builds the images and brings them where they are wanted.
pub(crate) fn run(args: &[&str]) -> Outcome {
    let wanted = wanted(args)?;
    bpf::build_programs(Profile::Dist, &["weft-agent", "weft-cni", "weft-operator"])?;
    let folder = wanted.save.map_or_else(|| sh::target().join("images"), |dir| sh::root().join(dir));
    let version = format!("v{}", env!("CARGO_PKG_VERSION"));
    let registry = wanted.push.or(wanted.registry).unwrap_or(REGISTRY);
    let tag = wanted.tag.unwrap_or(&version);
    save(Profile::Dist, registry, tag, &folder)?;
    if let Some(name) = wanted.load {
        for archive in archives(&folder)? {
            let mut kind = Command::new("kind");
            sh::run(kind.args(["load", "image-archive", "--name", name]).arg(archive))?;
        }
    }
    if wanted.push.is_some() {
        push(&folder, registry, tag)?;
    }
    Ok(())
}

/// Packs what `profile` built into archives in `folder`.
pub(crate) fn save(profile: Profile, registry: &str, tag: &str, folder: &Path) -> Outcome {
    sh::run(sh::cargo().args(["build", "--quiet", "--package", "weft-cluster"]))?;
    let mut tool = Command::new(sh::target().join("debug/weft-cluster"));
    tool.args(["images", "--registry", registry, "--tag", tag, "--programs"]).arg(profile.folder());
    sh::run(tool.arg("--save").arg(folder))
}

fn wanted<'a>(args: &[&'a str]) -> Outcome<Wanted<'a>> {
    let usage = || Failure::Usage(USAGE.into());
    let mut wanted = Wanted::default();
    for pair in args.chunks(2) {
        let &[flag, value] = pair else { return Err(usage()) };
        let place = match flag {
            "--save" => &mut wanted.save,
            "--load" => &mut wanted.load,
            "--push" => &mut wanted.push,
            "--registry" => &mut wanted.registry,
            "--tag" => &mut wanted.tag,
            _ => return Err(usage()),
        };
        *place = Some(value);
    }
    if let Some(load) = wanted.load {
        wanted.load = Some(load.strip_prefix("kind:").ok_or_else(usage)?);
    }
    let goals = [wanted.save, wanted.load, wanted.push].iter().flatten().count();
    if goals == 1 { Ok(wanted) } else { Err(usage()) }
}

fn archives(folder: &Path) -> Outcome<Vec<std::path::PathBuf>> {
    let mut found: Vec<_> = fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "tar"));
    found.sort();
    Ok(found)
}

/// Registries differ in how one logs in: the tools that people have configured for theirs do the upload.
fn push(folder: &Path, registry: &str, tag: &str) -> Outcome {
    for archive in archives(folder)? {
        let name = archive.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let target = format!("{registry}/{name}:{tag}");
        let mut tool = if sh::which("skopeo").is_some() {
            let mut skopeo = Command::new("skopeo");
            skopeo.args([
                "copy",
                &format!("oci-archive:{}", archive.display()),
                &format!("docker://{target}"),
            ]);
            skopeo
        } else if sh::which("crane").is_some() {
            let mut crane = Command::new("crane");
            crane.arg("push").arg(&archive).arg(&target);
            crane
        } else {
            return failed(format!(
                "neither skopeo nor crane is here to push {target}; install one (`apt-get install skopeo`), or take the archives in {}",
                folder.display()
            ));
        };
        sh::run(&mut tool)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_goal_is_asked_for() {
        assert_eq!(wanted(&["--load", "kind:a"]).ok().and_then(|w| w.load), Some("a"));
        assert!(wanted(&["--save", "d", "--tag", "x"]).is_ok());
        for bad in [&[][..], &["--save"], &["--load", "a"], &["--tag", "x"], &["--save", "a", "--push", "b"]]
        {
            assert!(wanted(bad).is_err(), "{bad:?}");
        }
    }
}
