//! A real API server for tests: etcd and kube-apiserver on free ports of the loopback, in a folder of their own; all of
//! it ends with the value.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use kube::{Client, Config, config::Kubeconfig};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tempfile::TempDir;

/// How long the programs have to start.
const START: Duration = Duration::from_secs(120);

/// The programs, where the machine has them.
pub(crate) struct Programs {
    etcd: PathBuf,
    apiserver: PathBuf,
}

/// `None` where they are missing, which is said; in CI (`CI=true`) that is a failure.
pub(crate) fn programs() -> Option<Programs> {
    let found = Programs::find();
    if let Err(missing) = &found {
        let message = format!(
            "the tests against a real API server need {missing}; `cargo xtask cluster up` fetches it, or name folders in \
             WEFT_KUBE_BIN and WEFT_ETCD_BIN"
        );
        assert!(std::env::var_os("CI").is_none_or(|v| v != "true"), "{message}");
        eprintln!("SKIPPED: {message}");
    }
    found.ok()
}

impl Programs {
    fn find() -> Result<Self, String> {
        Ok(Self {
            etcd: program("etcd", "WEFT_ETCD_BIN")?,
            apiserver: program("kube-apiserver", "WEFT_KUBE_BIN")?,
        })
    }
}

fn program(name: &str, variable: &str) -> Result<PathBuf, String> {
    let mut folders: Vec<PathBuf> = std::env::var_os(variable).map(PathBuf::from).into_iter().collect();
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let mut caches: Vec<PathBuf> =
        fs::read_dir(home.join(".cache/weft")).into_iter().flatten().flatten().map(|e| e.path()).collect();
    caches.sort();
    for cache in caches.into_iter().rev() {
        folders.extend([cache.join("bin"), cache.join("usr/bin"), cache.join("root/usr/bin")]);
    }
    folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    folders.into_iter().map(|f| f.join(name)).find(|p| p.is_file()).ok_or_else(|| name.to_owned())
}

