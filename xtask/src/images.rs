//! `cargo xtask images`: static binaries, packed without a container engine.

use std::{fs, path::Path, process::Command};

use crate::{
    Failure, Outcome,
    bpf::{self, Profile},
    sh,
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
    let mut pack = pack(Profile::Dist, registry, tag, &folder)?;
    sh::run(pack.args(wanted.push.map(|_| "--push")))?;
    if let Some(name) = wanted.load {
        for archive in archives(&folder)? {
            let mut kind = Command::new("kind");
            sh::run(kind.args(["load", "image-archive", "--name", name]).arg(archive))?;
        }
    }
    Ok(())
}

/// Packs what `profile` built into archives in `folder`.
pub(crate) fn save(profile: Profile, registry: &str, tag: &str, folder: &Path) -> Outcome {
    sh::run(&mut pack(profile, registry, tag, folder)?)
}

fn pack(profile: Profile, registry: &str, tag: &str, folder: &Path) -> Outcome<Command> {
    sh::run(sh::cargo().args(["build", "--quiet", "--package", "weft-cluster"]))?;
    let mut tool = Command::new(sh::target().join("debug/weft-cluster"));
    tool.args(["images", "--registry", registry, "--tag", tag, "--programs"]).arg(profile.folder());
    tool.arg("--save").arg(folder);
    Ok(tool)
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
