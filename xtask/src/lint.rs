//! `cargo xtask lint`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{Outcome, bpf, failed, sh};

/// Each crate, and the crates of ours that it may depend on.
const EDGES: [(&str, &[&str]); 18] = [
    ("ebpf-common", &[]),
    ("ebpf", &["ebpf-common"]),
    ("core", &[]),
    ("runtime", &[]),
    ("proto", &[]),
    ("cni", &[]),
    ("api", &["core"]),
    ("identity", &["core", "proto", "runtime"]),
    ("proxy", &["core", "identity", "runtime"]),
    ("agent", &["cni", "core", "ebpf-common", "identity", "proto", "proxy", "runtime", "tests"]),
    ("operator", &["api", "core", "identity", "proto", "runtime"]),
    ("cli", &["api", "core", "proto"]),
    ("bench", &["cluster", "core", "proto", "runtime", "tests"]),
    ("bpf-tests", &["core", "ebpf-common"]),
    ("cluster", &[]),
    ("fuzz", &["agent", "api", "core", "ebpf-common", "identity", "operator", "proto", "proxy"]),
    ("tests", &["cluster"]),
    ("xtask", &[]),
];

/// Libraries that belong to some crates only.
const LIBRARIES: [(&str, &[&str]); 6] = [
    // ebpf-common says of its types, behind a feature, that maps may hold them: only their own crate can.
    ("aya", &["agent", "bpf-tests", "ebpf-common"]),
    ("aya-obj", &["agent", "bpf-tests"]),
    ("aya-log", &["agent", "bpf-tests"]),
    ("kube", &["api", "bench", "operator", "cli"]),
    ("k8s-openapi", &["api", "bench", "operator", "cli"]),
    (
        "tokio",
        &["agent", "bench", "cli", "fuzz", "identity", "operator", "proto", "proxy", "runtime", "tests"],
    ),
];

/// Where `unsafe` may be written.
const UNSAFE_ROOMS: [&str; 5] =
    ["ebpf/", "ebpf-common/", "agent/src/datapath", "agent/tests/datapath", "bpf-tests/"];

const LONGEST: usize = 500;

const DENY_VERSION: &str = "0.20.2";

/// Runs every check and names each that found something.
pub(crate) fn run() -> Outcome {
    let mut bad = Vec::new();
    let mut step = |name: &str, outcome: Outcome| {
        match &outcome {
            Ok(()) => sh::say(&format!("lint: {name}: clean")),
            Err(failure) => {
                sh::say(&format!("lint: {name}: {failure:?}"));
                bad.push(name.to_owned());
            }
        }
        outcome.is_ok()
    };
    step("sources", report(&sources()));
    step("dependencies", report(&dependencies()));
    step("format", sh::run(sh::cargo().args(["fmt", "--all", "--check"])));
    if step("the BPF object", bpf::build_ebpf()) {
        let mut cargo = sh::cargo();
        cargo.arg("clippy");
        for package in packages() {
            cargo.args(["--package", &package]);
        }
        step("clippy", sh::run(cargo.args(["--all-targets", "--", "--deny", "warnings"])));
    }
    match deny()? {
        Some(program) => {
            let mut command = Command::new(program);
            command.current_dir(sh::root()).args(["check", "bans", "licenses", "sources"]);
            step("dependencies' licences and sources", sh::run(&mut command));
        }
        None => sh::say(&format!(
            "lint: licences: not checked, cargo-deny is not here (`cargo install cargo-deny --version {DENY_VERSION} --locked`)"
        )),
    }
    if bad.is_empty() { Ok(()) } else { failed(format!("lint found something in: {}", bad.join(", "))) }
}

/// Every package but the programs for the kernel, which have a compiler of their own.
pub(crate) fn packages() -> impl Iterator<Item = String> {
    let names = EDGES.into_iter().map(|(name, _)| name).filter(|name| *name != "ebpf");
    names.map(|name| if name == "xtask" { name.to_owned() } else { format!("weft-{name}") })
}

/// cargo-deny: installed, or in the cache. CI puts it there, a person is told how.
fn deny() -> Outcome<Option<PathBuf>> {
    if let Some(path) = sh::which("cargo-deny") {
        return Ok(Some(path));
    }
    let root = bpf::cache().join(format!("cargo-deny-{DENY_VERSION}"));
    let path = root.join("bin/cargo-deny");
    if path.is_file() {
        return Ok(Some(path));
    }
    if !sh::ci() {
        return Ok(None);
    }
    let mut cargo = sh::cargo();
    cargo.args(["install", "cargo-deny", "--version", DENY_VERSION, "--locked", "--root"]).arg(&root);
    sh::run(&mut cargo)?;
    Ok(Some(path))
}

fn report(findings: &[String]) -> Outcome {
    if findings.is_empty() { Ok(()) } else { failed(format!("\n  {}", findings.join("\n  "))) }
}

/// Length, `unsafe` and `tokio::spawn` of every source file.
fn sources() -> Vec<String> {
    let root = sh::root();
    let mut findings = Vec::new();
    for path in files() {
        let name = path.strip_prefix(&root).unwrap_or(&path).display().to_string();
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let kind = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if !["rs", "proto", "sh", "py"].contains(&kind) {
            continue;
        }
        let lines = text.lines().count();
        if lines > LONGEST {
            findings.push(format!("{name} has {lines} lines; split it, {LONGEST} is the limit"));
        }
        if kind != "rs" {
            continue;
        }
        if path.file_name().is_some_and(|file| file == "mod.rs") {
            findings.push(format!("{name}: a module `foo` lives in foo.rs beside foo/"));
        }
        findings.extend(words(&name, &text));
    }
    findings
}

