//! SPIRE beside a cluster: its server on the control plane's network, an agent on each node, with the admin socket by
//! which Weft asks for the identities of others.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{Cluster, Node, net, parts::go, sh};

/// Where the agents' admin sockets are, as the nodes see it.
pub const ADMIN_SOCKET: &str = "/run/spire/admin.sock";
/// The organisation in the name of SPIRE's CA.
pub const ORGANIZATION: &str = "SPIRE under test";
const SERVER_PORT: u16 = 8081;
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);

/// A server, and an agent on every node. It ends with the cluster.
#[derive(Debug)]
pub struct Spire<'a> {
    cluster: &'a Cluster,
    programs: PathBuf,
    domain: String,
}

impl<'a> Spire<'a> {
    /// Raises both for a trust domain, with an entry for Weft's agents, and waits until every agent is attested. A first
    /// call on a machine builds SPIRE, which takes minutes.
    ///
    /// # Errors
    /// When a part does not come up; the message holds the end of its log.
    pub fn up(cluster: &'a Cluster, domain: &str, say: &dyn Fn(&str)) -> Result<Self> {
        let spire = Self { cluster, programs: go::SPIRE.ensure(say)?, domain: domain.into() };
        fs::create_dir_all(spire.folder().join("data"))?;
        fs::write(spire.folder().join("server.conf"), spire.server_configuration())?;
        let mut server = cluster.command(&spire.program("spire-server"))?;
        server.args(["run", "-config"]).arg(spire.folder().join("server.conf"));
        spire.spawn(&mut server, &spire.server_log())?;
        let bundle = spire.until("SPIRE's server", &spire.server_log(), || {
            Ok(spire.server(&["bundle", "show"]).ok().filter(|text| text.contains("BEGIN CERTIFICATE")))
        })?;
        fs::write(spire.folder().join("bundle.pem"), bundle)?;
        spire.entry(
            &spire.delegate(),
            &["k8s:ns:weft-system", "k8s:sa:weft-agent"],
            Duration::from_secs(3600),
        )?;
        for node in cluster.nodes() {
            fs::create_dir_all(spire.agent_data(&node))?;
            let said = spire.server(&["token", "generate", "-spiffeID", &spire.nodes()])?;
            let token = said.lines().find_map(|line| line.strip_prefix("Token: ")).context("no token")?;
            fs::write(spire.agent_configuration_file(&node), spire.agent_configuration(&node, token.trim()))?;
            spire.start_agent(&node)?;
        }
        Ok(spire)
    }

