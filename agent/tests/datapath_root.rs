//! The agent as a container of a node with cgroup2 alone: a cgroup namespace of its own, in which its subtree passes for
//! the root. Attaches to the root of the whole machine, so it is for a virtual one: `cargo xtask test --tier 8`.

#![allow(clippy::expect_used, reason = "a test that cannot set itself up has to end")]

#[allow(dead_code, reason = "each file of tests uses a part")]
#[path = "datapath/world.rs"]
mod world;

use std::{
    fs,
    net::{IpAddr, TcpStream},
    path::Path,
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};
use weft_agent::datapath::{AddressInfo, Datapath, DatapathConfig, Tables};
use weft_core::SubjectId;
use world::World;

const ROOT: &str = "/sys/fs/cgroup";
/// The same, as PID 1 has it mounted.
const NODES: &str = "/proc/1/root/sys/fs/cgroup";

fn join(group: &Path) {
    fs::write(group.join("cgroup.procs"), std::process::id().to_string()).expect("moved to the cgroup");
}

#[test]
#[ignore = "attaches to the root cgroup of the machine; tier 8 runs it in a virtual one"]
fn a_container_attaches_to_the_nodes_root_and_not_to_its_own() {
    World::run(|world| {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        assert!(
            table.lines().any(|l| l.contains(" /sys/fs/cgroup ") && l.contains(" - cgroup2 ")),
            "{table}"
        );
        let pods = Path::new(NODES).join("kubepods");
        let (agent, application) = (pods.join("agent"), pods.join("application"));
        for group in [&agent, &application] {
            fs::create_dir_all(group).expect("a cgroup");
        }
        let home = fs::read_to_string("/proc/self/cgroup").expect("cgroups");
        let home = Path::new(NODES).join(home.trim().trim_start_matches("0::/"));

        // Before the mounts part: the node takes them away in the end.
        let pod = world.pod();
        mount("bpf", world.bpffs(), "bpf", MountFlags::empty(), None).expect("a bpffs");
        join(&agent);
        // SAFETY: only this thread, which ends with the test, gets other mounts and another view of cgroups.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWCGROUP) }.expect("namespaces");
        mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
            .expect("private mounts");
        unmount(ROOT, UnmountFlags::DETACH).expect("the node's cgroup2 goes out of sight");
        mount("cgroup", ROOT, "cgroup2", MountFlags::empty(), None).expect("the container's cgroup2");
        assert!(!Path::new(ROOT).join("kubepods").exists(), "the container sees its own subtree alone");

        let config = DatapathConfig { cgroup_root: None, ..world.config() };
        let (datapath, report) = Datapath::load(config).expect("load");
        assert_eq!(report.cgroup_root, Path::new(NODES));
        // What the hooks meet is not the agent's subtree alone: an application beside it is refused.
        join(&application);
        let _enrolled = datapath.enroll(&pod.spec(SubjectId(300))).expect("enrol");
        let address: IpAddr = "10.99.0.9".parse().expect("address");
        let info =
            AddressInfo { subject: SubjectId(301), enrolled: true, policed: true, ..AddressInfo::default() };
        let tables = Tables { addresses: [(address, info)].into(), ..Tables::default() };
        datapath.reconcile(&tables).expect("tables");
        let error = pod.inside(move || TcpStream::connect((address, 80))).expect_err("denied by policy");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        let attachments = datapath.check();
        assert!(attachments.iter().all(|a| a.healthy), "{attachments:?}");
        println!("kernel {}", report.kernel);
        join(&home);
    });
}
