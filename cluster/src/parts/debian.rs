//! Debian packages of several suites, unpacked beside the system. The system's own packages stay as they are.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{cache, sh};

/// The name of this set in the cache; to be raised with every change of [`PACKAGES`] or of how they are unpacked.
pub const KEY: &str = "debian-parts-2";

/// runc is bookworm's: sid's wants a newer C library than many machines have, and crun refuses machines with version 1
/// cgroups. bookworm's busybox crashes in `wget -T`. The libraries serve runc, nft and iptables alone.
const PACKAGES: [&str; 21] = [
    "busybox-static/sid",
    "containerd/sid",
    "containernetworking-plugins/sid",
    "etcd-server/sid",
    "kubectl/sid",
    "iptables/bookworm",
    "nftables/bookworm",
    "runc/bookworm",
    "libbsd0/bookworm",
    "libedit2/bookworm",
    "libip4tc2/bookworm",
    "libip6tc2/bookworm",
    "libjansson4/bookworm",
    "libmd0/bookworm",
    "libmnl0/bookworm",
    "libnetfilter-conntrack3/bookworm",
    "libnfnetlink0/bookworm",
    "libnftables1/bookworm",
    "libnftnl11/bookworm",
    "libseccomp2/bookworm",
    "libxtables12/bookworm",
];

/// Programs that need libraries among the parts, and the words that start them.
const WRAPPED: [(&str, &str); 9] = [
    ("nft", "nft"),
    ("runc", "runc"),
    ("iptables", "xtables-nft-multi iptables"),
    ("iptables-save", "xtables-nft-multi iptables-save"),
    ("iptables-restore", "xtables-nft-multi iptables-restore"),
    ("ip6tables", "xtables-nft-multi ip6tables"),
    ("ip6tables-save", "xtables-nft-multi ip6tables-save"),
    ("ip6tables-restore", "xtables-nft-multi ip6tables-restore"),
    ("xtables-monitor", "xtables-nft-multi xtables-monitor"),
];

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const MIRROR: &str = "http://deb.debian.org/debian";

/// The folder where the parts are unpacked; fetches them where the cache has them not.
///
/// # Errors
/// When this is no Debian-like machine, or the mirror cannot be reached.
pub fn ensure(say: &dyn Fn(&str)) -> Result<PathBuf> {
    let complete = |folder: &Path| folder.join("wrapped/nft").is_file();
    let entry = cache::entry(KEY, complete, |folder| {
        say("fetching etcd, containerd, runc, kubectl and the CNI plugins from Debian (100 MB, once)");
        let root = folder.join("root");
        unpack(&["bookworm", "sid"], &PACKAGES, false, &folder.join("apt"), &root)?;
        fs::rename(&root, folder.join("parts"))?;
        // The entry is the root itself, so that its paths are short.
        for item in fs::read_dir(folder.join("parts"))? {
            let item = item?;
            fs::rename(item.path(), folder.join(item.file_name()))?;
        }
        fs::remove_dir(folder.join("parts"))?;
        fs::remove_dir_all(folder.join("apt"))?;
        wrap(folder)
    })?;
    Ok(entry)
}

/// A whole file system of those packages of `suite` with everything that they depend on, for an image; cached as
/// `name`, which says what it is and is changed with the packages. Their installation scripts do not run: a user that
/// one would make is to be added by whoever builds the image.
///
/// # Errors
/// When this is no Debian-like machine, or the mirror cannot be reached.
pub fn tree(name: &str, suite: &str, packages: &[&str], say: &dyn Fn(&str)) -> Result<PathBuf> {
    tree_of(name, &[suite], packages, say)
}

/// As [`tree`]; of several suites the last is preferred.
///
/// # Errors
/// When this is no Debian-like machine, or the mirror cannot be reached.
pub(super) fn tree_of(name: &str, suites: &[&str], packages: &[&str], say: &dyn Fn(&str)) -> Result<PathBuf> {
    let suite = suites.last().copied().unwrap_or_default();
    let entry = cache::entry(
        &format!("tree-{suite}-{name}"),
        |folder| folder.join("root/usr").is_dir(),
        |folder| {
            say(&format!("fetching {} with dependencies from Debian ({suite}, once)", packages.join(", ")));
            let root = folder.join("root");
            let packages = [packages, &["base-passwd"]].concat();
            unpack(suites, &packages, true, &folder.join("apt"), &root)?;
            base(&root)?;
            Ok(fs::remove_dir_all(folder.join("apt"))?)
        },
    )?;
    Ok(entry.join("root"))
}

/// What the installation of a Debian makes that is in no package: users, groups, folders.
fn base(root: &Path) -> Result<()> {
    for (master, name) in [("passwd.master", "passwd"), ("group.master", "group")] {
        let master = root.join("usr/share/base-passwd").join(master);
        fs::copy(&master, root.join("etc").join(name))
            .with_context(|| format!("copy {}", master.display()))?;
    }
    for (name, mode) in [("run", 0o755), ("root", 0o700), ("tmp", 0o1777), ("var/tmp", 0o1777)] {
        fs::create_dir_all(root.join(name))?;
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode))?;
    }
    if !root.join("var/run").exists() {
        std::os::unix::fs::symlink("/run", root.join("var/run"))?;
    }
    Ok(())
}

/// Fetches packages (`name` or `name/suite`), with what they depend on where `whole`, and unpacks them in `root`.
fn unpack(suites: &[&str], packages: &[&str], whole: bool, work: &Path, root: &Path) -> Result<()> {
    let apt = Apt::new(work, suites)?;
    apt.update()?;
    apt.unpack(packages, whole, work, root)
}

