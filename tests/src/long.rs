//! Connections inside a cluster's Pods that stay open and carry a request again and again.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{mesh::Mesh, wait};

/// One connection of a Pod that has a shell, to a web server that keeps connections open.
#[derive(Debug, Clone, Copy)]
pub struct Long<'a> {
    mesh: &'a Mesh,
    namespace: &'a str,
    pod: &'a str,
    name: &'a str,
}

impl<'a> Long<'a> {
    /// Opens it from a Pod to `host` (a name or an address) at port 80; `name` tells it from others of the Pod.
    ///
    /// # Errors
    /// When no answer comes.
    pub fn open(mesh: &'a Mesh, namespace: &'a str, pod: &'a str, name: &'a str, host: &str) -> Result<Self> {
        let requests =
            "while :; do printf 'GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n' || break; sleep 0.2; done";
        let script = format!(
            "rm -f /tmp/{name}.*; ( ({requests}) | nc {host} 80 >/tmp/{name}.out; echo over >/tmp/{name}.end ) \
             >/dev/null 2>&1 </dev/null &"
        );
        mesh.exec(namespace, pod, &["sh", "-c", &script])?;
        let long = Self { mesh, namespace, pod, name };
        mesh.eventually(&format!("the first answer of {name}"), || {
            ensure!(long.answered()? > 0, "{name} has no answer");
            Ok(())
        })?;
        Ok(long)
    }

    fn look(&self, script: &str) -> Result<String> {
        self.mesh.exec(self.namespace, self.pod, &["sh", "-c", script])
    }

    /// How many bytes came over it.
    fn answered(&self) -> Result<u64> {
        Ok(self.look(&format!("cat /tmp/{0}.out 2>/dev/null | wc -c", self.name))?.trim().parse()?)
    }

    fn over(&self) -> Result<bool> {
        Ok(self.look(&format!("cat /tmp/{}.end 2>/dev/null || true", self.name))?.contains("over"))
    }

    /// Waits for another answer over it.
    ///
    /// # Errors
    /// When it is over, or nothing comes.
    pub fn goes_on(&self) -> Result<()> {
        let before = self.answered()?;
        let what = format!("another answer over {}", self.name);
        wait::until_every(Duration::from_millis(200), Duration::from_secs(30), &what, || {
            ensure!(!self.over()?, "{} is over", self.name);
            ensure!(self.answered()? > before, "{} is silent", self.name);
            Ok(())
        })?;
        Ok(())
    }

    /// Waits for its end, at most `limit`.
    ///
    /// # Errors
    /// When it goes on.
    pub fn ends(&self, limit: Duration) -> Result<()> {
        wait::until_every(Duration::from_millis(100), limit, &format!("the end of {}", self.name), || {
            ensure!(self.over()?, "{} goes on", self.name);
            Ok(())
        })?;
        Ok(())
    }
}
