use super::*;

/// A made-up `/proc` and cgroup2 mount.
struct World {
    folder: tempfile::TempDir,
    finder: Finder,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (proc, mount) = (folder.path().join("proc"), folder.path().join("cgroup"));
        fs::create_dir_all(&mount).unwrap();
        let finder = Finder {
            proc,
            owner: rustix::process::getuid().as_raw(),
            mounts: Some(vec![folder.path().join("elsewhere"), mount]),
            known: BTreeMap::new(),
        };
        let world = Self { folder, finder };
        world.process(1, 0, "init", "/init.scope");
        world
    }

    fn folder(&self, pid: u32) -> PathBuf {
        self.finder.proc.join(pid.to_string())
    }

    fn process(&self, pid: u32, parent: u32, name: &str, cgroup: &str) {
        let folder = self.folder(pid);
        fs::create_dir_all(folder.join("ns")).unwrap();
        let user = self.finder.owner;
        for (file, text) in [
            ("comm", format!("{name}\n")),
            ("exe", String::new()),
            ("status", format!("Name:\t{name}\nUid:\t{user}\t{user}\t{user}\t{user}\nGid:\t0\n")),
            ("stat", format!("{pid} ({name}) S {parent} {} {pid}00 0", vec!["0"; 17].join(" "))),
        ] {
            fs::write(folder.join(file), text).unwrap();
        }
        std::os::unix::fs::symlink("pid:[7]", folder.join("ns/pid")).unwrap();
        self.enter(pid, cgroup);
    }

    fn enter(&self, pid: u32, cgroup: &str) {
        fs::write(self.folder(pid).join("cgroup"), format!("4:cpu:/x\n0::{cgroup}\n")).unwrap();
        let folder = self.group(cgroup);
        fs::create_dir_all(&folder).unwrap();
        let members = read(&folder.join("cgroup.procs")).unwrap_or_default();
        fs::write(folder.join("cgroup.procs"), format!("{members}{pid}\n")).unwrap();
    }

    fn group(&self, cgroup: &str) -> PathBuf {
        self.folder.path().join("cgroup").join(cgroup.trim_start_matches('/'))
    }

    fn id(&self, cgroup: &str) -> u64 {
        fs::metadata(self.group(cgroup)).unwrap().ino()
    }

    fn set(&self, pid: u32, file: &str, from: &str, to: &str) {
        let path = self.folder(pid).join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replace(from, to)).unwrap();
    }
}

const SERVICE: &str = "/system.slice/kubelet.service";

#[test]
fn a_kubelet_in_a_cgroup_of_its_own_is_found() {
    let mut world = World::new();
    assert_eq!(world.finder.find(), []);
    world.process(50, 1, "containerd", "/system.slice/containerd.service");
    world.process(70, 1, "kubelet", SERVICE);
    world.process(71, 70, "mount", SERVICE);
    assert_eq!(world.finder.find(), [Ok(world.id(SERVICE))]);
}

#[test]
fn a_restarted_kubelet_is_found_again() {
    let mut world = World::new();
    world.process(70, 1, "kubelet", SERVICE);
    let first = world.id(SERVICE);
    assert_eq!(world.finder.find(), [Ok(first)]);
    // systemd removes the group with the service, and makes another one.
    fs::remove_dir_all(world.folder(70)).unwrap();
    fs::rename(world.group(SERVICE), world.group("/gone")).unwrap();
    assert_eq!(world.finder.find(), []);
    world.process(90, 1, "kubelet", SERVICE);
    assert_eq!(world.finder.find(), [Ok(world.id(SERVICE))]);
    assert_ne!(world.id(SERVICE), first);
}

#[test]
fn the_root_cgroup_is_everybodys() {
    let mut world = World::new();
    world.process(70, 1, "kubelet", "/");
    let found = world.finder.find();
    assert_eq!(found, [Err(Problem::Root { pid: 70 })]);
    assert!(found[0].as_ref().unwrap_err().to_string().contains("kubeletCgroups"));
}

#[test]
fn a_cgroup_with_others_is_not_the_kubelets() {
    let mut world = World::new();
    world.process(50, 1, "containerd", "/init");
    world.process(51, 50, "shim", "/init");
    world.process(70, 1, "kubelet", "/init");
    let others = "containerd, shim".to_owned();
    assert_eq!(world.finder.find(), [Err(Problem::Shared { pid: 70, cgroup: "/init".into(), others })]);
}

#[test]
fn a_helper_that_outlives_its_parent_changes_nothing() {
    let mut world = World::new();
    world.process(70, 1, "kubelet", SERVICE);
    let found = [Ok(world.id(SERVICE))];
    assert_eq!(world.finder.find(), found);
    world.process(75, 1, "mount", SERVICE);
    assert_eq!(world.finder.find(), found);
}

#[test]
fn a_kubelet_that_moves_is_judged_anew() {
    let mut world = World::new();
    world.process(70, 1, "kubelet", SERVICE);
    assert_eq!(world.finder.find(), [Ok(world.id(SERVICE))]);
    world.set(70, "cgroup", SERVICE, "/");
    assert_eq!(world.finder.find(), [Err(Problem::Root { pid: 70 })]);
}

#[test]
fn whoever_calls_himself_kubelet_is_none() {
    let mut world = World::new();
    // In a Pod with the node's processes.
    world.process(70, 1, "kubelet", "/kubepods/burstable/pod1/2");
    world.process(71, 1, "kubelet", "/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope");
    // In a process namespace of its own.
    world.process(72, 1, "kubelet", "/a");
    fs::remove_file(world.folder(72).join("ns/pid")).unwrap();
    std::os::unix::fs::symlink("pid:[8]", world.folder(72).join("ns/pid")).unwrap();
    // Somebody who is not root, or was not a moment ago.
    let user = world.finder.owner;
    world.process(73, 1, "kubelet", "/b");
    world.set(73, "status", &format!("Uid:\t{user}\t"), "Uid:\t4242\t");
    assert_eq!(world.finder.find(), []);
    world.finder.owner += 1;
    world.process(74, 1, "kubelet", "/c");
    assert_eq!(world.finder.find(), [], "its program is not root's");
}

#[test]
fn a_cgroup_that_does_not_hold_the_kubelet_is_not_taken_for_its_own() {
    let mut world = World::new();
    world.process(70, 1, "kubelet", SERVICE);
    fs::write(world.group(SERVICE).join("cgroup.procs"), "71\n").unwrap();
    assert_eq!(world.finder.find(), [Err(Problem::Hidden { pid: 70, cgroup: SERVICE.into() })]);
}

#[test]
fn this_machines_mounts_are_found() {
    assert!(mounts(Path::new("/nonexistent")).is_empty());
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(mounts(Path::new("/proc")).is_empty(), cgroup2_mount(&table).is_none());
}
