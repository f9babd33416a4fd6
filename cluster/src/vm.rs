//! Programs in a virtual machine with another kernel than this machine's: QEMU without hardware support, an initramfs,
//! cgroup2 alone at `/sys/fs/cgroup`.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    parts::kernels::{self, Kernel},
    sh,
};

const INIT: &str = include_str!("vm/init.sh");
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "ld-linux-x86-64.so.2";
/// Without hardware support every instruction is translated: a minute on an idle machine, many on one that is busy.
const LIMIT: Duration = Duration::from_secs(900);

/// What the machine says when it is up.
const UP: &str = "weft-vm: Linux";

/// A program and its arguments, run as root after the machine is up.
#[derive(Debug, Clone)]
pub struct Run {
    /// The program; its debug information is left out.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// Boots a kernel, runs the programs one after the other, and gives each line of the machine's console to `line`.
///
/// # Errors
/// When the machine does not come up or end, or a program fails.
pub fn run(kernel: &Kernel, runs: &[Run], say: &dyn Fn(&str), line: &mut dyn FnMut(&str)) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("weft-vm-{}-{}", std::process::id(), kernel.package));
    fs::create_dir_all(&folder)?;
    let folder = Folder(folder);
    let initrd = folder.0.join("initrd");
    fs::write(&initrd, initramfs(kernel, runs, &folder.0, say)?)?;
    let mut machine = Machine(boot(kernel, &initrd, say)?);
    let console = machine.0.stdout.take().context("the machine has no console")?;
    let (sender, lines) = mpsc::sync_channel(1024);
    let began = Instant::now();
    std::thread::spawn(move || {
        for text in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&text).trim_end_matches('\r').to_owned();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let (mut done, mut failed) = (0, Vec::new());
    // What the firmware says clears the reader's terminal; it is of interest where nothing else comes.
    let mut firmware = Some(String::new());
    loop {
        let left = LIMIT.saturating_sub(began.elapsed());
        match lines.recv_timeout(left) {
            Ok(text) => {
                if let Some((said, up)) = firmware.as_mut().map(|said| (said, text.contains(UP))) {
                    if up {
                        firmware = None;
                        line(&text[text.find(UP).unwrap_or_default()..]);
                    } else {
                        said.push_str(&format!("{}\n", text.escape_debug()));
                    }
                } else if let Some(code) = text.strip_prefix("weft-vm: ended ") {
                    done += 1;
                    if code.trim() != "0" {
                        failed.push(format!("{} ended with {code}", describe(runs.get(done - 1))));
                    }
                } else {
                    line(&text);
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("{} did not end in {} s", kernel.package, LIMIT.as_secs())
            }
        }
    }
    ensure!(
        done == runs.len(),
        "{} ended after {done} of {} programs; see its console above\n{}",
        kernel.package,
        runs.len(),
        firmware.unwrap_or_default()
    );
    ensure!(failed.is_empty(), "{}: {}", kernel.package, failed.join("; "));
    Ok(())
}

fn describe(run: Option<&Run>) -> String {
    run.map_or_else(String::new, |run| run.program.display().to_string())
}

/// A folder that goes with its owner.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A machine that ends with its owner.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot(kernel: &Kernel, initrd: &Path, say: &dyn Fn(&str)) -> Result<Child> {
    let root = kernels::qemu(say)?;
    // By its own loader: its C library may be newer than this machine's.
    let libraries = [root.join(LIBRARIES), root.join(LIBRARIES).join("pulseaudio")];
    let libraries: Vec<String> = libraries.iter().map(|path| path.display().to_string()).collect();
    let mut command = Command::new(root.join(LIBRARIES).join(LOADER));
    command.arg("--library-path").arg(libraries.join(":")).arg(root.join("usr/bin/qemu-system-x86_64"));
    for data in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(root.join(data));
    }
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-M",
        "pc",
        "-accel",
        "tcg",
        "-cpu",
        "max",
    ]);
    command.args(["-smp", "1", "-m", "1536", "-nographic", "-serial", "stdio", "-monitor", "none"]);
    command.args(["-net", "none", "-append", "console=ttyS0 quiet panic=-1", "-kernel"]);
    command.arg(&kernel.image).arg("-initrd").arg(initrd);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start QEMU")
}

