//! What tests ask of a lab again and again: addresses, connections that stand, samples, what a command says.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{Lab, Node, Process, run};
use crate::{metrics, wait};

impl Lab {
    /// `address:port` of a Pod.
    ///
    /// # Errors
    /// When there is no such Pod.
    pub fn at(&self, pod: &str, port: u16, v6: bool) -> Result<String> {
        Ok(SocketAddr::new(self.pod(pod)?.address(v6), port).to_string())
    }

    /// `address:port` of a Service, by `namespace/name`.
    ///
    /// # Errors
    /// When there is no such Service.
    pub fn vip(&self, service: &str, port: u16, v6: bool) -> Result<String> {
        Ok(SocketAddr::new(self.service(service, v6)?, port).to_string())
    }

    /// A connection from a Pod that has heard its server's first word and stands until the other side ends it.
    ///
    /// # Errors
    /// When it does not come to stand.
    pub fn hold(&self, pod: &str, name: &str, to: &str) -> Result<Process> {
        let mut held = self.spawn_app(pod, name, &["dial", "--to", to, "--hold", "--timeout-ms", "60000"])?;
        wait::until(Duration::from_secs(10), "a connection that stands", || {
            held.check()?;
            ensure!(held.output().contains("established"), "not yet: {}", held.output());
            Ok(())
        })?;
        Ok(held)
    }

    /// Applies the mesh's settings: `spec` of MeshConfig, as YAML in one line.
    ///
    /// # Errors
    /// As [`Lab::apply`].
    pub fn settings(&self, spec: &str) -> Result<Duration> {
        let object = format!(
            "apiVersion: weft.mesh/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\nspec: {spec}\n"
        );
        self.apply("mesh", &object)
    }

    /// Runs `weft status` with the operator's status folder; its exit code and text.
    ///
    /// # Errors
    /// When it gives no answer in time.
    pub fn told_status(&self) -> Result<(i32, String)> {
        let mut command = std::process::Command::new(self.bins().path("weft"));
        command.arg("status").arg("--operator-status").arg(self.source().path().join("status"));
        for node in self.nodes() {
            command.arg("--server").arg(node.server());
        }
        let out = run(command, Duration::from_secs(15))?;
        let code = out.status.code().context("weft status was ended by a signal")?;
        Ok((code, String::from_utf8_lossy(&out.stdout).into_owned()))
    }

    /// The operator's log so far.
    ///
    /// # Errors
    /// When there is none.
    pub fn operator_log(&self) -> Result<String> {
        let path = self.dir().join("log/operator.log");
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }
}

impl Node {
    /// The sum of the agent's samples of that name which hold these labels.
    ///
    /// # Errors
    /// When its metrics cannot be read.
    pub fn sample(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(metrics::sum(&metrics::parse(&self.admin("/metrics")?), name, labels))
    }
}
