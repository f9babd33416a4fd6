//! Whether this machine can run the mesh. Only looks; nothing is downloaded or changed.

use std::{fs, path::Path};

use crate::sh;

/// What to do on a machine that cannot: each line is a command that gives a machine that can.
const ELSEWHERE: &str = "\
A virtual machine can. With Lima (macOS, Linux):
  limactl start --name=weft --cpus=4 --memory=8 template://debian
  limactl shell weft
or with Multipass (also Windows):
  multipass launch 24.04 --name weft --cpus 4 --memory 8G --disk 30G
  multipass shell weft
Then install rustup there, clone this repository and run the same command.";

/// What the machine is, in one line, or what it lacks.
pub(crate) fn check() -> Result<String, String> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(format!(
            "Linux {}, BTF, cgroup2{}, {}",
            read("/proc/sys/kernel/osrelease").trim(),
            cgroup2().map_or_else(|| " (will be mounted)".into(), |at| format!(" at {at}")),
            if is_root() { "root" } else { "sudo for the run" },
        ));
    }
    let list: String = missing.iter().map(|line| format!("  - {line}\n")).collect();
    Err(format!("This machine cannot run Weft. It lacks:\n{list}\n{ELSEWHERE}"))
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    status_field("Uid").and_then(|line| line.split_whitespace().nth(1)?.parse::<u32>().ok()) == Some(0)
}

fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if cfg!(not(target_os = "linux")) {
        return vec![
            "Linux: the mesh is made of kernel hooks (only the `weft` command runs elsewhere)".into(),
        ];
    }
    let release = read("/proc/sys/kernel/osrelease");
    match version(&release) {
        Some(found) if found >= (5, 15) => {}
        _ => missing.push(format!("a Linux kernel of 5.15 or newer (this is {})", release.trim())),
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        missing.push(
            "the kernel's BTF at /sys/kernel/btf/vmlinux (a kernel built with CONFIG_DEBUG_INFO_BTF=y)"
                .into(),
        );
    }
    let systems = read("/proc/filesystems");
    for (kind, option) in [("cgroup2", "CONFIG_CGROUPS"), ("bpf", "CONFIG_BPF_SYSCALL")] {
        if !systems.lines().any(|line| line.trim_start_matches("nodev").trim() == kind) {
            missing.push(format!("the file system {kind} (a kernel built with {option}=y)"));
        }
    }
    if read("/sys/kernel/security/lockdown").contains("[confidentiality]") {
        missing.push("a kernel that is not locked down to `confidentiality`: it forbids BPF".into());
    }
    rights(&mut missing);
    if !Path::new("/proc/self/ns/net").exists() || read("/proc/sys/user/max_net_namespaces").trim() == "0" {
        missing.push("network namespaces (CONFIG_NET_NS=y and user.max_net_namespaces above 0)".into());
    }
    if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
        missing.push("an x86-64 or arm64 processor".into());
    }
    missing
}

/// Root's rights: of this process where it is root, else those that sudo could give.
fn rights(missing: &mut Vec<String>) {
    let root = is_root();
    if !root && sh::which("sudo").is_none() {
        missing.push("root, or sudo: the run loads BPF programs and makes network namespaces".into());
    }
    let field = if root { "CapEff" } else { "CapBnd" };
    let held = status_field(field).and_then(|line| u64::from_str_radix(line.trim(), 16).ok()).unwrap_or(0);
    let has = |bit: u32| held & (1 << bit) != 0;
    let mut lacks = Vec::new();
    // CAP_SYS_ADMIN makes namespaces and mounts; it includes CAP_BPF where that is older than the container.
    for (name, held) in [
        ("CAP_BPF", has(39) || has(21)),
        ("CAP_NET_ADMIN", has(12)),
        ("CAP_NET_RAW", has(13)),
        ("CAP_SYS_ADMIN (network namespaces, mounts)", has(21)),
    ] {
        if !held {
            lacks.push(name);
        }
    }
    if !lacks.is_empty() {
        missing.push(format!("the rights {} (a container without --privileged has not)", lacks.join(", ")));
    } else if root && !can_make_netns() {
        missing.push(
            "the right to make a network namespace (`unshare --net` is refused: a seccomp filter?)".into(),
        );
    }
}

fn can_make_netns() -> bool {
    match sh::which("unshare") {
        Some(unshare) => sh::output(std::process::Command::new(unshare).args(["--net", "true"])).is_some(),
        None => true,
    }
}

fn cgroup2() -> Option<String> {
    let text = read("/proc/self/mountinfo");
    let line = text.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(str::to_owned)
}

fn status_field(name: &str) -> Option<String> {
    let text = read("/proc/self/status");
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::to_owned))
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.trim().split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(version("6.18.44-fc-v595\n"), Some((6, 18)));
        assert_eq!(version("5.15.0-101-generic"), Some((5, 15)));
        assert!(version("5.4.0") < Some((5, 15)));
        assert_eq!(version(""), None);
    }
}