    /// Registers an identity on every node. All of `selectors` must hold.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn entry(&self, id: &str, selectors: &[&str], ttl: Duration) -> Result<()> {
        let (parent, ttl) = (self.nodes(), ttl.as_secs().to_string());
        let mut words = vec!["entry", "create", "-spiffeID", id, "-parentID", &parent, "-x509SVIDTTL", &ttl];
        for selector in selectors {
            words.extend(["-selector", selector]);
        }
        self.server(&words).map(drop)
    }

    /// Starts the agent of a node, and waits until its admin socket is there.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_agent(&self, node: &Node<'_>) -> Result<()> {
        let log = self.agent_log(node);
        let script = format!(
            "mkdir -p /run/spire && rm -f {ADMIN_SOCKET} && echo $$ > /run/spire/agent.pid && exec {} run -config {}",
            self.program("spire-agent"),
            self.agent_configuration_file(node).display()
        );
        self.spawn(&mut node.command(&["sh", "-c", &script])?, &log)?;
        let socket = node.folder().join("run/spire/admin.sock");
        self.until("SPIRE's agent", &log, || Ok(socket.exists().then_some(())))
    }

    /// Ends the agent of a node at once, as a crash does.
    ///
    /// # Errors
    /// When it does not run.
    pub fn stop_agent(&self, node: &Node<'_>) -> Result<()> {
        let script = "pid=$(cat /run/spire/agent.pid) && kill -9 \"$pid\" && rm /run/spire/agent.pid && \
            while kill -0 \"$pid\" 2>/dev/null; do sleep 0.02; done";
        node.exec(&["sh", "-c", script]).map(drop)
    }

    /// What the server's own command says.
    ///
    /// # Errors
    /// When it fails.
    pub fn server(&self, words: &[&str]) -> Result<String> {
        let mut command = self.cluster.command(&self.program("spire-server"))?;
        let split = words.iter().position(|word| word.starts_with('-')).unwrap_or(words.len());
        command.args(&words[..split]).arg("-socketPath").arg(self.server_socket()).args(&words[split..]);
        sh::output(&mut command, None)
    }

    /// The ends of the logs, for an error.
    pub fn diagnose(&self) -> String {
        let agents = self.cluster.nodes().map(|node| self.agent_log(&node));
        let logs = std::iter::once(self.server_log()).chain(agents);
        logs.map(|log| format!("--- {}\n{}\n", log.display(), end(&log))).collect()
    }

    /// The SPIFFE id of Weft's agents.
    fn delegate(&self) -> String {
        format!("spiffe://{}/ns/weft-system/sa/weft-agent", self.domain)
    }

    /// The id that every node's agent goes by.
    fn nodes(&self) -> String {
        format!("spiffe://{}/nodes", self.domain)
    }

    fn folder(&self) -> PathBuf {
        self.cluster.folder().join("spire")
    }

    fn program(&self, name: &str) -> String {
        self.programs.join(name).display().to_string()
    }

    fn server_socket(&self) -> PathBuf {
        self.folder().join("server.sock")
    }

    fn server_log(&self) -> PathBuf {
        self.folder().join("server.log")
    }

    fn agent_log(&self, node: &Node<'_>) -> PathBuf {
        self.folder().join(format!("{}.log", node.name()))
    }

    fn agent_configuration_file(&self, node: &Node<'_>) -> PathBuf {
        self.folder().join(format!("{}.conf", node.name()))
    }

    /// Buried when it ends; the cluster's removal ends it.
    fn spawn(&self, command: &mut Command, log: &Path) -> Result<()> {
        let log = File::options().create(true).append(true).open(log)?;
        command.current_dir("/").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = command.spawn().context("start a part of SPIRE")?;
        thread::spawn(move || child.wait());
        Ok(())
    }

    fn until<T>(&self, what: &str, log: &Path, step: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        sh::until(PATIENCE, PAUSE, what, step).with_context(|| end(log))
    }

    fn server_configuration(&self) -> String {
        let folder = self.folder();
        format!(
            r#"server {{
  bind_address = "{address}"
  bind_port = "{SERVER_PORT}"
  socket_path = "{socket}"
  trust_domain = "{domain}"
  data_dir = "{folder}/data"
  log_level = "INFO"
  ca_subject {{ organization = ["{ORGANIZATION}"] }}
  experimental {{ cache_reload_interval = "1s" }}
}}
plugins {{
  DataStore "sql" {{ plugin_data {{ database_type = "sqlite3" connection_string = "{folder}/data/entries" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory" {{ plugin_data {{}} }}
}}
"#,
            address = net::CONTROL,
            socket = self.server_socket().display(),
            domain = self.domain,
            folder = folder.display(),
        )
    }

    fn agent_configuration(&self, node: &Node<'_>, token: &str) -> String {
        let pki = self.cluster.folder().join("pki");
        format!(
            r#"agent {{
  server_address = "{address}"
  server_port = "{SERVER_PORT}"
  socket_path = "/run/spire/workload/api.sock"
  admin_socket_path = "{ADMIN_SOCKET}"
  trust_bundle_path = "{folder}/bundle.pem"
  trust_domain = "{domain}"
  data_dir = "{data}"
  join_token = "{token}"
  log_level = "INFO"
  authorized_delegates = ["{delegate}"]
  experimental {{ sync_interval = "1s" }}
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "disk" {{ plugin_data {{ directory = "{data}" }} }}
  WorkloadAttestor "k8s" {{
    plugin_data {{
      skip_kubelet_verification = true
      certificate_path = "{pki}/kubelet-client.crt"
      private_key_path = "{pki}/kubelet-client.key"
    }}
  }}
}}
"#,
            address = net::CONTROL,
            folder = self.folder().display(),
            domain = self.domain,
            data = self.agent_data(node).display(),
            delegate = self.delegate(),
            pki = pki.display(),
        )
    }

    fn agent_data(&self, node: &Node<'_>) -> PathBuf {
        self.folder().join("data").join(node.name())
    }
}

fn end(log: &Path) -> String {
    match fs::read_to_string(log) {
        Ok(text) => sh::tail(&text, 15),
        Err(error) => format!("{}: {error}", log.display()),
    }
}
