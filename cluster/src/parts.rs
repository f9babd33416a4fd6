//! The programs of a cluster: Debian packages unpacked beside the system (never installed), and Go modules built at
//! pinned versions. Both are made once and cached ([`crate::cache`]).

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::image::Image;

pub mod debian;
pub mod envoy;
pub mod go;
pub mod kernels;

const PAUSE: &str = include_str!("parts/pause.c");

/// The image of a Pod's sandbox.
pub const PAUSE_IMAGE: &str = "localhost/pause:1";
/// busybox with all its names, for tests: `sh`, `httpd`, `nc`, `wget`, `nslookup` and so on.
pub const BUSYBOX_IMAGE: &str = "docker.io/library/busybox:1";
/// The image of the cluster's DNS.
pub const DNS_IMAGE: &str = "registry.k8s.io/coredns/coredns:v1.14.7";

/// Where the parts of a cluster are.
#[derive(Debug, Clone)]
pub struct Parts {
    /// kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy.
    pub kubernetes: PathBuf,
    /// The root of the Debian parts.
    pub debian: PathBuf,
    /// Archives of the images that every node holds.
    pub images: Vec<PathBuf>,
}

impl Parts {
    /// Those in the cache; makes what is missing, the Go parts at low priority, and says so first.
    ///
    /// # Errors
    /// When a tool is missing or the network cannot be reached; the message says what to do.
    pub fn ensure(say: &dyn Fn(&str)) -> Result<Self> {
        let debian = debian::ensure(say)?;
        let kubernetes = go::KUBERNETES.ensure(say)?;
        let coredns = go::COREDNS.ensure(say)?;
        let images = images(&debian, &coredns, say)?;
        Ok(Self {
            kubernetes,
            debian,
            images: vec![images.join("pause.tar"), images.join("busybox.tar"), images.join("dns.tar")],
        })
    }

    /// `PATH` with the parts before the machine's own programs.
    pub(crate) fn path(&self) -> OsString {
        let mut path = OsString::from(&self.kubernetes);
        for folder in [self.debian.join("wrapped"), self.debian.join("usr/bin"), self.debian.join("usr/sbin")]
        {
            path.push(":");
            path.push(folder);
        }
        path.push(":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        path
    }
}

/// The archives of the images that every node holds.
fn images(debian: &Path, coredns: &Path, say: &dyn Fn(&str)) -> Result<PathBuf> {
    let complete = |folder: &Path| {
        ["pause.tar", "busybox.tar", "dns.tar"].iter().all(|name| folder.join(name).is_file())
    };
    let name = format!("images-{}-coredns-{}", debian::KEY, go::COREDNS.version);
    crate::cache::entry(&name, complete, |folder| {
        say("writing the images of pause, busybox and CoreDNS");
        std::fs::write(folder.join("pause.c"), PAUSE)?;
        let mut cc = std::process::Command::new(crate::sh::need("cc", "gcc libc6-dev")?);
        cc.current_dir(folder).args(["-O2", "-static", "-o", "pause", "pause.c"]);
        crate::sh::output(&mut cc, None).context("build the pause program")?;
        Image::new(PAUSE_IMAGE)
            .file(folder.join("pause"), "/pause", 0o755)
            .entrypoint(&["/pause"])
            .user("65535:65535")
            .write_archive(&folder.join("pause.tar"))?;
        busybox(debian)?.write_archive(&folder.join("busybox.tar"))?;
        Image::new(DNS_IMAGE)
            .file(coredns.join("coredns"), "/coredns", 0o755)
            .entrypoint(&["/coredns"])
            .user("65532:65532")
            .write_archive(&folder.join("dns.tar"))
    })
}

fn busybox(debian: &Path) -> Result<Image> {
    let program = debian.join("usr/bin/busybox");
    let names = crate::sh::output(std::process::Command::new(&program).arg("--list"), None)?;
    let mut image = Image::new(BUSYBOX_IMAGE)
        .file(program, "/bin/busybox", 0o755)
        .text("root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n", "/etc/passwd", 0o644)
        .text("root:x:0:\nnobody:x:65534:\n", "/etc/group", 0o644)
        .folder("/tmp", 0o1777)
        .command(&["sh"]);
    for name in names.lines().filter(|name| !name.is_empty() && *name != "busybox") {
        image = image.link("busybox", &format!("/bin/{name}"));
    }
    Ok(image)
}