/// A port that is free now, and that no other test of this process is given.
pub(crate) fn port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        // Below the range from which the kernel takes ports for connections.
        let n = NEXT.fetch_add(1, Ordering::Relaxed) + std::process::id() * 61;
        let port = u16::try_from(12_000 + n % 18_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A child that is killed with the value.
struct Program {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Program {
    fn start(name: &'static str, path: &Path, folder: &Path, args: &[String]) -> Self {
        let log = folder.join(format!("{name}.log"));
        let file = fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new(path);
        command.args(args).current_dir(folder).stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap();
        Self { name, child, log }
    }

    fn check(&mut self) {
        if let Some(end) = self.child.try_wait().unwrap() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let start = log.len().saturating_sub(4000);
            panic!("{} ended: {end}\n{}", self.name, log.get(start..).unwrap_or_default());
        }
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A running API server.
pub(crate) struct ApiServer {
    programs: Programs,
    folder: TempDir,
    port: u16,
    etcd_port: u16,
    client: Client,
    etcd: Option<Program>,
    apiserver: Option<Program>,
}

impl ApiServer {
    /// Starts etcd and the API server; `None` where there are no programs for it.
    pub(crate) async fn start() -> Option<Self> {
        let programs = programs()?;
        let folder = TempDir::with_prefix("weft-apiserver-").unwrap();
        let (port, etcd_port) = (port(), port());
        pki(folder.path(), port);
        let client = client(folder.path(), "admin").await;
        let mut server = Self { programs, folder, port, etcd_port, client, etcd: None, apiserver: None };
        server.start_etcd();
        server.start_apiserver();
        server.ready().await;
        Some(server)
    }

    fn start_etcd(&mut self) {
        let (own, peer) = (self.etcd_port, port());
        let args = [
            "--name=t".to_owned(),
            "--data-dir=etcd".into(),
            "--unsafe-no-fsync".into(),
            format!("--listen-client-urls=http://127.0.0.1:{own}"),
            format!("--advertise-client-urls=http://127.0.0.1:{own}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
            format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
            format!("--initial-cluster=t=http://127.0.0.1:{peer}"),
        ];
        self.etcd = Some(Program::start("etcd", &self.programs.etcd, self.folder.path(), &args));
    }

    /// Starts the API server again after [`Self::stop_apiserver`].
    pub(crate) fn start_apiserver(&mut self) {
        let args = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            "--bind-address=127.0.0.1".into(),
            format!("--secure-port={}", self.port),
            "--tls-cert-file=apiserver.crt".into(),
            "--tls-private-key-file=apiserver.key".into(),
            "--client-ca-file=ca.crt".into(),
            "--authorization-mode=Node,RBAC".into(),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            "--service-account-key-file=sa.pub".into(),
            "--service-account-signing-key-file=sa.key".into(),
            // The audience of agents need not be listed here: TokenReview asks for it.
            "--api-audiences=https://kubernetes.default.svc".into(),
            "--service-cluster-ip-range=10.96.0.0/16".into(),
            "--disable-admission-plugins=ServiceAccount,Priority".into(),
            "--etcd-compaction-interval=0".into(),
            "--watch-cache=true".into(),
        ];
        let program = &self.programs.apiserver;
        self.apiserver = Some(Program::start("kube-apiserver", program, self.folder.path(), &args));
    }

    /// Ends the API server as a crash would.
    pub(crate) fn stop_apiserver(&mut self) {
        self.apiserver = None;
    }

    /// Waits until it answers.
    pub(crate) async fn ready(&mut self) {
        let end = Instant::now() + START;
        loop {
            for program in [&mut self.etcd, &mut self.apiserver].into_iter().flatten() {
                program.check();
            }
            let request = http::Request::get("/readyz").body(Vec::new()).unwrap();
            let answer =
                tokio::time::timeout(Duration::from_secs(2), self.client.request_text(request)).await;
            if matches!(answer, Ok(Ok(text)) if text == "ok") {
                return;
            }
            assert!(
                Instant::now() < end,
                "the API server is not ready; see {}",
                self.folder.path().display()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// As administrator.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// The API server's port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// As administrator, through another port of the loopback.
    pub(crate) async fn client_by(&self, port: u16) -> Client {
        let mut config = config(self.folder.path(), "admin").await;
        config.cluster_url = format!("https://127.0.0.1:{port}").parse().unwrap();
        Client::try_from(config).unwrap()
    }

    /// Makes etcd forget what was before now.
    pub(crate) async fn compact(&self) {
        let revision = self.etcd_post("/v3/kv/range", r#"{"key":"AA=="}"#).await;
        let revision: serde_json::Value = serde_json::from_str(&revision).unwrap();
        let revision = revision["header"]["revision"].as_str().unwrap().to_owned();
        let body = format!(r#"{{"revision":"{revision}","physical":true}}"#);
        self.etcd_post("/v3/kv/compaction", &body).await;
    }

    async fn etcd_post(&self, path: &str, body: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.etcd_port)).await.unwrap();
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.0\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(" 200 "), "{answer}");
        body.to_owned()
    }

    /// A kubeconfig for another process, with the rights of a user.
    pub(crate) fn kubeconfig_as(&self, user: &str) -> PathBuf {
        let admin = fs::read_to_string(self.folder.path().join("admin.kubeconfig")).unwrap();
        let path = self.folder.path().join("user.kubeconfig");
        fs::write(
            &path,
            admin.replace("user: {client-certificate", &format!("user: {{as: '{user}', client-certificate")),
        )
        .unwrap();
        path
    }
}

async fn config(folder: &Path, name: &str) -> Config {
    let file = Kubeconfig::read_from(folder.join(format!("{name}.kubeconfig"))).unwrap();
    Config::from_custom_kubeconfig(file, &Default::default()).await.unwrap()
}

async fn client(folder: &Path, name: &str) -> Client {
    Client::try_from(config(folder, name).await).unwrap()
}

/// A CA, the server's certificate, the administrator's, and the key of ServiceAccount tokens.
fn pki(folder: &Path, port: u16) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "weft-test");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
    write("ca.crt", &ca.pem());
    for (name, common, organization, names) in [
        ("apiserver", "kube-apiserver", None, vec!["127.0.0.1".to_owned(), "10.96.0.1".into()]),
        ("admin", "admin", Some("system:masters"), Vec::new()),
    ] {
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, common);
        if let Some(organization) = organization {
            params.distinguished_name.push(DnType::OrganizationName, organization);
        }
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &ca).unwrap();
        write(&format!("{name}.crt"), &certificate.pem());
        write(&format!("{name}.key"), &key.serialize_pem());
    }
    let key = KeyPair::generate().unwrap();
    write("sa.key", &key.serialize_pem());
    write("sa.pub", &key.public_key_pem());
    let at = folder.display();
    write(
        "admin.kubeconfig",
        &format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: x\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: 'https://127.0.0.1:{port}', certificate-authority: {at}/ca.crt}}}}]\n\
             users: [{{name: u, user: {{client-certificate: {at}/admin.crt, client-key: {at}/admin.key}}}}]\n"
        ),
    );
}
