//! The servers that run inside Pods: nginx, which this project did not write, and a few of `weft-lab-app`.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{Lab, Process, net};
use crate::wait;

/// The port that nginx listens on.
pub const HTTP: u16 = 8080;

impl Lab {
    /// The lab of `deploy/examples` with its servers: nginx in both webs, a banner in echo.
    ///
    /// # Errors
    /// As [`Lab::start`].
    pub fn shop() -> Result<Self> {
        Self::shop_with(super::LabOptions::default())
    }

    /// [`Lab::shop`] with other settings.
    ///
    /// # Errors
    /// As [`Lab::start`].
    pub fn shop_with(options: super::LabOptions) -> Result<Self> {
        let mut lab = Self::start(options)?;
        lab.start_nginx("web-v1")?;
        lab.start_nginx("web-v2")?;
        lab.start_server("echo", "banner", 7000)?;
        Ok(lab)
    }

    /// Starts nginx in a Pod; every path answers `200` with the Pod's name, and the access log shows the
    /// client's address.
    ///
    /// # Errors
    /// When nginx is missing or does not listen in time.
    pub fn start_nginx(&mut self, pod: &str) -> Result<()> {
        let folder = self.pod(pod)?.folder(&self.dir);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
        fs::create_dir_all(folder.join("tmp"))?;
        let config = folder.join("nginx.conf");
        fs::write(&config, nginx_config(&folder.display().to_string(), pod))?;
        let program = nginx()?;
        let mut command = self.pod(pod)?.place.command(&self.bins, program);
        command.arg("-c").arg(&config).arg("-e").arg(folder.join("error.log"));
        let server = Process::spawn(command, &format!("nginx of {pod}"), &folder.join("nginx.log"))?;
        self.servers.push(server);
        self.wait_listening(pod, HTTP)
    }

    /// Starts a server of `weft-lab-app` in a Pod and waits until it listens on `port`.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn start_server(&mut self, pod: &str, kind: &str, port: u16) -> Result<()> {
        let server = self.spawn_app(pod, kind, &[kind, "--port", &port.to_string()])?;
        self.servers.push(server);
        self.wait_listening(pod, port)
    }

    fn wait_listening(&mut self, pod: &str, port: u16) -> Result<()> {
        let netns = self.pod(pod)?.place.netns.clone();
        let server = self.servers.last_mut().context("no server")?;
        wait::until(Duration::from_secs(10), &format!("{pod} to listen on {port}"), || {
            if let Err(error) = server.check() {
                return Ok(Err(error));
            }
            ensure!(net::within(&netns, || listens(port))?, "nothing listens there");
            Ok(Ok(()))
        })?
        .0
    }

    /// Lines of a Pod's nginx access log.
    ///
    /// # Errors
    /// When there is no such Pod.
    pub fn access_log(&self, pod: &str) -> Result<Vec<String>> {
        let text =
            fs::read_to_string(self.pod(pod)?.folder(&self.dir).join("access.log")).unwrap_or_default();
        Ok(text.lines().map(str::to_owned).collect())
    }
}

fn listens(port: u16) -> Result<bool> {
    let wanted = format!(":{port:04X} ");
    // The states of a TCP socket that listens and of a UDP socket that is bound.
    for (table, state) in [("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        let found = text.lines().skip(1).any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let local = fields.next().map(|local| format!("{local} ")).unwrap_or_default();
            local.ends_with(&wanted) && fields.nth(1) == Some(state)
        });
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

fn nginx() -> Result<PathBuf> {
    let places = ["/usr/sbin/nginx", "/usr/bin/nginx", "/usr/local/sbin/nginx", "/usr/local/bin/nginx"];
    let found = places.iter().map(PathBuf::from).find(|path| path.is_file());
    found.context("nginx is not installed; run `cargo xtask setup`")
}

fn nginx_config(folder: &str, pod: &str) -> String {
    format!(
        "worker_processes 1; daemon off; master_process off; pid {folder}/nginx.pid;\n\
         error_log {folder}/error.log; worker_rlimit_nofile 8192;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
         \x20 log_format peer '$remote_addr $request_method $uri $status $server_addr:$server_port';\n\
         \x20 access_log {folder}/access.log peer;\n\
         \x20 keepalive_requests 1000000; keepalive_timeout 600s; lingering_close off; default_type text/plain;\n\
         \x20 client_body_temp_path {folder}/tmp; proxy_temp_path {folder}/tmp; fastcgi_temp_path {folder}/tmp;\n\
         \x20 uwsgi_temp_path {folder}/tmp; scgi_temp_path {folder}/tmp;\n\
         \x20 server {{ listen {HTTP} backlog=4096; listen [::]:{HTTP} backlog=4096; location / {{ return 200 '{pod}\\n'; }} }}\n\
         }}\n"
    )
}
