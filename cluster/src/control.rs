//! etcd and the control plane, in a network namespace of their own.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    cgroup::Hierarchies,
    net,
    parts::Parts,
    pki::Pki,
    record::{Record, began},
    sh,
};

/// Moves itself into the cgroups given before `--`, then into the network namespace, then becomes the program.
pub(crate) const ENTER: &str = r#"n=$1; shift
while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit 70; shift; done; shift
exec nsenter --net="$n" -- "$@""#;

/// A program of the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The store.
    Etcd,
    /// kube-apiserver.
    ApiServer,
    /// kube-controller-manager.
    ControllerManager,
    /// kube-scheduler.
    Scheduler,
}

impl Program {
    /// In the order in which they start.
    pub const ALL: [Self; 4] = [Self::Etcd, Self::ApiServer, Self::ControllerManager, Self::Scheduler];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::ApiServer => "kube-apiserver",
            Self::ControllerManager => "kube-controller-manager",
            Self::Scheduler => "kube-scheduler",
        }
    }
}

/// The control plane of a cluster.
#[derive(Debug)]
pub(crate) struct Control<'a> {
    pub(crate) record: &'a Record,
    pub(crate) parts: &'a Parts,
}

impl Control<'_> {
    fn folder(&self) -> PathBuf {
        self.record.folder().join("control")
    }

    fn pki(&self) -> Pki {
        Pki::at(self.record.folder().join("pki"))
    }

    /// Where a program writes.
    pub(crate) fn log(&self, program: Program) -> PathBuf {
        self.folder().join(format!("{}.log", program.name()))
    }

    /// A command in the control plane's network namespace and cgroup.
    ///
    /// # Errors
    /// When the cgroup cannot be made.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let groups = Hierarchies::find()?.make(&format!("{}/control", self.record.group()))?;
        let mut command = Command::new("sh");
        command.args(["-c", ENTER, "sh"]).arg(net::path(&self.record.control_netns())).args(groups).arg("--");
        command
            .arg(program)
            .env("PATH", self.parts.path())
            .env("KUBECONFIG", self.pki().file("admin.kubeconfig"));
        // No proxy of this machine is reachable from there.
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
            command.env_remove(name);
        }
        Ok(command)
    }

    /// Starts a program.
    ///
    /// # Errors
    /// When it runs already or cannot be started.
    pub(crate) fn start(&self, program: Program) -> Result<()> {
        if self.running(program).is_some() {
            bail!("{} runs already", program.name());
        }
        fs::create_dir_all(self.folder())?;
        let inner = self.command(program.name())?;
        // A session of its own: the cluster outlives this terminal.
        let mut command = Command::new("setsid");
        command.arg(inner.get_program()).args(inner.get_args()).args(self.arguments(program));
        for (key, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        let log = File::options().create(true).append(true).open(self.log(program))?;
        command.current_dir("/").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = command.spawn().with_context(|| format!("start {}", program.name()))?;
        let pid = child.id();
        fs::write(self.pid_file(program), format!("{pid} {}", began(pid).unwrap_or_default()))?;
        // Buried when it ends; the cluster's removal ends it.
        thread::spawn(move || child.wait());
        Ok(())
    }

    /// Ends a program at once, as a crash does.
    ///
    /// # Errors
    /// When it stays.
    pub(crate) fn stop(&self, program: Program) -> Result<()> {
        let Some(pid) = self.running(program) else { return Ok(()) };
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        sh::until(
            Duration::from_secs(10),
            Duration::from_millis(10),
            &format!("the end of {}", program.name()),
            || Ok(self.running(program).is_none().then_some(())),
        )?;
        Ok(fs::remove_file(self.pid_file(program))?)
    }

    /// Its process id, while it runs.
    pub(crate) fn running(&self, program: Program) -> Option<u32> {
        let text = fs::read_to_string(self.pid_file(program)).ok()?;
        let (pid, start) = text.split_once(' ')?;
        let pid = pid.parse().ok()?;
        (began(pid)? == start.parse::<u64>().ok()?).then_some(pid)
    }

    /// Whether it was started and does not run any more, without [`Self::stop`].
    pub(crate) fn ended(&self, program: Program) -> bool {
        self.pid_file(program).exists() && self.running(program).is_none()
    }

    fn pid_file(&self, program: Program) -> PathBuf {
        self.folder().join(format!("{}.pid", program.name()))
    }

    fn arguments(&self, program: Program) -> Vec<String> {
        let pki = self.pki();
        let file = |name: &str| pki.file(name).display().to_string();
        let dual = self.record.options.dual_stack;
        let own = |name: &str| format!("--kubeconfig={}", file(&format!("{name}.kubeconfig")));
        match program {
            Program::Etcd => vec![
                "--name=weft".into(),
                format!("--data-dir={}", self.folder().join("etcd").display()),
                "--unsafe-no-fsync".into(),
                "--listen-client-urls=http://127.0.0.1:2379".into(),
                "--advertise-client-urls=http://127.0.0.1:2379".into(),
                "--listen-peer-urls=http://127.0.0.1:2380".into(),
                "--initial-advertise-peer-urls=http://127.0.0.1:2380".into(),
                "--initial-cluster=weft=http://127.0.0.1:2380".into(),
            ],
            Program::ApiServer => {
                let mut arguments = vec![
                    "--etcd-servers=http://127.0.0.1:2379".into(),
                    "--bind-address=::".into(),
                    format!("--advertise-address={}", net::CONTROL),
                    "--secure-port=6443".into(),
                    format!("--service-cluster-ip-range={}", net::service_ranges(dual)),
                    "--allow-privileged=true".into(),
                    "--authorization-mode=Node,RBAC".into(),
                    "--enable-admission-plugins=NodeRestriction".into(),
                    "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
                    "--kubelet-preferred-address-types=InternalIP".into(),
                    "--requestheader-allowed-names=front-proxy".into(),
                    "--requestheader-username-headers=X-Remote-User".into(),
                    "--requestheader-group-headers=X-Remote-Group".into(),
                    "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
                ];
                for (argument, name) in [
                    ("tls-cert-file", "apiserver.crt"),
                    ("tls-private-key-file", "apiserver.key"),
                    ("client-ca-file", "ca.crt"),
                    ("service-account-key-file", "sa.pub"),
                    ("service-account-signing-key-file", "sa.key"),
                    ("kubelet-client-certificate", "kubelet-client.crt"),
                    ("kubelet-client-key", "kubelet-client.key"),
                    ("kubelet-certificate-authority", "ca.crt"),
                    ("requestheader-client-ca-file", "front-ca.crt"),
                    ("proxy-client-cert-file", "front.crt"),
                    ("proxy-client-key-file", "front.key"),
                ] {
                    arguments.push(format!("--{argument}={}", file(name)));
                }
                arguments.extend(self.record.options.apiserver_args.iter().cloned());
                arguments
            }
            Program::ControllerManager => vec![
                own(program.name()),
                "--leader-elect=false".into(),
                // The nodes' CNI configuration is written beforehand, so the ranges are not given out here.
                "--allocate-node-cidrs=false".into(),
                format!("--cluster-cidr={}", net::pod_ranges(dual)),
                format!("--service-account-private-key-file={}", file("sa.key")),
                format!("--root-ca-file={}", file("ca.crt")),
                "--use-service-account-credentials=true".into(),
                // The token of each controller is a request: the default makes the start 5 s longer.
                "--kube-api-qps=200".into(),
                "--kube-api-burst=400".into(),
            ],
            Program::Scheduler => vec![own(program.name()), "--leader-elect=false".into()],
        }
    }
}