fn words(name: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        let at = format!("{name}:{}", number + 1);
        let is_unsafe =
            ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|word| code.contains(word));
        // The lint's own patterns are text.
        let quoted = name.starts_with("xtask/src/lint");
        if is_unsafe && !quoted && !UNSAFE_ROOMS.iter().any(|room| name.starts_with(room)) {
            findings.push(format!("{at}: unsafe outside {}", UNSAFE_ROOMS.join(", ")));
        }
        if code.contains("tokio::spawn(") && !quoted && !name.starts_with("runtime/") {
            findings.push(format!("{at}: spawn through weft_runtime::Tasks"));
        }
        // The API client's library sets the process's default, whatever that is.
        if ["ClientConfig::builder()", "ServerConfig::builder()"].iter().any(|word| code.contains(word))
            && !quoted
        {
            findings.push(format!("{at}: name the provider of cryptography (builder_with_provider)"));
        }
    }
    let crate_root = name.ends_with("src/lib.rs") || name.ends_with("src/main.rs");
    let rooms = ["ebpf/", "ebpf-common/", "agent/", "bpf-tests/"];
    if crate_root
        && !rooms.iter().any(|room| name.starts_with(room))
        && !text.contains("#![forbid(unsafe_code)]")
    {
        findings.push(format!("{name}: forbid unsafe_code"));
    }
    findings
}

/// Tracked and new files, without those that git ignores.
fn files() -> Vec<PathBuf> {
    let mut git = Command::new("git");
    git.current_dir(sh::root()).args(["ls-files", "--cached", "--others", "--exclude-standard"]);
    let listed = sh::output(&mut git).unwrap_or_default();
    listed.lines().map(|line| sh::root().join(line)).filter(|path| path.is_file()).collect()
}

fn dependencies() -> Vec<String> {
    let mut findings = Vec::new();
    let known: BTreeSet<&str> = EDGES.iter().map(|(name, _)| *name).collect();
    for (name, allowed) in EDGES {
        let path = sh::root().join(name).join("Cargo.toml");
        let Ok(text) = fs::read_to_string(&path) else {
            findings.push(format!("{} cannot be read", path.display()));
            continue;
        };
        for (dependency, dev) in manifest(&text) {
            if let Some(ours) = dependency.strip_prefix("weft-").filter(|ours| known.contains(ours)) {
                // Tests may look both ways; nothing but the fuzz targets may depend on a program.
                let program = ["agent", "operator", "cli"].contains(&ours) && name != "fuzz";
                if program || (!dev && !allowed.contains(&ours)) {
                    findings.push(format!(
                        "{name} may not depend on {ours}; see the repository's layout in ARCHITECTURE.md"
                    ));
                }
            }
            for (library, homes) in LIBRARIES {
                if dependency == library && !dev && !homes.contains(&name) {
                    findings
                        .push(format!("{name} may not depend on {library}; only {} may", homes.join(", ")));
                }
            }
        }
    }
    let members = fs::read_dir(sh::root())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().join("Cargo.toml").is_file());
    for member in members {
        let name = member.file_name().to_string_lossy().into_owned();
        if !known.contains(name.as_str()) {
            findings.push(format!("{name} is a crate that xtask/src/lint.rs does not know"));
        }
    }
    findings.extend(aya_users());
    findings
}

/// Only the datapath knows aya.
fn aya_users() -> Vec<String> {
    let root = sh::root();
    let agent = files().into_iter().filter(|path| path.starts_with(root.join("agent/src")));
    agent
        .filter(|path| {
            !path.starts_with(root.join("agent/src/datapath")) && *path != root.join("agent/src/datapath.rs")
        })
        .filter(|path| {
            fs::read_to_string(path).is_ok_and(|text| text.contains("aya::") || text.contains("use aya"))
        })
        .map(|path| {
            format!(
                "{}: only agent/src/datapath knows aya",
                path.strip_prefix(&root).unwrap_or(Path::new("")).display()
            )
        })
        .collect()
}

/// Names in the dependency tables of a manifest, and whether for development only.
fn manifest(text: &str) -> Vec<(String, bool)> {
    let mut table = "";
    let mut out = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            table = header;
            continue;
        }
        if !table.ends_with("dependencies") || line.is_empty() || line.starts_with('#') {
            continue;
        }
        let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
        out.push((name.trim_matches('"').to_owned(), table.ends_with("dev-dependencies")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_manifests() {
        let text = "[package]\nname = \"x\"\n[dependencies]\nweft-core.workspace = true\naya = \"1\"\n\n[dev-dependencies]\nproptest = { workspace = true }\n";
        let expected = [("weft-core", false), ("aya", false), ("proptest", true)];
        assert_eq!(manifest(text), expected.map(|(name, dev)| (name.to_owned(), dev)));
    }

    #[test]
    fn finds_unsafe_outside_its_rooms() {
        let code = "#![forbid(unsafe_code)]\nfn f() { unsafe { g() } }\n";
        assert_eq!(words("core/src/lib.rs", code).len(), 1);
        assert_eq!(words("agent/src/datapath/sys.rs", code), Vec::<String>::new());
        assert_eq!(words("core/src/tls.rs", "let config = ServerConfig::builder();\n").len(), 1);
        assert_eq!(
            words("core/src/lib.rs", "#![forbid(unsafe_code)]\n// unsafe { }\n"),
            Vec::<String>::new()
        );
    }
}
