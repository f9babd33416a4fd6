//! Where everything runs: the same two nodes, wire and Pods, once bare for the peers and once with Weft on it.

use std::{
    ffi::OsString,
    fs,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use weft_tests::{Lab, LabOptions, lab::Process, wait};

use super::parts::Parts;

/// HTTP/1.1.
pub(crate) const HTTP: u16 = 8080;
/// HTTP/2 with prior knowledge.
pub(crate) const H2: u16 = 8081;
/// iperf3.
pub(crate) const BULK: u16 = 5201;
/// As [`HTTP`] and [`H2`], of the same server, for requests that are judged while connections to those are.
pub(crate) const REQUESTED: [u16; 2] = [8090, 8091];
/// What most nodes run. Some machines have bbr as their default, which paces: then it is measured how well timers do.
const CONGESTION: &str = "cubic";
/// Pods on each node beside those that talk, so that memory is that of an agent with many.
const IDLE_PODS: usize = 48;
/// As many of those of the server's node are servers too.
const OTHERS: usize = 8;

const POLICY: &str = "
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {name: servers, namespace: bench}
spec:
  targetRefs: [{group: \"\", kind: Pod, selector: {matchLabels: {app: server}}}]
  action: ALLOW
  rules: [{sources: [{type: ServiceAccount, serviceAccount: {name: client}}]}]
";

/// Requests instead of connections: the Service's ports are HTTP by their routes, the Pod's by the rule.
const REQUESTS: &str = "
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {name: requests, namespace: bench}
spec:
  targetRefs: [{group: \"\", kind: Pod, selector: {matchLabels: {app: server}}}]
  action: ALLOW
  rules:
  - sources: [{type: ServiceAccount, serviceAccount: {name: client}}]
    networkAttributes: {ports: [8080, 8081]}
    http: [{methods: [GET], paths: [{type: PathPrefix, value: /}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server, namespace: bench}
spec:
  parentRefs: [{group: \"\", kind: Service, name: server}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /}}]
    backendRefs: [{name: server, port: 8080}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server-h2, namespace: bench}
spec:
  parentRefs: [{group: \"\", kind: Service, name: server-h2}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /}}]
    backendRefs: [{name: server-h2, port: 8081}]
";

/// Two nodes with a client, a server on the other node and one on the same node.
#[derive(Debug)]
pub(crate) struct Ground {
    /// The nodes and Pods.
    pub(crate) lab: Lab,
    parts: Parts,
    servers: Vec<Process>,
}

impl Ground {
    /// Raises nodes, Pods and servers; with Weft where `meshed`.
    ///
    /// # Errors
    /// What could not be made.
    pub(crate) fn raise(parts: &Parts, folder: &Path, meshed: bool) -> Result<Self> {
        let objects = folder.join("objects.yaml");
        fs::write(&objects, pods(if meshed { IDLE_PODS } else { 0 }))?;
        let policy = folder.join("policy.yaml");
        fs::write(&policy, POLICY)?;
        allow_congestion_control()?;
        let options = LabOptions {
            objects: vec![objects, policy],
            // The ports that peers listen on in a Pod's namespace are below those that its connections take.
            sysctls: vec![
                format!("net/ipv4/tcp_congestion_control={CONGESTION}"),
                "net/ipv4/ip_local_port_range=20000 65000".into(),
            ],
            drain_seconds: 1,
            filter: "warn".into(),
            ..LabOptions::default()
        };
        let lab = if meshed { Lab::start(options)? } else { Lab::bare(options)? };
        let mut ground = Self { lab, parts: parts.clone(), servers: Vec::new() };
        for pod in ["server", "near"] {
            ground.serve(pod)?;
        }
        if meshed {
            for pod in others() {
                ground.http(&pod)?;
                ground.listening(&pod, &[HTTP])?;
            }
            ground.enrolled()?;
        }
        Ok(ground)
    }

    fn serve(&mut self, pod: &str) -> Result<()> {
        self.http(pod)?;
        let iperf = self.command(pod, "iperf3", &["-s".into(), "-p".into(), BULK.to_string().into()])?;
        self.keep(pod, "iperf3", iperf)?;
        self.listening(pod, &[HTTP, H2, BULK])
    }

    fn http(&mut self, pod: &str) -> Result<()> {
        let folder = self.lab.pod(pod)?.folder(self.lab.dir());
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
        for name in ["www", "tmp"] {
            fs::create_dir_all(folder.join(name))?;
        }
        // Sparse: what readers that never read are asked to take.
        fs::File::create(folder.join("www/big"))?.set_len(1 << 30)?;
        let config = folder.join("nginx.conf");
        fs::write(&config, nginx(&folder.display().to_string()))?;
        let log = folder.join("error.log");
        let words = ["-c".into(), config.into(), "-e".into(), log.into()];
        let nginx = self.command(pod, "nginx", &words)?;
        self.keep(pod, "nginx", nginx)
    }

    fn listening(&mut self, pod: &str, ports: &[u16]) -> Result<()> {
        let address = self.address(pod)?;
        for &port in ports {
            wait::until(Duration::from_secs(20), &format!("{pod} to listen on {port}"), || {
                for server in &mut self.servers {
                    server.check()?;
                }
                let netns = self.lab.pod(pod)?.place.netns.clone();
                let stream = weft_tests::lab::net::within(&netns, || {
                    Ok(std::net::TcpStream::connect((address, port))?)
                });
                stream.map(drop)
            })?;
        }
        Ok(())
    }

    /// Starts both agents anew, so that a measurement begins as a peer's does.
    ///
    /// # Errors
    /// When they do not become ready or a Pod is not enrolled.
    pub(crate) fn restart(&mut self) -> Result<()> {
        for name in ["node-a", "node-b"] {
            if let Some(mut agent) = self.lab.node_mut(name)?.agent.take() {
                agent.stop(Duration::from_secs(10));
            }
            self.lab.start_agent(name)?;
        }
        for name in ["node-a", "node-b"] {
            self.lab.node_mut(name)?.wait_ready(Duration::from_secs(20))?;
        }
        self.enrolled()
    }

    fn enrolled(&self) -> Result<()> {
        wait::until(Duration::from_secs(60), "every Pod's enrolment", || {
            let status = self.lab.status()?;
            let agents = status["agents"].as_array().into_iter().flatten();
            let pods: Vec<_> =
                agents.flat_map(|agent| agent["pods"].as_array().into_iter().flatten()).collect();
            let fine = pods.iter().filter(|pod| pod["problem"].as_str().is_none_or(str::is_empty)).count();
            ensure!(fine == 3 + 2 * IDLE_PODS, "{fine} of {} are enrolled", 3 + 2 * IDLE_PODS);
            Ok(())
        })
        .map(drop)
    }

    /// Runs another server until these nodes end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn keep(&mut self, pod: &str, name: &str, command: Command) -> Result<()> {
        let log = self.lab.pod(pod)?.folder(self.lab.dir()).join(format!("{name}.log"));
        self.servers.push(Process::spawn(command, name, &log)?);
        Ok(())
    }

    /// That every server and both agents run.
    ///
    /// # Errors
    /// Names one that ended, with the end of its log.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.servers.iter_mut().try_for_each(Process::check)?;
        for name in ["node-a", "node-b"] {
            let agent = &mut self.lab.node_mut(name)?.agent;
            agent.as_mut().with_context(|| format!("{name} has no agent"))?.check()?;
        }
        Ok(())
    }

    /// A command of the parts inside a Pod.
    ///
    /// # Errors
    /// When there is no such Pod or program.
    pub(crate) fn command(&self, pod: &str, program: &str, args: &[OsString]) -> Result<Command> {
        let words = self.parts.words(program)?;
        let mut command = self.lab.pod(pod)?.place.command(self.lab.bins(), &words[0]);
        command.args(&words[1..]).args(args);
        Ok(command)
    }

    /// See [`Parts::words`].
    ///
    /// # Errors
    /// When the parts have no such program.
    pub(crate) fn words(&self, program: &str) -> Result<Vec<OsString>> {
        self.parts.words(program)
    }

    /// This program's own load generator inside a Pod.
    ///
    /// # Errors
    /// When there is no such Pod.
    pub(crate) fn load(&self, pod: &str, args: &[String]) -> Result<Command> {
        let own = std::env::current_exe()?;
        let mut command = self.lab.pod(pod)?.place.command(self.lab.bins(), own);
        command.arg("load").args(args);
        Ok(command)
    }

    /// The addresses of the server and the further ones on its node; `one` as often, where it has no further ones.
    ///
    /// # Errors
    /// When a server is missing.
    pub(crate) fn all_servers(&self, one: IpAddr) -> Result<Vec<IpAddr>> {
        let further =
            others().map(|pod| if self.lab.pod("server-0").is_ok() { self.address(&pod) } else { Ok(one) });
        std::iter::once(Ok(one)).chain(further).collect()
    }

    /// A Pod's address.
    ///
    /// # Errors
    /// When there is no such Pod.
    pub(crate) fn address(&self, pod: &str) -> Result<IpAddr> {
        Ok(self.lab.pod(pod)?.address(false))
    }

    /// The cgroups of both agents.
    ///
    /// # Errors
    /// When there are no two nodes.
    pub(crate) fn agents(&self) -> Result<Vec<PathBuf>> {
        ["node-a", "node-b"].iter().map(|name| Ok(self.lab.node(name)?.place.cgroup.clone())).collect()
    }

    /// Has requests judged and routed one by one, or connections again.
    ///
    /// # Errors
    /// When a node does not enforce it in time.
    pub(crate) fn requests(&self, judged: bool) -> Result<()> {
        if judged {
            self.lab.apply("requests", REQUESTS).context("the L7 policy")?;
            self.lab.delete("policy").map(drop)
        } else {
            self.lab.apply("policy", POLICY).context("the L4 policy")?;
            self.lab.delete("requests").map(drop)
        }
    }
}

/// A namespace may only choose among what the machine allows.
fn allow_congestion_control() -> Result<()> {
    let path = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    let allowed = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    if allowed.split_whitespace().any(|name| name == CONGESTION) {
        return Ok(());
    }
    fs::write(path, format!("{} {CONGESTION}", allowed.trim())).with_context(|| format!("allow {CONGESTION}"))
}

/// Further servers on the server's node.
fn others() -> impl Iterator<Item = String> {
    (0..OTHERS).map(|index| format!("server-{index}"))
}

/// Pods of the client's node that speak to nobody until they are asked to.
pub(crate) fn idle_pods() -> impl Iterator<Item = String> {
    (0..IDLE_PODS).map(|index| format!("idle-a{index}"))
}

fn pods(idle: usize) -> String {
    let mut text =
        "{apiVersion: v1, kind: Namespace, metadata: {name: bench, labels: {weft.mesh/mode: strict}}}\n"
            .to_owned();
    let account = |name: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {name}, namespace: bench}}}}\n"
        )
    };
    text += &["client", "server", "idle"].map(account).concat();
    let pod = |name: &str, account: &str, node: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: bench, labels: {{app: {account}, pod: {name}}}}}, \
             spec: {{nodeName: {node}, serviceAccountName: {account}, containers: [{{name: app, image: 'none:1', \
             ports: [{{name: http, containerPort: 8080}}, {{name: h2, containerPort: 8081}}]}}]}}}}\n"
        )
    };
    text += &pod("client", "client", "node-a");
    text += &pod("server", "server", "node-b");
    text += &pod("near", "server", "node-a");
    for index in 0..idle {
        text += &pod(&format!("idle-a{index}"), "client", "node-a");
        text += &match others().nth(index) {
            Some(other) => pod(&other, "server", "node-b"),
            None => pod(&format!("idle-b{index}"), "idle", "node-b"),
        };
    }
    let service = |name: &str, port: u16, protocol: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: bench}}, spec: {{selector: {{pod: server}}, \
             ports: [{{name: http, port: {port}, targetPort: {port}, appProtocol: {protocol}}}]}}}}\n"
        )
    };
    text + &service("server", HTTP, "http") + &service("server-h2", H2, "kubernetes.io/h2c")
}

fn nginx(folder: &str) -> String {
    let body = "x".repeat(1024);
    let files = ["big", "blob"].map(|name| format!("location = /{name} {{ root {folder}/www; }}")).join(" ");
    let locations = format!("{files} location / {{ return 200 '{body}'; }}");
    let [http, h2] = REQUESTED;
    format!(
        "worker_processes 2; daemon off; user root; pid {folder}/nginx.pid; error_log {folder}/error.log;\n\
         worker_rlimit_nofile 16384;\n\
         events {{ worker_connections 9000; }}\n\
         http {{\n\
         \x20 access_log off; keepalive_requests 100000000; keepalive_timeout 600s; tcp_nodelay on; default_type text/plain;\n\
         \x20 client_body_temp_path {folder}/tmp; proxy_temp_path {folder}/tmp; fastcgi_temp_path {folder}/tmp;\n\
         \x20 uwsgi_temp_path {folder}/tmp; scgi_temp_path {folder}/tmp;\n\
         \x20 server {{ listen {HTTP} reuseport backlog=8192; listen {http}; {locations} }}\n\
         \x20 server {{ listen {H2} http2 reuseport backlog=8192; listen {h2} http2; http2_max_concurrent_streams 1000; {locations} }}\n\
         }}\n"
    )
}