fn extract(apt: &Apt, packages: &[&str], whole: bool, work: &Path, root: &Path) -> Result<()> {
    let debs = if whole {
        let mut install = apt.command();
        install.args(["install", "-qq", "--yes", "--download-only", "--no-install-recommends"]);
        install.args(["--target-release", &apt.preferred]);
        sh::output(install.args(packages), None).context("fetch packages")?;
        work.join("cache/archives")
    } else {
        let debs = work.join("debs");
        fs::create_dir_all(&debs)?;
        sh::output(apt.command().current_dir(&debs).args(["download", "-qq"]).args(packages), None)
            .context("fetch packages")?;
        debs
    };
    fs::create_dir_all(root)?;
    if whole {
        // As in a Debian of today; otherwise packages that still hold /bin would hide /usr/bin.
        for name in ["bin", "sbin", "lib", "lib64"] {
            fs::create_dir_all(root.join("usr").join(name))?;
            std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name))?;
        }
    }
    let mut unpacked = 0;
    for deb in fs::read_dir(&debs)?.flatten().map(|item| item.path()) {
        if deb.extension().is_some_and(|extension| extension == "deb") {
            let mut dpkg = Command::new(sh::need("dpkg-deb", "dpkg")?);
            if whole {
                // Its tar follows the links made above.
                let archive =
                    dpkg.arg("--fsys-tarfile").arg(&deb).stdin(std::process::Stdio::null()).output()?;
                if !archive.status.success() {
                    bail!("{} cannot be read", deb.display());
                }
                let mut tar = Command::new(sh::need("tar", "tar")?);
                tar.arg("-C").arg(root).args([
                    "-x",
                    "--keep-directory-symlink",
                    "--no-same-owner",
                    "-f",
                    "-",
                ]);
                sh::output(&mut tar, Some(&archive.stdout))?;
            } else {
                sh::output(dpkg.arg("-x").arg(&deb).arg(root), None)?;
            }
            unpacked += 1;
        }
    }
    if unpacked < packages.len() {
        bail!("Debian gave {unpacked} packages where {} were asked for", packages.len());
    }
    Ok(())
}

/// Programs that need libraries get a script that says where these are; nothing else sees them.
fn wrap(root: &Path) -> Result<()> {
    let folder = root.join("wrapped");
    fs::create_dir_all(&folder)?;
    let triple = format!("{}-linux-gnu", std::env::consts::ARCH);
    for (name, words) in WRAPPED {
        // `$0` is an absolute path: each caller finds the script by PATH or names it so.
        let text = format!(
            "#!/bin/sh\nroot=${{0%/*}}/..\nLD_LIBRARY_PATH=$root/usr/lib/{triple}:$root/lib/{triple} \
             XTABLES_LIBDIR=$root/usr/lib/{triple}/xtables exec \"$root/usr/sbin/\"{words} \"$@\"\n"
        );
        let path = folder.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// apt with lists, cache and state of its own.
pub(super) struct Apt {
    options: Vec<String>,
    preferred: String,
}

impl Apt {
    pub(super) fn new(work: &Path, suites: &[&str]) -> Result<Self> {
        if sh::which("apt-get").is_none() || !Path::new(KEYRING).is_file() {
            bail!(
                "the cluster's parts are Debian packages: run it on Debian, or on Ubuntu with \
                 `apt-get install debian-archive-keyring`"
            );
        }
        for folder in ["sources", "lists/partial", "cache/archives/partial", "state"] {
            fs::create_dir_all(work.join(folder))?;
        }
        fs::write(work.join("state/status"), "")?;
        let mirror = std::env::var("WEFT_DEBIAN_MIRROR").unwrap_or_else(|_| MIRROR.into());
        let sources = format!(
            "Types: deb\nURIs: {mirror}\nSuites: {}\nComponents: main\nSigned-By: {KEYRING}\n",
            suites.join(" ")
        );
        fs::write(work.join("sources/parts.sources"), sources)?;
        let at = |folder: &str| work.join(folder).display().to_string();
        let options = [
            ("Dir::Etc::SourceList", "/dev/null".into()),
            ("Dir::Etc::SourceParts", at("sources")),
            ("Dir::State::Lists", at("lists")),
            ("Dir::State::status", at("state/status")),
            ("Dir::Cache", at("cache")),
            // As whoever runs it: the user `_apt` may not reach the cache.
            ("APT::Sandbox::User", "root".into()),
            ("Acquire::Languages", "none".into()),
            ("Debug::NoLocking", "1".into()),
        ];
        Ok(Self {
            options: options.map(|(key, value)| format!("{key}={value}")).into(),
            preferred: suites.last().copied().unwrap_or_default().to_owned(),
        })
    }

    /// Reads the lists of packages.
    pub(super) fn update(&self) -> Result<()> {
        let mut update = self.command();
        sh::output(update.args(["update", "-qq"]), None).context("read Debian's package lists").map(drop)
    }

    /// Fetches packages as [`unpack`] does; the lists have been read.
    pub(super) fn unpack(&self, packages: &[&str], whole: bool, work: &Path, root: &Path) -> Result<()> {
        extract(self, packages, whole, work, root)
    }

    fn command(&self) -> Command {
        self.program("apt-get")
    }

    /// apt-cache, for a question.
    pub(super) fn cache(&self) -> Command {
        self.program("apt-cache")
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}
