//! The BPF toolchain, the BPF object, and the build.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{Failure, Outcome, failed, machine, sh};

/// The linker that fits LLVM 22, which both compilers below have.
const LINKER_VERSION: &str = "0.13.0";
/// A nightly whose LLVM is 22: a newer one writes bitcode that the linker cannot read.
const NIGHTLY: &str = "nightly-2026-05-20";
/// Debian's compiler with a core library for BPF, and what the linker is built from.
const DEBIAN: [&str; 5] =
    ["rustc-web", "libstd-rust-web-dev-bpf", "llvm-22-dev", "libzstd-dev", "zlib1g-dev"];
const LLVM: &str = "/usr/lib/llvm-22";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// The crates whose programs are the mesh, its lab and its demo.
pub(crate) const PROGRAMS: [&str; 5] = ["weft-agent", "weft-cni", "weft-operator", "weft-cli", "weft-tests"];

/// How the workspace is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Unoptimised.
    Dev,
    /// What the demo and the end-to-end tests run: static, so that the test cluster's images can hold it too.
    Quick,
    /// What images hold.
    Dist,
}

impl Profile {
    /// Its folder below the target folder.
    pub(crate) fn folder(self) -> PathBuf {
        match self {
            Self::Dev => sh::target().join("debug"),
            Self::Quick => sh::target().join(triple()).join("quick"),
            Self::Dist => sh::target().join(triple()).join("dist"),
        }
    }

    /// Makes a cargo command build with it.
    pub(crate) fn apply(self, cargo: &mut Command) {
        if self == Self::Dev {
            return;
        }
        let target = triple();
        let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
        // With a target named, host programs such as build scripts stay as they are.
        cargo.args(["--target", &target]).env(flags, "-Ctarget-feature=+crt-static").env_remove("RUSTFLAGS");
        cargo.args(["--profile", if self == Self::Quick { "quick" } else { "dist" }]);
    }
}

fn triple() -> String {
    format!("{}-unknown-linux-gnu", env::consts::ARCH)
}

enum Compiler {
    Debian,
    Nightly,
}

/// A step of the set-up that is still to be done.
struct Step {
    what: String,
    seconds: u32,
    run: fn() -> Outcome,
}

/// Finds or installs everything, saying first what and how long.
pub(crate) fn setup() -> Outcome {
    let steps = steps();
    if steps.is_empty() {
        sh::say("The toolchain is complete: a BPF compiler, bpf-linker, nginx, iproute2 and make.");
        return Ok(());
    }
    let seconds: u32 = steps.iter().map(|step| step.seconds).sum();
    sh::say(&format!("To be installed (about {seconds} s on two cores):"));
    for step in &steps {
        sh::say(&format!("  - {}", step.what));
    }
    for step in steps {
        (step.run)()?;
    }
    sh::say("The toolchain is complete.");
    Ok(())
}

fn steps() -> Vec<Step> {
    let mut steps = Vec::new();
    let programs = missing_programs();
    if !programs.is_empty() {
        steps.push(Step {
            what: format!(
                "{} (the demo's network and web server, and what builds the agent's allocator), by apt-get as root",
                programs.join(", ")
            ),
            seconds: 10,
            run: install_programs,
        });
    }
    if compiler().is_none() {
        if apt_has(&DEBIAN) {
            let what = format!(
                "{} (a Rust compiler with a core library for BPF, and LLVM 22), by apt-get as root",
                DEBIAN.join(", ")
            );
            steps.push(Step { what, seconds: 25, run: install_debian });
        } else {
            let what = format!("the Rust toolchain {NIGHTLY} with rust-src, by rustup");
            steps.push(Step { what, seconds: 60, run: install_nightly });
        }
    }
    if linker().is_none() {
        let what = format!("bpf-linker {LINKER_VERSION}, into {}", linker_root().display());
        steps.push(Step { what, seconds: 60, run: install_linker });
    }
    steps
}

