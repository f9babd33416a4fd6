//! Debian's kernels, and QEMU to run them in, from Debian too. Fetched once per suite ([`crate::cache`]); the kernel is
//! the newest of its suite at that time.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::debian::{self, Apt};
use crate::{cache, sh};

/// The suites whose kernels are run: one without tcx, then newer ones.
pub const SUITES: [&str; 3] = ["bookworm", "trixie", "sid"];

/// Modules that the tests need and Debian does not build in, in the order in which they can be loaded.
const MODULES: [&str; 5] = ["inet_diag", "tcp_diag", "veth", "sch_ingress", "cls_bpf"];

/// A kernel with its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The package that holds it.
    pub package: String,
    /// The bootable image.
    pub image: PathBuf,
    /// The modules, in the order in which they are loaded; some are packed with xz.
    pub modules: Vec<PathBuf>,
}

/// The kernel of a suite.
///
/// # Errors
/// When this is no Debian-like machine, or the mirror cannot be reached.
pub fn kernel(suite: &str, say: &dyn Fn(&str)) -> Result<Kernel> {
    let entry = cache::entry(
        &format!("kernel-{suite}-1"),
        |folder| folder.join("package").is_file(),
        |folder| {
            say(&format!("fetching the kernel of {suite} from Debian (30 MB, once)"));
            let work = folder.join("apt");
            let apt = Apt::new(&work, &[suite])?;
            apt.update()?;
            let newest = depends(&apt, "linux-image-cloud-amd64", suite)?
                .into_iter()
                .find(|name| name.strip_prefix("linux-image-").is_some_and(starts_with_digit))
                .with_context(|| format!("{suite} has no kernel for machines of a cloud"))?;
            // Newer packages hold nothing themselves.
            let split =
                |name: &String| name.starts_with("linux-binary-") || name.starts_with("linux-modules-");
            let mut packages: Vec<String> =
                depends(&apt, &newest, suite)?.into_iter().filter(split).collect();
            packages.push(newest.clone());
            let packages: Vec<String> = packages.iter().map(|name| format!("{name}/{suite}")).collect();
            let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
            let root = folder.join("root");
            apt.unpack(&packages, false, &work, &root)?;
            let image = found(&root, &|name| name.starts_with("vmlinuz")).context("no vmlinuz")?;
            fs::rename(image, folder.join("vmlinuz"))?;
            for (number, module) in MODULES.iter().enumerate() {
                let names = [format!("{module}.ko"), format!("{module}.ko.xz")];
                let file = found(&root, &|name| names.iter().any(|one| one == name))
                    .with_context(|| format!("{newest} has no module {module}"))?;
                let packed = if file.extension().is_some_and(|e| e == "xz") { ".xz" } else { "" };
                fs::rename(&file, folder.join(format!("{number}-{module}.ko{packed}")))?;
            }
            fs::remove_dir_all(&root)?;
            fs::remove_dir_all(&work)?;
            Ok(fs::write(folder.join("package"), newest)?)
        },
    )?;
    let mut modules: Vec<PathBuf> = fs::read_dir(&entry)?
        .flatten()
        .map(|item| item.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains(".ko")))
        .collect();
    modules.sort();
    Ok(Kernel { package: fs::read_to_string(entry.join("package"))?, image: entry.join("vmlinuz"), modules })
}

/// The root of QEMU with everything that it needs.
///
/// # Errors
/// When this is no Debian-like machine, or the mirror cannot be reached.
pub fn qemu(say: &dyn Fn(&str)) -> Result<PathBuf> {
    // Bookworm's own cannot run newer kernels; other suites together with it would replace half a system.
    let packages = ["qemu-system-x86"];
    debian::tree_of("qemu-1", &["bookworm", "bookworm-backports"], &packages, say)
}

/// The root of the tools that tests call in the virtual machine; its C library is new enough for programs of other
/// machines.
///
/// # Errors
/// When this is no Debian-like machine, or the mirror cannot be reached.
pub fn tools(say: &dyn Fn(&str)) -> Result<PathBuf> {
    debian::tree_of("tools-1", &["trixie"], &["iproute2", "busybox-static"], say)
}

fn starts_with_digit(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
}

/// What a package depends on directly.
fn depends(apt: &Apt, package: &str, suite: &str) -> Result<Vec<String>> {
    let said = sh::output(apt.cache().args(["depends", &format!("{package}/{suite}")]), None)?;
    let names: Vec<String> =
        said.lines().filter_map(|line| Some(line.trim().strip_prefix("Depends: ")?.to_owned())).collect();
    if names.is_empty() && package == "linux-image-cloud-amd64" {
        bail!("{package} of {suite} depends on nothing: {said}");
    }
    Ok(names)
}

/// The first file below `folder` with such a name.
fn found(folder: &Path, fits: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder).ok()?.flatten() {
            match item.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(item.path()),
                Ok(kind) if kind.is_file() && fits(&item.file_name().to_string_lossy()) => {
                    return Some(item.path());
                }
                _ => {}
            }
        }
    }
    None
}