/// The root file system of the machine, as a cpio archive in the new ASCII format (Linux,
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn initramfs(kernel: &Kernel, runs: &[Run], work: &Path, say: &dyn Fn(&str)) -> Result<Vec<u8>> {
    let tools = kernels::tools(say)?;
    let mut archive = Archive::default();
    for folder in [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/x86_64-linux-gnu",
        "lib64",
        "modules",
        "proc",
        "root",
        "run",
        "runs",
    ]
    .into_iter()
    .chain(["sys", "tmp", "usr", "usr/sbin", "var"])
    {
        archive.folder(folder);
    }
    archive.console();
    archive.file("init", INIT.as_bytes(), 0o755);
    archive.copy(&tools.join("usr/bin/busybox"), "bin/busybox")?;
    for tool in ["ip", "tc"] {
        archive.copy(&tools.join("usr/sbin").join(tool), &format!("usr/sbin/{tool}"))?;
    }
    let mut libraries: Vec<_> = fs::read_dir(tools.join(LIBRARIES))?.flatten().collect();
    libraries.sort_by_key(fs::DirEntry::file_name);
    for library in libraries {
        let name = library.file_name().to_string_lossy().into_owned();
        if !name.contains(".so") {
            continue;
        }
        let at = format!("lib/x86_64-linux-gnu/{name}");
        match fs::read_link(library.path()) {
            Ok(target) => archive.link(&at, &target.to_string_lossy()),
            Err(_) => archive.copy(&library.path(), &at)?,
        }
    }
    archive.copy(&tools.join(LIBRARIES).join(LOADER), &format!("lib64/{LOADER}"))?;
    for module in &kernel.modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.copy(module, &format!("modules/{name}"))?;
    }
    let mut script = String::new();
    for (number, run) in runs.iter().enumerate() {
        let bare = work.join(format!("program-{number}"));
        let mut strip = Command::new(sh::need("strip", "binutils")?);
        sh::output(strip.arg("--strip-debug").arg("-o").arg(&bare).arg(&run.program), None)?;
        archive.copy(&bare, &format!("runs/{number}"))?;
        fs::remove_file(&bare)?;
        ensure!(
            run.arguments
                .iter()
                .all(|word| word.chars().all(|c| c.is_ascii_alphanumeric() || "-_=:".contains(c))),
            "an argument of {} holds characters that a shell reads",
            run.program.display()
        );
        writeln!(script, "/runs/{number} {}; echo \"weft-vm: ended $?\"", run.arguments.join(" "))?;
    }
    archive.file("runs/all", script.as_bytes(), 0o644);
    Ok(archive.finish())
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let length = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // inode, mode, uid, gid, links, mtime, size, device of the file system, device, length of the name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, length, 0]
            .map(|f| format!("{f:08x}"));
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend_from_slice(fields.concat().as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, (0, 0), &[]);
    }

    fn console(&mut self) {
        self.entry("dev/console", 0o020_600, (5, 1), &[]);
    }

    fn file(&mut self, name: &str, content: &[u8], mode: u32) {
        self.entry(name, 0o100_000 | mode, (0, 0), content);
    }

    fn link(&mut self, name: &str, target: &str) {
        self.entry(name, 0o120_777, (0, 0), target.as_bytes());
    }

    fn copy(&mut self, from: &Path, name: &str) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        let metadata = fs::metadata(from)?;
        ensure!(metadata.size() <= u64::from(u32::MAX), "{} is too large", from.display());
        self.file(name, &content, metadata.permissions().mode() & 0o7777);
        Ok(())
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

/// Fetches everything that [`on_every_kernel`] needs.
///
/// # Errors
/// When this is no Debian-like machine, or the mirror cannot be reached.
pub fn fetch(say: &dyn Fn(&str)) -> Result<()> {
    sh::need("strip", "binutils")?;
    kernels::qemu(say)?;
    kernels::tools(say)?;
    kernels::SUITES.iter().try_for_each(|suite| kernels::kernel(suite, say).map(drop))
}

/// Runs programs on the kernel of each suite and prints their consoles; names the kernels on which one failed.
///
/// # Errors
/// When a kernel cannot be had, does not boot, or a program failed on it.
pub fn on_every_kernel(runs: &[Run], say: &dyn Fn(&str)) -> Result<()> {
    let mut failed = Vec::new();
    for suite in kernels::SUITES {
        let kernel = kernels::kernel(suite, say)?;
        let began = Instant::now();
        say(&format!("-- {}", kernel.package));
        let ended = run(&kernel, runs, say, &mut |line| {
            let _ = writeln!(std::io::stdout(), "{line}");
        });
        match ended {
            Ok(()) => say(&format!("-- {}: {:.1} s", kernel.package, began.elapsed().as_secs_f64())),
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_aligned_entries_and_an_end() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.file("bin/a", b"12345", 0o755);
        archive.link("bin/b", "a");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(bytes.windows(6).filter(|w| w == b"070701").count(), 4);
        let header = &bytes[bytes.windows(5).position(|w| w == b"bin/a").unwrap() - 110..];
        assert_eq!(&header[14..22], b"000081ed");
        assert_eq!(&header[54..62], b"00000005");
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }
}
