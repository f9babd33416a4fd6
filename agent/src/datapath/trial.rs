//! What this node can do, seen without attaching or pinning anything.

use std::path::Path;

use rustix::fs::statfs;
use serde_json::{Value, json};

use super::{
    Datapath, loader,
    mounts::{BPF_FS, CgroupRoot},
};

/// Longest reason that is told, in characters: a Pod's last word has 4096 bytes.
const REASON: usize = 250;

impl Datapath {
    /// Loads every program once and looks at what enrolment stands on. Each part says what is against it, or nothing.
    pub fn trial() -> Value {
        let cut = |text: String| text.chars().take(REASON).collect::<String>();
        let programs = loader::trial();
        let object = programs.as_ref().err().map(|e| cut(e.to_string()));
        let refused: Vec<Value> = programs
            .iter()
            .flatten()
            .filter_map(|(name, problem)| Some(json!({"name": name, "problem": cut(problem.clone()?)})))
            .collect();
        let btf = !Path::new("/sys/kernel/btf/vmlinux").exists();
        let bpffs = statfs("/sys/fs/bpf").map(|s| s.f_type != BPF_FS).unwrap_or(true);
        let cgroup = CgroupRoot::open(None).err().map(|e| cut(e.to_string()));
        json!({
            "kernel": loader::kernel(),
            "loaded": programs.iter().flatten().filter(|(_, problem)| problem.is_none()).count(),
            "object": object,
            "refused": refused,
            "btf": btf.then_some("there is no /sys/kernel/btf/vmlinux: the kernel was built without BTF"),
            "bpffs": bpffs.then_some("no bpffs is mounted at /sys/fs/bpf: mount -t bpf bpf /sys/fs/bpf"),
            "cgroup": cgroup,
        })
    }
}
