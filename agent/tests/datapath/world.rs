//! A node in a network namespace of its own, with a cgroup of its own and a bpffs of its own.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    net::IpAddr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

pub(crate) mod bpf;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use weft_agent::datapath::{Datapath, DatapathConfig, PodSpec};
use weft_core::{
    SubjectId, WorkloadUid,
    workload::{FailMode, Mode},
};

/// Tests move this very process between cgroups, so they take turns.
static TURN: Mutex<()> = Mutex::new(());
static NEXT: AtomicU32 = AtomicU32::new(0);

/// The node.
pub(crate) struct World {
    cgroup: PathBuf,
    home: PathBuf,
    bpffs: tempfile::TempDir,
    namespaces: Mutex<Vec<String>>,
}

/// A Pod's namespace with a veth to the node.
pub(crate) struct PodHost {
    pub(crate) uid: WorkloadUid,
    pub(crate) netns: PathBuf,
    /// The host's end of its veth.
    pub(crate) veth: String,
    pub(crate) addresses: Vec<IpAddr>,
}

/// Runs several commands of `ip` in one process.
fn batch(arguments: &[&str], commands: &str) {
    let mut ip = Command::new("ip")
        .args(arguments)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("iproute2 is installed");
    ip.stdin.take().expect("a pipe").write_all(commands.as_bytes()).expect("written");
    assert!(ip.wait().expect("ended").success(), "ip {arguments:?}: {commands}; these tests need root");
}

/// Runs `tc`; what it printed.
pub(crate) fn tc(arguments: &str) -> String {
    tc_with(arguments, &[])
}

/// Runs `tc` with further arguments that may hold blanks; what it printed.
pub(crate) fn tc_with(arguments: &str, more: &[&str]) -> String {
    let output =
        Command::new("tc").args(arguments.split(' ')).args(more).output().expect("iproute2 is installed");
    assert!(output.status.success(), "tc {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Looks at `condition` again and again until it gives something; at most `limit` long.
pub(crate) fn until<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(began.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::yield_now();
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("iproute2 is installed");
    assert!(status.success(), "ip {arguments}; these tests need root");
}

fn cgroup2() -> PathBuf {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let line = table.lines().find(|l| l.contains(" - cgroup2 ")).expect("a cgroup2 mount");
    line.split(' ').nth(4).expect("a mount point").into()
}

/// This process's cgroup below the mount.
fn own_cgroup(mount: &Path) -> PathBuf {
    let table = fs::read_to_string("/proc/self/cgroup").expect("cgroups");
    let path = table.lines().find_map(|l| l.strip_prefix("0::/")).expect("a cgroup2 membership");
    mount.join(path)
}

fn join(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
        .expect("moved to the cgroup; run as root");
}

impl World {
    /// Runs a test on a thread in the node's namespace and cgroup; everything is gone afterwards.
    pub(crate) fn run(test: impl FnOnce(&Self) + Send) {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let world = Self::new();
        std::thread::scope(|scope| {
            let node = scope.spawn(|| {
                // SAFETY: only this thread, which ends with the test, gets another network namespace.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
                    .expect("a namespace; run as root");
                ip("link set lo up");
                let _standing = Standing(&world);
                test(&world);
            });
            if let Err(panic) = node.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn new() -> Self {
        let mount = cgroup2();
        let home = own_cgroup(&mount);
        let cgroup =
            mount.join(format!("weft-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&cgroup).expect("a cgroup; run as root");
        let group = cgroup.join("agent");
        fs::create_dir(&group).expect("a cgroup");
        join(&group);
        Self { cgroup, home, bpffs: tempfile::tempdir().expect("folder"), namespaces: Mutex::default() }
    }

    /// The configuration of an agent on this node.
    pub(crate) fn config(&self) -> DatapathConfig {
        DatapathConfig {
            cgroup_root: Some(self.cgroup.clone()),
            bpffs: self.bpffs.path().to_owned(),
            ..DatapathConfig::default()
        }
    }

    /// The pin of a link.
    pub(crate) fn pin(&self, name: &str) -> PathBuf {
        self.bpffs.path().join("links").join(name)
    }

    /// Where everything is pinned.
    pub(crate) fn bpffs(&self) -> &Path {
        self.bpffs.path()
    }

    /// The cgroup below which programs are attached.
    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The folders of Pods with filters.
    pub(crate) fn records(&self) -> usize {
        fs::read_dir(self.bpffs.path().join("filters")).map_or(0, Iterator::count)
    }

    /// The pinned links.
    pub(crate) fn pins(&self) -> Vec<PathBuf> {
        let folder = self.bpffs.path().join("links");
        let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
        entries.map(|entry| entry.expect("entry").path()).collect()
    }

    /// A new Pod, routed by its node.
    pub(crate) fn pod(&self) -> PodHost {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let (high, low) = (number >> 8 & 0xff, number & 0xff);
        let name = format!("weft-{}-{number}", std::process::id());
        let (v4, v6) = (format!("10.88.{high}.{low}"), format!("fd88::{number:x}"));
        ip(&format!("netns add {name}"));
        self.namespaces.lock().unwrap_or_else(PoisonError::into_inner).push(name.clone());
        let veth = format!("veth{number}");
        // Routed, as Calico does it: the gateway is a link-local address that the node answers for.
        batch(
            &[],
            &format!(
                "link add {veth} type veth peer name eth0 netns {name}\nlink set {veth} up\n\
                 addr add 169.254.1.1/32 dev {veth}\naddr add fe80::1/64 dev {veth} nodad\n\
                 route add {v4}/32 dev {veth}\nroute add {v6}/128 dev {veth}\n"
            ),
        );
        batch(
            &["-n", &name],
            &format!(
                "link set lo up\nlink set eth0 up\naddr add {v4}/32 dev eth0\n\
                 addr add {v6}/128 dev eth0 nodad\nroute add 169.254.1.1 dev eth0\n\
                 route add default via 169.254.1.1\nroute add default via fe80::1 dev eth0\n"
            ),
        );
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("forwarding");
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").expect("forwarding");
        PodHost {
            uid: WorkloadUid::from(format!("00000000-0000-0000-0000-{number:012}").as_str()),
            netns: Path::new("/run/netns").join(name),
            veth,
            addresses: vec![v4.parse().expect("address"), v6.parse().expect("address")],
        }
    }
}

/// A node that still has its network namespace, in which filters are.
struct Standing<'a>(&'a World);

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        Datapath::uninstall(self.0.bpffs.path()).expect("uninstall");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        join(&self.home);
        for name in self.namespaces.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            ip(&format!("netns del {name}"));
        }
        rustix::mount::unmount(self.bpffs.path(), rustix::mount::UnmountFlags::DETACH).expect("unmount");
        fs::remove_dir(self.cgroup.join("agent")).expect("the cgroup is empty");
        fs::remove_dir(&self.cgroup).expect("the cgroup is empty");
    }
}

impl PodHost {
    /// How the Pod is enrolled.
    pub(crate) fn spec(&self, subject: SubjectId) -> PodSpec {
        PodSpec {
            uid: self.uid.clone(),
            subject,
            mode: Mode::Strict,
            fail_mode: FailMode::Closed,
            addresses: self.addresses.clone(),
            netns: self.netns.clone(),
        }
    }

    /// Runs `f` as an application of the Pod.
    pub(crate) fn inside<T: Send>(&self, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let application = scope.spawn(|| {
                let namespace = File::open(&self.netns)?;
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                f()
            });
            application.join().expect("the application")
        })
    }
}