/// Builds the BPF object.
pub(crate) fn build_ebpf() -> Outcome {
    let Some(compiler) = compiler() else {
        return Err(Failure::Unable(
            "There is no Rust compiler for BPF here; run `cargo xtask setup`.".into(),
        ));
    };
    let Some(linker) = linker() else {
        return Err(Failure::Unable("There is no bpf-linker here; run `cargo xtask setup`.".into()));
    };
    let mut cargo = match compiler {
        Compiler::Debian => {
            let mut cargo = sh::cargo();
            // The stable compiler has the target; only the attributes that BPF needs are unstable.
            cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
            cargo
        }
        Compiler::Nightly => {
            let mut cargo = Command::new("rustup");
            cargo.current_dir(sh::root()).args(["run", NIGHTLY, "cargo"]);
            for name in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN"] {
                cargo.env_remove(name);
            }
            cargo
        }
    };
    cargo.args(["build", "--package", "weft-ebpf", "--release", "--target", "bpfel-unknown-none"]);
    if matches!(compiler, Compiler::Nightly) {
        cargo.args(["-Z", "build-std=core"]);
    }
    let target = sh::target().join("bpf-build");
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".into(),
        "-Cdebuginfo=2".into(),
    ];
    cargo.env("CARGO_TARGET_DIR", &target).env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    for (name, value) in
        [("PANIC", "abort"), ("LTO", "true"), ("DEBUG", "2"), ("OPT_LEVEL", "3"), ("CODEGEN_UNITS", "1")]
    {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{name}"), value);
    }
    // Incremental builds split the code differently, and the verifier counts what results.
    cargo.env("CARGO_INCREMENTAL", "0").env_remove("RUSTFLAGS");
    sh::run(&mut cargo)?;
    let built = target.join("bpfel-unknown-none/release/weft-ebpf");
    let object = sh::root().join("target/bpf/weft.bpf.o");
    let bytes = fs::read(&built)?;
    if fs::read(&object).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    // The agent embeds it: a reader must never see half of it.
    let part = object.with_extension("part");
    fs::create_dir_all(object.parent().unwrap_or(Path::new(".")))?;
    fs::write(&part, bytes)?;
    fs::rename(&part, &object)?;
    Ok(())
}

/// Builds the object, every binary, and the lab.
pub(crate) fn build(profile: Profile) -> Outcome {
    if machine::is_root() && env::var_os("SUDO_USER").is_some_and(|user| user != "root") {
        return Err(Failure::Usage(
            "Run this without sudo: the build needs no root, and the run asks for it itself.".into(),
        ));
    }
    build_programs(profile, &PROGRAMS)
}

/// Builds the object and the binaries of these packages.
pub(crate) fn build_programs(profile: Profile, packages: &[&str]) -> Outcome {
    build_ebpf()?;
    let mut cargo = sh::cargo();
    cargo.arg("build");
    for package in packages {
        cargo.args(["--package", package]);
    }
    cargo.arg("--bins");
    profile.apply(&mut cargo);
    sh::run(&mut cargo)
}

fn compiler() -> Option<Compiler> {
    let libdir = |command: &mut Command| {
        let out = sh::output(command.args(["--print", "target-libdir", "--target", "bpfel-unknown-none"]))?;
        let folder = fs::read_dir(out.trim()).ok()?;
        folder.flatten().any(|file| file.file_name().to_string_lossy().starts_with("libcore")).then_some(())
    };
    if Path::new(DEBIAN_RUSTC).is_file() && libdir(&mut Command::new(DEBIAN_RUSTC)).is_some() {
        return Some(Compiler::Debian);
    }
    let sysroot = sh::output(Command::new("rustup").args(["run", NIGHTLY, "rustc", "--print", "sysroot"]))?;
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
    source.is_dir().then_some(Compiler::Nightly)
}

/// Where tools are kept: outside the checkout and keyed by version, so that a fresh clone finds them.
pub(crate) fn cache() -> PathBuf {
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    env::var_os("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), PathBuf::from).join("weft")
}

fn linker_root() -> PathBuf {
    cache().join(format!("bpf-linker-{LINKER_VERSION}"))
}

fn linker() -> Option<PathBuf> {
    let path = linker_root().join("bin/bpf-linker");
    path.is_file().then_some(path)
}

fn apt_has(packages: &[&str]) -> bool {
    sh::which("apt-get").is_some()
        && packages.iter().all(|package| {
            let out = sh::output(Command::new("apt-cache").args(["policy", package])).unwrap_or_default();
            out.contains("Candidate:") && !out.contains("Candidate: (none)")
        })
}

fn apt_install(packages: &[&str]) -> Outcome {
    if sh::which("apt-get").is_none() {
        return Err(Failure::Unable(format!(
            "Install {} with this system's package manager, then run `cargo xtask setup` again.",
            packages.join(", ")
        )));
    }
    let apt = |args: &[&str]| -> Outcome {
        let mut command = sh::as_root("env")?;
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]).args(args);
        sh::run(&mut command)
    };
    let mut install = vec!["install", "-y", "--no-install-recommends"];
    install.extend_from_slice(packages);
    // The lists may be old or absent: then fetch them, once.
    apt(&install).or_else(|_| apt(&["update"]).and_then(|()| apt(&install)))
}

/// The packages of programs that are not here.
fn missing_programs() -> Vec<&'static str> {
    let needed = [("ip", "iproute2"), ("nginx", "nginx-light"), ("make", "make"), ("pip3", "python3-pip")];
    needed.into_iter().filter(|(name, _)| sh::which(name).is_none()).map(|(_, package)| package).collect()
}

fn install_programs() -> Outcome {
    apt_install(&missing_programs())
}

fn install_debian() -> Outcome {
    apt_install(&DEBIAN)
}

fn install_nightly() -> Outcome {
    if sh::which("rustup").is_none() {
        return Err(Failure::Unable(
            "There is no rustup here; install it from https://rustup.rs, then run `cargo xtask setup` again."
                .into(),
        ));
    }
    sh::run(Command::new("rustup").args([
        "toolchain",
        "install",
        NIGHTLY,
        "--profile",
        "minimal",
        "-c",
        "rust-src",
    ]))
}

fn install_linker() -> Outcome {
    let root = linker_root();
    if !Path::new(LLVM).is_dir() && apt_has(&["llvm-22-dev"]) {
        apt_install(&["llvm-22-dev", "libzstd-dev", "zlib1g-dev"])?;
    }
    if Path::new(LLVM).is_dir() {
        let mut cargo = sh::cargo();
        cargo.args(["install", "bpf-linker", "--version", LINKER_VERSION, "--no-default-features"]);
        cargo.args(["--features", "llvm-22", "--root"]).arg(&root).env("LLVM_PREFIX", LLVM);
        return sh::run(&mut cargo);
    }
    let arch = env::consts::ARCH;
    let file = format!("bpf-linker-{arch}-unknown-linux-musl.tar.zst");
    let url = format!("https://github.com/aya-rs/bpf-linker/releases/download/v{LINKER_VERSION}/{file}");
    let archive = root.join(&file);
    fs::create_dir_all(root.join("bin"))?;
    let fetched =
        sh::run(Command::new("curl").args(["-sSfL", "-o"]).arg(&archive).arg(&url)).and_then(|()| {
            sh::run(
                Command::new("tar").arg("--zstd").arg("-xf").arg(&archive).arg("-C").arg(root.join("bin")),
            )
        });
    if fetched.is_err() || linker().is_none() {
        return failed(format!(
            "bpf-linker could not be had from {url}. Install LLVM 22's development files so that {LLVM} exists (from https://apt.llvm.org on Debian and Ubuntu), or put a bpf-linker {LINKER_VERSION} at {}; then run `cargo xtask setup` again.",
            root.join("bin/bpf-linker").display()
        ));
    }
    Ok(())
}

/// What the set-up would still do, in words, and about how long.
pub(crate) fn pending() -> Option<(String, u32)> {
    let steps = steps();
    let words: Vec<String> = steps.iter().map(|step| step.what.clone()).collect();
    (!steps.is_empty()).then(|| (words.join("; "), steps.iter().map(|step| step.seconds).sum()))
}
